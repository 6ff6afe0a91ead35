"""From ties to units: decide how grids stay rectangular, then number the components."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from graphprune.ops.ids import KEPT, Alternatives, Pairs, Ties, Way, connected, varying


@dataclass(frozen=True)
class Weights:
    """The parameters of a model as ids: what would be saved by removing some of them.

    ``dims`` holds for each parameter where the ids of its dimensions start, and how many there are;
    ``owner`` for each id which parameter it belongs to, or -1.
    """

    dims: Sequence[Sequence[tuple[int, int]]]
    owner: np.ndarray

    @classmethod
    def of(cls, dims: Sequence[Sequence[tuple[int, int]]]) -> Weights:
        """From the ranges of ids."""
        owner = np.full(max((start + size for d in dims for start, size in d), default=0), -1)
        for number, ranges in enumerate(dims):
            for start, size in ranges:
                owner[start : start + size] = number
        return cls(dims, owner)

    def saved(self, number: int, labels: np.ndarray, moving: np.ndarray) -> float:
        """How many weights of a parameter leave with half of the units that are moving.

        Half of three units as well: ways are compared at the same widths.
        """
        before = left = 1.0
        for start, size in self.dims[number]:
            units = labels[start : start + size]
            units = units[moving[units]]
            before *= size
            left *= size - (len(units) / 2 if len(np.unique(units)) > 1 else 0)
        return before - left


@dataclass
class Units:
    """The component label of every id, and which components must stay."""

    labels: np.ndarray
    frozen: np.ndarray  # by label
    chosen: list[tuple[Tensor, Way]] = field(default_factory=list)  # for which ids
    firm: list[Pairs] = field(default_factory=list)  # ties made that align no blocks

    @classmethod
    def of(cls, ties: Ties) -> Units:
        """The components of all ties collected so far."""
        labels = ties.components()
        frozen = np.zeros(int(labels.max()) + 1, bool)
        frozen[labels[KEPT]] = True
        units = cls(labels, frozen)
        for ids, _ in ties.frozen:
            units.freeze(ids)
        return units

    def copy(self) -> Units:
        """The same components, to tie and freeze more of them."""
        return Units(self.labels, self.frozen.copy(), self.chosen, self.firm)

    def freeze(self, ids: Tensor) -> None:
        """Ids that must stay."""
        self.frozen[self.labels[ids.reshape(-1).numpy()]] = True

    def stay(self, ids: Tensor) -> bool:
        """Whether all of some ids are frozen."""
        return bool(self.frozen[self.labels[ids.numpy()]].all())

    def _merged(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """The labels touched by new ties, and the label each of them becomes."""
        left, right = [], []
        for a, b in pairs:
            a, b = torch.broadcast_tensors(a, b)
            left.append(self.labels[a.reshape(-1).numpy()])
            right.append(self.labels[b.reshape(-1).numpy()])
        touched, index = np.unique(np.concatenate(left + right), return_inverse=True)
        half = len(index) // 2
        component = connected(index[:half], index[half:], len(touched))
        representative = np.zeros(component.max() + 1, np.int64)
        representative[component[::-1]] = touched[::-1]  # the smallest label of each component
        return touched, representative[component]

    def tie(self, pairs: Pairs) -> None:
        """Merge components."""
        if not pairs:
            return
        touched, target = self._merged(pairs)
        if (touched == target).all():
            return
        np.logical_or.at(self.frozen, target, self.frozen[touched])
        mapping = np.arange(len(self.frozen))
        mapping[touched] = target
        self.labels = mapping[self.labels]

    def free_count(self, ids: Tensor, pairs: Pairs, frozen: Iterable[Tensor]) -> int:
        """How many removable units would remain among ``ids`` after more ties."""
        touched, target = self._merged(pairs or ((ids, ids),))

        def after(labels: np.ndarray) -> np.ndarray:
            labels = np.unique(labels)
            at = np.minimum(np.searchsorted(touched, labels), len(touched) - 1)
            return np.unique(np.where(touched[at] == labels, target[at], labels))

        mine = after(self.labels[ids.reshape(-1).numpy()])
        stuck = [target[self.frozen[touched]], mine[self.frozen[mine]]]
        stuck += [after(self.labels[item.reshape(-1).numpy()]) for item in frozen]
        return len(np.setdiff1d(mine, np.concatenate(stuck)))

    def counts(self, choice: Alternatives) -> list[int]:
        """How many removable units each way would leave."""
        return [self.free_count(choice.ids, way.ties, way.frozen) for way in choice.ways]

    def choose(self, choice: Alternatives, weights: Weights) -> None:
        """Take the way that leaves the most removable units; the first one when equal."""
        counts = self.counts(choice)
        best = 0 if choice.firm and counts[0] > 1 else counts.index(max(counts))
        if choice.lightest and sum(count > 1 for count in counts) > 1:
            saved = [self._saved(choice, way, weights) for way in choice.ways]
            best = max(range(len(saved)), key=lambda place: (saved[place], counts[place]))
        way = choice.ways[best]
        self._take(way)
        if not way.aligns:
            self.firm.append(way.ties)
        self.chosen.append((choice.ids, way))

    def _take(self, way: Way) -> None:
        self.tie(way.ties)
        for ids in way.frozen:
            self.freeze(ids)

    def _saved(self, choice: Alternatives, way: Way, weights: Weights) -> float:
        """How many weights leave with half of the units that a choice is about."""
        tried = self.copy()
        tried._take(way)
        mine = np.zeros(len(tried.frozen), bool)
        mine[tried.labels[choice.ids.reshape(-1).numpy()]] = True
        mine &= ~tried.frozen
        return sum(
            weights.saved(number, tried.labels, mine)
            for number in np.unique(weights.owner[mine[tried.labels[: len(weights.owner)]]])
            if number >= 0
        )

    def rectangular(self, layer: Tensor, forbidden: frozenset[int], weights: Weights) -> None:
        """Make the labels of a grid vary along one dimension only."""
        dims = sorted(varying(layer))
        grid = self.labels[layer.numpy()]
        for dim in dims:
            first = np.take(grid, [0], axis=dim)
            if (grid == first).all():
                layer, grid = layer.narrow(dim, 0, 1), first
        dims = sorted(varying(layer))
        if len(dims) < 2 and not set(dims) & forbidden:
            return
        ways: list[Way] = []
        for keep in dims:
            if keep in forbidden:
                continue
            row = layer
            for dim in dims:
                if dim != keep:
                    row = row.narrow(dim, 0, 1)
            ways.append(Way(((row, layer),), aligns=True))
        if not ways:
            self.freeze(layer)
        else:
            self.choose(Alternatives(layer, tuple(ways)), weights)


def resolve(
    ties: Ties,
    choices: Sequence[Alternatives],
    grids: Sequence[tuple[Tensor, frozenset[int]]],
    aligned: Pairs = (),
    dims: Sequence[Sequence[tuple[int, int]]] = (),
) -> Units:
    """Settle all open decisions, first those of which one way alone leaves anything.

    Args:
        ties: what is tied and frozen in any case.
        choices: decisions that rules left open.
        grids: layers that vary along several dimensions, and those along which they may not be cut.
        aligned: columns of blocks that must stay equally large.
        dims: for each parameter the first id and the size of its dimensions.
    """
    units, weights = Units.of(ties), Weights.of(dims)
    units.tie(aligned)
    for layer, forbidden in grids:
        if forbidden:
            units.rectangular(layer, forbidden, weights)
    several = []
    for choice in choices:
        if sum(count > 0 for count in units.counts(choice)) == 1:
            units.choose(choice, weights)
        else:
            several.append(choice)
    for choice in several:
        units.choose(choice, weights)
    seen: set[int] = set()
    for layer, forbidden in grids:
        if not forbidden and id(layer) not in seen:
            seen.add(id(layer))
            units.rectangular(layer, forbidden, weights)
    return units
