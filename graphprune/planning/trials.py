"""Variants of a plan, tried: each small model is repaired on few items, and others decide.

How much errors of different layers count for the outputs is an estimate of the criterion. Where it
offers other ones, the plans that follow from them are carried out and repaired; the one whose
outputs come nearest to the original's, on items that the repair has not seen, is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from torch import nn

from graphprune.calibration import calibrate
from graphprune.calibration.items import FEW, count
from graphprune.criteria import find
from graphprune.errors import GraphPruneError
from graphprune.execute.shrink import shrink
from graphprune.plan.plan import Plan
from graphprune.planning.draft import Draft
from graphprune.ranks import Ranks
from graphprune.record.batches import Batch, Through

MOST = 96  # items that small models are repaired on
HELD_OUT = 0.34  # of these
BETTER = 0.99  # of the error: less is chance


class First(Through):
    """Data that is gone through once, of which the first items are kept.

    Attributes:
        data: what the user passed.
        kept: batches of a few items.
    """

    def __init__(self, data: Iterable[object]) -> None:
        super().__init__(data)
        self.kept: list[object] = []
        self.items = 0

    def __iter__(self) -> Iterator[object]:
        self.kept, self.items = [], 0
        for batch in self.data:
            if self.items < MOST:
                self.kept.append(batch)
                self.items += count(Batch.of(batch)) or 1
            yield batch

    def in_common(self, ranks: Ranks) -> int:
        """Keep of the first items of all ranks those that are this one's; how many all are."""
        counts, places = ranks.in_turn([count(Batch.of(batch)) or 1 for batch in self.kept])
        before = [0, *itertools.accumulate(counts)]
        self.kept = [batch for batch, place in zip(self.kept, places) if before[place] < MOST]
        self.items = next((total for total in before if total >= MOST), before[-1])
        return self.items


class Trials:
    """The best of several plans.

    Args:
        model: the original.
        items: that small models are repaired on, once data was gone through.
    """

    def __init__(self, model: nn.Module, items: First) -> None:
        self.model, self.items = model, items

    def best(self, draft: Draft, make: Callable[[Draft], Plan]) -> Plan:
        """The plan of the draft, or a better one of a variant; one after the other is tried.

        Args:
            draft: with the data.
            make: the plan of a draft.
        """
        best = make(draft)
        variants = find(draft.request.criterion).variants
        ranks = draft.request.ranks
        if self.items.in_common(ranks) < FEW or draft.evidence is None or variants is None:
            return best
        seen = {_kept(best)}
        error: float | None = None
        changes = [*variants(draft.analysis.groups, draft.evidence)]
        for change in (*changes, *find(draft.request.criterion).others):
            if isinstance(change, Mapping):
                base = draft.base or {}
                product = {n: draft.factors.get(n, 1.0) * change.get(n, 1.0) for n in base}
                other = replace(draft, factors=product)
            else:
                request = replace(draft.request, criterion=change)
                other = Draft(draft.model, draft.call, draft.settled, request, draft.evidence)
            plan = make(other)
            if _kept(plan) in seen:
                continue
            seen.add(_kept(plan))
            error = self._error(best, ranks) if error is None else error
            found = self._error(plan, ranks)
            if error is None or found is None:
                return best
            if found < BETTER * error:
                best, error, draft = plan, found, other
        return best

    def _error(self, plan: Plan, ranks: Ranks) -> float | None:
        """How far the outputs of the repaired small model are from the original's."""
        small = shrink(self.model, plan)
        asked = False if ranks.size == 1 else ranks.asked
        try:
            report = calibrate(
                small, self.model, self.items.kept, held_out=HELD_OUT, process_group=asked
            )
        except GraphPruneError:
            return None
        return report.after


def _kept(plan: Plan) -> tuple[tuple[int, ...], ...]:
    return tuple(group.kept for group in plan.groups)
