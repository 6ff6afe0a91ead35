"""Different channels in every block of a group, where no op ties the columns of the blocks.

Groups of a convolution, equal parts of a split and heads must keep equally many channels, and
groups of channels are therefore columns: channel c of every block. Where nothing but this count
ties the blocks, each may keep the channels that are best in it. Shapes, sizes and costs are those
of the columns; only the kept indices differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from graphprune.channels.analysis import Analysis, Group, Member
from graphprune.channels.resolve import Units
from graphprune.channels.slots import Slot
from graphprune.ops.calls import args_of
from graphprune.ops.ids import varying
from graphprune.plan.plan import SlotPlan

aten = torch.ops.aten


def fine_labels(graph: Analysis) -> np.ndarray:
    """The component label of every id when blocks need not keep equal columns."""
    units = Units.of(graph.ties)
    for pairs in (*graph.units.firm, graph.later.ties):
        units.tie(pairs)
    return units.labels


@dataclass(frozen=True)
class Shared:
    """A dimension of the weight of a grouped convolution that all groups share.

    ``parts`` tells for each block of rows which part of a group its columns are.
    """

    member: Member
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Blocks:
    """A group whose channels may be chosen block by block: each part holds those of one block."""

    parts: tuple[Group, ...]
    shared: tuple[Shared, ...]


def blocks(graph: Analysis, group: Group, labels: np.ndarray) -> Blocks | None:
    """The blocks of a group, if nothing but their number of channels ties them."""
    renumbered = [graph.units.labels[i.numpy()] for i in graph.marks.renumbered.values()]
    if not group.exact or any(np.isin(ids, group.units).any() for ids in renumbered):
        return None
    columns = [
        (member, place) for member in group.members for place in range(member.index.shape[1])
    ]
    table = np.stack([labels[m.slot.start + m.index[:, place]] for m, place in columns], 1)
    _, first, kinds = np.unique(table[0], return_index=True, return_inverse=True)
    if len(first) < 2 or (table != table[:, first][:, kinds]).any():
        return None
    if any(len(set(row)) < len(first) for row in table[:, first].tolist()):
        return None
    shared_slots = dict(_shared_slots(graph))
    parts, shared = [], []
    for kind in range(len(first)):
        mine = [columns[number] for number in np.flatnonzero(kinds == kind)]
        slots = {(member.slot.tensor, member.slot.dim) for member, _ in mine}
        if slots & shared_slots.keys():
            if len(mine) > 1:
                return None
            shared.append(mine[0][0])
        else:
            parts.append((first[kind], mine))
    joint = []
    for member in shared:
        rows = _rows(member, shared_slots[member.slot.tensor, member.slot.dim], labels)
        own = rows and _matched(rows, [table[:, column] for column, _ in parts])
        if not own:
            return None
        joint.append(Shared(member, own))
    groups = tuple(_part(group, mine) for _, mine in parts)
    return Blocks(groups, tuple(joint)) if len(groups) > 1 else None


def _part(group: Group, columns: Sequence[tuple[Member, int]]) -> Group:
    places: dict[int, tuple[Member, list[int]]] = {}
    for member, place in columns:
        places.setdefault(id(member), (member, []))[1].append(place)
    members = tuple(Member(m.slot, m.index[:, own], m.reads) for m, own in places.values())
    return Group(group.name, members, group.units)


Grids = list[np.ndarray]  # [groups of the convolution, channels in each]: ids


def _shared_slots(graph: Analysis) -> Iterator[tuple[tuple[str, int], Grids]]:
    """Dimension 1 of the weights of grouped convolutions, with the channels that meet it."""
    slots: dict[tuple[str, int], Grids] = {}
    for record in graph.records:
        for node in record.ops:
            args = args_of(node)
            if getattr(node.target, "overloadpacket", None) is not aten.convolution or args[8] < 2:
                continue
            if args[1].op == "get_attr":
                value: fx.Node = node if args[6] else args[0]
                layers = [i for i in graph.values[value].layers if varying(i) == {1}]
                grids = slots.setdefault((str(args[1].target), 1), [])
                grids += [layer.reshape(int(args[8]), -1).numpy() for layer in layers[:1]]
    yield from slots.items()


def _rows(member: Member, grids: Grids, labels: np.ndarray) -> list[np.ndarray]:
    """For each block of rows of a weight, the components that meet the columns of a group."""
    rows = [[labels[grid[:, member.index[:, 0]]]] for grid in grids]
    if not rows or any((other[0] != rows[0][0]).any() for other in rows):
        return []
    return list(rows[0][0])


def _matched(rows: Sequence[np.ndarray], parts: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Which part each row is; nothing when one is none of them."""
    own = [next((n for n, part in enumerate(parts) if (row == part).all()), -1) for row in rows]
    return () if -1 in own else tuple(own)


def choose(
    graph: Analysis,
    alive: np.ndarray,
    kept: Mapping[str, Sequence[int]],
    best: Callable[[Group, int], Sequence[int]],
    names: set[str],
) -> tuple[SlotPlan, ...]:
    """The slots of a plan whose blocks keep channels of their own.

    Args:
        graph: the analysed model.
        alive: for every id whether it stays, in equal columns.
        kept: the kept channels by group name.
        best: the best channels of a part of a group, given how many.
        names: the groups that may keep different channels in each block.
    """
    labels, alive = fine_labels(graph), alive.copy()
    rows: dict[Slot, np.ndarray] = {}
    for group in graph.groups:
        count = len(kept.get(group.name, group.units))
        own = blocks(graph, group, labels) if count < group.size and group.name in names else None
        if own is None:
            continue
        stays = np.zeros((len(own.parts), group.size), bool)
        for mine, part in zip(stays, own.parts):
            mine[list(best(part, count))] = True
            for member in part.members:
                alive[member.slot.start + member.index] = mine[:, None]
        for shared in own.shared:
            slot = shared.member.slot
            whole = alive[slot.start : slot.start + slot.size]
            table = rows.setdefault(slot, np.tile(whole, (len(shared.parts), 1)))
            table[:, shared.member.index[:, 0]] = stays[list(shared.parts)]
    return tuple(_slots(graph, alive, rows))


def _slots(
    graph: Analysis, alive: np.ndarray, rows: Mapping[Slot, np.ndarray]
) -> Iterator[SlotPlan]:
    for slot in graph.slots:
        keep = alive[slot.start : slot.start + slot.size]
        if slot in rows:
            places = tuple(int(place) for row in rows[slot] for place in np.flatnonzero(row))
            yield SlotPlan(slot.tensor, slot.dim, slot.size, places, len(rows[slot]))
        elif not keep.all():
            yield SlotPlan(slot.tensor, slot.dim, slot.size, tuple(np.flatnonzero(keep).tolist()))
