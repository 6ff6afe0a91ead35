"""Where ids go in a recorded graph: what is an id, which tables they read, what else reads them.

Values that ops move, compare or write into one tensor are of one *kind*. The kinds that look up
rows of tables are ids of a vocabulary; the numbers that code compares them with, or puts among
them, are ids as well. New ids keep the order of old ones: whatever depends on their order alone
(maximum, sorting, comparisons with each other) comes out as before. Anything else that reads ids is
told.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ops.places import (
    ADDS,
    EMPTY,
    EQUAL,
    FILLED,
    INDICES,
    LIKE,
    MADE,
    MOVES,
    ORDER,
    PADS,
    PLACES,
    PUTS,
    THROUGH,
)
from graphprune.ops.registry import op_name, packet_of
from graphprune.record.cost import storages
from graphprune.record.recorder import Record

aten = torch.ops.aten

_WHOLE = frozenset({torch.int64, torch.int32})  # what can be ids


@dataclass(frozen=True)
class Number:
    """A number that code compares with ids, or puts among them.

    ``bound`` is what must be added to it to make it the smallest id that is not below it; ``None``
    where the number itself is an id.
    """

    node: fx.Node
    value: int
    bound: int | None = None


@dataclass
class Kind:
    """Values of one kind that look up rows: the ids of a vocabulary, or places, or other types.

    Attributes:
        inputs: the places of model inputs that hold them.
        tables: the tensors whose rows they look up.
        lookups: the ops that do.
        numbers: those among them that code says.
        others: other ops that read them, in ways that new ids would change.
    """

    inputs: set[int] = field(default_factory=set)
    tables: dict[str, None] = field(default_factory=dict)
    lookups: set[fx.Node] = field(default_factory=set)
    numbers: list[Number] = field(default_factory=list)
    others: list[tuple[fx.Node, str]] = field(default_factory=list)

    def join(self, other: Kind) -> None:
        """Another kind that reads the same table."""
        self.inputs |= other.inputs
        self.tables |= other.tables
        self.lookups |= other.lookups
        self.numbers += other.numbers
        self.others += other.others


def kinds(record: Record, values: Mapping[str, Tensor]) -> list[Kind]:
    """All kinds that look up rows and come from inputs.

    Args:
        record: a recorded forward pass.
        values: parameters and buffers, for the numbers in those that hold ids.
    """
    return [kind for kind in Flow(record, values).kinds() if kind.inputs]


def computed(record: Record, values: Mapping[str, Tensor]) -> list[Kind]:
    """The kinds that look up rows and are computed from inputs, in some way that is no move."""
    found = []
    for kind in Flow(record, values).kinds():
        waiting = [] if kind.inputs else [node for node, _ in kind.others]
        seen: set[fx.Node] = set()
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += node.all_input_nodes
        if any(node.op == "placeholder" and _whole(node) for node in seen):
            found.append(kind)
    return found


class Flow:
    """The kinds of whole numbers in a recorded graph."""

    def __init__(self, record: Record, values: Mapping[str, Tensor]) -> None:
        self.record, self.values = record, values
        self.nodes = list(record.graph.nodes)
        self.parent: dict[fx.Node, fx.Node] = {}
        roots = storages(self.nodes)
        self.needed = _needed(record, roots)
        for node in self.nodes:
            if node in roots and _whole(node) and _whole(roots[node]):
                self._unite(node, roots[node])
            for source in self._sources(node):
                self._unite(node, source)
            sides = self._compared(node)
            for side in sides[1:]:
                self._unite(sides[0], side)

    def find(self, node: fx.Node) -> fx.Node:
        """What stands for the kind of a value."""
        while (up := self.parent.get(node, node)) is not node:
            node = up
        return node

    def _unite(self, one: fx.Node, other: fx.Node) -> None:
        a, b = self.find(one), self.find(other)
        if a is not b:
            self.parent[b] = a

    def _sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """The values that the result of an op holds."""
        if node.target is operator.getitem:
            source: Any = node.args[0]
            if _whole(node) and not (node.args[1] and packet_of(source) in INDICES):
                yield source
            return
        packet = packet_of(node)
        places = MOVES.get(packet, ()) if "shape" not in node.meta or _whole(node) else ()
        if packet in FILLED:
            places = (0, len(node.args) - 1)
        for place in places:
            yield from filter(_whole, _flat(node.args[place] if place < len(node.args) else None))

    def _compared(self, node: fx.Node) -> list[fx.Node]:
        """The values that an op compares with each other."""
        packet = packet_of(node)
        if packet not in EQUAL and packet not in ORDER:
            return []
        return [n for n in node.args[:2] if isinstance(n, fx.Node) and _whole(n)]

    def kinds(self) -> list[Kind]:
        """Those that look up rows, joined where they read the same table."""
        found: dict[fx.Node, Kind] = {}
        for node in self.nodes:
            looked = lookup(node)
            if looked is None:
                continue
            table, index = looked
            kind = found.setdefault(self.find(index), Kind())
            kind.tables[table] = None
            kind.lookups.add(node)
        for node in self.nodes:
            self._note(node, found)
        joined: list[Kind] = []
        for kind in found.values():
            same = [other for other in joined if other.tables.keys() & kind.tables.keys()]
            for other in same:
                joined.remove(other)
                kind.join(other)
            joined.append(kind)
        return joined

    def _note(self, node: fx.Node, found: Mapping[fx.Node, Kind]) -> None:
        """What a node makes of the kinds."""
        mine = found.get(self.find(node))
        if mine is not None:
            self._made(node, mine)
        for source in dict.fromkeys(node.all_input_nodes):
            kind = found.get(self.find(source))
            if kind is not None and node in self.needed:
                self._read(node, source, kind, mine)

    def _made(self, node: fx.Node, kind: Kind) -> None:
        """A value of a kind: where it comes from, and the numbers in it."""
        packet = packet_of(node)
        if node.op == "placeholder":
            kind.inputs.add(int(str(node.target).rpartition("_")[2]))
        elif node.op == "get_attr":
            self._constant(node, kind)
        elif self._computes(node):
            kind.others.append((node, f"{op_name(node)} makes ids"))
        elif packet in PUTS:
            self._put(node, kind)
        elif packet in MADE:
            kind.numbers.append(Number(node, MADE[packet]))
        elif packet not in MOVES and packet not in EMPTY and node.target is not operator.getitem:
            kind.others.append((node, f"{op_name(node)} makes ids"))

    def _put(self, node: fx.Node, kind: Kind) -> None:
        """Numbers that an op puts among ids."""
        packet = packet_of(node)
        given: list[Any] = [node.args[n] for n in PUTS[packet] if n < len(node.args)]
        given += [node.kwargs[name] for name in ("value", "min", "max") if name in node.kwargs]
        given = given or [PADS[packet]] if packet in PADS else given
        for number in given:
            if isinstance(number, float) and not number.is_integer():
                kind.others.append((node, f"{op_name(node)} puts {number} among ids"))
            elif isinstance(number, int | float):
                kind.numbers.append(Number(node, int(number)))

    def _computes(self, node: fx.Node) -> bool:
        """Whether an op that moves ids adds them up, or takes values that are none."""
        packet = packet_of(node)
        if "reduce" in getattr(node.target, "_overloadname", ""):
            return True
        if packet in ADDS and True in (*node.args[3:4], node.kwargs.get("accumulate")):
            return True
        places = MOVES.get(packet, ()) if packet not in FILLED else (0,)
        given = [item for n in places if n < len(node.args) for item in _flat(node.args[n])]
        return any("dtype" in item.meta and not _whole(item) for item in given)

    def _constant(self, node: fx.Node, kind: Kind) -> None:
        """Ids in a constant or a buffer."""
        name = str(node.target)
        tensor = self.record.constants.get(name, self.values.get(name))
        if tensor is None or tensor.is_meta:
            kind.others.append((node, f"{name} holds ids that are not known"))
            return
        for value in tensor.detach().unique().tolist():
            kind.numbers.append(Number(node, int(value)))

    def _read(self, node: fx.Node, source: fx.Node, kind: Kind, mine: Kind | None) -> None:
        """An op that reads values of a kind."""
        packet = packet_of(node)
        if node.op == "output":
            kind.others.append((source, "they are returned (outputs= names those that count)"))
        elif node.target is operator.getitem or packet in PLACES or packet in INDICES:
            return
        elif packet in EQUAL or packet in ORDER:
            other: list[Any] = [v for v in node.args[:2] if not isinstance(v, fx.Node)]
            if other and (not isinstance(other[0], int) or node.args[0] is not source):
                kind.others.append((node, f"{op_name(node)} compares ids with {other[0]!r}"))
            elif other:
                kind.numbers.append(Number(node, int(other[0]), ORDER.get(packet)))
            elif not all(_whole(value) for value in node.all_input_nodes):
                kind.others.append((node, f"{op_name(node)} compares ids with other numbers"))
        elif packet is aten._to_copy and node.meta["dtype"] == torch.bool:
            kind.numbers.append(Number(node, 0))
        elif (
            (packet in LIKE and source is node.args[0])
            or self._moves(node, source, kind, mine)
            or node in kind.lookups
        ):
            return
        else:
            kind.others.append((node, f"{op_name(node)} reads ids"))

    def _moves(self, node: fx.Node, source: fx.Node, kind: Kind, mine: Kind | None) -> bool:
        """Whether an op only moves what it reads."""
        return (mine is kind or "shape" not in node.meta) and any(
            source is value for value in self._sources(node)
        )


def lookup(node: fx.Node) -> tuple[str, fx.Node] | None:
    """The table that an op looks up rows of, and the index that it does so by."""
    packet, args = packet_of(node), list(node.args)
    if packet in (aten.embedding, aten._embedding_bag, aten._embedding_bag_forward_only):
        table, index = args[0], args[1]
    elif packet is aten.index_select and args[1] == 0:
        table, index = args[0], args[2]
    elif packet is aten.index and isinstance(args[1], list | tuple) and len(args[1]) == 1:
        table, index = args[0], args[1][0]
    else:
        return None
    name = _held(table)
    known = name is not None and isinstance(index, fx.Node) and _whole(index)
    return (name, index) if known and name is not None and isinstance(index, fx.Node) else None


def _held(node: object) -> str | None:
    """The tensor of the model behind a value with the same rows."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if packet_of(node) not in THROUGH or not node.args:
            return None
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.meta["shape"][:1] != node.meta["shape"][:1]:
            return None
        node = before
    if not isinstance(node, fx.Node) or node.op != "get_attr" or not node.meta["shape"]:
        return None
    return str(node.target)


def _whole(node: object) -> bool:
    """Whether a value holds whole numbers."""
    return isinstance(node, fx.Node) and node.meta.get("dtype") in _WHOLE


def _flat(value: object) -> Iterable[fx.Node]:
    if isinstance(value, fx.Node):
        return [value]
    items = value if isinstance(value, list | tuple) else ()
    return [item for item in items if isinstance(item, fx.Node)]


def _needed(record: Record, roots: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """The nodes that the outputs depend on, by what is written into the same memory as well."""
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in record.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and node in roots:
            writers.setdefault(roots[node], []).append(node)
        elif node.op == "call_function" and schema is None and node.target is not operator.getitem:
            writers.setdefault(node, []).append(node)
    found: set[fx.Node] = set()
    ends = [node for node in record.graph.nodes if node.op == "output" or _leaks(node)]
    while ends:
        node = ends.pop()
        if node not in found:
            found.add(node)
            ends += [*node.all_input_nodes, *writers.get(roots.get(node, node), ())]
    return found


def _leaks(node: fx.Node) -> bool:
    """Whether the code gets values from an op: what it does with them is not recorded."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    return "shape" not in node.meta and not node.meta.get("items")
