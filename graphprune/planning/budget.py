"""The search for the kept counts that meet a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from graphprune.channels.analysis import Analysis
from graphprune.errors import InputError
from graphprune.measurement import bytes_text, count_text
from graphprune.ops.views import macs_of, multiplies
from graphprune.planning.costs import Costs, Counts, Polynomials
from graphprune.planning.select import Path
from graphprune.planning.targets import Target
from graphprune.text import share, shorten

_TRIES = 8  # of a search whose foreseen costs were not the exact ones
TITLES = {
    "macs": "MACs",
    "params": "parameters",
    "bytes": "bytes of weights",
    "memory": "peak bytes of activations",
    "latency": "latency",
}


class Unreachable(InputError):
    """The smallest model on a path costs more than it may."""


@dataclass
class Budget:
    """Limits on costs of an analysis; ``alive`` says what stays for given counts.

    ``before`` are the costs of the whole model and ``limits`` the amounts allowed. ``scales`` are
    what foreseen costs are multiplied by, where they were seen to be too small.
    """

    analysis: Analysis
    targets: Mapping[str, Target]
    alive: Callable[[Counts], np.ndarray]
    costs: Costs = field(init=False)
    before: dict[str, float] = field(init=False)
    limits: dict[str, float] = field(init=False)
    scales: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        counted = [name for name in self.targets if name != "latency"]
        self.costs = Costs(self.analysis, counted)
        whole = np.ones(len(self.analysis.units.labels), bool)
        self.before = {name: self.costs.exact(name, whole) for name in counted}
        self.limits = {name: self.targets[name].of(self.before[name]) for name in counted}
        self.scales = dict.fromkeys(self.targets, 1.0)

    def time(self, part: Polynomials, before: float, limit: float) -> None:
        """From now on, limit the latency: as foreseen, of the whole model, and at most."""
        self.costs.parts["latency"] = part
        self.before["latency"] = before
        self.limits["latency"] = limit

    def tightness(self, counts: Counts) -> float:
        """The largest share of a limit that is used."""
        found = self.costs.of(counts)
        return max(found[name] * self.scales[name] / self.limits[name] for name in self.limits)

    def search(self, path: Path) -> Counts:
        """The counts of the largest model on (or beside) a path that is within all limits.

        Foreseen costs are exact for nearly all models. Where they are not (a layer reads some of
        the channels of a group only), the exact cost of the result corrects them.

        Raises:
            Unreachable: even the smallest model on the path costs too much.
        """
        for _ in range(_TRIES):
            counts = path.fit(self.tightness)
            if counts is None:
                break
            alive = self.alive(counts)
            exact = {
                name: self.costs.exact(name, alive) for name in self.limits if name != "latency"
            }
            if all(exact[name] <= self.limits[name] for name in exact):
                return counts
            for name, amount in exact.items():
                if amount > self.limits[name]:
                    self.scales[name] *= 1.0001 * amount / self.costs.of(counts)[name]
        raise Unreachable(self.explanation(path))

    def floor(self, path: Path) -> dict[str, float]:
        """The costs of the smallest model on a path."""
        smallest = path.counts(path.at(len(path.order[0])))
        return self.costs.of(smallest)

    def explanation(self, path: Path) -> str:
        """Which target cannot be met, the nearest figure, and what stays."""
        floor = self.floor(path)
        smallest = path.counts(path.at(len(path.order[0])))
        lines = []
        for name, limit in self.limits.items():
            if floor[name] <= limit:
                continue
            title = TITLES[name]
            lines.append(
                f"at most {amount_text(name, limit)} {title} cannot be met: the nearest is "
                f"{amount_text(name, floor[name])}, {share(floor[name], self.before[name])} of "
                f"the original's {amount_text(name, self.before[name])}"
            )
            stay = remains(self.analysis, name, self.alive(smallest))
            if stay:
                lines.append(f"  what is left then: {shorten(stay, 5)}")
        return "\n".join(lines) or "the targets cannot be met together"


def amount_text(name: str, amount: float) -> str:
    """An amount for people."""
    if name == "latency":
        return f"{amount:.3g} ms"
    return bytes_text(round(amount)) if name in ("bytes", "memory") else count_text(round(amount))


def remains(analysis: Analysis, name: str, alive: np.ndarray) -> list[str]:
    """The layers that cost most in what a plan leaves, with their shares."""
    amounts: dict[str, float] = {}
    pruned = analysis.pruned(alive)
    if name == "macs":
        for node in analysis.records[0].ops:
            if multiplies(node):
                module = node.meta["module"] or "(root)"
                cost = macs_of(node, pruned.shape)
                amounts[module] = amounts.get(module, 0) + cost
    elif name in ("params", "bytes"):
        left: dict[str, list[int]] = {}
        for slot in analysis.slots:
            keep = int(alive[slot.start : slot.start + slot.size].sum())
            left.setdefault(slot.tensor, []).append(keep)
        for tensor, (_, width, parameter) in analysis.shapes.items():
            module = tensor.rpartition(".")[0] or "(root)"
            weight = int(parameter) if name == "params" else width
            amounts[module] = amounts.get(module, 0) + math.prod(left.get(tensor, ())) * weight
    total = sum(amounts.values())
    ranked = sorted(amounts, key=lambda module: -amounts[module])
    return [f"{module} ({share(amounts[module], total)})" for module in ranked if amounts[module]]
