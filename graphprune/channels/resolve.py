"""From ties to units: decide how grids stay rectangular, then number the components."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from graphprune.ops.ids import KEPT, Alternatives, Pairs, Ties, Way, connected, varying

RECTANGLE = "a rectangular grid"
_ALIGNING = frozenset({"equal columns", "rows", "others stay", RECTANGLE})  # columns


@dataclass
class Units:
    """The component label of every id, and which components must stay."""

    labels: np.ndarray
    frozen: np.ndarray  # by label
    chosen: list[tuple[Alternatives, str]] = field(default_factory=list)
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

    def choose(self, choice: Alternatives) -> None:
        """Take the way that leaves the most removable units; the first one when equal."""
        counts = [self.free_count(choice.ids, pairs, frozen) for pairs, frozen in choice.ways]
        best = 0 if choice.firm and counts[0] > 1 else counts.index(max(counts))
        pairs, frozen = choice.ways[best]
        self.tie(pairs)
        if choice.labels[best] not in _ALIGNING:
            self.firm.append(pairs)
        for ids in frozen:
            self.freeze(ids)
        self.chosen.append((choice, choice.labels[best]))

    def rectangular(self, layer: Tensor, forbidden: frozenset[int]) -> None:
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
            ways.append((((row, layer),), ()))
        if not ways:
            self.freeze(layer)
        else:
            self.choose(Alternatives(layer, tuple(ways), (RECTANGLE,) * len(ways)))


def resolve(
    ties: Ties,
    choices: Sequence[Alternatives],
    grids: Sequence[tuple[Tensor, frozenset[int]]],
    aligned: Pairs = (),
) -> Units:
    """Settle all open decisions, the forced ones first; ``aligned`` are columns of blocks."""
    units = Units.of(ties)
    units.tie(aligned)
    for layer, forbidden in grids:
        if forbidden:
            units.rectangular(layer, forbidden)
    for choice in choices:
        units.choose(choice)
    seen: set[int] = set()
    for layer, forbidden in grids:
        if not forbidden and id(layer) not in seen:
            seen.add(id(layer))
            units.rectangular(layer, forbidden)
    return units
