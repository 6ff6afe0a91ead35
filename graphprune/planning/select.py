"""From scores to kept channels. Knows neither criteria nor layers.

Every channel has a *level*: the fraction of removed channels at which its turn comes, ranked within
its pool of groups. Channels sorted by level make a path from the whole model to the smallest one
allowed; a ratio is a point on it, and so is, but for the last few channels, a budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Kept = dict[str, tuple[int, ...]]
Counts = np.ndarray  # [groups]
Tightness = Callable[[Counts], float]  # above 1: over the budget

_COARSE = 4000  # paths of fewer steps are worth trying several ways
_FURTHER = (0, 1, 2, 4, 8)  # steps down the path from which to fill up
_BARRED = 4  # lanes that are left out in turn when filling up


@dataclass(frozen=True)
class Lane:
    """Groups that keep equally many channels, and how many these may be.

    ``groups`` are their numbers, ``counts`` the allowed kept counts, decreasing, and ``levels``
    those of their channels in the order in which they leave. Groups of other sizes keep the same
    shares: ``table`` then holds the counts of all, and ``counts`` those of the first.
    """

    groups: tuple[int, ...]
    counts: tuple[int, ...]
    levels: np.ndarray  # [channels of a group]
    table: tuple[tuple[int, ...], ...] = ()  # [allowed counts, groups]

    def kept(self, step: int) -> tuple[int, ...]:
        """How many channels each of its groups keeps after some steps."""
        return self.table[step] if self.table else (self.counts[step],) * len(self.groups)

    def steps(self) -> np.ndarray:
        """The level at which each next allowed count becomes the nearest one."""
        size = len(self.levels)
        middles = (np.array(self.counts[:-1]) + np.array(self.counts[1:])) / 2
        removed = np.ceil(size - middles).astype(int)
        return self.levels[np.maximum(removed, 1) - 1]


@dataclass(frozen=True)
class Path:
    """Steps from the largest to the smallest model allowed; a place is how many were taken."""

    lanes: tuple[Lane, ...]
    full: Counts

    @cached_property
    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """The lane of every step, and its level, in the order in which they are taken."""
        steps = [lane.steps() for lane in self.lanes]
        lanes = np.repeat(np.arange(len(steps)), [len(levels) for levels in steps])
        levels = np.concatenate(steps) if steps else np.zeros(0)
        order = np.argsort(levels, kind="stable")
        return lanes[order], levels[order]

    def at(self, place: int) -> np.ndarray:
        """How many steps every lane has taken: [lanes]."""
        return np.bincount(self.order[0][:place], minlength=len(self.lanes))

    def counts(self, taken: Sequence[int] | np.ndarray) -> Counts:
        """The kept counts of all groups."""
        counts = self.full.copy()
        for lane, steps in zip(self.lanes, taken, strict=True):
            counts[list(lane.groups)] = lane.kept(steps)
        return counts

    def level(self, level: float) -> Counts:
        """The kept counts where all steps up to a level are taken."""
        place = int(np.searchsorted(self.order[1], level + 1e-9, side="right"))
        return self.counts(self.at(place))

    def fit(self, tightness: Tightness) -> Counts | None:
        """The kept counts of a model within a budget; ``None`` when there are none on the path.

        The path is left at its first place within the budget; what remains of the budget is
        given to the best of the removed channels, as long as they fit. A larger budget never
        gives a smaller cost: all ways tried are the same ones for every budget, each of them
        takes a first step that fits, and the best result counts.
        """
        low, high = -1, len(self.order[0])
        if tightness(self.counts(self.at(high))) > 1:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if tightness(self.counts(self.at(middle))) > 1:
                low = middle
            else:
                high = middle
        coarse = len(self.order[0]) < _COARSE
        best: tuple[float, Counts] | None = None
        for further in _FURTHER if coarse else _FURTHER[:1]:
            place = min(high + further, len(self.order[0]))
            last = dict.fromkeys(self.order[0][:place][::-1].tolist())
            for barred in (None, *list(last)[:_BARRED]) if coarse else (None,):
                counts = self._filled(place, tightness, barred)
                reached = tightness(counts)
                if best is None or reached > best[0]:
                    best = reached, counts
        assert best is not None
        return best[1]

    def _filled(self, place: int, tightness: Tightness, barred: int | None) -> Counts:
        """Take back steps while the budget allows, the latest first, but none of one lane."""
        taken = self.at(place)
        counts = self.counts(taken)
        closed = np.zeros(len(self.lanes), bool)
        if barred is not None:
            closed[barred] = True
        for number in self.order[0][:place][::-1]:
            if closed[number]:
                continue
            lane = self.lanes[number]
            groups = list(lane.groups)
            counts[groups] = lane.kept(taken[number] - 1)
            if tightness(counts) > 1:
                counts[groups] = lane.kept(taken[number])
                closed[number] = True
            else:
                taken[number] -= 1
        return counts


def levels(
    scores: Mapping[str, Tensor], pools: Mapping[str, Hashable] | None = None
) -> dict[str, np.ndarray]:
    """At which fraction of removed channels of its pool each channel leaves.

    Args:
        scores: one score per channel, by group name.
        pools: the pool of each group; each group is one of its own when absent.

    Returns:
        Increasing levels in (0, 1] by group name; infinite for the last channel of a group.
    """
    members: dict[Hashable, list[str]] = {}
    for name in scores:
        members.setdefault(name if pools is None else pools[name], []).append(name)
    found = {}
    for names in members.values():
        parts = []
        for name in names:
            part = scores[name].double().clone()
            part[int(part.argmax())] = torch.inf  # no group loses its last channel
            parts.append(part)
        ranked = torch.cat(parts).flip(0)  # equal scores keep the earlier channel
        rank = torch.empty_like(ranked)
        order = torch.argsort(ranked, stable=True)
        rank[order] = torch.arange(1, len(ranked) + 1, dtype=rank.dtype)
        rank = (rank / len(ranked)).masked_fill(ranked.isinf(), torch.inf).flip(0)
        for name, part in zip(names, rank.split([len(part) for part in parts])):
            found[name] = part.sort().values.numpy()
    return found


def allowed(
    size: int, least: float, most: float, multiple: int, finer: bool = False
) -> tuple[int, ...]:
    """The counts a group may keep, decreasing.

    Args:
        size: its channels.
        least: the smallest fraction.
        most: the largest fraction.
        multiple: counts are multiples of this, or the whole group where there is none.
        finer: the smallest count, and halves of the smallest multiple, are allowed as well.
    """
    low = max(math.ceil(least * size - 1e-9), 1)
    high = max(math.floor(most * size + 1e-9), low)
    counts = [n for n in range(high, low - 1, -1) if n % multiple == 0]
    if high == size and size % multiple:
        counts.insert(0, size)
    while finer and min(counts, default=high + 1) > low:
        multiple //= 2
        counts.append(max(multiple, low))
    return tuple(counts) or (size,)


def kept(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> Kept:
    """The best channels of every group, increasing; equal scores keep the earlier channel."""
    return {name: _best(score, counts[name]) for name, score in scores.items()}


def _best(score: Tensor, count: int) -> tuple[int, ...]:
    order = torch.argsort(score, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))
