"""LayerNorm, RMSNorm and GroupNorm: tie their parameters, and say whose statistics change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.ops.batch_norm import affine_fact, per_channel, vector_fact
from graphprune.ops.calls import Overload, args_of
from graphprune.ops.fact import Fact, along_unknown
from graphprune.ops.given import Given, Pruned
from graphprune.ops.heads import over_heads
from graphprune.ops.ids import Alternatives, Layers, Way, varying
from graphprune.ops.made import made
from graphprune.ops.marks import Statistics
from graphprune.ops.reduction import count_of, kept_zero, moments
from graphprune.ops.registry import declare as _declare
from graphprune.ops.registry import free
from graphprune.ops.samples import Length, of
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten
declare = partial(_declare, macs=free)  # nothing is multiplied here


def layer_norm_fact(
    op: Overload,
    x: Fact,
    shape: Sequence[int],
    weight: Fact | None = None,
    bias: Fact | None = None,
    *rest: object,
) -> list[Fact]:
    """Statistics over the last dimensions."""
    normed = op(x.filled(), shape, None, None, *rest)[0]
    return [affine_fact(normed, _last_unknown(x, shape), weight, bias)]


def rms_norm_fact(
    op: Overload, x: Fact, shape: Sequence[int], weight: Fact | None = None, *rest: object
) -> list[Fact]:
    """Statistics over the last dimensions."""
    normed = op(x.filled(), shape, None, *rest)[0]
    return [affine_fact(normed, _last_unknown(x, shape), weight, None)]


def _last_unknown(x: Fact, shape: Sequence[int]) -> Tensor:
    dims = list(range(x.value.dim() - len(shape), x.value.dim()))
    return along_unknown(x.unknown, dims).expand(x.value.shape)


def layer_norm_masked(
    keep: Tensor, x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of what stays."""
    dims = list(range(x.dim() - len(shape), x.dim()))
    var, mean = moments(keep, x, dims, 0)
    scale = (var + eps).rsqrt()
    out = (x - mean) * scale
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias), mean, scale


def rms_norm_masked(
    keep: Tensor, x: Tensor, shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """The mean square of what stays."""
    dims = list(range(x.dim() - len(shape), x.dim()))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = (x.square().sum(dims, keepdim=True) / count_of(keep, x, dims) + eps).rsqrt()
    return (x * scale if weight is None else x * scale * weight), scale


def layer_norm_meta(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> object:
    """The plain form."""
    dims = len(shape)
    if list(x.shape[x.dim() - dims :]) != list(shape):
        return NotImplemented
    for affine in (weight, bias):
        if affine is not None and list(affine.shape) != list(shape):
            return NotImplemented
    saved = made(x, (*x.shape[: x.dim() - dims], *[1] * dims))
    return made(x, x.shape), saved, saved


def shape_given(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Given]:
    """The normalised shape."""
    given = list(args_of(node)[1])
    new = list(graph.shape(node.meta["items"][0], alive))[-len(given) :]
    yield Given(given, new, "normalized_shape")


@declare(
    aten.native_layer_norm,
    fact=layer_norm_fact,
    masked=layer_norm_masked,
    meta=layer_norm_meta,
    saves=True,
    given=shape_given,
    layer=True,
    sample=of((2, 3, 4), [4], (4,), (4,), 1e-5),
    any_size=True,
)
def layer_norm(
    walk: Walk, node: fx.Node, x: Value, shape: Sequence[int], weight: Value | None,
    bias: Value | None, *args: object,
) -> list[Layers]:  # fmt: skip
    """Statistics over the last dimensions: over the kept channels."""
    dims = range(x.ndim - len(shape), x.ndim)
    return normalised(walk, x, set(dims), [weight, bias], "LayerNorm")


@declare(
    aten._fused_rms_norm,
    fact=rms_norm_fact,
    masked=rms_norm_masked,
    given=shape_given,
    layer=True,
    sample=of((2, 3, 4), [4], (4,), 1e-5),
    any_size=True,
)
def rms_norm(
    walk: Walk, node: fx.Node, x: Value, shape: Sequence[int], weight: Value | None, *args: object
) -> list[Layers]:
    """The root of the mean square of the kept channels."""
    dims = range(x.ndim - len(shape), x.ndim)
    return normalised(walk, x, set(dims), [weight], "RMSNorm")


def normalised(
    walk: Walk,
    x: Value,
    dims: set[int],
    affine: list[Value | None],
    name: str,
    exact: bool = False,
) -> list[Layers]:
    """A norm over some dimensions; ``exact``: statistics count what leaves as zero."""
    layers = []
    for layer in over_heads(walk, x, dims).layers:
        if dims & varying(layer):
            if varying(layer) - dims:
                layer = walk.collapse(layer, dims)
            else:
                if not exact:
                    walk.renormalise(layer, f"statistics of {name}")
                walk.mask(layer)
        layers.append(layer)
    x = Value(x.shape, tuple(layers))
    given = [value for value in affine if value is not None]
    out = walk.broadcast([x, *given], x.ndim, f"{name} with a fixed size")
    rest = tuple(layer for layer in out if not dims & varying(layer))
    return [out, rest, rest]


def group_norm_fact(
    op: Overload, x: Fact, weight: Fact | None, bias: Fact | None,
    batch: int, channels: int, positions: int, groups: int, eps: float,
) -> list[Fact]:  # fmt: skip
    """Statistics over the channels of a group and all places."""
    unknown = along_unknown(x.unknown.reshape(batch, groups, -1), [2])
    wide = unknown.expand(batch, groups, x.value[0].numel() // groups).reshape(x.value.shape)
    normed = op(x.filled(), None, None, batch, channels, positions, groups, eps)[0]
    ndim = x.value.dim()
    return [affine_fact(normed, wide, vector_fact(weight, ndim), vector_fact(bias, ndim))]


def group_norm_masked(
    keep: Tensor, x: Tensor, weight: Any, bias: Any,
    batch: int, channels: int, positions: int, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean and variance of what stays of each group."""
    blocks = x.reshape(batch, groups, -1)
    staying = keep.expand(x.shape).reshape(batch, groups, -1)
    count = staying.to(x.dtype).sum(2, keepdim=True).clamp_min(1)
    mean = blocks.sum(2, keepdim=True) / count
    var = kept_zero((blocks - mean).square(), staying).sum(2, keepdim=True) / count
    scale = (var + eps).rsqrt()
    out = ((blocks - mean) * scale).reshape(x.shape)
    per_channel = [1, channels, *[1] * (x.dim() - 2)]
    out = out if weight is None else out * weight.reshape(per_channel)
    return (out if bias is None else out + bias.reshape(per_channel)), mean, scale


def group_norm_meta(
    x: Tensor, weight: Any, bias: Any, batch: int, channels: int, positions: int, groups: int,
    eps: float,
) -> object:  # fmt: skip
    """The plain form."""
    if not x.is_contiguous() or x.shape[1] != channels or channels % groups:
        return NotImplemented
    for affine in (weight, bias):
        if affine is not None and tuple(affine.shape) != (channels,):
            return NotImplemented
    saved = made(x, (batch, groups))
    return x.clone(), saved, saved


def group_norm_given(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Given]:
    """Groups that lose all of their channels leave."""
    return groups_given(graph, node, alive, int(args_of(node)[6]))


def groups_given(graph: Pruned, node: fx.Node, alive: np.ndarray, groups: int) -> Iterator[Given]:
    """How many groups of channels stay."""
    if groups > 1:
        keep = graph.positions(node.meta["items"][0], 1, alive).reshape(groups, -1)
        yield Given([groups], [int(keep.any(1).sum())], "group")


@declare(
    aten.native_group_norm,
    fact=group_norm_fact,
    masked=group_norm_masked,
    meta=group_norm_meta,
    saves=True,
    given=group_norm_given,
    layer=True,
    sample=of((2, 6, 4), (6,), (6,), *(Length(0, dim) for dim in range(3)), 3, 1e-5),
    any_size=True,
)
def group_norm(
    walk: Walk, node: fx.Node, x: Value, weight: Value | None, bias: Value | None,
    batch: int, channels: int, positions: int, groups: int, *args: object,
) -> list[Layers]:  # fmt: skip
    """Whole groups go exactly; equal columns of all groups change their statistics."""
    return [channel_groups(walk, x, weight, bias, groups, positions)]


def channel_groups(
    walk: Walk,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    groups: int,
    positions: int = 0,
    exact: bool = False,
) -> Layers:
    """A norm of every group of channels; ``exact``: statistics count what leaves as zero."""
    x = Value(x.shape, walk.settle(x, range(2, x.ndim), "normalised over channels"))
    layers = per_channel(walk, x, [weight, bias])
    for layer in layers:
        if varying(layer) != {1} or groups == x.shape[1]:
            continue
        grid = layer.reshape(groups, -1)
        walk.mask(layer)
        if groups == 1:
            if not exact:
                walk.renormalise(grid, "statistics of GroupNorm")
            continue
        if positions == 1:
            walk.marks.alone.append(grid[0])
        reason = walk.reason("statistics of GroupNorm")
        changed = None if exact else Statistics(grid.reshape(-1), reason, walk.node)
        rows = Way(((grid[:, :1], grid),))
        columns = Way(((grid[:1], grid),), aligns=True, statistics=changed)
        walk.choose(Alternatives(grid.reshape(-1), (rows, columns)))
    return layers
