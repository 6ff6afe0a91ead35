"""What plans are made of: records of single changes, and how they compose."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from graphprune.errors import PlanError
from graphprune.record.sites import Site
from graphprune.record.sizes import Attribute


@dataclass(frozen=True)
class GroupPlan:
    """The kept channels of one group, of ``size`` channels."""

    name: str
    size: int
    kept: tuple[int, ...]
    layers: tuple[str, ...] = ()
    exact: bool = True


@dataclass(frozen=True)
class SlotPlan:
    """The kept indices along one dimension of one parameter or buffer.

    Where the groups of a convolution keep different input channels, ``kept`` holds equally many
    indices for each of several ``blocks`` of rows of the weight, block by block.
    """

    tensor: str
    dim: int
    size: int
    kept: tuple[int, ...]
    blocks: int = 1

    @property
    def width(self) -> int:
        """How many slices stay."""
        return len(self.kept) // self.blocks

    @property
    def by_block(self) -> tuple[tuple[int, ...], ...]:
        """The kept indices of every block."""
        return tuple(
            self.kept[number * self.width : (number + 1) * self.width]
            for number in range(self.blocks)
        )

    def stays(self, shape: Sequence[int]) -> Tensor:
        """For a tensor of this shape what stays: a boolean mask that broadcasts to it."""
        found = torch.zeros(self.blocks, self.size, dtype=torch.bool)
        found.scatter_(1, torch.tensor(self.kept).reshape(self.blocks, -1), True)
        sides = [1] * len(shape)
        sides[self.dim] = self.size
        if self.blocks == 1:
            return found.reshape(sides)
        rows = found.repeat_interleave(shape[0] // self.blocks, 0)
        sides[0] = shape[0]
        return rows.reshape(sides)

    def then(self, later: SlotPlan) -> SlotPlan:
        """This change followed by one of the small tensor."""
        if later.size != self.width:
            raise PlanError(
                f"the later plan expects {later.size} channels in dimension {self.dim} of "
                f"{self.tensor!r}, where {self.width} are left: make it for the small model"
            )
        blocks = math.lcm(self.blocks, later.blocks)
        mine, others = (
            [block for block in slot.by_block for _ in range(blocks // slot.blocks)]
            for slot in (self, later)
        )
        kept = tuple(own[index] for own, rest in zip(mine, others) for index in rest)
        return replace(self, kept=kept, blocks=blocks)

    def before(self, rows: SlotPlan) -> SlotPlan:
        """The blocks of a small tensor as blocks of the one whose rows were cut before.

        Whole blocks may have left: there are as many of equal height as keep those apart that stay.
        """
        left = len(rows.kept) // self.blocks
        for count in (n for n in range(self.blocks, rows.size + 1) if rows.size % n == 0):
            height = rows.size // count
            pairs = {(row // height, place // left) for place, row in enumerate(rows.kept)}
            if len(pairs) == len({part for part, _ in pairs}):
                break
        own, spare = dict(pairs), tuple(range(self.width))
        parts = [self.by_block[own[n]] if n in own else spare for n in range(count)]
        return replace(self, kept=tuple(i for part in parts for i in part), blocks=count)


@dataclass(frozen=True)
class SizeChange:
    """A size that a module remembers: ``path`` indexes into a tuple or list."""

    module: str
    name: str
    path: tuple[int, ...]
    old: int
    new: int

    @property
    def attribute(self) -> Attribute:
        """The attribute that changes."""
        return Attribute(self.module, self.name, self.path)


@dataclass(frozen=True)
class LiteralChange:
    """A number in the code that a module runs: ``path`` of the arguments given at a site."""

    module: str
    site: Site
    path: tuple[int | str, ...]
    old: float
    new: float
    digest: str = ""  # of the source of the function


@dataclass(frozen=True)
class IndexChange:
    """A buffer that permutes channels: its numbers, and which of the numbered channels stay."""

    tensor: str
    values: tuple[int, ...]
    kept: tuple[int, ...]

    def then(self, later: IndexChange) -> IndexChange:
        """This change followed by one of the small model."""
        return replace(self, kept=tuple(self.kept[channel] for channel in later.kept))


@dataclass(frozen=True)
class Rescale:
    """A weight to multiply, and the eps of its norm, so that statistics are the masked ones."""

    tensor: str
    factor: float
    module: str
    attribute: str  # empty when there is no eps to change
    old: float
    new: float


@dataclass(frozen=True)
class BiasChange:
    """Constants of removed channels, added to a vector along the outputs of their reader.

    ``values`` has an entry for each channel of the original. A vector that does not exist yet is a
    new bias: ``like`` is then the weight and its dimension that lie along the same channels.
    """

    tensor: str
    values: tuple[float, ...]
    like: tuple[str, int] | None = None


@dataclass(frozen=True)
class MergeChange:
    """Slices of a weight that are added to another slice, each times its factor.

    ``mask`` is a buffer that the weight is multiplied with; the slice ``into`` is then unmasked.
    """

    tensor: str
    dim: int
    into: int
    sources: tuple[int, ...]
    factors: tuple[float, ...]
    mask: str | None = None

    def before(self, slots: Mapping[tuple[str, int], SlotPlan]) -> MergeChange:
        """The same change of the original of a small model."""
        slot = slots.get((self.tensor, self.dim))
        if slot is None:
            return self
        sources = tuple(slot.kept[source] for source in self.sources)
        return replace(self, into=slot.kept[self.into], sources=sources)


@dataclass(frozen=True)
class Cost:
    """Parameters, MACs and bytes of parameters and buffers."""

    params: int
    macs: int
    bytes: int


FREE = Cost(0, 0, 0)


Change = TypeVar("Change", SizeChange, LiteralChange)


def compose(
    first: Sequence[Change], later: Sequence[Change], key: Callable[[Change], Hashable]
) -> tuple[Change, ...]:
    """Changes of numbers: the first old number, the last new one."""
    changes = {key(change): change for change in first}
    for change in later:
        old = changes[key(change)].old if key(change) in changes else change.old
        changes[key(change)] = replace(change, old=old)
    return tuple(changes.values())


def compose_indices(
    first: Sequence[IndexChange], later: Sequence[IndexChange]
) -> tuple[IndexChange, ...]:
    """Changes of buffers of channel numbers."""
    changes = {change.tensor: change for change in first}
    for change in later:
        known = changes.get(change.tensor)
        changes[change.tensor] = change if known is None else known.then(change)
    return tuple(changes.values())


def compose_scales(first: Sequence[Rescale], later: Sequence[Rescale]) -> tuple[Rescale, ...]:
    """Factors multiply."""
    changes = {change.tensor: change for change in first}
    for change in later:
        known = changes.get(change.tensor, change)
        factor = change.factor if known is change else known.factor * change.factor
        changes[change.tensor] = replace(change, factor=factor, old=known.old)
    return tuple(changes.values())


def compose_groups(first: Sequence[GroupPlan], later: Sequence[GroupPlan]) -> tuple[GroupPlan, ...]:
    """Groups are matched by the layers they tie; one that cannot be matched is kept as it is."""
    known = {group.layers: group for group in first}
    groups = []
    for group in later:
        old = known.get(group.layers)
        if old is not None and len(old.kept) == group.size:
            kept = tuple(old.kept[index] for index in group.kept)
            exact = group.exact and (old.exact or len(old.kept) == old.size)
            group = replace(group, name=old.name, size=old.size, kept=kept, exact=exact)
        groups.append(group)
    return tuple(groups)


def compose_biases(
    first: Sequence[BiasChange],
    later: Sequence[BiasChange],
    slots: Mapping[tuple[str, int], SlotPlan],
) -> tuple[BiasChange, ...]:
    """Constants add up; ``slots`` are what the first plan left of each dimension."""
    changes = {change.tensor: change for change in first}
    for change in later:
        known = changes.get(change.tensor, change)
        slot = slots.get(known.like or (change.tensor, 0))
        size, places = len(change.values), range(len(change.values))
        kept = places if slot is None else slot.kept
        total = [0.0] * (size if slot is None else slot.size)
        total = total if known is change else [*known.values]
        for place, value in zip(kept, change.values):
            total[place] += value
        changes[change.tensor] = BiasChange(change.tensor, tuple(total), known.like)
    return tuple(changes.values())


def compose_zeroed(slot: SlotPlan, first: Mapping[tuple[str, int], SlotPlan]) -> SlotPlan:
    """What a plan for a small model zeroes, in the original."""
    known = first.get((slot.tensor, slot.dim))
    if known is None:
        return slot
    gone = {known.kept[index] for index in set(range(slot.size)) - set(slot.kept)}
    return replace(slot, size=known.size, kept=tuple(i for i in range(known.size) if i not in gone))
