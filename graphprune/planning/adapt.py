"""What must change besides weights: sizes in attributes and literals.

Every recorded op that was given a size is asked which size it needs after pruning; the
expression behind the size says which attribute or literal to change for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.channels.analysis import Analysis
from graphprune.ops.given import args_of, ints_of, locate, paths_of
from graphprune.ops.ids import Path
from graphprune.ops.registry import op_of, packet_of
from graphprune.planning.problems import Place, Problem, around
from graphprune.record.recorder import Record
from graphprune.record.sites import changeable, given, is_literal
from graphprune.record.sizes import (
    COMPARISONS,
    Attribute,
    Comparison,
    Expression,
    Extent,
    Literal,
    Scale,
    Settable,
    Size,
    attributes,
    evaluate,
    expression,
    extents,
    plain,
    solve,
)

aten = torch.ops.aten
ExtentOf = Callable[[Extent], int]


@dataclass(frozen=True)
class Demand:
    """A size that an op was given, and the one it needs."""

    node: fx.Node
    old: int
    new: int
    expression: Expression
    place: Place | None = None  # what it measures
    path: Path | None = None  # where it stands in the arguments
    leaks: bool = False  # whether a plain int may have been computed from sizes
    before: tuple[Tensor, ...] = ()  # what must stay if a place cannot be changed

    @property
    def position(self) -> bool:
        """Whether it is the place of a channel."""
        return op_of(self.node).places


@dataclass
class Changes:
    """New values of attributes and literals, and what could not be solved."""

    values: dict[Settable, float] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    origin: dict[Settable, fx.Node] = field(default_factory=dict)
    places: dict[Settable, Place] = field(default_factory=dict)
    written: bool = False  # whether there are literals
    unsure: bool = False  # whether a run must show that the code follows


def sized(node: fx.Node) -> bool:
    """Whether an op may be given a size."""
    op = op_of(node)
    return op.given is not None and (op.places or bool(node.meta.get("numbers")))


def changes(
    graph: Analysis, alive: np.ndarray, trusted: frozenset[tuple[int, int]] = frozenset()
) -> Changes:
    """Solve for the attributes and literals that a plan changes.

    Args:
        graph: the analysed model.
        alive: for every id whether it stays.
        trusted: (record, node) positions of plain ints known to follow the shapes by themselves.
    """
    found, pruned = Changes(), graph.pruned(alive)

    @functools.cache
    def extent(leaf: Extent) -> int:
        return pruned.shape(leaf.node)[leaf.dim]

    for known in graph.remembered:
        _holds(graph, found, known, extent)
    _settle_sizes(graph, found, list(_demands(graph, alive, trusted, found)), extent)
    _check_comparisons(graph, found, extent)
    _check_numbers(graph, found, extent)
    found.unsure |= any(record.doubts for record in graph.records)
    found.unsure |= any(_vanishes(graph, node, alive) for r in graph.records for node in r.ops)
    found.values = {
        leaf: new
        for leaf, new in found.values.items()
        if new != leaf.value or isinstance(leaf, Literal)
    }
    return found


def _settle_sizes(graph: Analysis, found: Changes, demands: list[Demand], extent: ExtentOf) -> None:
    """Attributes first, then numbers in the source; what neither can change is a problem."""

    def now(demand: Demand) -> float:
        return _current(found, demand, extent)

    unsolved = False
    demands.sort(key=lambda demand: not isinstance(demand.expression, Attribute))
    for demand in demands:
        expr, new = demand.expression, demand.new
        for leaf in attributes(expr):
            found.origin.setdefault(leaf, demand.node)
            if demand.place is not None and new != demand.old:
                found.places.setdefault(leaf, demand.place)
        if isinstance(expr, Attribute) and expr not in found.values:
            found.values[expr] = new
        elif now(demand) != new and not _solve(found, expr, new, extent):
            _write(graph, found, demand)
            unsolved |= now(demand) != new
    if not unsolved and not found.written:  # only attributes can have changed since
        demands = [demand for demand in demands if attributes(demand.expression)]
    for demand in demands:  # what was settled later may have changed it
        if now(demand) != demand.new:
            _write(graph, found, demand)
    for demand in demands:
        if now(demand) != demand.new:
            found.problems.append(_problem(found, demand))


def _current(found: Changes, demand: Demand, extent: ExtentOf) -> float:
    """The size that an op would be given with the changes found so far."""
    if found.written:
        literal = _literal(demand.node, demand.path, demand.old)
        if literal is not None and literal in found.values:
            return found.values[literal]
    return evaluate(demand.expression, found.values, extent)


def _literal(node: fx.Node, path: Path | None, value: float) -> Literal | None:
    """The number at a place in the source, if it is known."""
    site = node.meta.get("site")
    if site is None or path is None:
        return None
    return Literal(str(node.meta["module"]), site, path, value)


def _write(graph: Analysis, found: Changes, demand: Demand) -> None:
    """Change the number in the source, where that says the same for other inputs."""
    literal, expr = _literal(demand.node, demand.path, demand.old), demand.expression
    if literal is None or literal in found.values or not changeable(literal.site, literal.path):
        return
    if isinstance(expr, int):
        source = given(literal.site, literal.path)
        if demand.leaks and (source is None or not is_literal(source)):
            return
    elif not _carried(graph, expr):
        return
    found.values[literal] = demand.new
    found.written = True
    if demand.place is not None:
        found.places[literal] = demand.place


def _problem(found: Changes, demand: Demand) -> Problem:
    leaves: list[Any] = [*attributes(demand.expression)]
    leaves.append(_literal(demand.node, demand.path, demand.old))
    rivals = tuple(found.places[leaf] for leaf in leaves if leaf in found.places)
    node, old, new = demand.node, demand.old, demand.new
    return Problem(
        node, old, new, demand.expression, demand.position, demand.place, rivals, demand.before
    )


def _check_numbers(graph: Analysis, found: Changes, extent: ExtentOf) -> None:
    """Numbers computed from sizes keep their value."""
    for node in _implicit_scales(graph, extent):
        query = args_of(node)[0]
        width = query.meta["shape"][-1]
        literal = _literal(node, ("scale",), 0.0)
        if literal is not None and changeable(literal.site, literal.path):
            found.values[literal] = float(width) ** -0.5
        else:
            layers = graph.values[query].on(len(node.meta["shape"]) - 1)
            found.problems.append(Problem(node, width, width, width, layers=tuple(layers)))
    for node, number, path in _scalars(graph):
        expr, literal = expression(number), _literal(node, path, number)
        if literal is not None and literal in found.values:
            if found.values[literal] == number:
                continue
        elif evaluate(expr, found.values, extent) == number:
            continue
        elif literal is not None and _carried(graph, expr) and changeable(literal.site, path):
            found.values[literal] = float(number) if isinstance(number, float) else plain(number)
            continue
        found.problems.append(Problem(node, number, number, expr))


def _check_comparisons(graph: Analysis, found: Changes, extent: ExtentOf) -> None:
    """Comparisons of sizes come out as before, or a run must show that it does not matter."""
    for record in graph.records:
        made = dict.fromkeys(record.comparisons)
        for comparison in sorted(made, key=lambda comparison: comparison.op == "is"):
            if _holds(graph, found, comparison, extent):
                continue
            places = [leaf.node for leaf in extents(comparison.left)]
            leaves = attributes(comparison.left)
            places += [found.origin[leaf] for leaf in leaves if leaf in found.origin]
            if comparison.op == "is" and places:  # its value has left the sizes
                value = float(evaluate(comparison.right, {}, extent))
                rivals = tuple(found.places[leaf] for leaf in leaves if leaf in found.places)
                problem = Problem(places[0], value, value, comparison.left, rivals=rivals)
                found.problems.append(problem)
            else:
                found.unsure = True


def _carried(graph: Analysis, expr: Expression) -> bool:
    """Whether an expression depends on channels only: a literal would fix a batch size."""
    return all(
        any(layer.shape[leaf.dim] > 1 for layer in graph.values[leaf.node].layers)
        for leaf in extents(expr)
    )


def _solve(found: Changes, expr: Expression, want: int, extent: ExtentOf) -> bool:
    """Give one attribute of an expression the value that makes it right."""
    for leaf in attributes(expr):
        if leaf in found.values:
            continue
        value = solve(expr, want, leaf, found.values, extent)
        if value is not None:
            found.values[leaf] = value
            if evaluate(expr, found.values, extent) == want:
                return True
            del found.values[leaf]
    return False


def _vanishes(graph: Analysis, node: fx.Node, alive: np.ndarray) -> bool:
    """Whether a squeeze would drop a dimension that shrinks to a single channel."""
    if packet_of(node) is not aten.squeeze:
        return False
    source = args_of(node)[0]
    return any(n > 1 == m for n, m in zip(source.meta["shape"], graph.shape(source, alive)))


def _implicit_scales(graph: Analysis, extent: ExtentOf) -> Iterator[fx.Node]:
    """Attention that takes its scale from a width that changes."""
    for record in graph.records:
        for node in record.ops:
            if packet_of(node) is aten.scaled_dot_product_attention:
                query: Any = node.args[0]
                dim = len(query.meta["shape"]) - 1
                width = query.meta["shape"][dim]
                if node.kwargs.get("scale") is None and extent(Extent(query, dim)) != width:
                    yield node


def _scalars(graph: Analysis) -> Iterator[tuple[fx.Node, float, Path]]:
    """Numbers computed from sizes that meet values, such as ``1 / sqrt(width)``: they stay."""
    for record in graph.records:
        for node in record.ops:
            numbers = node.meta.get("numbers")
            filled = op_of(node).fills
            tags = getattr(node.target, "tags", ())
            scaled = isinstance(node.kwargs.get("scale"), float)
            if numbers and (filled or scaled or torch.Tag.pointwise in tags):
                arguments = (*node.args, *node.kwargs.values())
                scalars = {arg for arg in arguments if isinstance(arg, int | float)}
                for number, path in zip(numbers, node.meta["paths"]):
                    if isinstance(number, Size | Scale) and float(number) in scalars:
                        yield node, number, path


def _holds(graph: Analysis, found: Changes, comparison: Comparison, extent: ExtentOf) -> bool:
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
) -> Iterator[Demand]:
    for number, record in enumerate(graph.records):
        for position, node in enumerate(record.ops):
            if not sized(node):
                continue
            op = op_of(node)
            assert op.given is not None
            ints, paths = ints_of(node), paths_of(node)
            for old, new, kind, dims in op.given(graph, node, alive):
                place = locate(node, old, kind)
                if place is None and op.places and old != new:
                    yield Demand(node, old[0], new[0], old[0], before=_before(graph, node, old))
                found.unsure |= _unsure(graph, node, place, record.leaks)
                places = dims or [None] * len(old)
                sizes = ints[place] if place is not None else []
                trust = (number, position) in trusted and not op.places
                for offset, (size, was, now) in enumerate(zip(sizes, old, new)):
                    if was == now == -1 or (size == -1 and was != -1):
                        continue  # inferred by the op
                    expr = expression(size)
                    if trust and isinstance(expr, int):
                        continue
                    assert place is not None
                    path = paths[place.start + offset]
                    if isinstance(expr, int) and plain(size) in record.leaked:
                        expr = _computed(record, node, path, plain(size))
                        found.unsure |= not isinstance(expr, int)
                    before = _before(graph, node, [was]) if op.places else ()
                    yield Demand(node, was, now, expr, places[offset], path, record.leaks, before)


def _before(graph: Analysis, node: fx.Node, places: list[int]) -> tuple[Tensor, ...]:
    """The ids before a place of a dimension, as slices and selections are given one."""
    args = args_of(node)
    source, dim = args[0], args[1] if len(args) > 1 else 0
    if len(places) > 1 or not isinstance(dim, int):
        return ()  # padding
    value = graph.values[source]
    dim, size = dim % value.ndim, value.shape[dim]
    start, stop = (0, places[0]) if places[0] >= 0 else (max(size + places[0], 0), size)
    return tuple(layer.narrow(dim, start, min(stop, size) - start) for layer in value.on(dim))


def _computed(record: Record, node: fx.Node, path: Path, number: int) -> Expression:
    """What a plain int was probably computed from; a run shows whether that is so."""
    literal, formulas = _literal(node, path, number), record.leaked[number]
    source = None if literal is None else given(literal.site, path)
    if len(formulas) > 1 or source is None or is_literal(source):
        return number
    return next(iter(formulas))


def _unsure(graph: Analysis, node: fx.Node, place: slice | None, leaks: bool) -> bool:
    """Whether sizes given to an op that carries channels are not fully understood.

    Sizes of tensors are, and attributes; plain ints are when no size was turned into one.
    """
    ints = ints_of(node)
    if place is None:  # computed inside a function of torch, from its ints or from shapes
        results = (node, *node.meta.get("items", {}).values())
        rank = max(len(result.meta.get("shape", ())) for result in results)
        doubtful = [n for n in ints if abs(n) > rank]
    elif op_of(node).layer:
        doubtful = [n for n in ints[place] if not isinstance(expression(n), Attribute)]
    else:
        doubtful = [n for n in ints[place] if isinstance(expression(n), int) and abs(n) > 1]
        doubtful = doubtful if leaks else []
    return bool(doubtful) and any(not graph.walk.is_fresh(layer) for layer in around(graph, node))
