"""Products over the width of heads: whether heads leave, columns of them, or queries alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace

from torch import Tensor

from graphprune.ops.ids import align, varying
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk


def inward(walk: Walk, value: Value, dims: Iterable[int]) -> Value:
    """A value about to be summed over ``dims``, when heads are pruned inside.

    Ids that vary over a summed dimension and another one (heads x width) are then tied along
    the other one: the same columns go in all heads. Otherwise whole heads go.
    """
    layers: list[Tensor] = []
    for layer in value.layers:
        others = varying(layer) - set(dims)
        inside = walk.attention == "head_dim" and others and varying(layer) != others
        if inside:
            walk.collapse(layer, others)
        layers += walk.sides(layer, others) if inside else [layer]
    return replace(value, layers=tuple(layers))


def over_heads(walk: Walk, value: Value, dims: Set[int]) -> Value:
    """A value of which sums over ``dims`` are taken: over its last one, as norms of each head do.

    Where heads become narrower the same columns go in all of them, as in front of a product.
    """
    return inward(walk, value, dims) if dims == {value.ndim - 1} else value


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
            return _one_head(walk, left, dims[0]), _one_head(walk, right, dims[1])
    return inward(walk, left, dims[:1]), inward(walk, right, dims[1:])


def _one_head(walk: Walk, value: Value, dim: int) -> Value:
    layers: list[Tensor] = []
    for layer in value.layers:
        others = varying(layer) - {dim}
        layers += walk.sides(layer, others) if others and layer.shape[dim] > 1 else [layer]
    return replace(value, layers=tuple(layers))


STAY = "keys and values, of which queries leave"


def queries(walk: Walk, values: Sequence[Value], dims: Set[int]) -> list[Value]:
    """Two values about to be multiplied, when queries leave: their keys and values stay.

    One of them varies along more of ``dims`` than the other: several queries for each key.
    """
    found = list(values)
    same = len({value.ndim for value in values}) == 1
    if walk.attention != "queries" or not same or any(value.constant for value in values):
        return found
    sides = [frozenset[int]().union(*map(varying, value.layers)) & dims for value in values]
    for own, other in ((0, 1), (1, 0)) if len(found) == 2 else ():
        if sides[own] and sides[own] < sides[other]:
            for layer in found[own].layers:
                if varying(layer) & sides[own]:
                    walk.freeze(layer, STAY)
            layers = [
                walk.collapse(i, sides[own]) if varying(i) & dims > sides[own] else i
                for i in found[other].layers
            ]
            found[other] = replace(found[other], layers=tuple(layers))
    return found
