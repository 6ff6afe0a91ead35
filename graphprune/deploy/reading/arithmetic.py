"""Nodes that compute sizes from sizes: numbers now, arithmetic in the graph for open ones."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import fx

from graphprune.deploy.reading import numbers
from graphprune.deploy.reading.builder import Builder, Value
from graphprune.deploy.reading.document import Node


def as_numbers(b: Builder, node: Node) -> Value | None:
    """What a node computes from sizes; ``None`` where it computes a tensor."""
    op = node.op
    if op == "Shape":
        return _shape(b, node)
    values = [b.values[name] for name in node.inputs if name]
    of_arrays = op in numbers.POINTWISE or op == "Concat"
    if not values or (values[0].numbers is None and not of_arrays):
        return None
    arrays = [_array(value) for value in values]
    if all(value.numbers is None for value in values) or any(x is None for x in arrays):
        return None
    floating = any(
        value.floating or (value.constant is not None and value.constant.is_floating_point())
        for value in values
    )
    if op in numbers.POINTWISE:
        return _made(_pointwise(b, node, arrays, floating), floating or op == "Sqrt")
    if op == "Concat":
        return _made(np.concatenate(arrays, int(node.attributes["axis"])), floating)
    if op == "Gather":
        return _made(np.take(arrays[0], arrays[1].astype(int), node.attributes.get("axis", 0)),
                     floating)  # fmt: skip
    if op == "Transpose":
        return _made(arrays[0].transpose(node.attributes.get("perm")), floating)
    if op == "Cast":
        wanted = node.attributes["to"] in (1, 10, 11, 16)
        return _made(_each(lambda x: _cast(b, x, floating, wanted), arrays[0]), wanted)
    if op in ("ReduceProd", "ReduceSum"):
        return _reduced(b, node, arrays[0], floating)
    if op in numbers.MOVES:
        return _moved(b, node, arrays[0], floating)
    return None


def _reduced(b: Builder, node: Node, x: Any, floating: bool) -> Value | None:
    if x.ndim != 1 or b.known(node, "axes", 1) not in (None, [], [0], [-1]):
        return None
    way = numbers.POINTWISE["Mul" if node.op == "ReduceProd" else "Add"]
    found = reduce(lambda x, y: _scalar(b, node, way, x, y), x)
    keep = node.attributes.get("keepdims", 1)
    return _made(numbers.array([found] if keep else found), floating)


def _moved(b: Builder, node: Node, x: Any, floating: bool) -> Value | None:
    function, names = numbers.MOVES[node.op]
    given = [b.known(node, name, place) for place, name in enumerate(names, 1)]
    if node.op == "Reshape" and not node.attributes.get("allowzero", 0) and 0 in given[0]:
        return None  # sizes that stay as they are, of tensors
    return _made(function(x, *given), floating)


def _shape(b: Builder, node: Node) -> Value:
    name = node.inputs[0]
    value = b.values[name]
    if value.numbers is not None:
        return Value(constant=torch.tensor(value.numbers.shape, dtype=torch.int64))
    dims = range(b.rank(node, name))[node.attributes.get("start", 0) : node.attributes.get("end")]
    return _made(numbers.array([b.size(name, dim, node) for dim in dims]), False)


def _array(value: Value) -> Any:
    """Numbers as an array; ``None`` for tensors, and for more numbers than sizes are."""
    if value.numbers is not None:
        return value.numbers
    if value.constant is None or value.constant.numel() > 64:
        return None
    return numbers.array(value.constant.numpy().astype(object))


def _made(found: Any, floating: bool) -> Value:
    """A value of numbers: a constant where all are known."""
    found = numbers.array(found)
    if numbers.is_open(found):
        return Value(numbers=found, floating=floating)
    items = found.tolist()
    kind = torch.float32 if floating else None
    return Value(constant=torch.tensor(items, dtype=kind if found.size else torch.int64))


def _each(function: Callable[..., Any], *arrays: Any) -> Any:
    """A function of numbers on arrays, item by item."""
    arrays = np.broadcast_arrays(*arrays)
    found = np.empty(arrays[0].shape, dtype=object)
    for place in np.ndindex(found.shape):
        found[place] = function(*(x[place] for x in arrays))
    return found


def _pointwise(b: Builder, node: Node, arrays: Sequence[Any], floating: bool) -> Any:
    function = numbers.POINTWISE[node.op]
    if node.op == "Div":
        function = operator.truediv if floating else operator.floordiv
    return _each(lambda *items: _scalar(b, node, function, *items), *arrays)


def _scalar(b: Builder, node: Node, function: Callable[..., Any], *items: Any) -> Any:
    """A number from numbers: now, or in the graph, where those of the file may follow widths."""
    if not any(isinstance(item, fx.Node) for item in items):
        return function(*items)
    if function is numbers.chosen and not isinstance(items[0], fx.Node):
        return items[1] if items[0] else items[2]
    if function is operator.eq and -1 in items:  # sizes are none of what stands for "as it is"
        return False
    given = (item if isinstance(item, fx.Node | bool) else b.kept_sizes(node, item, "number")
             for item in items)  # fmt: skip
    return b.call(function, *given)


def _cast(b: Builder, item: Any, before: bool, floating: bool) -> Any:
    """Floats from ints, or ints from floats, without losing where a size came from."""
    if before == floating:
        return item
    if not isinstance(item, fx.Node):
        return float(item) if floating else int(item)
    return b.call(operator.mul, item, 1.0) if floating else b.call(math.trunc, item)
