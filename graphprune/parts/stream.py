"""A recorded graph, and what of it is needed when operands of sums count as zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from graphprune.ops.registry import op_of
from graphprune.ops.views import macs_of
from graphprune.plan.changes import Cut
from graphprune.record.cost import recorded_shape, storages
from graphprune.record.inputs import Call
from graphprune.record.joins import Place, Run, Watched
from graphprune.record.recording import record
from graphprune.record.tensors import named_modules

aten = torch.ops.aten
Bounds = tuple[float, float]
Dims = Mapping[fx.Node, frozenset[int]]
SUMS = {aten.add.Tensor, aten.add_.Tensor}
_UNBOUNDED = -math.inf, math.inf


@dataclass(frozen=True)
class Narrowed:
    """Values of which channels leave.

    Attributes:
        dims: the dimensions in which values are narrower.
        empty: of those that have no channels any more, the dimensions in which they have none.
    """

    dims: Dims
    empty: Dims


NOTHING = Narrowed({}, {})


class Stream:
    """The recorded graph of a model, with the calls of its modules and the sums in its code."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.watched = Watched()
        self.record = record(model, call, False, watch=self.watched.watching)
        self.nodes = self.watched.nodes
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.modules = dict(named_modules(model))
        self.calls: dict[str, list[Run]] = {}
        for run in self.watched.runs:
            self.calls.setdefault(run.module, []).append(run)
        self.sums = {node: place for place, nodes in self.watched.sums.items() for node in nodes}
        outputs, counted = self.record.outputs, self.record.counted
        self.ends = [n for place, n in enumerate(outputs) if counted is None or place in counted]
        self.roots = storages(self.nodes)
        self.writes: dict[fx.Node, list[fx.Node]] = {}  # of parts of a storage, by its root
        for node in self.nodes:
            if _writes(node):
                written: Any = node.args[0]
                self.writes.setdefault(self.roots.get(written, node), []).append(node)
        self.macs = {node: int(macs_of(node, recorded_shape)) for node in self.record.ops}

    @cached_property
    def joins(self) -> frozenset[fx.Node]:
        """The nodes that put their operands side by side."""
        return frozenset(n for n in self.nodes if n.op == "call_function" and op_of(n).joins)

    def needed(self, sides: Mapping[Place, int], narrowed: Narrowed = NOTHING) -> set[fx.Node]:
        """The nodes that the outputs need when operands of some sums count as zero.

        Concatenations do not need what has no channels any more.
        """
        found: set[fx.Node] = set()
        given = [
            n for root, nodes in self.writes.items() if root.op == "placeholder" for n in nodes
        ]
        waiting = [*self.ends, *given]
        while waiting:
            node = waiting.pop()
            if node in found:
                continue
            found.add(node)
            waiting += self.writes.get(self.roots.get(node, node), ())
            side = sides.get(self.sums[node]) if node in self.sums else None
            if narrowed.empty and node in self.joins:
                waiting += [each for each in node.all_input_nodes if each not in narrowed.empty]
            elif side is None:
                waiting += node.all_input_nodes
            else:
                waiting.append(operand(node, 1 - side))
        return found

    def source(self, node: fx.Node, sides: Mapping[Place, int]) -> fx.Node:
        """The earliest node that holds the same values."""
        while True:
            before = self.before(node, sides)
            if before is None:
                return node
            node = before

    def before(
        self, node: fx.Node, sides: Mapping[Place, int], passed: list[Place] | None = None
    ) -> fx.Node | None:
        """The node that holds what this one holds, if it changes nothing.

        ``passed`` gets the sums in between of which an operand counts as zero.
        """
        place = self.sums.get(node)
        if place is not None and place in sides:
            if passed is not None:
                passed.append(place)
            return operand(node, 1 - sides[place])
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        op = op_of(node)
        if op.keeps == "values":
            return node.args[0]
        if op.keeps == "order":
            return self._turned_back(node, sides, passed)
        if op.clips and _lies_in(self._bounds(node.args[0], sides), _own_bounds(node)):
            return node.args[0]
        return None

    def _turned_back(
        self, node: fx.Node, sides: Mapping[Place, int], passed: list[Place] | None
    ) -> fx.Node | None:
        """The node whose shape a view gives back, after views that keep all in order."""
        seen: list[Place] = []
        found = first_of(node)
        while not same_shape(found, node):
            order = op_of(found).keeps == "order"
            before = first_of(found) if order else self.before(found, sides, seen)
            if before is None:
                return None
            found = before
        if passed is not None:
            passed += seen
        return found

    def _bounds(self, node: fx.Node, sides: Mapping[Place, int]) -> Bounds:
        """The interval in which the values of a node lie, whatever the inputs are."""
        while op_of(node).bounds is None:
            first = is_getitem(node) and node.args[1] == 0
            before = first_of(node) if first else self.before(node, sides)
            if before is None:
                break
            node = before
        if op_of(node).bounds is not None or not op_of(node).hull:
            return _own_bounds(node)
        found = [(0.0, 0.0), *(self._bounds(each, sides) for each in node.all_input_nodes)]
        return min(low for low, _ in found), max(high for _, high in found)

    def above(self, node: fx.Node) -> set[fx.Node]:
        """All nodes that a node is computed from."""
        known = self._above.get(node)
        if known is None:
            known = set()
            waiting = [*node.all_input_nodes]
            while waiting:
                each = waiting.pop()
                if each not in known:
                    known.add(each)
                    waiting += each.all_input_nodes
            self._above[node] = known
        return known

    @cached_property
    def _above(self) -> dict[fx.Node, set[fx.Node]]:
        return {}


def holder_of(out: Any) -> str | None:
    """What holds the results of a call: nothing, a tuple or a list of tensors; else ``None``."""
    if isinstance(out, fx.Node):
        return ""
    if type(out) in (tuple, list):
        flat = all(isinstance(item, fx.Node) or item is None for item in out)
        return type(out).__name__ if flat and out else None
    return None


def leaves(tree: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], fx.Node]]:
    """The nodes in nested data, with the way to each."""
    if isinstance(tree, fx.Node):
        yield path, tree
    elif isinstance(tree, tuple | list):
        for number, item in enumerate(tree):
            yield from leaves(item, (*path, number))
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from leaves(item, (*path, key))


def operand(node: fx.Node, side: int) -> fx.Node:
    """An operand of a sum of two tensors."""
    found = node.args[side]
    assert isinstance(found, fx.Node)
    return found


def sides_of(cuts: Iterable[Cut]) -> dict[Place, int]:
    """The operands that count as zero, by their sums."""
    return {cut.key: cut.side for cut in cuts}


def covers(root: str, name: str) -> bool:
    """Whether a module is another one or lies in it."""
    return name == root or name.startswith(f"{root}.")


def is_getitem(node: fx.Node) -> bool:
    """Whether a node takes one of several results."""
    return getattr(node.target, "__name__", "") == "getitem"


def _own_bounds(node: fx.Node) -> Bounds:
    """The interval in which the results of an op lie."""
    rule = op_of(node).bounds
    return _UNBOUNDED if rule is None else rule(*node.args, **node.kwargs)


def _lies_in(inner: Bounds, outer: Bounds) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values have the same shape."""
    return bool(one.meta.get("shape") == other.meta.get("shape"))


def first_of(node: fx.Node) -> fx.Node:
    """The tensor that an op is given first."""
    found = node.args[0]
    assert isinstance(found, fx.Node)
    return found


def _writes(node: fx.Node) -> bool:
    """Whether an op writes into a tensor that others may read by other nodes."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or first.op == "get_attr":
        return False
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return not pointwise or _is_part(first)


def _is_part(node: fx.Node) -> bool:
    """Whether a tensor is a view of another one."""
    schema = getattr(node.target, "_schema", None)
    returned = schema.returns[:1] if schema is not None and not schema.is_mutable else ()
    return any(value.alias_info is not None for value in returned)
