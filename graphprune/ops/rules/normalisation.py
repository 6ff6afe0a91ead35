"""Normalisation layers: tie their parameters, and say whose statistics change."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphprune.ops.ids import Alternatives, Layers, along, varying
from graphprune.ops.rules.base import Walk, aten
from graphprune.ops.rules.registry import Value, register_rule


def _per_channel(walk: Walk, x: Value, vectors: list[Value | None]) -> Layers:
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


@register_rule(
    aten.native_batch_norm,
    aten.cudnn_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten._batch_norm_with_update,
    aten._batch_norm_no_update,
)
def batch_norm(
    walk: Walk,
    node: fx.Node,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Any = None,
    var: Any = None,
    *args: Any,
) -> list[Layers]:
    """Every channel by itself: exact. Other dimensions share statistics of the batch."""
    others = set(range(x.ndim)) - {1}
    passing = []
    for layer in x.layers:
        over = others & varying(layer)
        if over and varying(layer) - others:  # a channel leaves with all its places
            layer = walk.collapse(layer, over)
        elif over and mean is not None:  # running statistics of other dimensions than the channels
            walk.freeze(layer, "channels where BatchNorm takes its statistics")
        elif over and args and args[0] is True:  # statistics of the batch
            walk.renormalise(layer, "statistics of BatchNorm")
            walk.mask(layer)
        passing.append(layer)
    x = Value(x.shape, tuple(passing))
    vectors = [v for v in (weight, bias, mean, var) if isinstance(v, Value)]
    layers = _per_channel(walk, x, list(vectors))
    own = tuple(layer.reshape(-1) for layer in layers if varying(layer) == {1})
    saved = [item.meta["shape"] for item in node.meta["items"].values()][1:]
    return [layers, *(own if shape == (x.shape[1],) else () for shape in saved)]


@register_rule(aten.native_layer_norm)
def layer_norm(
    walk: Walk, node: fx.Node, x: Value, shape: Any, weight: Value | None, bias: Value | None,
    *args: Any,
) -> list[Layers]:  # fmt: skip
    """Statistics over the last dimensions: over the kept channels."""
    dims = range(x.ndim - len(shape), x.ndim)
    return _statistics(walk, x, set(dims), [weight, bias], "LayerNorm")


@register_rule(aten._fused_rms_norm)
def rms_norm(
    walk: Walk, node: fx.Node, x: Value, shape: Any, weight: Value | None, *args: Any
) -> list[Layers]:
    """The root of the mean square of the kept channels."""
    dims = range(x.ndim - len(shape), x.ndim)
    return _statistics(walk, x, set(dims), [weight], "RMSNorm")


def _statistics(
    walk: Walk, x: Value, dims: set[int], affine: list[Value | None], name: str
) -> list[Layers]:
    layers = []
    for layer in x.layers:
        if dims & varying(layer):
            if varying(layer) - dims:
                layer = walk.collapse(layer, dims)
            else:
                walk.renormalise(layer, f"statistics of {name}")
                walk.mask(layer)
        layers.append(layer)
    x = Value(x.shape, tuple(layers))
    given = [value for value in affine if value is not None]
    out = walk.broadcast([x, *given], x.ndim, f"{name} with a fixed size")
    rest = tuple(layer for layer in out if not dims & varying(layer))
    return [out, rest, rest]


@register_rule(aten.native_group_norm)
def group_norm(
    walk: Walk, node: fx.Node, x: Value, weight: Value | None, bias: Value | None,
    batch: int, channels: int, positions: int, groups: int, *args: Any,
) -> list[Layers]:  # fmt: skip
    """Whole groups go exactly; equal columns of all groups change their statistics."""
    x = Value(x.shape, walk.settle(x, range(2, x.ndim), "normalised over channels"))
    layers = _per_channel(walk, x, [weight, bias])
    for layer in layers:
        if varying(layer) != {1}:
            continue
        grid = layer.reshape(groups, -1)
        if groups == channels:
            continue
        walk.mask(layer)
        rows, columns = ((grid[:, :1], grid),), ((grid[:1], grid),)
        choice = Alternatives(
            grid.reshape(-1),
            ((rows, ()), (columns, ())),
            ("whole groups", "equal columns"),
            walk.reason("statistics of GroupNorm"),
        )
        if groups == 1:
            walk.renormalise(grid, "statistics of GroupNorm")
        else:
            walk.choose(choice)
    return [layers, (), ()]
