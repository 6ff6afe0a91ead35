"""The largest set of channels that can leave: what must stay is found until nothing is added."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphprune.analysis import Analysis, Group
from graphprune.dead.changes import changes, disagreeing
from graphprune.dead.passes import Pass
from graphprune.dead.readers import Blame
from graphprune.plan import BiasChange

WHOLE = "a layer keeps at least one channel"


@dataclass
class Search:
    """Which units leave, given what the passes show of the readers.

    At first all removable units leave. Each reader then names those of its inputs that must stay
    for the sake of outputs that stay, until none is named any more. What then leaves is dead: its
    readers read zeroes or constants, or leave as well.
    """

    analysis: Analysis
    passes: Sequence[Pass]
    used: frozenset[str]  # tensors that the pass in eval mode reads
    stays: np.ndarray = field(init=False)
    reasons: dict[int, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.stays = np.ones(len(self.analysis.units.frozen), bool)
        for group in self.analysis.groups:
            seen = any(member.slot.tensor in self.used for member in group.members)
            if group.exact and seen:
                self.stays[group.units] = False
            elif not seen:
                self.because(group, "eval mode does not run it")
        for group in self.analysis.all_groups:
            if group.note:
                self.because(group, group.note)

    def because(self, group: Group, text: str) -> None:
        """Why the channels of a group stay."""
        self.reasons.update(dict.fromkeys(group.units.tolist(), text))

    def run(self) -> tuple[BiasChange, ...]:
        """Find what leaves; the constants that it leaves behind."""
        while True:
            while any([self._sweep(one) for one in self.passes]):
                pass
            slots = self.slots()
            found = [
                (one, blame)
                for one, blame in disagreeing(self.passes, slots)
                if self.keep(one, blame)
            ]
            if not found and not self._fill_groups():
                return changes(self.passes[0], slots)

    def slots(self) -> np.ndarray:
        """For the id of every slice of a parameter whether it stays."""
        by_id: np.ndarray = self.stays[self.analysis.units.labels[: self.passes[0].first]]
        return by_id

    def kept(self) -> dict[str, list[int]]:
        """Kept channels by the name of their group."""
        return {g.name: np.flatnonzero(self.stays[g.units]).tolist() for g in self.analysis.groups}

    def keep(self, one: Pass, blame: Blame) -> bool:
        """Units that must stay; whether that is new."""
        labels, new = self.analysis.units.labels, False
        for slots, why in zip(one.slots_of(blame.ids), blame.why):
            for unit in np.unique(labels[slots]).tolist():
                if not self.stays[unit]:
                    self.stays[unit] = new = True
                    self.reasons[unit] = why
        return new

    def _sweep(self, one: Pass) -> bool:
        """Ask all readers of a pass, the last one first: what stays, stays for those before it."""
        alive, changed = one.alive(self.slots()), False
        for reader in reversed(one.readers):
            if self.keep(one, reader.blamed(alive)):
                alive, changed = one.alive(self.slots()), True
        return changed

    def _fill_groups(self) -> bool:
        """A channel for each group that would be left empty: one that needs few others."""
        empty = [g for g in self.analysis.groups if not self.stays[g.units].any()]
        for group in empty:
            unit = int(group.units[self._cheapest(group)])
            self.stays[unit] = True
            self.reasons[unit] = WHOLE
        return bool(empty)

    def _cheapest(self, group: Group) -> int:
        """The channel whose own weights have the fewest numbers other than zero."""
        tensors = self.passes[0].counts
        total = np.zeros(group.size, np.int64)
        for member in group.members:
            count = tensors.get((member.slot.tensor, member.slot.dim))
            if count is not None and not member.reads:
                total += count[member.index].sum(1)
        return int(total.argmin())

    def notes(self) -> tuple[str, ...]:
        """Constant outputs of layers that stay, and why."""
        one, labels = self.passes[0], self.analysis.units.labels
        counts: dict[tuple[str, str], int] = {}
        for module, ids in one.dead:
            for own in ids.T:
                units = {
                    unit for slots in one.slots_of(own) for unit in np.unique(labels[slots]).tolist()
                }
                if units and all(self.stays[unit] for unit in units):
                    reason = _first(self.reasons.get(unit) for unit in units)
                    counts[module, reason] = counts.get((module, reason), 0) + 1
        return tuple(
            f"{module or 'the model'}: {count} constant channel{'s' * (count > 1)} stay"
            f"{'s' * (count == 1)}: {reason}"
            for (module, reason), count in counts.items()
        )


def _first(reasons: Iterable[str | None]) -> str:
    return next((reason for reason in reasons if reason), "channels tied to it stay")
