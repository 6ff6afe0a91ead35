"""Let the blocks of a plan keep channels of their own, where a run shows that they can."""

from __future__ import annotations

from dataclasses import replace

import torch

from graphprune.channels.analysis import Group
from graphprune.channels.blocks import choose
from graphprune.criteria import scores
from graphprune.errors import InputError, VerificationError
from graphprune.plan.plan import Plan
from graphprune.planning.draft import Draft
from graphprune.planning.select import Kept, kept
from graphprune.verification.comparing import Session


def freed(draft: Draft, plan: Plan, chosen: Kept) -> Plan:
    """The best channels of every block.

    Args:
        draft: the request and the analysis that the plan was made for.
        plan: it keeps equal columns.
        chosen: its kept channels.

    Returns:
        A plan of the same sizes and costs. The small model was compared with the masked one on
        the example inputs, in double precision; groups where they differ keep equal columns.
    """
    request = draft.request

    def best(part: Group, count: int) -> tuple[int, ...]:
        options = request.criterion, [part], draft.evidence or {}, request.seed
        try:
            found = scores(*options, request.aggregate, "none", None)
        except InputError:  # the criterion, which has seen the group, cannot see this part of it
            return chosen[part.name]
        return kept(found, {part.name: count})[part.name]

    def trial(names: set[str]) -> Plan | None:
        slots = choose(draft.analysis, draft.analysis.alive(chosen), chosen, best, names)
        if set(slots) == set(plan.slots):
            return None
        changed = replace(plan, slots=slots, request={**plan.request, "columns": "free"})
        session = Session(draft.model, changed, changed, torch.float64, 1e-10, 0)
        try:
            session.outputs("", session.unchanged(draft.call)[1], training=False)
        except VerificationError:
            return None
        return changed

    whole = trial(set(chosen))
    if whole is None:
        whole = trial({name for name in chosen if trial({name}) is not None})
    return whole or replace(plan, request={**plan.request, "columns": "aligned"})
