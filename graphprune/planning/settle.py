"""Find out, before anyone plans, which channels can leave as far as the model's code goes.

A trial plan of irregular widths is solved for sizes; sizes that neither an attribute nor a number
in the source can change freeze their channels, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphprune.channels.analysis import Analysis
from graphprune.channels.structure import least
from graphprune.errors import PlanError, RewriteError, TraceError
from graphprune.ops.values import Reason
from graphprune.plan.plan import IndexChange, LiteralChange, Plan, SizeChange, SlotPlan
from graphprune.planning import adapt
from graphprune.planning.dry_run import Place, Ran, broken, first_changed, first_mismatch
from graphprune.planning.problems import Obstacles, Problem, around, obstacles, united
from graphprune.record.inputs import Call
from graphprune.record.recorder import Record
from graphprune.record.recording import record
from graphprune.record.sizes import Attribute, Literal, plain
from graphprune.record.tensors import named_modules

TRIALS = 2


@dataclass(frozen=True)
class Settled:
    """An analysis, with what is known of how the code of the model follows it.

    ``trusted`` are the (record, op) positions of plain ints that were seen to follow the shapes by
    themselves, ``scaled`` those of ints that were seen not to, and are multiplied in their place.
    ``weights`` are read in place of the model's, by name, where that is on the meta device.
    """

    analysis: Analysis
    trusted: frozenset[Place] = frozenset()
    scaled: frozenset[Place] = frozenset()
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    _solved: dict[bytes, adapt.Changes] = field(default_factory=dict, repr=False, compare=False)
    known: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # to planners

    def changes(self, alive: np.ndarray) -> adapt.Changes:
        """The sizes that change when these ids stay."""
        key = alive.tobytes()
        if key not in self._solved:
            self._solved.clear()  # the channels asked for last are asked for again
            self._solved[key] = adapt.changes(self.analysis, alive, self.trusted, self.scaled)
        return self._solved[key]

    def without(self, obstacle: Obstacles) -> Settled:
        """The same where what stood in the way is tied or stays."""
        derived = self.analysis.derived(obstacle.ties, obstacle.frozen, obstacle.several)
        return Settled(derived, self.trusted, self.scaled, self.weights)


@dataclass(frozen=True)
class Finding:
    """Whether the code of a model can follow a plan.

    ``settled`` knows what was found out: ints that can be trusted, or that more channels are tied
    or stay, without which the plan must be made anew; ``ran`` is what ran of the small model, where
    that was on ``meta``.
    """

    settled: Settled
    possible: bool
    ran: tuple[Ran, ...] = ()


def analyse(
    model: nn.Module, call: Call, first: Record | None = None, attention: str = "heads"
) -> Settled:
    """Record, analyse and settle all sizes.

    Args:
        model: the user's model, not touched.
        call: inputs it runs on.
        first: the recorded forward pass in eval mode, when there is one already.
        attention: see ``trace``.
    """
    analysis = Analysis.build(model, recorded(model, call, first), attention)
    if not all(agree(analysis, each.ran) for each in analysis.records[0].beside):
        analysis = Analysis.build(model, recorded(model, call, alike=False), attention)
    settled = Settled(analysis)
    for number in range(TRIALS):
        possible = False
        while not possible:
            finding = follow(model, call, settled, trial(settled.analysis, number))
            settled, possible = finding.settled, finding.possible
    return settled


def follow(
    model: nn.Module, call: Call, settled: Settled, kept: Mapping[str, Sequence[int]]
) -> Finding:
    """Whether the code can follow kept channels; if not, what is left without the obstacle."""
    analysis = settled.analysis
    alive = analysis.alive(kept)
    if alive.all():
        return Finding(settled, True)  # nothing leaves
    solved = settled.changes(alive)
    problems = list(solved.problems)
    unclear = [problem for problem in problems if problem.literal]
    if unclear and len(unclear) == len(problems):
        hidden = any(problem.hidden for problem in unclear)
        place = _mismatch(model, call, settled, alive, strict=hidden)
        if place is None:
            seen = {_place(analysis, problem.node) for problem in unclear}
            return Finding(
                replace(settled, trusted=settled.trusted | seen, _solved={}, known={}), True
            )
        problems = _guilty(analysis, place, unclear)
        tried = {_place(analysis, problem.node) for problem in problems} - settled.scaled
        if tried and all(record.device == "meta" for record in analysis.records):
            return Finding(
                replace(settled, scaled=settled.scaled | tried, _solved={}, known={}), False
            )
    if problems:
        return Finding(settled.without(obstacles(analysis, problems)), False)
    place = _mismatch(model, call, settled, alive) if solved.unsure else None
    ties = () if place is None else tuple(united(analysis, solved.parted))
    if ties:  # the code takes another way where they differ
        return Finding(settled.without(Obstacles(ties)), False)
    return _finding(settled, alive, place)


def rehearse(
    model: nn.Module,
    call: Call,
    settled: Settled,
    plan: Plan,
    alive: np.ndarray,
    unread: tuple[Attribute, ...] = (),
) -> Finding:
    """Whether the small model of a plan runs; the last check before a plan is handed out.

    ``unread`` are attributes that it may not need: see :func:`what_runs`.
    """
    analysis = settled.analysis
    ran: list[Ran] = []
    run = partial(broken, ran=ran, unread=unread)
    place = _carried_out(run, model, call, analysis, alive, plan)
    return replace(_finding(settled, alive, place), ran=tuple(ran))


def _finding(settled: Settled, alive: np.ndarray, place: Place | None) -> Finding:
    if place is None:
        return Finding(settled, True)
    return Finding(settled.without(_in_the_way(settled.analysis, place, alive)), False)


def _mismatch(
    model: nn.Module, call: Call, settled: Settled, alive: np.ndarray, strict: bool = False
) -> Place | None:
    """Where a shrunk copy differs from what is foreseen, if no plain int is trusted."""
    analysis = settled.analysis
    solved = adapt.changes(analysis, alive, scaled=settled.scaled)
    plan = bare_plan(analysis, alive, solved)
    run = partial(first_mismatch, strict=strict)
    return _carried_out(run, model, call, analysis, alive, plan)


def _carried_out(
    run: Callable[..., Place | None],
    model: nn.Module,
    call: Call,
    analysis: Analysis,
    alive: np.ndarray,
    plan: Plan,
) -> Place | None:
    """Where a run of the small model fails; where its code cannot be changed, at that place."""
    try:
        return run(model, call, analysis, alive, plan)
    except (RewriteError, PlanError):
        return first_changed(analysis.records[0], plan) or Place(0, 0)


def _in_the_way(analysis: Analysis, place: Place, alive: np.ndarray) -> Obstacles:
    """What shrinks at an op that fails, or else what shrank last before it, or next after it.

    Code may look at an attribute before anything that it measures has been computed.
    """
    ops = analysis.records[place.record].ops
    node = ops[place.position]
    reason = Reason(
        f"the code around {node.target} does not follow", node.meta["module"], node.meta["line"]
    )
    for node in (*ops[place.position :: -1], *ops[place.position + 1 :]):
        ids = around(analysis, node)
        if not all(alive[layer.numpy()].all() for layer in ids):
            lone = tuple(layer for layer in ids if _alone(analysis, layer, alive))
            if lone:  # code takes another way for one: heads that are copied once, say
                return Obstacles(several=lone)
            return Obstacles(frozen=tuple((layer, reason) for layer in ids))
    return Obstacles(frozen=((torch.arange(len(alive))[~torch.from_numpy(alive)], reason),))


def _alone(analysis: Analysis, layer: Tensor, alive: np.ndarray) -> bool:
    """Whether of several channels one is left, and two were not asked for yet."""
    if any(layer is known for known in analysis.later.several):
        return False
    ids = layer.flatten().numpy()
    labels = analysis.units.labels[ids]
    free = ~analysis.units.frozen[labels]
    return len(np.unique(labels[free & alive[ids]])) == 1 and len(np.unique(labels[free])) > 2


def trial(analysis: Analysis, number: int) -> dict[str, list[int]]:
    """Kept channels of irregular number and place, the same for every call.

    Groups of different sizes keep different numbers, where they can: some code takes equal sizes
    for the absence of a layer (LSTM without projection).
    """
    generator = np.random.default_rng(number)
    kept = {}
    sizes: dict[int, int] = {}
    fewest = least(analysis) if analysis.later.several else {}
    for group in analysis.groups:
        low = min(fewest.get(group.name, 1), max(group.size - 1, 1))
        for _ in range(4):
            count = int(generator.integers(low, max(group.size, 2)))
            if sizes.setdefault(count, group.size) == group.size:
                break
        kept[group.name] = sorted(generator.permutation(group.size)[:count].tolist())
    return kept


def agree(analysis: Analysis, modules: Sequence[str]) -> bool:
    """Whether modules of one kind read and write the same channels, but for those of their own."""
    labels = analysis.units.labels
    held: list[dict[tuple[str, int], np.ndarray]] = []
    for name in modules:
        inside, outside = [], set[int]()
        for slot in analysis.slots:
            ids = labels[slot.start : slot.start + slot.size]
            if slot.tensor.startswith(f"{name}."):
                inside.append(((slot.tensor.removeprefix(f"{name}."), slot.dim), ids))
            else:
                outside.update(ids.tolist())
        held.append({key: ids for key, ids in inside if not outside.isdisjoint(ids.tolist())})
    first, *others = held
    return all(
        first.keys() == other.keys() and all(np.array_equal(first[k], other[k]) for k in first)
        for other in others
    )


def recorded(
    model: nn.Module, call: Call, first: Record | None = None, alike: bool = True
) -> list[Record]:
    """The recorded forward passes that a model is analysed by: in eval mode, and in train mode."""
    evaluated = first or record(model, call, False, alike=alike)
    if not _depends_on_mode(model, evaluated):
        return [evaluated]
    batch = {t.shape[0] for t in call.tensors() if t.dim()}
    call = call.repeated(2) if batch == {1} else call
    try:
        return [evaluated, record(model, call, True, alike=alike)]
    except TraceError:
        return [evaluated]


def _depends_on_mode(model: nn.Module, evaluated: Record) -> bool:
    """Whether train mode may run other ops: code looked at it, or layers were not used."""
    tensors = (str(n.target) for n in evaluated.graph.nodes if n.op == "get_attr")
    used = {*evaluated.used, *(tensor.rpartition(".")[0] for tensor in tensors)}
    unused = (module for name, module in named_modules(model) if name not in used)
    return evaluated.branches or any(
        p is not None for module in unused for p in module._parameters.values()
    )


def _place(analysis: Analysis, node: fx.Node) -> Place:
    for number, rec in enumerate(analysis.records):
        ops = rec.ops
        if node in ops:
            return Place(number, ops.index(node))
    raise AssertionError("an op of no record")


def _guilty(analysis: Analysis, place: Place, unclear: Sequence[Problem]) -> list[Problem]:
    """Which of some plain ints does not follow the shapes by itself, given where a run failed."""
    node = analysis.records[place.record].ops[place.position]
    guilty = [problem for problem in unclear if problem.node is node]
    if guilty:
        return guilty
    places = [_place(analysis, problem.node) for problem in unclear]
    before = [
        problem
        for problem, (record, position) in zip(unclear, places)
        if record == place.record and position <= place.position
    ]
    return before[-1:] or list(unclear[:1])


def changed_literal(leaf: Literal, new: float) -> LiteralChange:
    """The change of a number in the code, as a plan holds it."""
    site = replace(leaf.site, file="", first=0, digest="")
    return LiteralChange(leaf.module, site, leaf.path, plain(leaf.value), new, leaf.site.digest)


def bare_plan(analysis: Analysis, alive: np.ndarray, solved: adapt.Changes) -> Plan:
    """The slots and sizes of a plan, without its report."""
    slots = []
    for slot in analysis.slots:
        keep = alive[slot.start : slot.start + slot.size]
        if not keep.all():
            kept = tuple(np.flatnonzero(keep).tolist())
            slots.append(SlotPlan(slot.tensor, slot.dim, slot.size, kept))
    sizes = [
        SizeChange(leaf.module, leaf.name, leaf.path, leaf.value, int(new))
        for leaf, new in solved.values.items()
        if isinstance(leaf, Attribute)
    ]
    literals = [
        changed_literal(leaf, new)
        for leaf, new in solved.values.items()
        if isinstance(leaf, Literal)
    ]
    indices = [
        IndexChange(name, tuple(values.tolist()), tuple(np.flatnonzero(alive[ids]).tolist()))
        for name, ids in analysis.marks.renumbered.items()
        if (values := analysis.integers.get(name)) is not None and not alive[ids].all()
    ]
    ids = analysis.vocabulary
    rows = next((slot.kept for slot in slots if ids and slot.key in ids.rows), None)
    ids = ids if ids is None or rows is None else replace(ids, kept=rows)
    return Plan(
        analysis.architecture,
        (),
        tuple(slots),
        tuple(sizes),
        tuple(literals),
        tuple(indices),
        vocabularies=() if ids is None else (ids,),
    )
