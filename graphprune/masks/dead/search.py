"""The largest set of channels that can leave: what must stay is found until nothing is added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphprune.channels.analysis import Analysis, Group
from graphprune.masks.dead.changes import changes
from graphprune.masks.dead.merging import merges, representatives
from graphprune.masks.dead.passes import Pass
from graphprune.masks.dead.readers import Blame
from graphprune.plan.plan import BiasChange, MergeChange
from graphprune.text import shorten

WHOLE = "a layer keeps at least one channel"
TIED = "tied to channels that stay"


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
    rescaled: Callable[[Group], bool]  # whether statistics can be made those with zeroes
    stays: np.ndarray = field(init=False)
    reasons: dict[int, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.stays = np.ones(len(self.analysis.units.frozen), bool)
        for group in self.analysis.groups:
            seen = any(member.slot.tensor in self.used for member in group.members)
            if seen and (group.exact or self.rescaled(group)):
                self.stays[group.units] = False
            elif not seen:
                self.because(group, "eval mode does not run it")
        for group in self.analysis.all_groups:
            if group.note:
                self.because(group, group.note)

    def because(self, group: Group, text: str) -> None:
        """Why the channels of a group stay."""
        self.reasons.update(dict.fromkeys(group.units.tolist(), text))

    def run(self) -> tuple[tuple[BiasChange, ...], tuple[MergeChange, ...]]:
        """Find what leaves; the constants that it leaves behind."""
        while True:
            while any([self._sweep(one) for one in self.passes]):
                pass
            if not self._stand_in() and not self._fill_groups():
                one, slots = self.passes[0], self.slots()
                return changes(one, slots), merges(one, slots)

    def _stand_in(self) -> bool:
        """A channel for each weight that others are merged into."""
        slots = self.slots()
        found = [(one, blame) for one in self.passes for blame in representatives(one, slots)]
        return any([self.keep(one, blame) for one, blame in found])

    def slots(self) -> np.ndarray:
        """For the id of every slice of a parameter whether it stays."""
        by_id: np.ndarray = self.stays[self.analysis.units.labels[: self.passes[0].first]]
        return by_id

    def kept(self) -> dict[str, tuple[int, ...]]:
        """Kept channels by the name of their group."""
        groups = self.analysis.groups
        return {g.name: tuple(np.flatnonzero(self.stays[g.units]).tolist()) for g in groups}

    def keep(self, one: Pass, blame: Blame) -> bool:
        """Units that must stay; whether that is new."""
        labels, new = self.analysis.units.labels, False
        for index, why in zip(blame.ids.tolist(), blame.why):
            for unit in np.unique(labels[one.slots_of(index)]).tolist():
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
        """Constant outputs of layers that stay, and why; layers that write the same are as one."""
        one, labels = self.passes[0], self.analysis.units.labels
        layers: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for module, ids in one.dead:
            staying: dict[str, list[int]] = {}
            for own in ids.T:
                places = np.concatenate([one.slots_of(index) for index in own.tolist()])
                units = np.unique(labels[places]).tolist()
                if units and self.stays[units].all():
                    reason = next((self.reasons[u] for u in units if u in self.reasons), TIED)
                    staying.setdefault(reason, []).append(units[0])
            for reason, found in staying.items():
                layers.setdefault((reason, tuple(found)), []).append(module or "the model")
        return tuple(
            f"{shorten(dict.fromkeys(names), 2)}: {len(units)} constant "
            f"channel{'s stay' if len(units) > 1 else ' stays'}: {reason}"
            for (reason, units), names in layers.items()
        )

    def approximated(self) -> tuple[str, ...]:
        """Constants that are not the same at all places, of channels that leave all the same."""
        one, notes = self.passes[0], []
        alive = one.alive(self.slots())
        for reader in one.sinks:
            taken = reader.gone(alive) & reader.affine.uneven
            count = int((taken & reader.affine.read_by(reader.kept(alive))).sum())
            if count:
                name = reader.node.meta.get("module") or "the model"
                plural = "s" * (count > 1)
                text = f"the constant{plural} of {count} channel{plural} from the middle"
                notes.append(f"{name}: takes {text}, which is not exact")
        return tuple(notes)
