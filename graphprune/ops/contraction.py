"""Products of matrices: slice k of the left meets slice k of the right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ops.fact import Fact, reached_nowhere
from graphprune.ops.factors import Factors
from graphprune.ops.heads import inward_both, queries
from graphprune.ops.ids import Layers, along, varying
from graphprune.ops.made import made
from graphprune.ops.registry import declare
from graphprune.ops.samples import of
from graphprune.ops.values import Natural, Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten


def contract(walk: Walk, left: Value, right: Value, left_dim: int, right_dim: int) -> None:
    """Tie the contracted dimensions of two values and note who only reads.

    Ids that vary over the contracted dimension and another one are tied along the contracted
    dimension first (attention: whole heads).
    """
    walk.reading()
    sides = []
    for value, dim in ((left, left_dim), (right, right_dim)):
        layers = walk.single(value, dim)
        pure = [layer for layer in layers if varying(layer) == {dim}]
        for layer in value.on(dim):
            if len(varying(layer)) > 1:
                walk.collapse(layer, {dim})
        sides.append([layer.reshape(-1) for layer in pure])
    here, there = sides
    walk.write(left, [right], free(walk, left, left_dim))
    walk.write(right, [left], free(walk, right, right_dim))
    for value, other, own, others in ((left, right, here, there), (right, left, there, here)):
        for ids in own:
            if not others:
                walk.freeze(ids, Natural.INPUT if other.given else "multiplied with a fixed tensor")
            if value.constant:
                walk.read(ids)
            for partner in others:
                walk.tie(ids, partner)
    if not (left.linear or right.linear):
        walk.mask(*sides[0], *sides[1])


def free(walk: Walk, value: Value, dim: int) -> list[Tensor]:
    """The layers of a value that remain when ``dim`` is summed away (kept with size 1)."""
    rest = []
    for layer in value.layers:
        if layer.shape[dim] == 1:
            rest.append(layer)
        elif len(varying(layer)) > 1:
            rest.append(walk.row(layer, {dim}))
    return rest


def of_matrices(left: object, right: object, *_: object) -> Factors:
    """``left @ right``; the right one may be the weight of a layer, as [inputs, outputs]."""
    return Factors((left, right), torch.matmul, matrix=True, turned=True)


def of_others(left: object, right: object, *_: object) -> Factors:
    """``left @ right`` of batches or vectors."""
    return Factors((left, right), torch.matmul, turned=True)


def added_to(product: Callable[..., Factors]) -> Callable[..., Factors]:
    """``beta * bias + alpha * left @ right``."""

    def factors(
        bias: object, left: object, right: object, *_: object, beta: float = 1, alpha: float = 1
    ) -> Factors:
        return replace(product(left, right), bias=bias, scales=(beta, alpha))

    return factors


def of_linear(x: object, weight: object, bias: object = None) -> Factors:
    """``x @ weight.T + bias``."""
    return Factors((x, weight), torch.nn.functional.linear, bias, matrix=True)


def linear_fact(op: object, x: Fact, weight: Fact, bias: Fact | None = None) -> Fact:
    """``x @ weight.T + bias``, sparing the work where plainly nothing is known."""
    if reached_nowhere(x, weight):
        return Fact.nothing((*x.value.shape[:-1], len(weight.value)), torch.float64)
    return of_linear(x, weight, bias).fact()


def addmm_meta(
    bias: Tensor, left: Tensor, right: Tensor, *args: object, **kwargs: object
) -> object:
    """A matrix product with a bias."""
    plain = not args and not kwargs and bias.dim() == 1 and left.dim() == right.dim() == 2
    if not plain or left.shape[1] != right.shape[0] or bias.shape[0] != right.shape[1]:
        return NotImplemented
    if not left.dtype is right.dtype is bias.dtype:
        return NotImplemented
    return made(left, (left.shape[0], right.shape[1]))


def linear_meta(x: Tensor, weight: Tensor, bias: Any = None) -> object:
    """A linear layer."""
    plain = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1]
    plain = plain and x.dtype is weight.dtype
    if bias is not None:
        plain = plain and tuple(bias.shape) == (weight.shape[0],) and bias.dtype is x.dtype
    return made(x, (*x.shape[:-1], weight.shape[0])) if plain else NotImplemented


def matmul_meta(left: Tensor, right: Tensor) -> object:
    """A product of batches of matrices."""
    if left.dim() < 2 or right.dim() < 2 or left.dtype is not right.dtype:
        return NotImplemented
    if left.shape[-1] != right.shape[-2]:
        return NotImplemented
    batch = left.shape[:-2]
    if batch != right.shape[:-2]:
        batch = torch.broadcast_shapes(batch, right.shape[:-2])
    return made(left, (*batch, left.shape[-2], right.shape[-1]))


def _read(walk: Walk, left: Value, right: Value, *dims: int) -> tuple[Value, Value]:
    """Two values of which one is a weight that reads the other along a dimension."""
    if left.constant != right.constant:
        left = left if left.constant else walk.read_along(left, dims[0])
        right = right if right.constant else walk.read_along(right, dims[1])
    return left, right


@declare(aten.mm, factors=of_matrices, sample=of((3, 4), (4, 5)), any_size=True)
def mm(walk: Walk, node: fx.Node, left: Value, right: Value) -> Layers:
    """``[n, k] @ [k, m]``."""
    left, right = _read(walk, left, right, 1, 0)
    contract(walk, left, right, 1, 0)
    return (*free(walk, left, 1), *free(walk, right, 0))


@declare(
    aten.linear,
    factors=of_linear,
    functions=(torch.nn.functional.linear,),
    fact=linear_fact,
    meta=linear_meta,
    sample=of((2, 3, 4), (5, 4), (5,)),
    any_size=True,
)
def linear(walk: Walk, node: fx.Node, x: Value, weight: Value, bias: Value | None = None) -> Layers:
    """``x @ weight.T + bias`` along the last dimension."""
    if weight.ndim == 1:
        weight = Value((1, *weight.shape), tuple(i.unsqueeze(0) for i in weight.layers),
                       weight.constant, weight.given, weight.linear)  # fmt: skip
    x = walk.read_along(x, x.ndim - 1)
    contract(walk, x, weight, x.ndim - 1, 1)
    out = [layer.reshape(-1) for layer in free(walk, weight, 1)]
    shape = (*x.shape[:-1], weight.shape[0])
    layers = [*free(walk, x, x.ndim - 1), *(along(ids, x.ndim - 1, x.ndim) for ids in out)]
    product = Value(shape, tuple(layers))
    found = product.layers if bias is None else walk.broadcast([product, bias], x.ndim)
    return tuple(layer.reshape(layer.shape[: len(node.meta["shape"])]) for layer in found)


@declare(
    aten.matmul,
    factors=of_matrices,
    functions=(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__),
    meta=matmul_meta,
    sample=of((2, 3, 4), (4, 5)),
    any_size=True,
)
def matmul(walk: Walk, node: fx.Node, left: Value, right: Value) -> Layers:
    """Products of matrices; a vector is a matrix of one row or column; batches broadcast."""
    wide_left = _reshaped(left, (1, *left.shape)) if left.ndim == 1 else left
    wide_right = _reshaped(right, (*right.shape, 1)) if right.ndim == 1 else right
    batch = set(range(wide_left.ndim - 2))
    wide_left, wide_right = queries(walk, (wide_left, wide_right), batch)
    wide_left, wide_right = inward_both(walk, wide_left, wide_right, turned=True)
    dims = wide_left.ndim - 1, wide_right.ndim - 2
    wide_left, wide_right = _read(walk, wide_left, wide_right, *dims)
    contract(walk, wide_left, wide_right, wide_left.ndim - 1, wide_right.ndim - 2)
    a, b = (tuple(free(walk, v, d)) for v, d in
            ((wide_left, wide_left.ndim - 1), (wide_right, wide_right.ndim - 2)))  # fmt: skip
    sides = [
        Value((*wide_left.shape[:-1], 1), a),
        Value((*wide_right.shape[:-2], 1, wide_right.shape[-1]), b),
    ]
    layers = walk.broadcast(sides, max(wide_left.ndim, wide_right.ndim))
    shape = node.meta["shape"]
    if left.ndim == 1:
        layers = tuple(layer.squeeze(-2) for layer in layers)
    if right.ndim == 1:
        layers = tuple(layer.squeeze(-1) for layer in layers)
    assert all(layer.dim() == len(shape) for layer in layers)
    return layers


def _reshaped(value: Value, shape: tuple[int, ...]) -> Value:
    layers = [along(layer.reshape(-1), shape.index(max(shape)), 2) for layer in value.layers]
    return replace(value, shape=shape, layers=tuple(layers))


@declare(
    aten.addmm,
    factors=added_to(of_matrices),
    meta=addmm_meta,
    sample=of((5,), (3, 4), (4, 5)),
    any_size=True,
)
def addmm(walk: Walk, node: fx.Node, bias: Value, left: Value, right: Value, **_: object) -> Layers:
    """``bias + left @ right``."""
    shape = node.meta["shape"]
    product = Value(shape, mm(walk, node, left, right))
    return walk.broadcast([product, bias], 2)


@declare(
    aten._sparse_addmm,
    factors=added_to(of_matrices),
    sample=of((3, 5), (3, 4), (4, 5)),
)
def sparse_addmm(
    walk: Walk, node: fx.Node, bias: Value, left: Value, right: Value, *_: object, **__: object
) -> Layers:
    """``beta * bias + alpha * left @ right`` of which the left one may be sparse."""
    return addmm(walk, node, bias, left, right)


@declare(aten.mv, factors=of_others, sample=of((3, 4), (4,)))
def mv(walk: Walk, node: fx.Node, left: Value, right: Value) -> Layers:
    """``[n, k] @ [k]``."""
    contract(walk, left, right, 1, 0)
    return tuple(layer.reshape(-1) for layer in free(walk, left, 1))


@declare(aten.dot, aten.vdot, factors=of_others, sample=of((4,), (4,)))
def dot(walk: Walk, node: fx.Node, left: Value, right: Value) -> Layers:
    """``[k] @ [k]``."""
    contract(walk, left, right, 0, 0)
    return ()


@declare(aten.bmm, factors=of_others, sample=of((2, 3, 4), (2, 4, 5)), any_size=True)
def bmm(walk: Walk, node: fx.Node, left: Value, right: Value) -> Layers:
    """``[b, n, k] @ [b, k, m]``."""
    left, right = inward_both(walk, left, right, turned=True)
    contract(walk, left, right, 2, 1)
    b, n, _ = left.shape
    m = right.shape[2]
    return walk.broadcast(
        [
            Value((b, n, 1), tuple(free(walk, left, 2))),
            Value((b, 1, m), tuple(free(walk, right, 1))),
        ],
        3,
    )


@declare(
    aten.baddbmm,
    factors=added_to(of_others),
    sample=of((2, 3, 5), (2, 3, 4), (2, 4, 5), beta=2),
    any_size=True,
)
def baddbmm(
    walk: Walk, node: fx.Node, bias: Value, left: Value, right: Value, **_: object
) -> Layers:
    """``bias + left @ right``, batched."""
    product = Value(node.meta["shape"], bmm(walk, node, left, right))
    return walk.broadcast([product, bias], 3)


@declare(aten.addmv, factors=added_to(of_others), sample=of((3,), (3, 4), (4,), alpha=2))
def addmv(walk: Walk, node: fx.Node, bias: Value, left: Value, right: Value, **_: object) -> Layers:
    """``bias + left @ right``, the right one a vector."""
    product = Value(node.meta["shape"], mv(walk, node, left, right))
    return walk.broadcast([product, bias], 1)
