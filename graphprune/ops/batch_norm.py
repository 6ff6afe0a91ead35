"""BatchNorm: every channel by itself. Its spellings differ in their arguments alone."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from graphprune.ops.fact import Fact, along_unknown
from graphprune.ops.ids import Layers, along, varying
from graphprune.ops.made import made
from graphprune.ops.reduction import moments
from graphprune.ops.registry import declare as _declare
from graphprune.ops.registry import free, op_of
from graphprune.ops.samples import of, positive
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten
declare = partial(_declare, macs=free)  # nothing is multiplied here


class Norm(NamedTuple):
    """The arguments of a BatchNorm, with anything in the place of tensors."""

    x: Any
    weight: Any
    bias: Any
    mean: Any
    var: Any
    training: bool
    eps: float

    @property
    def of_batch(self) -> bool:
        """Whether statistics are those of the batch."""
        return self.training or self.mean is None


def flagged(x: Any, weight: Any, bias: Any, *rest: Any) -> Norm:
    """With an argument that says which statistics are used, and maybe without running ones."""
    mean, var, training, _, eps = rest if len(rest) > 3 else (None, None, *rest)
    return Norm(x, weight, bias, mean, var, bool(training), eps)


def in_eval(
    x: object, weight: object, bias: object, mean: object, var: object, momentum: object, eps: float
) -> Norm:
    """With running statistics."""
    return Norm(x, weight, bias, mean, var, False, eps)


def in_training(
    x: object, weight: object, bias: object, mean: object, var: object, momentum: object, eps: float
) -> Norm:
    """With statistics of the batch, which update the running ones."""
    return Norm(x, weight, bias, mean, var, True, eps)


def per_channel(walk: Walk, x: Value, vectors: list[Value | None]) -> Layers:
    """Tie vectors of one entry per channel to dimension 1."""
    shaped = [
        Value(
            (1, *vector.shape, *[1] * (x.ndim - 2)),
            tuple(along(ids, 1, x.ndim) for ids in vector.layers),
        )
        for vector in vectors
        if vector is not None
    ]
    return walk.broadcast([x, *shaped], x.ndim, "normalised with vectors of fixed size")


def vector_fact(fact: Fact | None, ndim: int) -> Fact | None:
    """A vector of one entry per channel, shaped to broadcast."""
    if fact is None:
        return None
    shape = (1, -1, *[1] * (ndim - 2))
    return Fact(fact.value.reshape(shape), fact.unknown.reshape(shape))


def affine_fact(normed: Tensor, unknown: Tensor, weight: Fact | None, bias: Fact | None) -> Fact:
    """``normed * weight + bias``; a weight of zero leaves only the bias."""
    if weight is not None:
        unknown = (unknown & weight.nonzero) | weight.unknown
        normed = (normed * weight.value).masked_fill(weight.zero, 0)
    if bias is not None:
        normed, unknown = normed + bias.value, unknown | bias.unknown
    return Fact.checked(normed, unknown.expand(normed.shape).clone())


def batch_norm_fact(norm: Norm) -> list[Fact]:
    """Channel by channel; statistics of the batch are known where the whole channel is."""
    x = norm.x
    ndim = x.value.dim()
    weight, bias, mean, var = (
        vector_fact(part, ndim) for part in (norm.weight, norm.bias, norm.mean, norm.var)
    )
    if norm.of_batch or mean is None or var is None:
        others = [dim for dim in range(ndim) if dim != 1]
        unknown = along_unknown(x.unknown, others).expand(x.value.shape)
        values = x.filled()
        spread, centre = torch.var_mean(values, others, correction=0, keepdim=True)
    else:
        unknown = x.unknown | mean.unknown | var.unknown
        values, centre, spread = x.filled(), mean.value, var.value
    normed = (values - centre) * (spread + float(norm.eps or 0)).rsqrt()
    return [affine_fact(normed, unknown, weight, bias)]


def batch_norm_masked(keep: Tensor, norm: Norm) -> object:
    """Statistics of the batch over other dimensions than the channels, some of which left."""
    x, weight, bias = norm.x, norm.weight, norm.bias
    if not norm.of_batch or all(n == 1 for d, n in enumerate(keep.shape) if d != 1):
        return NotImplemented
    dims = [d for d in range(x.dim()) if d != 1]
    spread, centre = moments(keep, x, dims, 0)
    out = (x - centre) * (spread + norm.eps).rsqrt()
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    out = out if weight is None else out * weight.reshape(shape)
    out = out if bias is None else out + bias.reshape(shape)
    return out, centre.flatten(), spread.flatten(), x.new_empty(0)


def batch_norm_meta(norm: Norm) -> object:
    """The plain form."""
    x = norm.x
    channels = x.shape[1] if x.dim() > 1 else -1
    for vector in (norm.weight, norm.bias, norm.mean, norm.var):
        if vector is not None and tuple(vector.shape) != (channels,):
            return NotImplemented
    saved = made(x, (channels if norm.training else 0,))
    return x.clone(), saved, saved


def batch_norm_channels(walk: Walk, node: fx.Node, norm: Norm) -> list[Layers]:
    """Every channel by itself: exact. Other dimensions share statistics of the batch."""
    x = norm.x
    others = set(range(x.ndim)) - {1}
    passing = []
    for layer in x.layers:
        over = others & varying(layer)
        if over and varying(layer) - others:  # a channel leaves with all its places
            layer = walk.collapse(layer, over)
        elif over and norm.mean is not None:  # of other dimensions than the channels
            walk.freeze(layer, "channels where BatchNorm takes its statistics")
        elif over and norm.of_batch:
            walk.renormalise(layer, "statistics of BatchNorm")
            walk.mask(layer)
        passing.append(layer)
    x = Value(x.shape, tuple(passing))
    layers = per_channel(walk, x, [norm.weight, norm.bias, norm.mean, norm.var])
    own = tuple(layer.reshape(-1) for layer in layers if varying(layer) == {1})
    saved = [item.meta["shape"] for item in node.meta["items"].values()][1:]
    return [layers, *(own if shape == (x.shape[1],) else () for shape in saved)]


def spelling(*targets: Any, norm: Any, **views: Any) -> None:
    """Declare spellings of BatchNorm: all views but the arguments are the same."""
    declare(
        *targets,
        norm=norm,
        fact=lambda op, *args: batch_norm_fact(norm(*args)),
        masked=lambda keep, *args: batch_norm_masked(keep, norm(*args)),
        **views,
    )(_channels)


def _channels(walk: Walk, node: fx.Node, *args: object) -> list[Layers]:
    """Unpacked as its spelling says."""
    unpacked = op_of(node).norm
    assert unpacked is not None
    return batch_norm_channels(walk, node, unpacked(*args))


_VECTORS = (2, 3, 4), (3,), (3,), (3,), positive(3)

spelling(
    aten.native_batch_norm,
    norm=flagged,
    meta=lambda *args: batch_norm_meta(flagged(*args)),
    saves=True,
    any_size=True,
    sample=of(*_VECTORS, False, 0.1, 1e-5),
)
spelling(
    aten._native_batch_norm_legit,
    norm=flagged,
    any_size=True,
    sample=of(*_VECTORS, False, 0.1, 1e-5),
)
spelling(  # their kernels run on a GPU alone
    aten.cudnn_batch_norm,
    aten.miopen_batch_norm,
    norm=flagged,
    sample=of(*_VECTORS, False, 0.1, 1e-5),
)
spelling(
    aten._native_batch_norm_legit_no_training,
    aten._batch_norm_no_update,
    norm=in_eval,
    any_size=True,
    sample=of(*_VECTORS, 0.1, 1e-5),
)
spelling(
    aten._batch_norm_with_update,
    norm=in_training,
    sample=of(*_VECTORS, 0.1, 1e-5),
)
