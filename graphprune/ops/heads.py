"""Products over the width of heads, when heads are pruned inside: columns leave."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from graphprune.ops.ids import align, varying
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk


def inward(walk: Walk, value: Value, dims: Iterable[int]) -> Value:
    """A value about to be summed over ``dims``, when heads are pruned inside.

    Ids that vary over a summed dimension and another one (heads x width) are then tied along
    the other one: the same columns go in all heads. Otherwise whole heads go.
    """
    layers = []
    for layer in value.layers:
        others = varying(layer) - set(dims)
        inside = walk.attention == "head_dim" and others and varying(layer) != others
        layers.append(walk.collapse(layer, others) if inside else layer)
    return replace(value, layers=tuple(layers))


def inward_both(walk: Walk, left: Value, right: Value, turned: bool) -> tuple[Value, Value]:
    """Two values about to be multiplied over the last dimension of the left one.

    That of the right one is the last, too, or the one before (``turned``). The columns of
    each head meet; that they are the same in all heads is left to the count.
    """
    sides = [left, right]
    dims = [left.ndim - 1, right.ndim - (2 if turned else 1)]
    grids = [[i for i in value.on(dim) if len(varying(i)) > 1] for value, dim in zip(sides, dims)]
    ndim = max(left.ndim, right.ndim)
    if walk.attention == "head_dim" and len(grids[0]) == len(grids[1]) == 1:
        a, b = align(grids[0][0], ndim), align(grids[1][0], ndim)
        b = b.transpose(-1, -2) if turned else b
        if a.shape == b.shape and b.shape[-2] == 1:
            walk.tie(a, b)
            walk.align(a, varying(a) - {ndim - 1})
            return _first_head(left, dims[0]), _first_head(right, dims[1])
    return inward(walk, left, dims[:1]), inward(walk, right, dims[1:])


def _first_head(value: Value, dim: int) -> Value:
    layers = []
    for layer in value.layers:
        if layer.shape[dim] > 1:
            for other in varying(layer) - {dim}:
                layer = layer.narrow(other, 0, 1)
        layers.append(layer)
    return replace(value, layers=tuple(layers))
