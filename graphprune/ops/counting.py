"""Multiply-accumulates of ops, as a function of the shapes of their values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphprune.ops.ids import Shape

aten = torch.ops.aten
ShapeOf = Callable[[fx.Node], Shape]


def _first(node: fx.Node, shape: ShapeOf, index: int) -> Shape:
    argument: Any = node.args[index]
    return shape(argument)


def _convolution(node: fx.Node, shape: ShapeOf) -> int:
    x, weight = _first(node, shape, 0), _first(node, shape, 1)
    positions = x if node.args[6] else shape(node)
    return math.prod(positions) * math.prod(weight[1:])


def _matrix(left: int) -> Callable[[fx.Node, ShapeOf], int]:
    def count(node: fx.Node, shape: ShapeOf) -> int:
        return math.prod(_first(node, shape, left)) * _first(node, shape, left + 1)[-1]

    return count


def _einsum(node: fx.Node, shape: ShapeOf) -> int:
    equation: Any = node.args[0]
    tensors: Any = node.args[1]
    sizes: dict[str, int] = {}
    dotted: Shape = ()
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    for term, tensor in zip(terms, tensors):
        head, _, tail = term.partition("...")
        extents = shape(tensor)
        end = len(extents) - len(tail)
        dotted = max(dotted, extents[len(head) : end], key=math.prod)
        sizes.update(zip(head + tail, extents[: len(head)] + extents[end:]))
    return math.prod(sizes.values()) * math.prod(dotted)


def _attention(node: fx.Node, shape: ShapeOf) -> int:
    query, key, value = (_first(node, shape, index) for index in range(3))
    return math.prod(query) * key[-2] + math.prod(query[:-1]) * key[-2] * value[-1]


COUNTS: dict[Any, Callable[[fx.Node, ShapeOf], int]] = {
    aten.convolution: _convolution,
    aten.mm: _matrix(0),
    aten.bmm: _matrix(0),
    aten.addmm: _matrix(1),
    aten.baddbmm: _matrix(1),
    aten.linear: lambda node, shape: math.prod(shape(node)) * _first(node, shape, 1)[-1],
    aten.einsum: _einsum,
    aten.matmul: lambda node, shape: math.prod(shape(node)) * _first(node, shape, 0)[-1],
    aten._grouped_mm: lambda node, shape: math.prod(shape(node)) * _first(node, shape, 0)[-1],
    aten.mv: lambda node, shape: math.prod(_first(node, shape, 0)),
    aten.dot: lambda node, shape: math.prod(_first(node, shape, 0)),
    aten.scaled_dot_product_attention: _attention,
}
