"""Which channels of a model live and die together: units, groups, and shapes after pruning."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from graphprune.channels.resolve import Units, resolve
from graphprune.channels.slots import Rows, Slot, integers_in, slots_of
from graphprune.ops.ids import Pairs, Shape, Ties
from graphprune.ops.marks import Marks, Statistics
from graphprune.ops.values import Natural, Reason, Value
from graphprune.ops.walk import Walk
from graphprune.plan.vocabulary import Vocabulary
from graphprune.record.layers import remembered
from graphprune.record.recorder import Record
from graphprune.record.sizes import Comparison, attributes, expression
from graphprune.record.tensors import (
    aliases,
    fingerprint,
    held_tensors,
    named_modules,
    named_tensors,
    shared_by_modules,
)

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_PROJECTION = re.compile(r"\bweight_hr_l\d+(_reverse)?$")  # [projected, hidden] of an LSTM


@dataclass(frozen=True)
class Member:
    """A slot as part of a group: ``index[i]`` are its positions that belong to channel i."""

    slot: Slot
    index: np.ndarray  # [channels, positions per channel]
    reads: bool


@dataclass(frozen=True)
class Group:
    """Channels with the same slots: a row of the report, and what is scored.

    ``exact`` is false when removing channels changes the statistics of a norm (then the
    reference takes them over the kept channels).
    """

    name: str
    members: tuple[Member, ...]
    units: np.ndarray  # labels of the units, in the order of the channels
    reason: Reason | None = None  # why it is frozen
    renormalising: Reason | None = None
    limit: str = ""  # what numbers of its channels a layer does not take

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.units)

    @property
    def exact(self) -> bool:
        """Whether channels leave without changing statistics."""
        return self.renormalising is None

    @property
    def frozen(self) -> bool:
        """Whether the channels must stay."""
        return self.reason is not None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the modules whose parameters the group ties, in order.

        A parameter of the model itself stands there by its own name.
        """
        return tuple(dict.fromkeys(member.slot.layer for member in self.members))

    @property
    def slots(self) -> tuple[tuple[str, int], ...]:
        """Names of the tensors and the dimensions that the group ties, in order."""
        return tuple((member.slot.tensor, member.slot.dim) for member in self.members)

    @property
    def kind(self) -> str:
        """For tables: exact, renormalising or frozen."""
        return "frozen" if self.frozen else "exact" if self.exact else "renormalising"

    @property
    def note(self) -> str:
        """Why it is frozen or renormalising, and which numbers of channels it cannot have."""
        return str(self.reason or self.renormalising or self.limit)


@dataclass(frozen=True)
class Later:
    """What was tied and frozen for reasons found after the walk, and of what two stay."""

    ties: Pairs = ()
    frozen: tuple[tuple[Tensor, Reason], ...] = ()
    several: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Analysis:
    """The channel ids of recorded forward passes, resolved into groups.

    It never changes: what is found out later makes another one, see :meth:`derived`.
    """

    architecture: str
    records: tuple[Record, ...]
    values: Mapping[fx.Node, Value]
    slots: tuple[Slot, ...]
    names: Mapping[str, str]
    shared: frozenset[str]  # tensors that several modules hold
    units: Units
    ties: Ties = field(repr=False)
    marks: Marks = field(repr=False)  # what else the rules of the ops said of channels
    attention: str  # which channels of attention leave: see ``trace``
    own: int  # how many ids belong to parameters: they come first
    integers: Mapping[str, Tensor] = field(repr=False)  # vectors of them in buffers
    shapes: Mapping[str, tuple[Shape, int, bool]] = field(repr=False)
    remembered: tuple[Comparison, ...] = ()  # sizes of torch's layers that code of the model reads
    later: Later = Later()
    vocabulary: Vocabulary | None = None  # of which ids leave with the rows
    _last: list[Pruned] = field(default_factory=list, repr=False)  # what was asked for last

    @classmethod
    def build(
        cls,
        model: nn.Module,
        records: Sequence[Record],
        attention: str = "heads",
        rows: Rows | None = None,
    ) -> Analysis:
        """Analyse recorded forward passes of a model; see ``trace`` for ``attention``."""
        turned: set[fx.Node] = set()  # where blocks leave, as nothing in them can
        while True:
            slots, walk, units = _walked(model, records, attention, turned, rows)
            stuck = {node for node, ids in walk.crossed if units.stay(ids)} - turned
            if not stuck:
                break
            turned |= stuck
        marks = walk.marks
        for ids, way in units.chosen:
            if isinstance(way.statistics, Statistics):
                marks.statistics.append(way.statistics._replace(ids=ids))
            if way.reason is not None:
                for stays in way.frozen:
                    walk.ties.freeze(stays, way.reason)
        parameters = {name for name, _ in model.named_parameters()}
        found = cls(
            fingerprint(model),
            tuple(records),
            walk.values,
            slots,
            aliases(model),
            shared_by_modules(model),
            units,
            walk.ties,
            marks,
            attention,
            walk.first_fresh,
            integers_in(named_tensors(model)),
            {
                name: (tuple(t.shape), t.element_size(), name in parameters)
                for name, t in held_tensors(model)
            },
            tuple(_remembered(model, records)),
        )
        return found.derived(frozen=[*_tables(found)])

    def derived(
        self,
        ties: Pairs = (),
        frozen: Sequence[tuple[Tensor, Reason]] = (),
        several: Sequence[Tensor] = (),
    ) -> Analysis:
        """An analysis in which more is tied and frozen, for reasons found after the walk.

        Of the ids ``several`` at least two stay.
        """
        units = self.units.copy()
        units.tie(ties)
        for ids, _ in frozen:
            units.freeze(ids)
        later = Later(
            (*self.later.ties, *ties),
            (*self.later.frozen, *frozen),
            (*self.later.several, *several),
        )
        return replace(self, units=units, later=later)

    def stays(self, ids: Tensor) -> bool:
        """Whether all of some ids are frozen."""
        return self.units.stay(ids)

    def is_own(self, ids: Tensor) -> bool:
        """Whether some ids belong to parameters, or live and die with those that do."""
        return bool(self._owned[self.units.labels[ids.numpy()]].any())

    @cached_property
    def _owned(self) -> np.ndarray:
        owned = np.zeros(len(self.units.frozen), bool)
        owned[self.units.labels[: self.own]] = True
        return owned

    @cached_property
    def all_groups(self) -> tuple[Group, ...]:
        """All groups, frozen ones included."""
        return tuple(_groups(self))

    @cached_property
    def read(self) -> frozenset[str]:
        """The parameters and buffers that some op reads."""
        nodes = (node for record in self.records for node in record.graph.nodes)
        return frozenset(str(node.target) for node in nodes if node.op == "get_attr")

    @cached_property
    def unread(self) -> dict[str, int]:
        """How many parameters no op reads, by the tensor that holds them: they stay."""
        return {
            name: math.prod(shape)
            for name, (shape, _, parameter) in self.shapes.items()
            if parameter and name not in self.read
        }

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups whose channels can be removed."""
        return tuple(group for group in self.all_groups if not group.frozen)

    def alive(self, kept: Mapping[str, Sequence[int]]) -> np.ndarray:
        """For every id whether it stays, given the kept channels by group name."""
        stays = np.ones(len(self.units.frozen), bool)
        for group in self.groups:
            if group.name in kept:
                stays[group.units] = False
                stays[group.units[list(kept[group.name])]] = True
        by_id: np.ndarray = stays[self.units.labels]
        return by_id

    def pruned(self, alive: np.ndarray) -> Pruned:
        """What is left of every recorded value when these ids stay."""
        if not self._last or self._last[0].alive is not alive:
            self._last[:] = [Pruned(self.values, alive)]
        return self._last[0]

    def positions(self, node: fx.Node, dim: int, alive: np.ndarray) -> np.ndarray:
        """For each position of a value along ``dim`` whether it stays."""
        return self.pruned(alive).positions(node, dim)

    def shape(self, node: fx.Node, alive: np.ndarray) -> Shape:
        """The shape of a value after pruning."""
        return self.pruned(alive).shape(node)


class Pruned:
    """What is left of recorded values: positions and shapes, for one choice of ids.

    Args:
        values: the layers of every recorded value.
        alive: for every id whether it stays; it must not change any more.
    """

    def __init__(self, values: Mapping[fx.Node, Value], alive: np.ndarray) -> None:
        self.values, self.alive = values, alive
        self._lines: dict[tuple[int, int], np.ndarray] = {}  # by layer, which ``values`` keeps
        self._shapes: dict[fx.Node, Shape] = {}

    def positions(self, node: fx.Node, dim: int) -> np.ndarray:
        """For each position of a value along ``dim`` whether it stays."""
        value = self.values[node]
        dim %= value.ndim
        keep: np.ndarray | None = None
        for layer in value.layers:
            if layer.shape[dim] > 1:
                line = self._line(layer, dim)
                keep = line if keep is None else keep & line
        return np.ones(value.shape[dim], bool) if keep is None else keep

    def shape(self, node: fx.Node) -> Shape:
        """The shape of a value."""
        known = self._shapes.get(node)
        if known is None:
            value = self.values[node]
            sizes = list(value.shape)
            for dim in {d for layer in value.layers for d, n in enumerate(layer.shape) if n > 1}:
                sizes[dim] = int(self.positions(node, dim).sum())
            known = self._shapes[node] = tuple(sizes)
        return known

    def _line(self, layer: Tensor, dim: int) -> np.ndarray:
        key = id(layer), dim
        if key not in self._lines:
            rest = tuple(d for d in range(layer.dim()) if d != dim)
            empty = any(layer.shape[d] == 0 for d in rest)  # no id says which positions stay
            line = np.ones(layer.shape[dim], bool)
            self._lines[key] = line if empty else self.alive[layer.numpy()].any(axis=rest)
        return self._lines[key]


def _walked(
    model: nn.Module,
    records: Sequence[Record],
    attention: str,
    turned: Set[fx.Node],
    rows: Rows | None,
) -> tuple[tuple[Slot, ...], Walk, Units]:
    """The walk over recorded forward passes, and the units that it leaves."""
    ties = Ties()
    slots, values = slots_of(model, ties)
    walk = Walk(ties, values.get, attention, integers_in(named_tensors(model)).get)
    walk.by_blocks = lambda node, layer, dim: node in turned
    if rows is not None:
        rows.free(walk, slots)
    for record in records:  # ids made from here on belong to no parameter
        walk.run(record.graph)
    _tie_unread(model, records, values, ties)
    marks = walk.marks
    units = resolve(ties, marks.choices, marks.grids, marks.aligned, _weights(slots))
    return slots, walk, units


def _tie_unread(
    model: nn.Module, records: Sequence[Record], values: Mapping[str, Value], ties: Ties
) -> None:
    """What nothing reads of a layer of torch goes with what is read of it: the layer fits itself.

    A bias goes with the outputs of its weight, the vectors of a norm with each other.
    """
    read = {str(n.target) for r in records for n in r.graph.nodes if n.op == "get_attr"}

    def tie(name: str, others: Sequence[Tensor]) -> None:
        for layer, other in zip(values[name].layers, others):
            if layer.numel() == other.numel():
                ties.tie(layer.reshape(-1), other.reshape(-1))

    for name, module in named_modules(model):
        leaves = (f"{name}.{leaf}".lstrip(".") for leaf in (*module._parameters, *module._buffers))
        mine = [leaf for leaf in leaves if leaf in values]
        seen = [leaf for leaf in mine if leaf in read]
        if not seen or len(seen) == len(mine):
            continue
        if isinstance(module, _NORMS):
            for leaf in mine:
                if leaf not in read:
                    tie(leaf, values[seen[0]].layers)
        elif isinstance(module, nn.Linear | nn.Bilinear | _ConvNd) and len(mine) == 2:
            weight, bias = mine
            turned = isinstance(module, _ConvNd) and module.transposed
            tie(bias, values[weight].on(1 if turned else 0)[:1])


def _remembered(model: nn.Module, records: Sequence[Record]) -> Iterator[Comparison]:
    for record in records:
        read = [side for c in record.comparisons for side in (c.left, c.right)]
        for node in record.graph.nodes:
            read += [expression(number.value) for number in node.meta.get("numbers", ())]
        owners = {leaf.module for item in read for leaf in attributes(item)}
        nodes = {str(node.target): node for node in record.graph.nodes if node.op == "get_attr"}
        yield from remembered(model, owners, nodes) if owners else ()


def _tables(graph: Analysis) -> Iterator[tuple[Tensor, Reason]]:
    """Columns that only a constant makes and that mean something, coordinates say: they stay.

    A forward may compute the same table anew for other inputs. A constant that takes part in a
    product as weights do makes channels like a parameter.
    """
    used = {str(n.target) for r in graph.records for n in r.graph.nodes if n.op == "get_attr"}
    slots = [slot for slot in graph.slots if slot.tensor in used]
    if all(slot.parameter for slot in slots):
        return
    makes = np.zeros(len(graph.units.labels), bool)
    for slot in slots:
        makes[slot.start : slot.start + slot.size] = slot.parameter
    for ids in graph.marks.reads:
        makes[ids.numpy()] = False
    for ids in graph.marks.written:
        makes[ids.numpy()] = True
    made = np.zeros(len(graph.units.frozen), bool)
    made[graph.units.labels[makes]] = True
    for slot in slots:
        if slot.parameter:
            continue
        ids = torch.arange(slot.start, slot.start + slot.size)
        alone = ids[~made[graph.units.labels[ids.numpy()]]]
        if len(alone):
            yield alone, Reason("columns of a constant table", slot.module)


def _weights(slots: Sequence[Slot]) -> list[list[tuple[int, int]]]:
    """For each parameter the first id and the size of its dimensions."""
    dims: dict[str, list[tuple[int, int]]] = {}
    for slot in slots:
        if slot.parameter:
            dims.setdefault(slot.tensor, []).append((slot.start, slot.size))
    return list(dims.values())


def _groups(graph: Analysis) -> Iterator[Group]:
    """Units with the same multiset of slots form a group."""
    units, slots = graph.units, graph.slots
    numbers = [number for number, slot in enumerate(slots) if slot.tensor in graph.read]
    if not numbers:
        return
    owner = np.repeat(numbers, [slots[n].size for n in numbers])
    position = np.concatenate([np.arange(slots[n].size) for n in numbers])
    label = np.concatenate(
        [units.labels[slots[n].start : slots[n].start + slots[n].size] for n in numbers]
    )
    keys = np.random.default_rng(0).integers(1, 2**63, len(slots), dtype=np.uint64)
    signature = np.zeros(len(units.frozen), np.uint64)
    np.add.at(signature, label, keys[owner])
    reasons = _first_reason(units, [*graph.ties.frozen, *graph.later.frozen])
    changes = _first_reason(units, [mark[:2] for mark in graph.marks.statistics])
    reads = graph.marks.read_ids(graph.ties.size)
    signature[units.frozen] ^= np.uint64(1)
    order = np.lexsort((position, owner, label, signature[label]))
    owner, position, label = owner[order], position[order], label[order]
    placed: list[tuple[int, Group]] = []
    bounds = np.flatnonzero(np.diff(signature[label])) + 1
    starts = np.concatenate([[0], bounds, [len(label)]])
    for start, stop in itertools.pairwise(starts.tolist()):
        part = slice(start, stop)
        labels, counts = np.unique(label[part], return_counts=True)
        per_unit = int(counts[0])
        assert (counts == per_unit).all(), "two signatures with the same key"
        owners = owner[part].reshape(len(labels), per_unit)
        places = position[part].reshape(len(labels), per_unit)
        members = tuple(
            Member(slots[n], places[:, owners[0] == n], bool(reads[slots[n].start]))
            for n in dict.fromkeys(owners[0].tolist())
        )
        by_place = np.argsort(members[0].index[:, 0], kind="stable")
        members = tuple(Member(m.slot, m.index[by_place], m.reads) for m in members)
        first = int(labels[by_place[0]])
        reason = reasons.get(first, Reason("tied to channels that always stay"))
        if units.frozen[first] and reason.text is Natural.KERNEL:
            continue
        group = Group(
            "",
            members,
            labels[by_place],
            reason if units.frozen[first] else None,
            changes.get(first),
        )
        placed.append((members[0].slot.start + int(members[0].index[by_place[0], 0]), group))
    placed.sort(key=lambda item: item[0])
    for number, (_, group) in enumerate(placed):
        limit = "" if group.frozen else _limit(group)
        yield replace(group, name=f"g{number}", limit=limit)


def _limit(group: Group) -> str:
    """Torch takes an LSTM whose projection is as wide as its state for one without."""
    found = (m.slot for m in group.members if _PROJECTION.search(m.slot.tensor))
    layer = next((slot.layer for slot in found if slot.dim == 1), None)
    return "" if layer is None else f"never as many channels as the projection of {layer} keeps"


def _first_reason(units: Units, marked: Sequence[tuple[Any, Any]]) -> dict[int, Reason]:
    reasons: dict[int, Reason] = {}
    for ids, reason in reversed(marked):
        for label in np.unique(units.labels[ids.reshape(-1).numpy()]).tolist():
            reasons[label] = reason
    return reasons
