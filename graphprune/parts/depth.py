"""Which branches and blocks leave: those first that matter least, as long as the code goes on."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from graphprune.channels.analysis import Group
from graphprune.errors import InputError
from graphprune.parts.find import Finder, Part
from graphprune.parts.saving import savings
from graphprune.parts.score import Evidence, ordered
from graphprune.parts.stream import covers
from graphprune.parts.trial import goes_on, obstacle
from graphprune.plan.plan import PartPlan, Plan
from graphprune.planning.draft import matching
from graphprune.planning.latency import Bench
from graphprune.planning.options import Request
from graphprune.record.batches import device_of
from graphprune.record.inputs import Call
from graphprune.text import shorten

Alone = tuple[str, str, tuple[str, ...], int, Mapping[float, Plan]]


@dataclass
class Depth:
    """The branches and blocks of a model, in the order in which they leave.

    Args:
        model: it is not touched.
        call: inputs it runs on.
        request: what is asked for.
        finder: what can leave.
        evidence: what parts are scored on.
    """

    model: nn.Module
    call: Call
    request: Request
    finder: Finder
    evidence: Evidence

    @property
    def steps(self) -> int:
        """How many can leave."""
        return len(self.chain)

    def plan(self, count: int) -> Plan:
        """The plan by which the first so many leave."""
        count = max(count, len(self.asked))
        return self._without(self._running(self.chain[:count], count))

    def share(self, ratio: float) -> Plan:
        """The plan by which a fraction of them leaves."""
        count = max(round(ratio * len(self.parts)), len(self.asked))
        return self._without(self._running(self._apart(self.order, count), count))

    def _running(self, parts: list[Part], count: int) -> list[Part]:
        """So many parts, or those of them and of the next ones without which the code goes on."""
        if self._runs(parts):
            return parts
        found: list[Part] = []
        for part in self.order:
            trial = self._apart([*found, part], count)
            if part in trial and self._runs(trial):
                found = trial
        return found

    def alone(self, fractions: Sequence[float]) -> Iterator[Alone]:
        """Every part that can leave by itself, with the plan for it."""
        for part in self.parts:
            if self._runs([part]):
                yield part.kind, part.name, part.modules, 1, {1.0: self._without([part])}

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
        free = tuple(part for part in left if not self._is_bounded(part))
        if left and not free:
            return ()  # channels may leave all the same
        left = free
        kinds = " or ".join(kind for kind in self.request.parts if kind != "channels")
        if not left:
            why = "all are kept" if known else "nothing is added to a stream that can leave alone"
            raise InputError(f"no {kinds} of this model can leave: {why}")
        if len(known) == 1 and not self._likes_stay:
            raise InputError(f"{left[0].name!r} alone can leave, and one of the {kinds} must stay")
        return left

    @cached_property
    def asked(self) -> list[Part]:
        """The parts around layers all of whose channels leave, as ``ratios`` says.

        Raises:
            InputError: there is none around a layer.
        """
        found: dict[str, Part] = {}
        for pattern in (pattern for pattern, ratio in self.request.ratios.items() if ratio == 1):
            groups = matching(self.finder.joined.analysis, pattern, "ratios pattern")
            around = [part for part in self.parts if any(_holds(part, group) for group in groups)]
            if not around:
                raise InputError(
                    f"all channels of {pattern!r} can leave only with a part around them, and "
                    f"none of {shorten([part.name for part in self.parts])} is: name less than 1"
                )
            least = min(around, key=lambda part: part.macs)
            found[least.name] = least
        return list(found.values())

    def _is_bounded(self, part: Part) -> bool:
        """Whether channels of a part must stay by ``min_kept``."""
        analysis = self.finder.joined.analysis
        return any(
            least and any(_holds(part, group) for group in matching(analysis, pattern, "min_kept"))
            for pattern, least in self.request.min_kept.items()
        )

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
    def order(self) -> list[Part]:
        """The parts that the code goes on without, those first that matter least."""
        criterion, seed = self.request.criterion, self.request.seed
        measured = {} if self.request.allocation is None else self.request.allocation.parts()
        if all(part.name in measured for part in self.parts):
            order = sorted(self.parts, key=lambda p: measured[p.name] / self.saved[p.name])
        else:
            order = ordered(self.parts, self.evidence, criterion, seed, self.saved)
        order = [*self.asked, *(part for part in order if part not in self.asked)]
        if not self._runs(self._apart(order, len(order))):
            order = [part for part in order if self._runs([part])]
        if self.parts and not order:
            names, first = shorten([part.name for part in self.parts]), self._bare(self.parts[:1])
            told = first and obstacle(self.model, self.call, self.finder.record, first)
            raise InputError(f"none of {names} can leave alone: {told or 'others are tied to it'}")
        return order

    @cached_property
    def saved(self) -> Mapping[str, float]:
        """What every part saves of the targets; the same on all ranks, where times are measured."""
        bench = Bench(self.call, device_of(self.model), self.request.threads)
        target, ranks = self.request.target, self.request.ranks
        own = savings(self.parts, target, self.finder, self.model, bench) if ranks.first else {}
        return ranks.decided(own)

    @cached_property
    def chain(self) -> list[Part]:
        """The parts in the order in which they leave for a budget; not all of them."""
        return self._apart(self.order, len(self.order))

    @cached_property
    def _likes_stay(self) -> bool:
        """Whether something like the parts stays without all of them.

        The first of numbered layers, or a module of the class in whose code they are added, with
        nothing that can leave: a block that changes the resolution.
        """
        finder = self.finder
        adding = {cut.module for part in self._known() for cut in part.cuts} - {""}
        kinds = {type(finder.modules[name]) for name in adding}
        gone = [module for part in self._known() for module in part.modules]
        return finder.first_stays or any(
            type(module) in kinds
            and name in finder.calls
            and name not in adding
            and not any(covers(root, name) for root in gone)
            for name, module in finder.modules.items()
        )

    def _apart(self, order: Sequence[Part], count: int) -> list[Part]:
        """Parts that leave together, at most so many with those inside; one at least stays."""
        others = self._likes_stay or len(order) < len(self._known())
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
        """Whether the code goes on without some parts."""
        key = frozenset(part.name for part in parts)
        if key not in self._known_runs:
            plan = self._bare(parts)
            record = self.finder.record
            self._known_runs[key] = plan is not None and goes_on(
                self.model, self.call, record, plan
            )
        return self._known_runs[key]

    @cached_property
    def _known_runs(self) -> dict[frozenset[str], bool]:
        return {}

    def _bare(self, parts: Sequence[Part]) -> Plan | None:
        cuts = tuple(dict.fromkeys(cut for part in parts for cut in part.cuts))
        if len({cut.key for cut in cuts}) < len(cuts):
            return None  # both operands of a sum
        groups = tuple(dict.fromkeys(name for part in parts for name in part.groups))
        plan = self.finder.without(cuts, groups)
        told = tuple(PartPlan(part.name, part.kind, part.params, part.macs) for part in parts)
        return plan and replace(plan, parts=told)

    def _without(self, parts: Sequence[Part]) -> Plan:
        plan = self._bare(parts)
        if plan is None:
            raise InputError(f"{shorten([p.name for p in parts])} cannot leave together")
        return plan


def _holds(part: Part, group: Group) -> bool:
    """Whether all that writes the channels of a group leaves with a part."""
    written = [member.slot.tensor for member in group.members if not member.reads]
    return group.name in part.groups or all(
        any(covers(module, tensor) for module in part.modules) for tensor in written
    )


def _within(part: Part, others: Sequence[Part]) -> bool:
    """Whether all modules of a part leave with others."""
    roots = [module for other in others for module in other.modules]
    return all(any(covers(root, module) for root in roots) for module in part.modules)
