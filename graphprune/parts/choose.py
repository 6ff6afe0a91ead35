"""Which parts leave, and how many: by a fraction, or by a budget that widths share."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.calibration.outcome import distance
from graphprune.calibration.statistics import has_statistics, reestimate
from graphprune.criteria import name_of
from graphprune.errors import InputError
from graphprune.execute.shrink import hollow, shrink
from graphprune.measurement import drawn
from graphprune.parts.find import Finder, Part
from graphprune.parts.score import Evidence, ordered
from graphprune.parts.stream import covers
from graphprune.plan.plan import Cost, PartPlan, Plan
from graphprune.planning.budget import TITLES, amount_text
from graphprune.planning.latency import Bench
from graphprune.planning.options import Request, Target
from graphprune.record.batches import at_rest, device_of
from graphprune.record.inputs import Call
from graphprune.record.outputs import fields
from graphprune.record.random_numbers import same_numbers
from graphprune.record.recording import dry
from graphprune.record.skeleton import without_weights
from graphprune.record.tensors import fingerprint
from graphprune.text import shorten

_TRIED = 5  # numbers of parts, evenly spaced, for which a whole plan is made
_NEARER = 2  # rounds of halving the steps around the best one
_SECONDS = 1.0  # that two models run in turns to be timed


class Widths(Protocol):
    """A traced model: what it costs, and plans for its channels."""

    @property
    def cost(self) -> Cost:
        """Parameters, MACs and bytes."""

    @property
    def memory(self) -> int:
        """Peak bytes of activations."""

    def widths(self, request: Request) -> Plan:
        """A plan for channels alone."""


@dataclass
class Chooser:
    """A request for parts of a model.

    Args:
        model: it is not touched.
        call: inputs it runs on.
        request: what is asked for.
        finder: what can leave.
        whole: the traced model.
        again: traces a smaller one.
    """

    model: nn.Module
    call: Call
    request: Request
    finder: Finder
    whole: Widths
    again: Callable[[nn.Module], Widths]

    def plan(self) -> Plan:
        """The plan.

        Raises:
            InputError: no such part can leave, or a target cannot be met.
        """
        if self.request.target:
            return self._within()
        count = round((self.request.ratio or 0.0) * len(self.parts))
        made = self.without(self._apart(self.order, count))
        if "channels" not in self.request.parts:
            return made
        rest = replace(self.request, parts=("channels",))
        return made.then(self._traced(made).widths(rest))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What may leave: of branches and blocks, without those that must be kept."""
        known = self._known()
        spared = [
            part
            for part in known
            if any(self._names(pattern, part) for pattern in self.request.keep)
        ]
        left = tuple(part for part in known if part not in spared)
        kinds = " or ".join(kind for kind in self.request.parts if kind != "channels")
        if not left:
            why = "all are kept" if known else "nothing is added to a stream that can leave alone"
            raise InputError(f"no {kinds} of this model can leave: {why}")
        if len(known) == 1 and not self.finder.first_stays:
            raise InputError(f"{left[0].name!r} alone can leave, and one of the {kinds} must stay")
        return left

    def _known(self) -> tuple[Part, ...]:
        if "branches" in self.request.parts:  # blocks leave when all their branches do
            return self.finder.branches
        return self.finder.single_blocks

    def _names(self, pattern: str, part: Part) -> bool:
        """Whether a pattern names a module of a part, or one around it."""
        return any(
            fnmatch.fnmatchcase(name, pattern)
            for name in self.finder.modules
            if any(covers(root, name) for root in part.modules)
        )

    @cached_property
    def evidence(self) -> Evidence:
        """The batches that parts are scored on."""
        return Evidence.of(self.model, self.call, self.request.data, self.request.loss)

    @cached_property
    def order(self) -> list[Part]:
        """The parts that the code goes on without, those first that matter least."""
        per_mac = bool(self.request.target)
        criterion, seed = self.request.criterion, self.request.seed
        order = ordered(self.parts, self.evidence, criterion, seed, per_mac)
        if not self._runs(self._apart(order, len(order))):
            order = [part for part in order if self._runs([part])]
        if not order:
            raise InputError(f"none of {shorten([p.name for p in self.parts])} can leave alone")
        return order

    @cached_property
    def chain(self) -> list[Part]:
        """The parts in the order in which they leave for a budget; not all of them."""
        return self._apart(self.order, len(self.order))

    def _apart(self, order: Sequence[Part], count: int) -> list[Part]:
        """Parts that leave together, at most so many with those inside; one at least stays."""
        others = self.finder.first_stays or len(self.parts) < len(self._known())
        most = min(count, len(order) if others else len(order) - 1)
        chosen: list[Part] = []
        for part in order:
            trial = [*(p for p in chosen if not _within(p, [part])), part]
            cuts = {cut for each in trial for cut in each.cuts}
            one_side = len({cut.key for cut in cuts}) == len(cuts)
            gone = sum(_within(each, trial) for each in order)
            if not one_side or gone > most or _within(part, chosen):
                continue
            if self._bare(trial) is not None:
                chosen = trial
        return chosen

    def _runs(self, parts: Sequence[Part]) -> bool:
        """Whether the code goes on without some parts, and returns the same shapes.

        In train mode as well, where the whole model runs in it. A model that reads values is run
        on its device, with its weights.
        """
        plan = self._bare(parts)
        if plan is None:
            return False
        on_meta = self.finder.record.device == "meta"
        models = (self.model, self._small(plan)) if not on_meta else (
            without_weights(self.model), hollow(self.model, plan)
        )  # fmt: skip
        for training in (False, True):
            whole, rest = (self._shapes(model, training, on_meta) for model in models)
            if whole is not None and rest != whole:
                return False
        return True

    def _shapes(self, model: nn.Module, training: bool, on_meta: bool) -> list[object] | None:
        """The shapes of what a model returns; ``None`` where it does not run."""
        try:
            with at_rest(model), same_numbers(), torch.no_grad():
                model.train(training)
                if on_meta:
                    found = dry(model, self.call)
                else:
                    args, kwargs = drawn(self.call, device_of(model))
                    found = pytree.tree_leaves(fields(model(*args, **kwargs)))
        except Exception:  # whatever the code of the model raises
            return None
        return [tuple(leaf.shape) for leaf in found if isinstance(leaf, Tensor)]

    def _bare(self, parts: Sequence[Part]) -> Plan | None:
        cuts = tuple(dict.fromkeys(cut for part in parts for cut in part.cuts))
        if len({cut.key for cut in cuts}) < len(cuts):
            return None  # both operands of a sum
        stand_ins = self.finder.stand_ins(cuts)
        if stand_ins is None:
            return None
        told = tuple(PartPlan(part.name, part.kind, part.params, part.macs) for part in parts)
        return Plan(
            fingerprint(self.model), (), (), parts=told, cuts=cuts, stand_ins=tuple(stand_ins)
        )

    def without(self, parts: Sequence[Part]) -> Plan:
        """The plan by which some parts leave."""
        plan = self._bare(parts)
        if plan is None:
            raise InputError(f"{shorten([p.name for p in parts])} cannot leave together")
        request = self.request
        told: dict[str, Any] = {"parts": list(request.parts), "ratio": request.ratio}
        told |= {"criterion": name_of(request.criterion), "seed": request.seed}
        if request.target:
            told["target"] = {name: target.amount for name, target in request.target.items()}
        plan = replace(plan, inputs=str(self.call), request=told)
        return replace(plan, before=self.whole.cost, after=self._traced(plan).cost)

    def _traced(self, plan: Plan) -> Widths:
        key = plan.cuts
        if key not in self._known_widths:
            self._known_widths[key] = self.whole if not key else self.again(self._small(plan))
        return self._known_widths[key]

    @cached_property
    def _known_widths(self) -> dict[object, Widths]:
        return {}

    def _small(self, plan: Plan) -> nn.Module:
        small = shrink(self.model, plan)
        del vars(small)["graphprune_plan"]  # plans for it follow this one
        return small

    # --- budgets ------------------------------------------------------------------------------

    @cached_property
    def limits(self) -> dict[str, float]:
        """The amounts that the small model may cost."""
        return {
            name: target.of(self.amounts(self.without([]))[name])
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
        share = 1.0
        if plan.cuts:
            before, after = self._timed(self.model, self._small(plan))
            share = float(np.median(np.array(after) / np.array(before)))
        return self._whole_latency * share

    @cached_property
    def _whole_latency(self) -> float:
        return float(np.median(self._timed(self.model)))

    def _timed(self, *models: nn.Module) -> list[list[float]]:
        bench = Bench(self.call, device_of(self.model), self.request.threads)
        return bench.totals(models, bench.clock, seconds=_SECONDS)

    def _fits(self, count: int) -> bool:
        amounts = self.amounts(self.without(self.chain[:count]))
        return all(amounts[name] <= limit for name, limit in self.limits.items())

    def _least(self) -> int | None:
        """The smallest number of parts without which the model is within all limits."""
        low, high = 0, len(self.chain)
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
        if "channels" not in self.request.parts:
            if least is None:
                raise InputError(self._unreachable())
            return self.without(self.chain[:least])
        most = len(self.chain) if least is None else least
        found: dict[int, tuple[float, Plan]] = {}
        problem: InputError | None = None
        steps = sorted({round(most * step / (_TRIED - 1)) for step in range(_TRIED)})
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
        return replace(found[best][1], notes=(*found[best][1].notes, note))

    def _both(self, count: int) -> tuple[float, Plan]:
        """Without so many parts, and as narrow as the targets then demand: the error, the plan."""
        made = self.without(self.chain[:count])
        targets = {name: Target(limit, False) for name, limit in self.limits.items()}
        if count and self._fits(count):
            plan = made
        else:
            rest = replace(self.request, parts=("channels",), target=targets, ratio=None)
            plan = made.then(self._traced(made).widths(rest))
        return self.error(plan), plan

    def error(self, plan: Plan) -> float:
        """The squared error of the outputs as a fraction of their variance."""
        small = shrink(self.model, plan)
        if self.request.data is not None and any(map(has_statistics, small.modules())):
            reestimate(small, [batch.whole for batch in self.evidence.batches])
        batches = self.evidence.batches
        found = distance(small, self.model, batches, [None] * len(batches))
        return math.inf if found is None else found

    def _unreachable(self) -> str:
        plan = self.without(self.chain)
        amounts = self.amounts(plan)
        lines = [
            f"at most {amount_text(name, limit)} {TITLES[name]} cannot be met: without all parts "
            f"that can leave there are {amount_text(name, amounts[name])}"
            for name, limit in self.limits.items()
            if amounts[name] > limit
        ]
        return "; ".join(lines) + '; add "channels" to parts'


def _within(part: Part, others: Sequence[Part]) -> bool:
    """Whether all modules of a part leave with others."""
    roots = [module for other in others for module in other.modules]
    return all(any(covers(root, module) for root in roots) for module in part.modules)
