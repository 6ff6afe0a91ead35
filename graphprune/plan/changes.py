"""What plans are made of: records of single changes, and how they compose."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from graphprune.errors import PlanError
from graphprune.plan.coding import Runs
from graphprune.record.sites import TIMES, Site
from graphprune.record.sizes import Attribute


@dataclass(frozen=True)
class GroupPlan:
    """The kept channels of one group, of ``size`` channels."""

    name: str
    size: int
    kept: Runs
    layers: tuple[str, ...] = ()
    exact: bool = True

    @property
    def key(self) -> tuple[str, ...]:
        """Groups are matched by the layers they tie."""
        return self.layers

    def then(self, later: GroupPlan) -> GroupPlan:
        """This group cut once more; one that cannot be matched is taken as it is."""
        if len(self.kept) != later.size:
            return later
        kept = tuple(self.kept[index] for index in later.kept)
        exact = later.exact and (self.exact or len(self.kept) == self.size)
        return replace(self, kept=kept, exact=exact, layers=later.layers)


@dataclass(frozen=True)
class SlotPlan:
    """The kept indices along one dimension of one parameter or buffer.

    Where the groups of a convolution keep different input channels, ``kept`` holds equally many
    indices for each of several ``blocks`` of rows of the weight, block by block.
    """

    tensor: str
    dim: int
    size: int
    kept: Runs
    blocks: int = 1

    @property
    def key(self) -> tuple[str, int]:
        """The tensor and its dimension."""
        return self.tensor, self.dim

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
        kept = torch.tensor(self.kept, dtype=torch.int64)
        found.scatter_(1, kept.reshape(self.blocks, -1) if len(kept) else kept[None], True)
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
        for count in (n for n in divisors(rows.size) if n >= self.blocks):
            height = rows.size // count
            pairs = {(row // height, place // left) for place, row in enumerate(rows.kept)}
            if len(pairs) == len({part for part, _ in pairs}):
                break
        own, spare = dict(pairs), tuple(range(self.width))
        parts = [self.by_block[own[n]] if n in own else spare for n in range(count)]
        return replace(self, kept=tuple(i for part in parts for i in part), blocks=count)

    def zeroing(self, cut: SlotPlan | None) -> SlotPlan:
        """What this zeroes in a small model, in the one that was ``cut`` before."""
        if cut is None or cut.width != self.size:
            return self
        gone = {cut.kept[index] for index in set(range(self.size)) - set(self.kept)}
        return replace(self, size=cut.size, kept=tuple(i for i in range(cut.size) if i not in gone))


def divisors(number: int) -> list[int]:
    """All divisors, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


@dataclass(frozen=True)
class SizeChange:
    """A size that a module remembers: ``path`` leads into a tuple, list or dictionary."""

    module: str
    name: str
    path: tuple[int | str, ...]
    old: int
    new: int

    @property
    def key(self) -> Attribute:
        """The attribute that changes."""
        return Attribute(self.module, self.name, self.path)

    def then(self, later: SizeChange) -> SizeChange:
        """The first old number, the last new one; of factors, their product."""
        if self.path[-1:] != (TIMES,):
            return replace(later, old=self.old)
        part = Fraction(int(self.new * later.new), int(self.old * later.old))
        return replace(later, old=part.denominator, new=part.numerator)


@dataclass(frozen=True)
class LiteralChange:
    """A number in the code that a module runs: ``path`` of the arguments given at a site."""

    module: str
    site: Site
    path: tuple[int | str, ...]
    old: float
    new: float
    digest: str = ""  # of the source of the function

    @property
    def key(self) -> tuple[str, Site, tuple[int | str, ...]]:
        """Where the number stands."""
        return self.module, self.site, self.path

    def then(self, later: LiteralChange) -> LiteralChange:
        """The first old number, the last new one; of factors, their product."""
        if self.path[-1:] != (TIMES,):
            return replace(later, old=self.old)
        part = Fraction(int(self.new * later.new), int(self.old * later.old))
        return replace(later, old=part.denominator, new=part.numerator)


@dataclass(frozen=True)
class IndexChange:
    """A buffer that permutes channels: its numbers, and which of the numbered channels stay."""

    tensor: str
    values: tuple[int, ...]
    kept: Runs

    @property
    def key(self) -> str:
        """The buffer."""
        return self.tensor

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

    @property
    def key(self) -> str:
        """The weight."""
        return self.tensor

    def then(self, later: Rescale) -> Rescale:
        """Factors multiply."""
        return replace(later, factor=self.factor * later.factor, old=self.old)


@dataclass(frozen=True)
class NormChange:
    """A norm that goes on counting channels that left, as zeroes.

    ``of`` is how many numbers a LayerNorm counts, or how many channels a group of a GroupNorm.
    """

    module: str
    of: int

    @property
    def key(self) -> str:
        """The norm."""
        return self.module

    def then(self, later: NormChange) -> NormChange:
        """It counts what it counted first."""
        return self


@dataclass(frozen=True)
class BiasChange:
    """Constants of removed channels, added to a vector along the outputs of their reader.

    ``values`` has an entry for each channel of the original. A vector that does not exist yet is a
    new bias: ``like`` is then the weight and its dimension that lie along the same channels.
    """

    tensor: str
    values: tuple[float, ...]
    like: tuple[str, int] | None = None

    @property
    def key(self) -> str:
        """The vector."""
        return self.tensor

    def before(
        self, slots: Mapping[tuple[str, int], SlotPlan], like: tuple[str, int] | None
    ) -> BiasChange:
        """The same change of the original of a small model.

        Args:
            slots: what was left of each dimension.
            like: of the plan before, if that made the vector.
        """
        slot = slots.get(like or self.like or (self.tensor, 0))
        if slot is None:
            return self
        total = [0.0] * slot.size
        for place, value in zip(slot.kept, self.values):
            total[place] = value
        return replace(self, values=tuple(total))

    def then(self, later: BiasChange) -> BiasChange:
        """Constants add up."""
        return replace(self, values=tuple(a + b for a, b in zip(self.values, later.values)))


@dataclass(frozen=True)
class MergeChange:
    """Slices of a weight that are added to another slice, each times its factor.

    With ``shares`` their sum goes to the slices ``spread`` as well, to each times its share. The
    buffer ``mask`` is multiplied with the weight; what they are added to is then unmasked.
    """

    tensor: str
    dim: int
    into: int
    sources: tuple[int, ...]
    factors: tuple[float, ...]
    mask: str | None = None
    spread: Runs = ()  # without ``into``
    shares: tuple[float, ...] = ()  # of ``into`` first

    @property
    def targets(self) -> tuple[tuple[int, float], ...]:
        """The slices that are added to, each with its share of the sum."""
        return tuple(zip((self.into, *self.spread), self.shares or (1.0,)))

    def before(self, slots: Mapping[tuple[str, int], SlotPlan]) -> MergeChange:
        """The same change of the original of a small model."""
        slot = slots.get((self.tensor, self.dim))
        if slot is None:
            return self
        sources = tuple(slot.kept[source] for source in self.sources)
        spread = tuple(slot.kept[target] for target in self.spread)
        return replace(self, into=slot.kept[self.into], sources=sources, spread=spread)


@dataclass(frozen=True)
class PartPlan:
    """A part that leaves: a ``"block"`` or a ``"branch"``, by name."""

    name: str
    kind: str
    params: int = 0
    macs: int = 0


@dataclass(frozen=True)
class Cut:
    """A sum in the code of a module, of which one operand counts as zero.

    ``place`` counts the sums of two tensors in one call of the module; ``side`` is the operand.
    """

    module: str
    place: int
    side: int

    @property
    def key(self) -> tuple[str, int]:
        """Which sum it is."""
        return self.module, self.place

    def then(self, later: Cut) -> Cut:
        """The same operand once more; of the other one nothing would be left."""
        if later.side != self.side:
            raise PlanError(f"both operands of sum {self.place} in {self.module!r} would leave")
        return self


@dataclass(frozen=True)
class StandIn:
    """What takes the place of a module that leaves, by what it returns.

    One text for each item: ``"args.0"`` or ``"kwargs.x"`` hands on what it is given there,
    ``"zeros args.0"`` returns zeroes like it, ``"zeros args.0 in 0,1"`` with these of its sizes and
    ones, ``"none of args.0 in 1"`` something like it of size zero there, ``"empty"`` a vector
    without entries, ``"zero"`` a single zero, ``"none"`` nothing.
    ``holder`` is empty for an item alone, or ``"tuple"`` or ``"list"``.
    """

    module: str
    gives: tuple[str, ...]
    holder: str = ""

    @property
    def key(self) -> str:
        """The module that leaves."""
        return self.module

    def then(self, later: StandIn) -> StandIn:
        """The last one counts."""
        return later


@dataclass(frozen=True)
class Container:
    """A list or dictionary of modules, one for every expert, by its keys."""

    name: str
    keys: tuple[str, ...]

    def moved(self, kept: Iterable[int]) -> Iterator[tuple[str, str]]:
        """The names of modules that stay, and what they become: they take the first keys."""
        for old, new in zip(self.of(kept), self.keys):
            yield f"{self.name}.{old}", f"{self.name}.{new}"

    def of(self, experts: Iterable[int]) -> list[str]:
        """The keys of experts; the last of a mixture may have no module."""
        return [self.keys[expert] for expert in experts if expert < len(self.keys)]


@dataclass(frozen=True)
class ExpertsPlan:
    """The experts of a mixture that stay, as if the scores of the others were minus infinity.

    Attributes:
        mixture: the module that chooses among experts.
        routers: the weights whose products score them.
        size: how many experts there are.
        kept: those that stay.
        slices: the tensors that hold something for every expert, with the dimension. Each may have
            several neighbouring indices there, as slots for tokens, or only the first ones any.
        added: of these, vectors that are added to the scores.
        containers: of one module for every expert, or for the first ones.
        far: what the routers make are distances, which are infinity.
    """

    mixture: str
    routers: tuple[str, ...]
    size: int
    kept: Runs
    slices: tuple[tuple[str, int], ...]
    added: tuple[str, ...] = ()
    containers: tuple[Container, ...] = ()
    far: bool = False

    @property
    def key(self) -> str:
        """The module."""
        return self.mixture

    @property
    def gone(self) -> list[int]:
        """The experts that leave."""
        return sorted(set(range(self.size)) - set(self.kept))

    def fits(self, side: int) -> bool:
        """Whether so many indices along a dimension can be of experts: of all that leave."""
        return side % self.size == 0 or max(self.gone, default=-1) < side < self.size

    def kept_of(self, side: int) -> tuple[int, ...]:
        """What stays of so many indices along a dimension."""
        each = max(side // self.size, 1)
        kept = (expert * each + step for expert in self.kept for step in range(each))
        return tuple(index for index in kept if index < side)

    def gone_of(self, side: int) -> list[int]:
        """What leaves of so many indices along a dimension."""
        return sorted(set(range(side)) - set(self.kept_of(side)))

    def then(self, later: ExpertsPlan) -> ExpertsPlan:
        """Those that stay of the ones that stayed."""
        if later.size != len(self.kept):
            raise PlanError(
                f"the later plan expects {later.size} experts in {self.mixture!r}, where "
                f"{len(self.kept)} are left: make it for the small model"
            )
        return replace(self, kept=tuple(self.kept[expert] for expert in later.kept))

    def moved(self) -> Iterator[tuple[str, str]]:
        """The names of modules that stay, and what they become."""
        for container in self.containers:
            yield from container.moved(self.kept)


@dataclass(frozen=True)
class Cost:
    """Parameters, MACs and bytes of parameters and buffers."""

    params: int
    macs: int
    bytes: int


FREE = Cost(0, 0, 0)


class Chained(Protocol):
    """A change that a later one of the same thing can follow."""

    @property
    def key(self) -> Hashable:
        """What it changes."""

    def then(self, later: Any) -> Any:
        """This change followed by a later one."""


C = TypeVar("C", bound=Chained)


def chain(first: Iterable[C], later: Iterable[C]) -> tuple[C, ...]:
    """Changes followed by changes."""
    changes = {change.key: change for change in first}
    for change in later:
        known = changes.get(change.key)
        changes[change.key] = change if known is None else known.then(change)
    return tuple(changes.values())
