"""What must change besides weights: sizes in attributes and literals.

Every recorded op that was given a size is asked which size it needs after pruning; the
expression behind the size says which attribute or literal to change for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.analysis import Analysis
from graphprune.rules import Reason
from graphprune.sizes import (
    COMPARISONS,
    Attribute,
    Comparison,
    Expression,
    Extent,
    Literal,
    Override,
    Scale,
    Settable,
    Size,
    evaluate,
    expression,
    extents,
    settable,
    solve,
)

aten = torch.ops.aten
Want = tuple[list[int], list[int]]  # the sizes an op was given, and those it needs
Rule = Callable[[Analysis, fx.Node, np.ndarray], Iterator[Want]]
_RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def decorate(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return decorate


def _args(node: fx.Node) -> Any:
    """The positional arguments of a node; their types are known from the op."""
    return node.args


@_rule(
    aten.view,
    aten._unsafe_view,
    aten.reshape,
    aten.expand,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
    aten.view_copy,
)
def _shape(graph: Analysis, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    given = _args(node)[1] if len(_args(node)) > 1 else node.kwargs.get("size")
    if isinstance(given, list | tuple):
        new = list(graph.shape(node, alive))[-len(given) :] if given else []
        new = [n if g != -1 else -1 for g, n in zip(given, new)]
        if match(given, _ints(node)) is None:  # unflatten gives the sizes of one dimension
            given, new = _part(given, new, _ints(node))
        yield list(given), new


def _part(given: Any, new: list[int], ints: Sequence[int]) -> Want:
    """The part of a shape that ends the ints of a call."""
    for width in range(len(ints), 1, -1):
        tail = ints[-width:]
        for start in range(len(given) - width + 1):
            if match(given[start : start + width], tail) is not None:
                return list(given[start : start + width]), new[start : start + width]
    return list(given), new


@_rule(aten.zeros, aten.ones, aten.full, aten.empty, aten.rand, aten.randn)
def _factory(graph: Analysis, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    yield list(_args(node)[0]), list(graph.shape(node, alive))


@_rule(aten.split, aten.unsafe_split)
def _split(graph: Analysis, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    kwargs: Any = node.kwargs
    dim = _args(node)[2] if len(_args(node)) > 2 else kwargs.get("dim", 0)
    items = node.meta["items"]
    new = [graph.shape(item, alive)[dim] for item in items.values()]
    given = _args(node)[1]
    yield (list(given), new) if isinstance(given, list | tuple) else ([given], new[:1])


_rule(aten.split_with_sizes, aten.unsafe_split_with_sizes)(_split)


@_rule(aten.slice)
def _slice(graph: Analysis, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    given: list[Any] = [*_args(node), *(0, None, None, 1)[len(_args(node)) - 1 :]]
    x, dim, start, end, step = given
    if step != 1:
        return
    keep = graph.positions(x, dim, alive)
    size, new_size = len(keep), int(keep.sum())
    first = 0 if start is None else _clip(start, size)
    last = size if end is None else _clip(end, size)
    begin, stop = int(keep[:first].sum()), int(keep[:last].sum())
    if start:
        yield [start], [begin if start > 0 else begin - new_size]
    if end is not None and end < size:
        yield [end], [stop if end > 0 else stop - new_size]
        yield [last - first], [stop - begin]


def _clip(index: int, size: int) -> int:
    return max(0, min(size, index + size if index < 0 else index))


@_rule(aten.select)
def _select(graph: Analysis, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    x, dim, index = _args(node)
    keep = graph.positions(x, dim, alive)
    new = int(keep[: index % len(keep)].sum())
    if new != index % len(keep):
        yield [index], [new if index >= 0 else new - int(keep.sum())]


@_rule(aten.constant_pad_nd)
def _pad(graph: Analysis, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    pad = list(_args(node)[1])
    new = list(pad)
    ndim = len(node.meta["shape"])
    for i in range(0, len(pad), 2):
        dim = ndim - 1 - i // 2
        before, after = pad[i], pad[i + 1]
        keep, source = (graph.positions(n, dim, alive) for n in (node, _args(node)[0]))
        new[i] = int(keep[:before].sum() if before > 0 else -source[:-before].sum())
        end = len(keep) - after
        new[i + 1] = int(keep[end:].sum() if after > 0 else -source[len(source) + after :].sum())
    yield pad, new


@_rule(aten.convolution)
def _convolution(graph: Analysis, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    groups = int(_args(node)[8])
    if groups > 1:
        keep = graph.positions(node, 1, alive).reshape(groups, -1)
        yield [groups], [int(keep.any(1).sum())]


@_rule(aten.native_group_norm)
def _group_norm(graph: Analysis, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    groups = int(_args(node)[6])
    if groups > 1:
        keep = graph.positions(node.meta["items"][0], 1, alive).reshape(groups, -1)
        yield [groups], [int(keep.any(1).sum())]


@_rule(aten.native_layer_norm, aten._fused_rms_norm)
def _layer_norm(graph: Analysis, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    given = list(_args(node)[1])
    yield given, list(graph.shape(node.meta["items"][0], alive))[-len(given) :]


# Ops of torch's own layers: when a layer gives its own attribute, nothing else depends on it.
_LAYERS = frozenset(
    {aten.convolution, aten.native_group_norm, aten.native_layer_norm, aten._fused_rms_norm}
)


@dataclass(frozen=True)
class Problem:
    """A size that could not be changed as a plan needs it."""

    node: fx.Node
    old: float
    new: float
    expression: Expression

    @property
    def literal(self) -> bool:
        """Whether the size was a plain int: a literal, or computed where we could not follow."""
        return isinstance(self.expression, int)

    @property
    def owner(self) -> str:
        """The module whose code gives the size."""
        return str(self.node.meta.get("module", ""))

    @property
    def reason(self) -> Reason:
        """For reports."""
        return Reason(f"size {self.old} cannot be changed", self.owner, self.node.meta.get("line"))


@dataclass
class Changes:
    """New values of attributes and literals, and what could not be solved."""

    values: dict[Settable, float] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    origin: dict[Settable, fx.Node] = field(default_factory=dict)
    unsure: bool = False  # whether a run must show that the code follows


def _ints(node: fx.Node) -> list[int]:
    """The ints given to the function that called an op."""
    return [number for number in node.meta["numbers"] if isinstance(number, int)]


def sized(node: fx.Node) -> bool:
    """Whether an op may be given a size."""
    return getattr(node.target, "overloadpacket", None) in _RULES and bool(node.meta.get("numbers"))


def changes(
    graph: Analysis, alive: np.ndarray, trusted: frozenset[tuple[int, int]] = frozenset()
) -> Changes:
    """Solve for the attributes and literals that a plan changes.

    Args:
        graph: the analysed model.
        alive: for every id whether it stays.
        trusted: (record, node) positions of plain ints known to follow the shapes by themselves.
    """
    found = Changes()
    demands = list(_demands(graph, alive, trusted, found))

    @functools.cache
    def extent(leaf: Extent) -> int:
        return graph.shape(leaf.node, alive)[leaf.dim]

    demands.sort(key=lambda demand: not isinstance(demand[3], Attribute | Literal))
    for node, old, new, expr in demands:
        for leaf in settable(expr):
            found.origin.setdefault(leaf, node)
        if isinstance(expr, Attribute | Literal) and expr not in found.values:
            found.values[expr] = new
            continue
        if evaluate(expr, found.values, extent) == new:
            continue
        if not _solve(found, expr, new, extent):
            found.problems.append(Problem(node, old, new, expr))
    for node, number in _scalars(graph):
        expr = expression(number)
        if evaluate(expr, found.values, extent) == number:
            continue
        if isinstance(expr, Override | Literal):
            found.values[expr.literal if isinstance(expr, Override) else expr] = number
        else:
            found.problems.append(Problem(node, number, number, expr))
    for record in graph.records:
        for comparison in dict.fromkeys(record.comparisons):
            if _holds(found, comparison, extent):
                continue
            places = [leaf.node for leaf in extents(comparison.left)]
            places += [found.origin[leaf] for leaf in settable(comparison.left)]
            if comparison.op == "is" and places:
                value = float(evaluate(comparison.right, {}, extent))
                found.problems.append(Problem(places[0], value, value, comparison.left))
            else:
                found.unsure = True
    found.unsure |= any(_vanishes(graph, node, alive) for r in graph.records for node in r.ops)
    found.values = {
        leaf: new
        for leaf, new in found.values.items()
        if new != leaf.value or (isinstance(leaf, Literal) and leaf.computed)
    }
    return found


def _solve(found: Changes, expr: Expression, want: int, extent: Callable[[Extent], int]) -> bool:
    """Give one attribute or literal of an expression the value that makes it right."""
    for leaf in settable(expr):
        if leaf in found.values:
            continue
        value = solve(expr, want, leaf, found.values, extent)
        if value is not None:
            found.values[leaf] = value
            if evaluate(expr, found.values, extent) == want:
                return True
            del found.values[leaf]
    return False


_FILLING = frozenset({aten.full, aten.new_full, aten.full_like, aten.scalar_tensor, aten.fill_})


def _vanishes(graph: Analysis, node: fx.Node, alive: np.ndarray) -> bool:
    """Whether a squeeze would drop a dimension that shrinks to a single channel."""
    if getattr(node.target, "overloadpacket", None) is not aten.squeeze:
        return False
    source = _args(node)[0]
    return any(n > 1 == m for n, m in zip(source.meta["shape"], graph.shape(source, alive)))


def _scalars(graph: Analysis) -> Iterator[tuple[fx.Node, float]]:
    """Numbers computed from sizes that meet values, such as ``1 / sqrt(width)``: they stay."""
    for record in graph.records:
        for node in record.ops:
            numbers = node.meta.get("numbers")
            filled = getattr(node.target, "overloadpacket", None) in _FILLING
            if numbers and (filled or torch.Tag.pointwise in getattr(node.target, "tags", ())):
                scalars = {arg for arg in node.args if isinstance(arg, int | float)}
                for number in numbers:
                    if isinstance(number, Size | Scale) and float(number) in scalars:
                        yield node, number


def _holds(found: Changes, comparison: Comparison, extent: Callable[[Extent], int]) -> bool:
    """Whether a comparison comes out as before; an equality can be solved for an attribute."""

    def sides() -> tuple[float, float]:
        left, right = comparison.left, comparison.right
        return evaluate(left, found.values, extent), evaluate(right, found.values, extent)

    compare = COMPARISONS[comparison.op]
    left, right = sides()
    if compare(left, right) == comparison.result:
        return True
    equal = (comparison.op == "eq") == comparison.result
    if equal and not _solve(found, comparison.left, int(right), extent):
        _solve(found, comparison.right, int(left), extent)
    return compare(*sides()) == comparison.result


def _demands(
    graph: Analysis, alive: np.ndarray, trusted: frozenset[tuple[int, int]], found: Changes
) -> Iterator[tuple[fx.Node, int, int, Expression]]:
    for number, record in enumerate(graph.records):
        for position, node in enumerate(record.ops):
            if not sized(node):
                continue
            rule = _RULES[node.target.overloadpacket]  # type: ignore[union-attr]
            for old, new in rule(graph, node, alive):
                given = match(old, _ints(node))
                found.unsure |= _unsure(graph, node, given)
                for size, was, now in zip(given or (), old, new):
                    if was == now == -1 or (size == -1 and was != -1):
                        continue  # inferred by the op
                    expr = expression(size)
                    if isinstance(expr, int) and (now == was or (number, position) in trusted):
                        continue
                    yield node, was, now, expr


def _unsure(graph: Analysis, node: fx.Node, given: Sequence[int] | None) -> bool:
    """Whether sizes given to an op that carries channels are not fully understood.

    Sizes of tensors are, and the attributes that torch's own layers give to their own op.
    """
    if given is None:  # computed inside a function of torch, from its ints or from shapes
        rank = len(node.meta.get("shape", ()))
        doubtful = [n for n in _ints(node) if abs(n) > rank]
    elif node.target.overloadpacket in _LAYERS:  # type: ignore[union-attr]
        return not all(isinstance(expression(size), Attribute) for size in given)
    else:
        doubtful = [n for n in given if n not in (-1, 0, 1) and not _follows(expression(n))]
    return bool(doubtful) and any(
        not graph.walk.is_fresh(layer) for layer in ids_around(graph, node)
    )


def _follows(expr: Expression) -> bool:
    """Whether an expression is made of sizes of tensors."""
    return bool(extents(expr)) and not settable(expr)


def match(pattern: Sequence[int], ints: Sequence[int]) -> list[int] | None:
    """Find the sizes an op was given among the ints of the torch function that called it."""
    width = len(pattern)
    for start in range(len(ints) - width + 1):
        part = list(ints[start : start + width])
        if all(int(a) == int(b) or int(a) == -1 for a, b in zip(part, pattern)):
            return part
    return None


def ids_around(graph: Analysis, node: fx.Node) -> list[Tensor]:
    """All layers an op reads or makes, for freezing."""
    layers = list(graph.values[node].layers) if node in graph.values else []
    for other in (*node.all_input_nodes, *node.meta.get("items", {}).values()):
        layers.extend(graph.values[other].layers)
    return layers


def freeze(graph: Analysis, problem: Problem) -> bool:
    """Freeze the channels that a size depends on; whether that changed anything."""
    layers = ids_around(graph, problem.node)
    for extent in extents(problem.expression):
        value = graph.values[extent.node]
        layers += [layer for layer in value.layers if layer.shape[extent.dim] > 1]
    moving = [layer for layer in layers if not graph.units.frozen[graph.units.labels[layer]].all()]
    for layer in moving:
        graph.freeze(layer, problem.reason)
    return bool(moving)
