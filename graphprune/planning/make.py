"""From a request to a plan: the search for a budget, and what the code can follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from graphprune.channels.analysis import Analysis
from graphprune.criteria import find
from graphprune.errors import InputError, ModelError
from graphprune.execute.shrink import shrink
from graphprune.ops.vanishing import breaks
from graphprune.plan.plan import GroupPlan, Plan
from graphprune.planning.budget import TITLES, Budget, Unreachable, amount_text
from graphprune.planning.costs import cost
from graphprune.planning.deadline import Deadline
from graphprune.planning.draft import Draft, passed_by, unread, why
from graphprune.planning.dry_run import Ran
from graphprune.planning.expressible import Joint, Search, said_by_config
from graphprune.planning.freeing import freed
from graphprune.planning.latency import Bench, Cache
from graphprune.planning.options import Request
from graphprune.planning.rescaling import Rescaling
from graphprune.planning.select import Kept
from graphprune.planning.settle import Settled, bare_plan, follow, rehearse
from graphprune.planning.trials import First, Trials
from graphprune.planning.unread import waiting, with_unread
from graphprune.record.batches import Batched, check_data
from graphprune.record.checks import is_weightless
from graphprune.record.inputs import Call
from graphprune.record.tensors import fingerprint
from graphprune.text import share, shorten

COARSEST = 3  # sizes of a way to shrink from which none is left out


class _Stuck(Exception):
    """The code cannot follow some kept channels; ``settled`` is without what stood in the way."""

    def __init__(self, settled: Settled) -> None:
        super().__init__()
        self.settled = settled


def make_plan(model: nn.Module, call: Call, settled: Settled, request: Request) -> Plan:
    """The plan for a request; see ``ChannelGraph.plan``."""
    if request.data is not None:
        request = replace(request, data=Batched(check_data(request.data), str(call)))
    if find(request.criterion).variants is not None and request.data is not None:
        items = First(check_data(request.data))
        trials = Trials(model, items)
        draft = Draft(model, call, settled, replace(request, data=items))
        return trials.best(draft, lambda draft: _decided(draft, settled))
    return _decided(Draft(model, call, settled, request), settled)


def _decided(draft: Draft, settled: Settled) -> Plan:
    """The plan of the first rank, for all of them: a latency that it measures is its own."""
    ranks = draft.request.ranks
    if ranks.size == 1:
        return _planned(draft, settled)
    if draft.analysis.groups:
        _ = draft.scores  # which are summed over all ranks, before the first may go on alone
    own: Plan | str | None = None
    if ranks.first:
        try:
            own = _planned(draft, settled)
        except InputError as error:  # a target that cannot be met: on all ranks
            own = str(error)
    found = ranks.decided(own)
    if not isinstance(found, Plan):
        raise InputError(found)
    return found


def _planned(draft: Draft, settled: Settled) -> Plan:
    model, call, request = draft.model, draft.call, draft.request
    while True:
        if not draft.analysis.groups:
            reasons = why(draft.analysis) or "  its forward read no parameter of its own"
            raise InputError(f"no channel of this model can be removed:\n{reasons}")
        told = request.told
        try:
            chosen = draft.kept(_counts(draft, told))
            plan, ran = emit(model, call, draft.settled, chosen, told, draft.rescaling)
            if request.expressible and not _is_said(draft, plan):
                continue
        except _Stuck as stuck:
            known = draft.evidence, draft.factors
            draft = Draft(model, call, stuck.settled, request, *known, alone=True)
            continue
        draft.warn(plan)
        if draft.sayable is not None:
            plan = replace(plan, notes=(*plan.notes, *draft.sayable.told(draft.analysis.groups)))
        plan = freed(draft, plan, chosen) if request.columns == "free" else plan
        return with_unread(model, call, settled.analysis, plan, ran)


def _is_said(draft: Draft, plan: Plan) -> bool:
    """Whether the config of the model says a plan; else the draft is without its sizes.

    Raises:
        InputError: it does not, and no size is to blame.
    """
    said, kind = draft.said(), type(draft.model).__name__
    if not said.joints:
        lines = "\n  ".join(said.told(draft.analysis.groups))
        raise InputError(f"the config of {kind} says no other width:\n  {lines}")
    reason = said_by_config(draft.model, draft.call, plan)
    if not reason:
        return True
    joints = _without(draft, plan)
    if joints is None:
        raise InputError(f"the config of {kind} cannot say this plan: {reason}")
    draft.sayable = replace(said, joints=joints)
    return False


def _without(draft: Draft, plan: Plan) -> tuple[Joint, ...] | None:
    """What a config says without the sizes of a plan that it does not say after all.

    Where each of them is said alone, they do not go together (a layer stands between two widths
    unless these are equal, say): then the finest of them changes.
    """
    left = {group.name: len(group.kept) for group in plan.groups}
    search = Search(draft.model, draft.call, draft.settled)
    rows = {joint: tuple(left[name] for name in joint.groups) for joint in draft.said().joints}
    smaller = [joint for joint, row in rows.items() if row != joint.rows[0]]
    wrong = {joint for joint in smaller if search.wrong(joint, rows[joint])}
    if not wrong and smaller:
        finest = max(smaller, key=lambda joint: len(joint.rows))
        wrong = {finest} if len(finest.rows) > COARSEST else set()
    if not wrong:
        return None
    return tuple(j.without(rows[j]) if j in wrong else j for j in rows)


def emit(
    model: nn.Module,
    call: Call,
    settled: Settled,
    chosen: Kept,
    told: Mapping[str, object] | None = None,
    rescaling: Rescaling | None = None,
) -> tuple[Plan, Sequence[Ran]]:
    """A plan that the code of the model was seen to follow, and what was seen.

    Raises:
        _Stuck: it does not; says what is left without the channels in the way.
    """
    finding = follow(model, call, settled, chosen)
    if finding.possible:
        plan = assemble(call, finding.settled, chosen, told, rescaling)
        alive = finding.settled.analysis.alive(chosen)
        unread = waiting(model, finding.settled.analysis, plan)
        finding = rehearse(model, call, finding.settled, plan, alive, unread)
        if finding.possible:
            return plan, finding.ran
    raise _Stuck(finding.settled)


def _counts(draft: Draft, told: dict[str, object]) -> np.ndarray:
    """How many channels each group keeps; a latency that was measured is told."""
    path, request = draft.path(), draft.request
    if not request.target:
        return path.level(request.ratio or 0.0)
    budget = Budget(draft.analysis, request.target, draft.alive)
    try:
        if "latency" not in request.target:
            return budget.search(path)
        deadline = _deadline(draft, budget)
        told["latency"] = deadline.report
        return deadline.search(None if request.scope or request.allocation else draft.path)
    except Unreachable as error:
        raise InputError(f"{error}{_obstacles(draft, budget)}") from None


def _deadline(draft: Draft, budget: Budget) -> Deadline:
    """The search for a latency on the device of the model."""
    model, request = draft.model, draft.request
    if is_weightless(model):
        raise ModelError("a latency is measured, and the model is on the meta device: load it")

    def small(counts: np.ndarray) -> nn.Module:
        chosen = draft.kept(counts)
        plan, _ = emit(model, draft.call, draft.settled, chosen, rescaling=draft.rescaling)
        return shrink(model, plan)

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    bench = Bench(draft.call, device, request.threads)
    sizes = [group.size for group in draft.analysis.groups]
    tensors = [(t.dtype, t.stride()) for t in (*model.parameters(), *model.buffers())]
    inputs = repr(draft.call.map(lambda tensor: tensor.to("meta")))
    key = fingerprint(model), tensors, inputs, bench, sizes, request.round_to or request.vector
    return Deadline(budget, draft.path(), bench, Cache(*key), model, small)


def _obstacles(draft: Draft, budget: Budget) -> str:
    """What stands in the way of a target: frozen channels, and options that forbid more."""
    lines = [f"\n  frozen:\n{why(draft.analysis)}"]
    floor = budget.floor(draft.path())
    for name in ("keep", "exact_only", "min_kept", "round_to", "ratios", "uniform"):
        if getattr(draft.request, name) == getattr(Request(), name):
            continue
        freer = replace(draft.request, **{name: getattr(Request(), name), "criterion": "random"})
        other = Draft(draft.model, draft.call, draft.settled, freer)
        gains = [
            f"{amount_text(quantity, amount)} {TITLES[quantity]}"
            for quantity, amount in budget.floor(other.path()).items()
            if amount < floor[quantity] > budget.limits[quantity]
        ]
        if gains:
            lines.append(f"\n  without {name}, {' and '.join(gains)} could be reached")
    return "".join(lines)


def assemble(
    call: Call,
    settled: Settled,
    chosen: Kept,
    request: Mapping[str, Any] | None = None,
    rescaling: Rescaling | None = None,
) -> Plan:
    """A plan from kept channels by group name, which the code of the model can follow.

    With ``rescaling``, the statistics of norms that allow it become those of the masked model.

    Raises:
        InputError: a size in the code of the model cannot follow.
    """
    analysis = settled.analysis
    alive = analysis.alive(chosen)
    solved = settled.changes(alive)
    if solved.problems:
        raise InputError(f"these channels cannot leave: {solved.problems[0].reason}")
    bare = bare_plan(analysis, alive, solved)
    norms, calls = ((), ()) if rescaling is None else rescaling.counts(alive)
    groups = tuple(
        GroupPlan(
            group.name,
            group.size,
            chosen.get(group.name, tuple(range(group.size))),
            group.layers,
            group.exact or (rescaling is not None and rescaling.covers(group)),
        )
        for group in analysis.groups
    )
    return replace(
        bare,
        groups=groups,
        scales=() if rescaling is None else rescaling.changes(alive),
        norms=norms,
        literals=(*bare.literals, *calls),
        evaluated=bool((~alive[analysis.marks.masked_ids()]).any()) or _broken(analysis, alive),
        before=cost(analysis),
        after=cost(analysis, alive),
        inputs=str(call),
        request={"attention": analysis.attention, **counted_outputs(analysis), **(request or {})},
        notes=(
            *bare.notes,
            *_told((request or {}).get("latency")),
            *unread(analysis),
            *passed_by(analysis),
        ),
    )


def _broken(analysis: Analysis, alive: np.ndarray) -> bool:
    """Whether an op divides by what would be zero in a masked model."""
    divisors = [breaks(node) for record in analysis.records for node in record.ops]
    layers = [layer for n in divisors if n is not None for layer in analysis.values[n].layers]
    return any(not alive[layer.numpy()].all() for layer in layers)


def counted_outputs(analysis: Analysis) -> dict[str, object]:
    """Which outputs count, as places among the tensors of the output, by mode."""
    modes = {
        "train" if record.training else "eval": sorted(record.counted)
        for record in analysis.records
        if record.counted is not None
    }
    return {"outputs": modes} if modes else {}


def _told(latency: Mapping[str, Any] | None) -> Iterator[str]:
    """What was predicted and measured, as a line for reports."""
    if latency is not None:
        before, predicted, measured = (
            amount_text("latency", latency[name]) for name in ("before", "predicted", "measured")
        )
        part = share(latency["measured"], latency["before"])
        yield (
            f"latency on {latency['device']}: {before} -> {measured} ({part}) measured, "
            f"{predicted} predicted"
        )


def check_kept(settled: Settled, asked: Mapping[str, Iterable[int]]) -> Kept:
    """Kept channels of a user's own choice, sorted.

    Raises:
        InputError: an unknown or emptied group, or channels it does not have.
    """
    if not isinstance(asked, Mapping):
        raise InputError(
            'kept must map groups to the channels that stay, such as {"g0": [0, 2]}; '
            f"got {type(asked).__name__}"
        )
    by_name = {group.name: group for group in settled.analysis.groups}
    chosen: Kept = {}
    for name, channels in asked.items():
        if name not in by_name:
            raise InputError(f"no removable group {name!r}; groups: {shorten(by_name, 12)}")
        chosen[name] = _numbers(name, channels)
        size = by_name[name].size
        if not chosen[name] or not 0 <= chosen[name][0] <= chosen[name][-1] < size:
            valid = f"0..{size - 1}"
            raise InputError(f"group {name} must keep at least one of its channels {valid}")
    return chosen


def _numbers(name: str, channels: Any) -> tuple[int, ...]:
    """Numbers of channels, sorted."""
    given = np.asarray(channels.tolist() if hasattr(channels, "tolist") else list(channels))
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise InputError(
            f"group {name} must keep channels by number, such as [0, 2]; got {given.dtype} of "
            f"shape {list(given.shape)} (of a boolean mask: mask.nonzero().flatten())"
        )
    return tuple(np.unique(given).tolist())


def followed(model: nn.Module, call: Call, settled: Settled, chosen: Kept, plan: Plan) -> Plan:
    """A plan for which a shrunk copy without weights was run.

    Raises:
        InputError: the code does not follow.
    """
    alive = settled.analysis.alive(chosen)
    unread = waiting(model, settled.analysis, plan)
    finding = rehearse(model, call, settled, plan, alive, unread)
    ran = finding.ran
    if finding.possible and settled.changes(alive).unsure:
        finding = follow(model, call, settled, chosen)
    if not finding.possible:
        later = finding.settled.analysis.later
        reason: object = "the code takes another way where one of several is left: keep two"
        if len(later.several) == len(settled.analysis.later.several):
            reason = later.frozen[-1][1]
        limits = [f"{g.name}: {g.limit}" for g in settled.analysis.groups if g.limit]
        raise InputError("; ".join([f"these channels cannot leave: {reason}", *limits]))
    return with_unread(model, call, settled.analysis, plan, ran)
