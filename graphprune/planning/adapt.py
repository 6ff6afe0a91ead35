"""What must change besides weights: sizes in attributes and literals.

Every recorded op that was given a size is asked which size it needs after pruning; the
expression behind the size says which attribute or literal to change for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.channels.analysis import Analysis
from graphprune.ops.calls import args_of
from graphprune.ops.given import Number, ints_of, numbers_for
from graphprune.ops.ids import Path
from graphprune.ops.registry import Op, op_of, packet_of
from graphprune.planning.problems import Place, Problem, around
from graphprune.record.recorder import Record
from graphprune.record.sites import TIMES, changeable, is_literal, whole
from graphprune.record.sites import given as written
from graphprune.record.sizes import (
    COMPARISONS,
    Attribute,
    Comparison,
    Expression,
    Extent,
    Literal,
    Operation,
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


@dataclass(frozen=True)
class Need:
    """A size that an op was given, and the one it needs."""

    node: fx.Node
    given: int
    needed: int
    expression: Expression
    place: Place | None = None  # what it measures
    path: Path | None = None  # where it stands in the arguments
    leaks: bool = False  # whether a plain int may have been computed from sizes
    before: tuple[Tensor, ...] = ()  # what must stay if a place cannot be changed
    scaled: bool = False  # whether it was computed in a way that nobody saw, and does not follow
    hidden: bool = False  # whether no number in the code is known that it is

    @property
    def literal(self) -> Literal | None:
        """The number in the source, if it is known."""
        return _literal(self.node, self.path, self.given)


@dataclass(frozen=True)
class Changes:
    """New values of attributes and literals, and what could not be solved.

    ``unsure`` tells that a run must show whether the code follows; ``parted`` are the places
    whose sizes the code found equal, and which a plan makes different.
    """

    values: Mapping[Settable, float]
    problems: tuple[Problem, ...]
    unsure: bool
    parted: tuple[tuple[Place, Place], ...] = ()


def changes(
    graph: Analysis,
    alive: np.ndarray,
    trusted: frozenset[tuple[int, int]] = frozenset(),
    scaled: frozenset[tuple[int, int]] = frozenset(),
) -> Changes:
    """Solve for the attributes and literals that a plan changes.

    Args:
        graph: the analysed model.
        alive: for every id whether it stays.
        trusted: (record, node) positions of plain ints known to follow the shapes by themselves.
        scaled: those of plain ints known not to.
    """
    return Solver(graph, alive, trusted, scaled).solved()


class Solver:
    """Finds the values of attributes and literals, one after the other.

    What is settled first is known to what comes later: attributes of torch's layers, then the sizes
    that ops were given, then comparisons and numbers computed from sizes, which must come out as
    before.
    """

    def __init__(
        self,
        graph: Analysis,
        alive: np.ndarray,
        trusted: frozenset[tuple[int, int]],
        scaled: frozenset[tuple[int, int]],
    ) -> None:
        self.graph, self.alive, self.trusted, self.scaled = graph, alive, trusted, scaled
        self.pruned = graph.pruned(alive)
        self.values: dict[Settable, float] = {}
        self.problems: list[Problem] = []
        self.origin: dict[Settable, fx.Node] = {}  # the op that is given an attribute
        self.places: dict[Settable, Place] = {}  # what an attribute or literal measures
        self.written = False  # whether there are literals
        self.unsure = any(record.doubts for record in graph.records)
        self.parted: list[tuple[Place, Place]] = []

    def solved(self) -> Changes:
        """All changes of a plan."""
        for comparison in self.graph.remembered:
            self._holds(comparison)
        needs = sorted(self._needs(), key=lambda n: not isinstance(n.expression, Attribute))
        self._settle(needs)
        self._check_comparisons()
        self._keep(needs)
        self._check_scales()
        self._check_scalars()
        self.unsure |= any(self._vanishes(node) for r in self.graph.records for node in r.ops)
        values = {
            leaf: new
            for leaf, new in self.values.items()
            if new != leaf.value or isinstance(leaf, Literal)
        }
        return Changes(values, tuple(self.problems), self.unsure, tuple(self.parted))

    def extent(self, leaf: Extent) -> int:
        """The new size of a dimension of a value."""
        return self.pruned.shape(leaf.node)[leaf.dim]

    def value(self, expr: Expression) -> float:
        """The value of an expression with the changes found so far."""
        return evaluate(expr, self.values, self.extent)

    def _settle(self, needs: Sequence[Need]) -> None:
        """Attributes first, then numbers in the source; what neither can change is a problem."""
        unsolved = False
        for need in needs:
            expr = need.expression
            for leaf in attributes(expr):
                self.origin.setdefault(leaf, need.node)
                if need.place is not None and need.needed != need.given:
                    self.places.setdefault(leaf, need.place)
            if isinstance(expr, Attribute) and expr not in self.values:
                self.values[expr] = need.needed
            elif not self._met(need) and not self._solve(expr, need.needed):
                self._write(need)
                unsolved |= not self._met(need)
        if not unsolved and not self.written:  # only attributes can have changed since
            needs = [need for need in needs if attributes(need.expression)]
        for need in needs:  # what was settled later may have changed it
            if not self._met(need):
                self._write(need)
        self.problems += [self._problem(need) for need in needs if not self._met(need)]

    def _keep(self, needs: Sequence[Need]) -> None:
        """What was met must not have changed with an attribute that a comparison was solved for."""
        known = {problem.node for problem in self.problems}
        for need in needs:
            if need.node not in known and not self._met(need):
                self._write(need)
                if not self._met(need):
                    self.problems.append(self._problem(need))

    def _met(self, need: Need) -> bool:
        """Whether an op would be given the size it needs, with the changes found so far."""
        literal = need.literal if self.written else None
        if literal is not None and literal in self.values:
            return self.values[literal] == need.needed
        scaled = self._scaled(need) if self.written else None
        if scaled is not None and scaled[0] in self.values:
            return self.values[scaled[0]] == scaled[1]
        return self.value(need.expression) == need.needed

    def _solve(self, expr: Expression, needed: int) -> bool:
        """Give one attribute of an expression the value that makes it right."""
        for leaf in attributes(expr):
            if leaf in self.values:
                continue
            value = solve(expr, needed, leaf, self.values, self.extent)
            if value is not None:
                self.values[leaf] = value
                if self.value(expr) == needed:
                    return True
                del self.values[leaf]
        return False

    def _write(self, need: Need) -> None:
        """Change the number in the source, where that says the same for other inputs."""
        literal, expr = need.literal, need.expression
        if literal is None or literal in self.values or not _changeable(literal):
            return
        if isinstance(expr, int):
            source = written(literal.site, literal.path)
            if need.leaks and source is not None and not is_literal(source):
                if need.scaled:
                    self._scale(need)
                return
        elif not self._of_channels(expr):
            self._scale(need)
            return
        self.values[literal] = need.needed
        self.written = True
        if need.place is not None:
            self.places[literal] = need.place

    def _scale(self, need: Need) -> None:
        """Multiply a number where it stands, so that it is the same part of it for other inputs."""
        scaled = self._scaled(need)
        if scaled is not None:
            self.values[scaled[0]] = scaled[1]
            self.written = True

    def _scaled(self, need: Need) -> tuple[Literal, int] | None:
        """A product of a batch size (or of places) and a width: the width, and the one it needs.

        The expression in the source stays, and is multiplied by their quotient.
        """
        literal = need.literal
        if literal is None or not whole(literal.site, literal.path):
            return None
        if need.scaled:
            shared = math.gcd(need.given, need.needed)
            part = replace(literal, path=(*literal.path, TIMES), value=need.given // shared)
            return part, need.needed // shared
        factors = _factors(need.expression)
        others = [leaf for leaf in factors or () if not self._is_width(leaf)]
        if not others:
            return None
        rest, now = math.prod(self.extent(leaf) for leaf in others), self.value(need.expression)
        if not rest or now % rest or need.needed % rest or not now:
            return None
        width = replace(literal, path=(*literal.path, TIMES), value=int(now // rest))
        return width, need.needed // rest

    def _is_width(self, leaf: Extent) -> bool:
        return bool(self.graph.values[leaf.node].on(leaf.dim))

    def _of_channels(self, expr: Expression) -> bool:
        """Whether an expression depends on channels only: a literal would fix a batch size."""
        return all(map(self._is_width, extents(expr)))

    def _problem(self, need: Need) -> Problem:
        leaves: list[object] = [*attributes(need.expression), need.literal]
        if need.hidden:  # it may be an attribute of the module that came there unseen
            module, given = need.node.meta.get("module"), need.given
            held = [leaf for leaf in self.values if isinstance(leaf, Attribute)]
            leaves = [leaf for leaf in held if (leaf.module, leaf.value) == (module, given)]
        return Problem(
            need.node,
            need.given,
            need.needed,
            need.expression,
            position=op_of(need.node).places,
            place=need.place,
            rivals=tuple(self.places[leaf] for leaf in leaves if leaf in self.places),
            layers=need.before,
            hidden=need.hidden,
        )

    def _check_scales(self) -> None:
        """Attention that takes its scale from a width that changes keeps it."""
        for node in self._implicit_scales():
            query = args_of(node)[0]
            width = query.meta["shape"][-1]
            literal = _literal(node, ("scale",), 0.0)
            if literal is not None and _changeable(literal):
                self.values[literal] = float(width) ** -0.5
            else:
                layers = self.graph.values[query].on(len(node.meta["shape"]) - 1)
                self.problems.append(Problem(node, width, width, width, layers=tuple(layers)))

    def _implicit_scales(self) -> Iterator[fx.Node]:
        for record in self.graph.records:
            for node in record.ops:
                if packet_of(node) is aten.scaled_dot_product_attention:
                    query = args_of(node)[0]
                    dim = len(query.meta["shape"]) - 1
                    moved = self.extent(Extent(query, dim)) != query.meta["shape"][dim]
                    if moved and node.kwargs.get("scale") is None:
                        yield node

    def _check_scalars(self) -> None:
        """Numbers computed from sizes that meet values keep their value."""
        for node, number, path in _scalars(self.graph):
            expr, literal = expression(number), _literal(node, path, number)
            if literal is not None and literal in self.values:
                if self.values[literal] == number:
                    continue
            elif self.value(expr) == number:
                continue
            elif literal is not None and self._of_channels(expr) and _changeable(literal):
                fixed = float(number) if isinstance(number, float) else plain(number)
                self.values[literal] = fixed
                continue
            self.problems.append(Problem(node, number, number, expr))

    def _check_comparisons(self) -> None:
        """Comparisons of sizes come out as before, or a run must show that it does not matter."""
        for record in self.graph.records:
            made = dict.fromkeys(record.comparisons)
            for comparison in sorted(made, key=lambda comparison: comparison.op == "is"):
                if self._holds(comparison):
                    continue
                leaves = attributes(comparison.left)
                nodes = [leaf.node for leaf in extents(comparison.left)]
                nodes += [self.origin[leaf] for leaf in leaves if leaf in self.origin]
                if comparison.op == "is" and nodes:  # its value has left the sizes
                    value = float(evaluate(comparison.right, {}, self.extent))
                    rivals = tuple(self.places[leaf] for leaf in leaves if leaf in self.places)
                    problem = Problem(nodes[0], value, value, comparison.left, rivals=rivals)
                    self.problems.append(problem)
                else:
                    self.unsure = True
                    left, right = comparison.left, comparison.right
                    equal = (comparison.op == "eq") == comparison.result
                    if equal and isinstance(left, Extent) and isinstance(right, Extent):
                        self.parted.append(((left.node, left.dim), (right.node, right.dim)))

    def _holds(self, comparison: Comparison) -> bool:
        """Whether a comparison comes out as before; an equality can be solved for an attribute."""

        def sides() -> tuple[float, float]:
            return self.value(comparison.left), self.value(comparison.right)

        compare = COMPARISONS[comparison.op]
        left, right = sides()
        if compare(left, right) == comparison.result:
            return True
        equal = (comparison.op == "eq") == comparison.result
        if equal and not self._solve(comparison.left, int(right)):
            self._solve(comparison.right, int(left))
        return compare(*sides()) == comparison.result

    def _vanishes(self, node: fx.Node) -> bool:
        """Whether a squeeze would drop a dimension that shrinks to a single channel."""
        if packet_of(node) is not aten.squeeze:
            return False
        source = args_of(node)[0]
        return any(n > 1 == m for n, m in zip(source.meta["shape"], self.pruned.shape(source)))

    def _needs(self) -> Iterator[Need]:
        """The sizes that ops were given, and those they need."""
        for number, record in enumerate(self.graph.records):
            for position, node in enumerate(record.ops):
                op = op_of(node)
                if op.given is not None and (op.places or node.meta.get("numbers")):
                    place = number, position
                    trust = place in self.trusted
                    for need in self._needs_of(record, node, op, trust):
                        plain_int = isinstance(need.expression, int)
                        known = plain_int and place in self.scaled
                        yield replace(need, scaled=True) if known else need

    def _needs_of(self, record: Record, node: fx.Node, op: Op, trust: bool) -> Iterator[Need]:
        assert op.given is not None
        for given in op.given(self.graph, node, self.alive):
            bound = numbers_for(node, given)
            if not bound and op.places and given.old != given.new and not trust:
                before, (old, *_), (new, *_) = self._before(node, given.old), given.old, given.new
                place = given.places[0] if given.places else None
                yield Need(node, old, new, old, place, before=before, hidden=True)
            self.unsure |= self._doubtful(node, [*bound.values()], record.leaks)
            for offset, (size, path, *_) in bound.items():
                old, new = given.old[offset], given.new[offset]
                if old == new == -1 or (size == -1 and old != -1):
                    continue  # inferred by the op
                expr = expression(size)
                if trust and isinstance(expr, int) and not op.places:
                    continue
                if isinstance(expr, int) and plain(size) in record.leaked:
                    expr = _computed(record, node, path, plain(size))
                    self.unsure |= not isinstance(expr, int)
                before = self._before(node, [old]) if op.places else ()
                place = given.places[offset] if given.places else None
                yield Need(node, old, new, expr, place, path, record.leaks, before)

    def _before(self, node: fx.Node, places: list[int]) -> tuple[Tensor, ...]:
        """The ids before a place of a dimension, as slices and selections are given one."""
        args = args_of(node)
        source, dim = args[0], args[1] if len(args) > 1 else 0
        if len(places) > 1 or not isinstance(dim, int):
            return ()  # padding
        value = self.graph.values[source]
        dim, size = dim % value.ndim, value.shape[dim]
        start, stop = (0, places[0]) if places[0] >= 0 else (max(size + places[0], 0), size)
        return tuple(layer.narrow(dim, start, min(stop, size) - start) for layer in value.on(dim))

    def _doubtful(self, node: fx.Node, bound: Sequence[Number], leaks: bool) -> bool:
        """Whether sizes given to an op that carries channels are not fully understood.

        Sizes of tensors are, and attributes; plain ints are when no size was turned into one.
        """
        ints = [n.value for n in bound if isinstance(n.value, int)]
        if not bound:  # computed inside a function of torch, from its ints or from shapes
            results = (node, *node.meta.get("items", {}).values())
            rank = max(len(result.meta.get("shape", ())) for result in results)
            doubtful = [n for n in ints_of(node) if abs(n) > rank]
        elif op_of(node).layer:
            doubtful = [n for n in ints if not isinstance(expression(n), Attribute)]
        else:
            doubtful = [n for n in ints if isinstance(expression(n), int) and abs(n) > 1]
            doubtful = doubtful if leaks else []
        return bool(doubtful) and any(map(self.graph.is_own, around(self.graph, node)))


def _literal(node: fx.Node, path: Path | None, value: float) -> Literal | None:
    """The number at a place in the source, if it is known."""
    site = node.meta.get("site")
    if site is None or path is None:
        return None
    return Literal(str(node.meta["module"]), site, path, value)


def _factors(expr: Expression) -> list[Extent] | None:
    """The sizes of values in a product; ``None`` if it is something else.

    Divisors are those of an earlier change, which divide without a rest.
    """
    if isinstance(expr, Operation):
        left, right = _factors(expr.left), _factors(expr.right)
        product = expr.op == "mul" or (expr.op == "floordiv" and isinstance(expr.right, int))
        return None if left is None or right is None or not product else left + right
    return [expr] if isinstance(expr, Extent) else []


def _changeable(literal: Literal) -> bool:
    return changeable(literal.site, literal.path)


def _computed(record: Record, node: fx.Node, path: Path, number: int) -> Expression:
    """What a plain int was probably computed from; a run shows whether that is so."""
    literal, formulas = _literal(node, path, number), record.leaked[number]
    source = None if literal is None else written(literal.site, path)
    if source is None or is_literal(source):
        return number
    if len(formulas) > 1:  # of several numbers, one that measures what the op reads
        formulas = {formula for formula in formulas if _measures(formula, node)}
    return next(iter(formulas)) if len(formulas) == 1 else number


def _measures(formula: Expression, node: fx.Node) -> bool:
    """Whether a formula depends on sizes of what an op reads, and of nothing else."""
    nodes = {leaf.node for leaf in extents(formula)}
    return bool(nodes) and nodes <= _read(node)


def _read(node: fx.Node) -> set[fx.Node]:
    """What an op reads, and what that was before a slice that takes all of it."""
    found: set[fx.Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        found.add(source)
        if op_of(source).linear and len(source.all_input_nodes) == 1:
            (before,) = source.all_input_nodes
            waiting += [before] if before.meta.get("shape") == source.meta.get("shape") else []
    return found


def _scalars(graph: Analysis) -> Iterator[tuple[fx.Node, float, Path]]:
    """Numbers computed from sizes that meet values, such as ``1 / sqrt(width)``."""
    for record in graph.records:
        for node in record.ops:
            numbers = node.meta.get("numbers")
            tags = getattr(node.target, "tags", ())
            scaled = isinstance(node.kwargs.get("scale"), float)
            if numbers and (op_of(node).fills or scaled or torch.Tag.pointwise in tags):
                arguments = (*node.args, *node.kwargs.values())
                scalars = {arg for arg in arguments if isinstance(arg, int | float)}
                for number, path, *_ in numbers:
                    if isinstance(number, Size | Scale) and float(number) in scalars:
                        yield node, number, path
