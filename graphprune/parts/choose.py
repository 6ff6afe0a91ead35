"""Which parts leave, and how many: by a fraction, or by a budget that widths share."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch import nn

from graphprune.calibration import calibrate
from graphprune.calibration.outcome import distance
from graphprune.calibration.statistics import has_statistics, reestimate
from graphprune.channels.analysis import Analysis
from graphprune.criteria import find, name_of
from graphprune.errors import GraphPruneError, InputError, warn
from graphprune.execute.shrink import shrink
from graphprune.parts.depth import Alone, Depth
from graphprune.parts.experts import MixtureLadder
from graphprune.parts.mixtures import Mixtures
from graphprune.parts.score import Evidence
from graphprune.parts.trial import without
from graphprune.plan.plan import Cost, Plan
from graphprune.planning.budget import TITLES, amount_text
from graphprune.planning.draft import matching
from graphprune.planning.latency import Bench
from graphprune.planning.options import Request
from graphprune.planning.targets import Target
from graphprune.planning.trials import HELD_OUT, MOST
from graphprune.record.batches import device_of
from graphprune.record.checks import is_weightless
from graphprune.record.inputs import Call
from graphprune.text import shorten

_TRIED = 5  # numbers of parts, evenly spaced, for which a whole plan is made
_ALL = 6  # up to so many parts every number is tried
_NEARER = 2  # rounds of halving the steps around the best one
_NARROWER = 3  # times that widths are chosen anew for a latency
_NEAR = 1.2  # times the error of the best number of parts: width alone is looked at again
_NEARLY = 1.01  # of a latency: what its measuring allows for
_COLLAPSE = 0.5  # of the variance of the outputs: more of it lost is told
_SECONDS = 1.0  # that two models run in turns to be timed


class Widths(Protocol):
    """A traced model: what it costs, and plans for its channels."""

    @property
    def analysis(self) -> Analysis:
        """Its groups of channels."""

    @property
    def cost(self) -> Cost:
        """Parameters, MACs and bytes."""

    @property
    def memory(self) -> int:
        """Peak bytes of activations."""

    @property
    def counted(self) -> dict[str, object]:
        """Which outputs count, as a plan says it."""

    def widths(self, request: Request) -> Plan:
        """A plan for channels alone."""


class Ladder(Protocol):
    """Parts that leave step by step, those first that matter least."""

    @property
    def steps(self) -> int:
        """How many steps there are."""

    def plan(self, count: int) -> Plan:
        """The plan after so many steps."""

    def share(self, ratio: float) -> Plan:
        """The plan by which a fraction of them leaves."""

    def alone(self, fractions: Sequence[float]) -> Iterator[Alone]:
        """Each of them, with plans by which it alone leaves."""


@dataclass
class Chooser:
    """A request for parts of a model.

    Args:
        model: it is not touched.
        call: inputs it runs on.
        request: what is asked for.
        mixtures: what can leave.
        whole: the traced model.
        again: traces a smaller one.
    """

    model: nn.Module
    call: Call
    request: Request
    mixtures: Mixtures
    whole: Widths
    again: Callable[[nn.Module], Widths]

    def plan(self) -> Plan:
        """The plan.

        Raises:
            InputError: no such part can leave, or a target cannot be met.

        Warns:
            PruningWarning: on the data, little is left of what the outputs say.
        """
        find(self.request.criterion)
        if is_weightless(self.model):
            self._check_without_weights()
        for pattern in self.request.keep if "channels" not in self.request.parts else ():
            self._check_keep(pattern)
        plan = self._within() if self.request.target else self._share(self.request.ratio or 0.0)
        lost = 0.0 if self.request.data is None else self.error(plan)
        if lost > _COLLAPSE:
            warn(
                f"on the data, the outputs without these parts differ from the original's by "
                f"{min(lost, 9.99):.0%} of their variance: let fewer leave, or train afterwards"
            )
        return self.request.ranks.decided(plan)

    def _check_without_weights(self) -> None:
        """Raise where a model on the meta device would have to run."""
        request = self.request
        needs = [
            ("a latency is measured", "latency" in request.target),
            ("numbers of parts are compared by outputs", bool(self.rest and request.target)),
            (f"criterion {request.named!r} runs the model", name_of(request.criterion) != "random"),
        ]
        told = next((text for text, holds in needs if holds), "")
        if told:
            raise InputError(
                f"{told}, and the model is on the meta device: load it; of a model without weights "
                "parts leave by criterion='random', by a ratio or where no channels do"
            )

    def _check_keep(self, pattern: str) -> None:
        modules = self.mixtures.finder.modules
        names = [*modules, *(name for name, _ in self.model.named_parameters())]
        if not fnmatch.filter(names, pattern):
            layers = sorted(name for name in modules if name)
            raise InputError(
                f"keep pattern {pattern!r} matches no layer; layers: {shorten(layers, 12)}"
            )

    def _share(self, ratio: float) -> Plan:
        made = self.told(self.ladder.share(ratio))
        return made.then(self._rest(made, self.request)) if self.rest else made

    def _rest(self, made: Plan, request: Request) -> Plan:
        """The plan for what is left after one."""
        small = self._traced(made)
        left: dict[str, Any] = {
            name: {p: v for p, v in getattr(request, name).items() if self._is_left(p, small)}
            for name in ("ratios", "min_kept", "max_kept")
        }
        keep = tuple(pattern for pattern in request.keep if self._is_left(pattern, small))
        return small.widths(replace(request, parts=self.rest, keep=keep, **left))

    def _is_left(self, pattern: str, small: Widths) -> bool:
        """Whether a pattern means more than layers that have left."""
        try:
            matching(small.analysis, pattern, "")
        except InputError:
            matching(self.whole.analysis, pattern, "pattern")
            return False
        return True

    @cached_property
    def evidence(self) -> Evidence:
        """The batches that parts are scored on."""
        request = self.request
        return Evidence.of(self.model, self.call, request.data, request.loss, request.ranks)

    @cached_property
    def ladder(self) -> Ladder:
        """What leaves first: experts, or else blocks and branches."""
        if "experts" in self.request.parts:
            return MixtureLadder(self.mixtures, self.request, self.evidence)
        return Depth(self.model, self.call, self.request, self.mixtures.finder, self.evidence)

    @property
    def rest(self) -> tuple[str, ...]:
        """The kinds of parts that leave of what is then left."""
        if "experts" in self.request.parts:
            return tuple(kind for kind in self.request.parts if kind != "experts")
        return tuple(kind for kind in self.request.parts if kind == "channels")

    def alone(self, fractions: Sequence[float]) -> Iterator[Alone]:
        """Every part that may leave, with plans for it alone."""
        if "experts" in self.request.parts:
            yield from self.ladder.alone(fractions)
        if {"blocks", "branches"} & {*self.request.parts}:
            depth = Depth(self.model, self.call, self.request, self.mixtures.finder, self.evidence)
            yield from depth.alone(fractions)

    def told(self, plan: Plan) -> Plan:
        """A plan that says what it was asked for, and what it costs."""
        request = self.request
        told: dict[str, object] = {"parts": list(request.parts), "ratio": request.ratio}
        told |= {"criterion": request.named, "seed": request.seed}
        if request.target:
            told["target"] = {name: target.amount for name, target in request.target.items()}
        if request.keep:
            told["keep"] = list(request.keep)
        told |= _both(self.whole.counted, plan.request)
        plan = replace(plan, inputs=str(self.call), request=told)
        return replace(plan, before=self.whole.cost, after=self._traced(plan).cost)

    def _traced(self, plan: Plan) -> Widths:
        key = plan.cuts, plan.stand_ins, plan.experts
        if key not in self._known_widths:
            self._known_widths[key] = (
                self.whole if not any(key) else self.again(without(self.model, plan))
            )
        return self._known_widths[key]

    @cached_property
    def _known_widths(self) -> dict[object, Widths]:
        return {}

    # --- budgets ------------------------------------------------------------------------------

    @cached_property
    def limits(self) -> dict[str, float]:
        """The amounts that the small model may cost."""
        return {
            name: target.of(self.amounts(self.whole_plan)[name])
            for name, target in self.request.target.items()
        }

    def amounts(self, plan: Plan) -> dict[str, float]:
        """What a model costs without some parts, for every target."""
        traced = self._traced(plan)
        known: dict[str, float] = {
            "params": traced.cost.params, "macs": traced.cost.macs, "bytes": traced.cost.bytes
        }  # fmt: skip
        if "memory" in self.request.target:
            known["memory"] = traced.memory
        if "latency" in self.request.target:
            known["latency"] = self._latency(plan)
        return known

    def _latency(self, plan: Plan) -> float:
        """Milliseconds, as a share of the original's that ran in turns."""
        key = plan.cuts, plan.stand_ins, plan.experts
        if key not in self._known_shares:
            self._known_shares[key] = self._share_of_time(plan) if any(key) else 1.0
        return self._whole_latency * self._known_shares[key]

    def _share_of_time(self, plan: Plan) -> float:
        """The time of a small model as a fraction of the original's, in turns."""
        before, after = self._timed(self.model, without(self.model, plan))
        return float(np.median(np.array(after) / np.array(before)))

    @cached_property
    def _known_shares(self) -> dict[object, float]:
        return {}

    @cached_property
    def _whole_latency(self) -> float:
        return float(np.median(self._timed(self.model)))

    @property
    def whole_plan(self) -> Plan:
        """The plan by which nothing leaves."""
        return Plan(self.whole.analysis.architecture, (), ())

    def _timed(self, *models: nn.Module) -> list[list[float]]:
        bench = Bench(self.call, device_of(self.model), self.request.threads)
        ranks = self.request.ranks
        own = bench.totals(models, bench.clock, seconds=_SECONDS) if ranks.first else []
        return ranks.decided(own)

    def at(self, count: int) -> Plan:
        """The plan by which so much leaves, without the rest."""
        return self.told(self.ladder.plan(count))

    def _fits(self, count: int) -> bool:
        amounts = self.amounts(self.at(count))
        return all(amounts[name] <= limit for name, limit in self.limits.items())

    def _least(self) -> int | None:
        """The smallest number of parts without which the model is within all limits."""
        low, high = 0, self.ladder.steps
        if not self._fits(high):
            return None
        while low < high:
            middle = (low + high) // 2
            if self._fits(middle):
                high = middle
            else:
                low = middle + 1
        return high

    def _within(self) -> Plan:
        """The plan that meets the targets with the smallest change of the outputs."""
        least = self._least()
        if not self.rest:
            if least is None:
                raise InputError(self._unreachable())
            return self._timed_note(self.at(least))
        most = self.ladder.steps if least is None else least
        found: dict[int, tuple[float, Plan]] = {}
        problem: InputError | None = None
        gaps = max(most if most <= _ALL else _TRIED - 1, 1)
        steps = sorted({round(most * step / gaps) for step in range(gaps + 1)})
        for turn in range(1 + _NEARER):
            for count in steps:
                if count in found:
                    continue
                try:
                    found[count] = self._both(count)
                except InputError as error:
                    problem = error
            if not found:
                raise problem or InputError(self._unreachable())
            best = min(found, key=lambda count: found[count][0])
            width = max(1, most // (_TRIED - 1) // 2 ** (turn + 1))
            steps = [c for c in (best - width, best + width) if 0 <= c <= most]
        tried = ", ".join(f"{count}: {found[count][0]:.3g}" for count in sorted(found))
        note = f"error of the outputs by how many parts leave: {tried}"
        plan = self._final(best, found)
        return self._timed_note(replace(plan, notes=(*plan.notes, note)))

    def _final(self, best: int, found: Mapping[int, tuple[float, Plan]]) -> Plan:
        """The best number of parts with widths as all the data say; or width alone, if it is near.

        Without parts the criterion may try variants of its scores, which may turn the scale.
        """
        request = self.request
        if request.data is None:  # they are what the data say already
            return self._in_time(best, found[best][1], request)
        plan = self._wide(best, found[best][1], request)
        if not (self._is_for_repair and best and 0 in found):
            return plan
        if found[0][0] >= _NEAR * found[best][0]:
            return plan
        alone = replace(request, criterion=request.standing_in, standing_in="")
        plans = [plan, self._wide(0, found[0][1], alone)]
        errors = [self._repaired(each) for each in plans]
        known = [math.inf if error is None else error for error in errors]
        return plans[known.index(min(known))]

    def _wide(self, count: int, tried: Plan, request: Request) -> Plan:
        """Without so many parts, on all the data; as tried, where that is out of reach now."""
        try:
            return self._in_time(count, self._widths(count, request), request)
        except InputError:  # by a little, as times are measured
            return tried

    def _repaired(self, plan: Plan) -> float | None:
        """The error after a repair on few items, on some that it has not seen."""
        small, items = shrink(self.model, plan), [batch.whole for batch in self.few.batches]
        try:
            report = calibrate(small, self.model, items, held_out=HELD_OUT, process_group=False)
        except GraphPruneError:
            return None
        return report.after

    @cached_property
    def few(self) -> Evidence:
        """The batches that numbers of parts are compared on."""
        return self.evidence.first(MOST)

    @property
    def _tried(self) -> Request:
        """The request on these batches, which all ranks have."""
        if self.request.data is None:
            return self.request
        data = [batch.whole for batch in self.few.batches]
        return replace(self.request, data=data, process_group=False)

    def _in_time(self, count: int, plan: Plan, request: Request) -> Plan:
        """The plan, made narrower where parts and widths together save less time than apart."""
        if not self._is_timed or not plan.groups:
            return plan
        made, scale = self.at(count), 1.0
        limit = self.limits["latency"] / self._whole_latency
        for _ in range(_NARROWER):
            share = self._share_of_time(plan)
            if share <= limit * _NEARLY:
                break
            scale *= limit / share
            request = replace(request, target=self._left(made, scale), ratio=None)
            plan = made.then(self._rest(made, request))
        return plan

    @property
    def _is_timed(self) -> bool:
        return "latency" in self.request.target

    def _timed_note(self, plan: Plan) -> Plan:
        """The plan, which says how long the whole small model takes where that was asked for."""
        if not self._is_timed:
            return plan
        share = self._share_of_time(plan)
        return replace(
            plan, notes=(*plan.notes, f"{share:.1%} of the original's time, measured in turns")
        )

    def _both(self, count: int) -> tuple[float, Plan]:
        """Without so many parts, and as narrow as the targets then demand: the error, the plan."""
        plan = self._widths(count, self._tried)
        repaired = self._repaired(plan) if self._is_for_repair else None
        return self.error(plan) if repaired is None else repaired, plan

    @property
    def _is_for_repair(self) -> bool:
        """Whether what leaves is chosen for a repair, and there is data for one."""
        return bool(self.request.standing_in) and self.request.data is not None

    def _widths(self, count: int, request: Request) -> Plan:
        """The plan without so many parts that is as narrow as the targets then demand."""
        made = self.at(count)
        if count and self._fits(count):
            return made
        request = replace(request, target=self._left(made), ratio=None)
        return made.then(self._rest(made, request))

    def _left(self, made: Plan, scale: float = 1.0) -> dict[str, Target]:
        """The targets for what is left after a plan.

        Milliseconds mean other things from one minute to the next: of a latency it is the fraction.
        """
        targets = {name: Target(limit, False) for name, limit in self.limits.items()}
        if "latency" in targets:
            fraction = scale * self.limits["latency"] / self.amounts(made)["latency"]
            targets["latency"] = Target(min(fraction, 1.0), True)
        return targets

    def error(self, plan: Plan) -> float:
        """The squared error of the outputs as a fraction of their variance."""
        small = shrink(self.model, plan)
        batches = self.evidence.batches
        if self.request.data is not None and any(map(has_statistics, small.modules())):
            reestimate(small, [batch.whole for batch in batches])
        found = distance(small, self.model, batches, [None] * len(batches))
        return math.inf if found is None else found

    def _unreachable(self) -> str:
        amounts = self.amounts(self.at(self.ladder.steps))
        lines = [
            f"at most {amount_text(name, limit)} {TITLES[name]} cannot be met: without all parts "
            f"that can leave there are {amount_text(name, amounts[name])}"
            for name, limit in self.limits.items()
            if amounts[name] > limit
        ]
        return "; ".join(lines) + '; add "channels" to parts'


def _both(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, object]:
    """The outputs that count by two plans, by mode."""
    modes = [each["outputs"] for each in (one, other) if each.get("outputs")]
    found = {}
    for mode in ("eval", "train"):
        known = [set(each.get(mode, each.get("eval", ()))) for each in modes]
        if any(mode in each for each in modes):
            found[mode] = sorted(set.intersection(*known))
    return {"outputs": found} if found else {}
