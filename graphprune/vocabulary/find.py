"""Find the tables and the output layer of a vocabulary in a recorded graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, fx, nn

from graphprune.channels.analysis import Analysis, Group
from graphprune.channels.slots import Rows, Slot
from graphprune.errors import InputError
from graphprune.ops.registry import op_name
from graphprune.plan.vocabulary import Vocabulary, input_names
from graphprune.record.inputs import Call
from graphprune.record.recorder import Record
from graphprune.record.tensors import aliases, held_tensors
from graphprune.text import shorten
from graphprune.vocabulary.flow import Kind, computed, kinds

Row = tuple[str, int]
Place = tuple[str, int]  # an output, and the dimension of its logits


@dataclass(frozen=True)
class Found:
    """A vocabulary of a model.

    Attributes:
        kind: where its ids go, record by record.
        analysis: in which its rows may leave.
        group: these rows.
        vocabulary: all of its ids, and where they are read.
    """

    kind: tuple[Kind, ...]
    analysis: Analysis
    group: Group
    vocabulary: Vocabulary


class Search:
    """A model that was recorded, and what is known of its ids.

    Args:
        model: it is not touched.
        call: inputs it runs on.
        records: its recorded forward passes.
    """

    def __init__(self, model: nn.Module, call: Call, records: Sequence[Record]) -> None:
        self.model, self.call, self.records = model, call, records
        self.tensors = dict(held_tensors(model))
        self.names = input_names(call, model)
        self.kinds = [kinds(record, self.tensors) for record in records]

    def size(self, kind: Kind) -> int:
        """How many rows its tables have."""
        return int(self.tensors[next(iter(kind.tables))].shape[0])

    def told(self, kind: Kind) -> str:
        """For messages."""
        inputs = shorten([self.names[place] for place in sorted(kind.inputs)])
        return f"{shorten(kind.tables)} ({self.size(kind)} rows, read by {inputs})"

    def vocabulary(
        self,
        largest: int,
        embedding: str | None = None,
        output: str | bool | None = None,
        advice: str = "",
    ) -> Found:
        """The vocabulary that has an id ``largest``, or the one that is named.

        ``advice`` is added to what is said where there is none.

        Raises:
            InputError: there is none, or it is not clear which one; or something else reads ids.
        """
        kind = self._named(embedding) if embedding is not None else self._only(largest, advice)
        size = self.size(kind)
        uneven = [name for name in kind.tables if self.tensors[name].shape[0] != size]
        if uneven:
            raise InputError(
                f"tables that the same ids read have {size} and "
                f"{self.tensors[uneven[0]].shape[0]} rows ({shorten(kind.tables)}): a vocabulary "
                "must have one size"
            )
        same = [
            next((k for k in found if k.tables.keys() & kind.tables.keys()), Kind())
            for found in self.kinds
        ]
        for each in same:
            self._sound(each)
        tables = {(name, 0) for each in same for name in each.tables}
        lookups: frozenset[fx.Node] = frozenset().union(*(each.lookups for each in same))
        logits = Logits(self.model, self.records, tables, lookups, self._others(kind))
        rows, named = logits.rows(output)
        whole = Vocabulary(
            size,
            tuple(range(size)),
            tuple(sorted(rows)),
            tuple(self.names[place] for place in sorted(kind.inputs)),
            tuple(sorted(named)),
        )
        analysis = logits.analysis(rows)
        return Found(tuple(same), analysis, _group(analysis, rows, size), whole)

    def _only(self, largest: int, advice: str) -> Kind:
        """The kind of ids, where it is clear which one is meant."""
        found = self.kinds[0]
        for kind in computed(self.records[0], self.tensors) if not found else ():
            self._sound(kind)
        if not found:
            raise InputError(
                "no embedding table of this model is read by ids from its inputs, as recorded with "
                f"{self.call}: pass example_inputs that hold ids of tokens"
            )
        fitting = [kind for kind in found if self.size(kind) > largest]
        if not fitting:
            most = max(map(self.size, found))
            raise InputError(
                f"id {largest} is out of range: {shorten([self.told(k) for k in found])}; ids are "
                f"0 to {most - 1}{advice}"
            )
        if len(fitting) > 1:
            fitting = [k for k in fitting if self._has_logits(k)] or fitting
        if len(fitting) > 1:
            raise InputError(
                "it is not clear which table is the vocabulary: "
                f"{', '.join(self.told(kind) for kind in fitting)}; pass embedding= with the name "
                "of one"
            )
        return fitting[0]

    def _named(self, embedding: str) -> Kind:
        names = aliases(self.model)
        wanted = {names.get(name, name) for name in (embedding, f"{embedding}.weight")}
        for kind in self.kinds[0]:
            if wanted & kind.tables.keys():
                return kind
        known = shorten([self.told(kind) for kind in self.kinds[0]]) or "none"
        raise InputError(
            f"embedding={embedding!r} is no table that inputs look up rows of; there are: {known}"
        )

    def _has_logits(self, kind: Kind) -> bool:
        tables = {(name, 0) for name in kind.tables}
        logits = Logits(
            self.model, self.records, tables, frozenset(kind.lookups), self._others(kind)
        )
        return logits.tied() or bool(logits.candidates())

    def _others(self, kind: Kind) -> set[str]:
        """The tables that other ids read: they make no logits of these."""
        return {n for found in self.kinds for k in found for n in k.tables} - kind.tables.keys()

    def _sound(self, kind: Kind) -> None:
        """Raise where something reads ids in a way that other ids would change."""
        for node, what in kind.others:
            where = node.meta.get("module") or "the model"
            line = f" ({node.meta['line']})" if node.meta.get("line") else ""
            raise InputError(
                f"ids of tokens cannot change in this model: {what} in {where}{line}; pass "
                "example_inputs without labels, or give that code its result as an input"
            )


class Logits:
    """The outputs that have a logit for every id, and what makes them."""

    def __init__(
        self,
        model: nn.Module,
        records: Sequence[Record],
        tables: set[Row],
        lookups: frozenset[fx.Node],
        others: Set[str] = frozenset(),
    ) -> None:
        self.others = others
        self.model, self.records, self.tables, self.lookups = model, records, tables, lookups
        self.first = self.analysis(tables)
        tensors = dict(held_tensors(model))
        self.size = int(tensors[next(iter(tables))[0]].shape[0])

    def analysis(self, rows: Iterable[Row]) -> Analysis:
        """An analysis in which some rows may leave."""
        found = Rows(frozenset(rows), self.lookups)
        return Analysis.build(self.model, self.records, rows=found)

    @cached_property
    def labels(self) -> np.ndarray:
        """The unit of each row of the tables."""
        return _labels(self.first, next(s for s in self.first.slots if _row(s) in self.tables))

    def layers(self, analysis: Analysis) -> Iterator[tuple[str, Tensor, np.ndarray]]:
        """The outputs that count, each with what varies along it, and the units there."""
        for record in self.records:
            for place, (node, name) in enumerate(zip(record.outputs, record.output_names)):
                if record.counted is None or place in record.counted:
                    for layer in analysis.values[node].layers:
                        yield name, layer, analysis.units.labels[layer.reshape(-1).numpy()]

    def outputs(self, analysis: Analysis) -> Iterator[tuple[Place, np.ndarray]]:
        """The outputs that have a place for every id along a dimension, with the units there."""
        for name, layer, units in self.layers(analysis):
            for dim, size in enumerate(layer.shape):
                if size == self.size == layer.numel():
                    yield (name, dim), units

    def tied(self) -> bool:
        """Whether the tables themselves make logits."""
        return any((units == self.labels).all() for _, units in self.outputs(self.first))

    def candidates(self) -> dict[Row, set[Place]]:
        """The weights whose rows may be logits: nothing reads what they make but the output."""
        reads = self.first.marks.read_ids(self.first.ties.size)
        found: dict[Row, set[Place]] = {}
        for place, units in self.outputs(self.first):
            mine = np.zeros(len(self.first.units.frozen), bool)
            mine[units] = True
            slots = [s for s in self.first.slots if mine[_labels(self.first, s)].all()]
            slots = [slot for slot in slots if slot.tensor in self.first.read]
            weights = [slot for slot in slots if slot.weight]
            whole = weights and all((_labels(self.first, w) == units).all() for w in weights)
            whole = whole and not any(slot.tensor in self.others for slot in weights)
            if whole and not any(reads[slot.start] for slot in slots):
                found.setdefault(_row(weights[0]), set()).add(place)
        return found

    def rows(self, output: str | bool | None) -> tuple[set[Row], set[Place]]:
        """All tensors with a row for every id, and the outputs that have a logit for each.

        Raises:
            InputError: it is not clear which layer makes the logits.
        """
        rows = set(self.tables)
        if output is not False and not self.tied():
            rows |= self._chosen(output)
        analysis = self.analysis(rows)
        slot = next(slot for slot in analysis.slots if _row(slot) in self.tables)
        units = _labels(analysis, slot)
        places = {place for place, found in self.outputs(analysis) if (found == units).all()}
        mine = np.zeros(len(analysis.units.frozen), bool)
        mine[units] = True
        for other in analysis.slots:
            if mine[_labels(analysis, other)].any():
                rows.add(_row(other))
        self._followed(analysis, mine)
        for name, _, found in self.layers(analysis):
            if mine[found].any() and not (len(found) == self.size and (found == units).all()):
                raise InputError(
                    f"output {name or 'of the model'} holds logits of some ids, or in another "
                    "order: let it return all of them, and choose outside of the model"
                )
        return rows, places

    def _chosen(self, output: str | bool | None) -> set[Row]:
        found = self.candidates()
        others = {place for place, _ in self.outputs(self.first)}.difference(*found.values())
        if isinstance(output, str):
            names = aliases(self.model)
            wanted = {names.get(name, name) for name in (output, f"{output}.weight")}
            rows = {row for row in found if row[0] in wanted}
            if not rows:
                raise InputError(
                    f"output={output!r} is no layer with a row for each of {self.size} ids that "
                    f"makes an output alone; there are: {shorten([r[0] for r in found]) or 'none'}"
                )
            return rows
        if len(found) > 1 or (found and others):
            also = f" (output {min(others)[0]} has {self.size} channels as well)" if others else ""
            raise InputError(
                f"it is not clear which layer makes the logits of {self.size} ids: "
                f"{', '.join(sorted(row[0] for row in found))}{also}; pass output= with the name "
                "of one, or output=False where none does"
            )
        return set(found)

    def _followed(self, analysis: Analysis, mine: np.ndarray) -> None:
        """Raise where an op depends on which logits, or rows, there are."""
        labels, values = analysis.units.labels, analysis.values

        def moving(node: fx.Node) -> bool:
            return node in values and any(
                mine[labels[layer.numpy()]].any() for layer in values[node].layers
            )

        for record in analysis.records:
            for node in record.ops:
                results = [node, *node.meta.get("items", {}).values()]
                if node in self.lookups or any(map(moving, results)):
                    continue
                if any(map(moving, node.all_input_nodes)) and not _unread(node):
                    where = node.meta.get("module") or "the model"
                    line = f" ({node.meta['line']})" if node.meta.get("line") else ""
                    what = getattr(node.target, "reason", op_name(node))  # or what hides it
                    raise InputError(
                        f"what comes out of {what} in {where}{line} depends on all logits or rows "
                        "of the vocabulary: those that stay alone do not say it; pass "
                        "example_inputs without labels, or let the code return the logits"
                    )


def _unread(node: fx.Node) -> bool:
    """Whether nothing reads what an op makes of values, such as of shapes alone."""
    schema = getattr(node.target, "_schema", None)
    return not node.users and schema is not None and not schema.is_mutable


def _row(slot: Slot) -> Row:
    return slot.tensor, slot.dim


def _labels(analysis: Analysis, slot: Slot) -> np.ndarray:
    found: np.ndarray = analysis.units.labels[slot.start : slot.start + slot.size]
    return found


def _group(analysis: Analysis, rows: set[Row], size: int) -> Group:
    """The group of the rows of a vocabulary.

    Raises:
        InputError: they cannot leave; says why.
    """
    groups = [g for g in analysis.all_groups if any(row in rows for row in g.slots)]
    group = max(groups, key=lambda g: g.size)
    reason = group.reason or group.renormalising
    if reason is not None:
        raise InputError(f"rows of {group.slots[0][0]} cannot leave: {reason}")
    if group.size != size or len(groups) > 1:
        other = next(g for g in groups if g is not group or g.size != size)
        raise InputError(
            f"some rows of {group.slots[0][0]} cannot leave: {other.note or 'they are not alike'}"
        )
    return group


__all__ = ["Found", "Logits", "Search"]
