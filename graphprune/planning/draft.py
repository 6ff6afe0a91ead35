"""A request for an analysis: scores, limits, and the path of ever smaller models."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.channels.analysis import Analysis, Group
from graphprune.channels.structure import least, multiple, signature
from graphprune.criteria import Evidence, comparable, gather, scores
from graphprune.criteria.averaged import averaged
from graphprune.errors import InputError, warn
from graphprune.ops.values import Natural
from graphprune.plan.plan import Plan
from graphprune.planning.costs import Costs, Counts
from graphprune.planning.expressible import Sayable, Search, levels_of
from graphprune.planning.options import Request
from graphprune.planning.rescaling import Rescaling
from graphprune.planning.select import Kept, Lane, Path, allowed, kept, levels
from graphprune.planning.settle import Settled
from graphprune.record.inputs import Call
from graphprune.text import share, shorten

_CHOICES = 2  # multiples that a group has at least, where their size was not asked for
_MANY = 0.1  # the part of the parameters that is worth a warning when nothing reads it


@dataclass
class Draft:
    """A request for an analysis in which more may become frozen."""

    model: nn.Module
    call: Call
    settled: Settled
    request: Request
    evidence: Mapping[str, Tensor] | None = None
    factors: Mapping[str, float] = field(default_factory=dict)  # of the scores, by group name
    base: dict[str, Tensor] | None = None  # scores without these factors
    sayable: Sayable | None = None  # what a config can say, once that was asked for
    alone: bool = False  # whether other ranks may have gone another way

    @property
    def analysis(self) -> Analysis:
        """The channel ids behind the groups."""
        return self.settled.analysis

    @cached_property
    def spared(self) -> set[str]:
        """Names of the groups that ``keep`` names."""
        return {
            group.name
            for pattern in self.request.keep
            for group in matching(self.analysis, pattern, "keep pattern")
        }

    @cached_property
    def rescaling(self) -> Rescaling | None:
        """How statistics stay those of the masked model, when that is asked for."""
        return Rescaling.of(self.analysis, self.model) if self.request.exact_only else None

    @cached_property
    def least(self) -> dict[str, int]:
        """How many channels groups keep at least, where that is more than one."""
        return least(self.analysis)

    def may_leave(self, group: Group) -> bool:
        """Whether the request allows that statistics change as they do for a group."""
        if self.rescaling is None:
            return True
        made_up = group.exact or self.rescaling.covers(group)
        return made_up and self.rescaling.plain.covers(group)

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """The scores of all groups that may lose channels."""
        if self.base is None:
            self.base = self._scored()
        return {name: score * self.factors.get(name, 1.0) for name, score in self.base.items()}

    def _scored(self) -> dict[str, Tensor]:
        request = self.request
        groups = [g for g in self.analysis.groups if g.name not in self.spared]
        groups = [group for group in groups if self.may_leave(group)]
        if self.evidence is None:
            asked = request.data, request.loss, request.progress
            self.evidence = gather(
                self.model, request.criterion, groups, *asked, self.settled.weights, request.ranks
            )
        apart = request.scope in (None, "local") or comparable(request.criterion)
        normalise = request.normalise or ("none" if apart else "mean")
        saved = None
        if normalise == "macs":
            costs = Costs(self.analysis, ("macs",))
            slopes = costs.gradient("macs", costs.full)
            saved = {group.name: float(s) for group, s in zip(self.analysis.groups, slopes)}
        own = isinstance(self.evidence, Evidence) and self.evidence.own
        return scores(
            averaged(request.criterion, request.ranks) if own else request.criterion,
            groups,
            self.evidence,
            request.seed,
            request.aggregate,
            normalise,
            saved,
            None if self.alone else request.ranks,
        )

    def alive(self, counts: np.ndarray) -> np.ndarray:
        """For every id whether it stays, given how many channels each group keeps."""
        return self.analysis.alive(self.kept(counts))

    def kept(self, counts: np.ndarray) -> Kept:
        """The channels that stay, given how many."""
        numbers = {group.name: int(n) for group, n in zip(self.analysis.groups, counts)}
        return kept(self.scores, numbers)

    def path(self, order: Mapping[str, np.ndarray] | None = None) -> Path:
        """The lanes in which groups lose channels, in the order of the scope or another one."""
        fixed = self._by_pattern(self.request.ratios, "ratios pattern")
        groups = {group.name: group for group in self.analysis.groups}
        turns = self._levels() if order is None else order
        numbers = {name: number for number, name in enumerate(groups)}
        together: dict[object, list[Group]] = {}
        if self.request.expressible:
            return Path(tuple(self._joint_lanes(fixed, turns)), self._full())
        for name in self.scores:
            group = groups[name]
            key: object = name
            if self.request.uniform:
                key = signature(self.analysis, group), group.size, fixed.get(name)
            together.setdefault(key, []).append(group)
        lanes = []
        for members in together.values():
            counts = self._allowed(members)
            first = members[0]
            if first.name in fixed:
                removed = int(fixed[first.name] * first.size + 1e-9)
                nearest = min(counts, key=lambda n: abs(n - (first.size - removed)))
                counts = (nearest,)
            level = np.mean([turns[group.name] for group in members], axis=0)
            lanes.append(Lane(tuple(numbers[g.name] for g in members), counts, level))
        return Path(tuple(lanes), self._full())

    def _full(self) -> Counts:
        """What all groups keep where nothing leaves."""
        return np.array([group.size for group in self.analysis.groups], float)

    def said(self) -> Sayable:
        """What the config of the model can say."""
        if self.sayable is None:
            known = self.settled.known
            if "sayable" not in known:
                known["sayable"] = Search(self.model, self.call, self.settled).run()
            self.sayable = known["sayable"]
        return self.sayable

    def _joint_lanes(
        self, fixed: Mapping[str, float], turns: Mapping[str, np.ndarray]
    ) -> Iterator[Lane]:
        """Groups that the config of the model sizes together keep equal shares."""
        numbers = {group.name: number for number, group in enumerate(self.analysis.groups)}
        for joint in self.said().joints:
            if not all(name in self.scores for name in joint.groups):
                continue  # some of them stay
            members = [self.analysis.groups[numbers[name]] for name in joint.groups]
            allowed = [set(self._allowed([group])) for group in members]
            rows = [row for row in joint.rows if all(n in a for n, a in zip(row, allowed))]
            rows = rows or [joint.rows[0]]
            ratio = next((fixed[name] for name in joint.groups if name in fixed), None)
            if ratio is not None:
                aim = members[0].size * (1 - ratio)
                rows = [min(rows, key=lambda row: abs(row[0] - aim))]
            yield Lane(
                tuple(numbers[name] for name in joint.groups),
                tuple(row[0] for row in rows),
                levels_of([turns[name] for name in joint.groups], members[0].size),
                tuple(rows),
            )

    def _allowed(self, members: Sequence[Group]) -> tuple[int, ...]:
        request = self.request
        least = self._by_pattern(request.min_kept, "min_kept pattern")
        most = self._by_pattern(request.max_kept, "max_kept pattern")
        low = max(least.get(group.name, 0.0) for group in members)
        high = min(most.get(group.name, 1.0) for group in members)
        if low > high:
            name = members[0].layers[0]
            raise InputError(f"min_kept {low} is above max_kept {high} for the group of {name!r}")
        size = members[0].size
        low = max(low, max(self.least.get(group.name, 1) for group in members) / size)
        if request.round_to is not None:
            return allowed(size, low, max(low, high), _step(members, request.round_to))
        vector = request.vector
        while vector > 1 and _step(members, vector) * _CHOICES > size:
            vector //= 2
        return allowed(size, low, max(low, high), _step(members, vector), finer=True)

    def _levels(self) -> dict[str, np.ndarray]:
        """The order of the scope, or of an allocation for the groups it knows."""
        pools: dict[str, object] | None = None
        groups = {group.name: group for group in self.analysis.groups}
        if self.request.scope == "global":
            pools = dict.fromkeys(self.scores)
        elif self.request.scope == "isomorphic":
            pools = {name: signature(self.analysis, groups[name]) for name in self.scores}
        ranked = levels(self.scores, pools)
        if self.request.allocation is None:
            return ranked
        known = {
            name: self.request.allocation.levels(groups[name].slots, groups[name].size)
            for name in ranked
        }
        measured = [level[np.isfinite(level)] for level in known.values() if level is not None]
        last = np.concatenate([np.zeros(1), *measured]).max() + 1
        costs = {}
        for name, level in known.items():
            if level is None:  # not measured: the last to lose channels
                size = groups[name].size
                level = last + np.arange(1, size + 1) / size
                level[-1] = np.inf
            costs[name] = torch.from_numpy(level)
        return levels(costs, dict.fromkeys(costs))

    def _by_pattern(self, values: Mapping[str, float], what: str) -> dict[str, float]:
        by_group: dict[str, float] = {}
        for pattern, value in values.items():
            for group in matching(self.analysis, pattern, what):
                by_group[group.name] = value
        return by_group

    def warn(self, plan: Plan) -> None:
        """Warn when less is removed than the ratios say, or much less than the ratio."""
        for pattern, fraction in self.request.ratios.items():
            groups = matching(self.analysis, pattern, "ratios pattern")
            if fraction and not any(group.name in self.scores for group in groups):
                reasons = why(self.analysis, (group for group in groups if group.frozen))
                warn(f"ratios pattern {pattern!r} names no channels that may leave\n{reasons}")
        ratio = self.request.ratio
        if not ratio:
            return
        if sum(self.analysis.unread.values()) >= _MANY * plan.before.params:
            warn(*unread(self.analysis))
        frozen = [group for group in self.analysis.all_groups if group.frozen]
        unusual = [g for g in frozen if not (g.reason and isinstance(g.reason.text, Natural))]
        free = [group for group in self.analysis.groups if group.name not in self.spared]
        total = sum(g.size for g in free) + sum(
            g.size for g in unusual if any(m.slot.weight and not m.reads for m in g.members)
        )
        held = self._held(free)
        if plan.removed and (ratio * total < 1 or plan.removed >= 0.5 * ratio * total):
            return
        total += sum(group.size for group in self.analysis.groups if group.name in self.spared)
        text = f"{plan.removed} of {total} channels were removed where {ratio:.0%} was asked for"
        if unusual:
            text += f"; frozen:\n{why(self.analysis, unusual)}"
        small = [group for group in free if group.size * ratio < 1]
        for told in self.sayable.told(free) if self.sayable else ():
            text += f"\n  {told}"
        for told, groups in (*held, ("too small to lose a channel at this ratio", small)):
            if groups:
                names = shorten([group.layers[0] for group in groups], 6)
                text += f"\n  {told}: {names}"
        warn(text)

    def _held(self, free: Sequence[Group]) -> list[tuple[str, list[Group]]]:
        """Groups that options, or norms over few channels, leave whole; and what to do."""
        request = self.request
        step = request.round_to or 1
        may = [group for group in free if self.may_leave(group) and group.size > 1]
        rounded = [group for group in may if step > 1 and self._allowed([group]) == (group.size,)]
        bounded = [g for g in may if self._allowed([g]) == (g.size,) and g not in rounded]
        fewest = [g for g in bounded if self.least.get(g.name, 1) == g.size]
        norms = [group for group in fewest if not group.limit]
        spared = [group for group in self.analysis.groups if group.name in self.spared]
        fixed = self._by_pattern(self.request.ratios, "ratios pattern")
        asked = [group for group in may if fixed.get(group.name, 1) * group.size < 1]
        return [
            ("left whole by ratios", asked),
            ("left whole by exact_only", [group for group in free if not self.may_leave(group)]),
            (f"left whole by keep={', '.join(request.keep)} (name fewer layers)", spared),
            (f"have no width that is a multiple of round_to={step} (try a smaller one)", rounded),
            ("a norm over a single channel would be a constant", norms),
            ("would be as narrow as their projection", [g for g in fewest if g.limit]),
            ("min_kept and max_kept leave no choice", [g for g in bounded if g not in fewest]),
        ]


def _step(members: Sequence[Group], round_to: int) -> int:
    """Of what the count that groups keep must be a multiple."""
    return int(np.lcm.reduce([multiple(group, round_to) for group in members]))


def matching(analysis: Analysis, pattern: str, what: str) -> list[Group]:
    """The groups whose channels are written by layers that a glob pattern names.

    A parameter that several layers share is read by one of them in the dimension in which another
    one writes: all its channels count.

    Raises:
        InputError: no layer and no group has such a name.
    """
    named = [group for group in analysis.all_groups if fnmatch.fnmatchcase(group.name, pattern)]
    names = [name for name in analysis.names if _matches(pattern, name)]
    if not names and not named:
        layers = sorted({name.rpartition(".")[0] or name for name in analysis.names})
        raise InputError(f"{what} {pattern!r} matches no layer; layers: {shorten(layers, 12)}")
    tensors = {analysis.names[name] for name in names}
    return [
        group
        for group in analysis.all_groups
        if group in named
        or any(
            m.slot.tensor in tensors and (not m.reads or m.slot.tensor in analysis.shared)
            for m in group.members
        )
    ]


def _matches(pattern: str, tensor: str) -> bool:
    parts = tensor.split(".")
    return any(
        fnmatch.fnmatchcase(".".join(parts[:stop]), pattern) for stop in range(1, len(parts) + 1)
    )


def passed_by(analysis: Analysis) -> Iterator[str]:
    """What to know of modules that the values of the inputs pass by, if there are any."""
    names = [name for each in analysis.records[0].beside for name in each.others]
    if names:
        yield (
            f"the example inputs pass {shorten(names, 4)} by: channels leave there as in others of "
            "the same list, which all read and write the same"
        )


def unread(analysis: Analysis) -> Iterator[str]:
    """What to know of parameters that no op reads, if there are any: for reports."""
    count = sum(analysis.unread.values())
    if count:
        sizes = [math.prod(shape) for shape, _, parameter in analysis.shapes.values() if parameter]
        owners = dict.fromkeys(name.rpartition(".")[0] or name for name in analysis.unread)
        yield (
            f"{count:,} parameters ({share(count, sum(sizes))}) stay, as the model does not read "
            f"them on the example inputs: {shorten(owners, 4)}; remove these layers, or pass "
            "inputs that use them"
        )


def why(analysis: Analysis, groups: Iterable[Group] | None = None, most: int = 6) -> str:
    """Why groups are frozen, one reason a line."""
    lines: dict[str, list[str]] = {}
    frozen = (group for group in analysis.all_groups if group.frozen)
    for group in frozen if groups is None else groups:
        lines.setdefault(group.note, []).extend(group.layers)
    shown = list(lines.items())[:most]
    return "\n".join(f"  {reason}: {shorten(dict.fromkeys(layers), 3)}" for reason, layers in shown)
