"""The search for the kept counts of a model that meets a latency, verified by measuring it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from graphprune.planning.budget import Budget, Unreachable, amount_text
from graphprune.planning.costs import Costs, Counts, Polynomials
from graphprune.planning.latency import Bench, Cache, Sample, fit
from graphprune.planning.select import Path

_SAMPLES = 8  # shrunk models of random widths, from which times are fitted
_NARROWEST = 0.25
_MEASURED = 2.0  # seconds for the original and a small model
_ROUNDS = 7  # of search, emission and measurement
_NEAR = 0.97  # of the limit used, and of the prediction met: good enough
_NARROW = 0.6  # 0: only MACs count, and some groups nearly vanish; 1: all groups get narrower
_CHUNKS = 40  # in which a group loses its channels, while the order of the groups is found


class Curve:
    """Measured latency, as a fraction of the original's, over the latency that the fit foresees.

    Lines join what was measured; below it the first line goes on.
    """

    def __init__(self, whole: float) -> None:
        self.points = {whole: 1.0}

    def add(self, units: float, share: float) -> None:
        """One more model was measured."""
        self.points[units] = share

    def share(self, units: float) -> float:
        """What is to be measured where the fit foresees so much."""
        x, y = self._line()
        below = min(units - x[0], 0) * self._slope(x, y)
        return max(float(np.interp(units, x, y) + below), 0.1 * float(y[0]))

    def units(self, share: float) -> float:
        """What the fit foresees where a fraction is measured."""
        x, y = self._line()
        below = min(share - y[0], 0) / self._slope(x, y)
        return max(float(np.interp(share, y, x) + below), 0.1 * float(x[0]))

    def _line(self) -> tuple[np.ndarray, np.ndarray]:
        x = np.array(sorted(self.points))
        return x, np.maximum.accumulate([self.points[at] for at in x])

    def _slope(self, x: np.ndarray, y: np.ndarray) -> float:
        """Of the first line, and about that of a line from the origin."""
        straight = y[0] / x[0]
        rising = (y[1] - y[0]) / (x[1] - x[0]) if len(x) > 1 else straight
        return float(np.clip(rising, straight / 3, straight))


@dataclass
class Deadline:
    """A latency to be met on a bench.

    ``emit`` makes the model of kept counts. ``report`` is filled by :meth:`search`: the device,
    milliseconds of the original, what was predicted for the small model, what was measured.
    """

    budget: Budget
    path: Path
    bench: Bench
    cache: Cache
    model: nn.Module
    emit: Callable[[Counts], nn.Module]
    report: dict[str, object] = field(default_factory=dict)

    def search(self, along: Callable[[Mapping[str, np.ndarray]], Path] | None) -> Counts:
        """The counts of the largest model that was measured to be fast enough.

        Args:
            along: makes a path from an order of the channels; then the order is the one in which
                they save most time. ``None`` keeps to the path given.

        Raises:
            Unreachable: no model on the path is fast enough.
        """
        part = fit(self.budget.costs, self._samples())
        whole = self._of(part, self.path.full)
        path = self.path if along is None else along(self._order(part))
        target = self.budget.targets["latency"]
        best: tuple[tuple[bool, float], Counts, dict[str, object]] | None = None
        nearest = math.inf
        curve = Curve(whole)
        aim = curve.units(target.of(whole) / whole)
        slack = 1.0
        for turn in range(_ROUNDS):
            self.budget.time(part, whole, aim)
            try:
                counts = self.budget.search(path)
            except Unreachable:
                if best is None:
                    raise
                break  # as foreseen now; what was measured counts
            before, after = self._measured(self.emit(counts))
            limit, share = target.of(before), after / before
            nearest = min(nearest, after)
            units = self._of(part, counts)
            predicted = curve.share(units)
            found = {
                "device": str(self.bench),
                "before": before,
                "predicted": predicted * before,
                "measured": after,
            }
            accurate = _NEAR <= share / predicted <= 1 / _NEAR
            merit = accurate and after >= 0.9 * limit, after / limit
            if after <= limit and (best is None or merit > best[0]):
                best = merit, counts, found
            if after <= limit and accurate and after >= _NEAR * limit:
                break
            curve.add(units, share)
            if after > limit and (accurate or turn > 1):
                slack *= 0.99
            aim = curve.units(slack * limit / before)
        if best is None:
            raise Unreachable(
                f"at most {amount_text('latency', limit)} latency was not met: the nearest "
                f"model took {amount_text('latency', nearest)}"
            )
        self.report.update(best[2])
        return best[1]

    def _of(self, part: Polynomials, counts: Counts) -> float:
        return float(part.values(self.budget.costs.sizes(counts))[0])

    def _measured(self, small: nn.Module) -> tuple[float, float]:
        """Milliseconds of the original and of a small model, which ran in turns.

        What slows the machine down for a while hits both: the median of the ratio is that of a
        quiet one.
        """
        before, after = self.bench.totals([self.model, small], self.bench.clock, seconds=_MEASURED)
        whole = float(np.median(before))
        return whole, whole * float(np.median(np.array(after) / np.array(before)))

    def _samples(self) -> list[Sample]:
        """The whole model and some of random widths, from the cache where they are there."""
        generator = np.random.default_rng(0)
        wanted = [self.path.full]
        for _ in range(_SAMPLES):
            taken = []
            for lane in self.path.lanes:
                width = generator.uniform(_NARROWEST, 1) * len(lane.levels)
                taken.append(int(np.abs(np.array(lane.counts) - width).argmin()))
            wanted.append(self.path.counts(taken))
        missing = [counts for counts in wanted if self.cache.find(counts) is None]
        if missing:
            models = [
                self.model if counts is wanted[0] else self.emit(counts) for counts in missing
            ]
            for sample in self.bench.samples(models, missing):
                self.cache.add(sample)
        found = [self.cache.find(counts) for counts in wanted]
        return [sample for sample in found if sample is not None]

    def _order(self, part: Polynomials) -> dict[str, np.ndarray]:
        """An order of all channels: those that save most time for what they are worth first.

        A group is worth the MACs that depend on it at that point, the more the narrower it is.
        Otherwise the group that saves most would be emptied before the next one is touched.
        """
        costs, path = self.budget.costs, self.path
        groups = self.budget.analysis.groups
        macs = Costs(self.budget.analysis, ("macs",))
        least = 1e-4 * macs.of(path.full)["macs"]
        taken = np.zeros(len(path.lanes), int)
        turns = {group.name: np.full(group.size, np.inf) for group in groups}
        open_lanes = [number for number, lane in enumerate(path.lanes) if len(lane.counts) > 1]
        turn = 0
        while open_lanes:
            counts = path.counts(taken)
            saves = part.gradient(costs.sizes(counts), costs.matrix) * counts
            worth = macs.gradient("macs", counts) * counts
            gains = []
            for number in open_lanes:
                lane = path.lanes[number]
                members, kept = list(lane.groups), lane.counts[taken[number]] / len(lane.levels)
                value = max(worth[members].sum(), least) * kept**-_NARROW
                gains.append(saves[members].sum() / value)
            ranked = np.argsort(gains, kind="stable")[::-1]
            for place in ranked[: max(1, len(ranked) // 10)]:
                number = open_lanes[place]
                lane = path.lanes[number]
                now, was = lane.counts[taken[number]], lane.kept(taken[number])
                aim = now - max(1, round(now / _CHUNKS))
                while taken[number] + 1 < len(lane.counts):
                    taken[number] += 1
                    if lane.counts[taken[number]] <= aim:
                        break
                turn += 1
                for group, old, left in zip(lane.groups, was, lane.kept(taken[number])):
                    size = groups[group].size
                    turns[groups[group].name][size - old : size - left] = turn
            open_lanes = [n for n in open_lanes if taken[n] + 1 < len(path.lanes[n].counts)]
        return turns
