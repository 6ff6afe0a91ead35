"""Prune, train, evaluate, and again: until it is small enough, or not good enough any more."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from graphprune.api import rebuild
from graphprune.arguments import is_number
from graphprune.criteria.averaged import averaged
from graphprune.errors import InputError, RoundError
from graphprune.plan.plan import Plan, carry, plan_of
from graphprune.planning.options import Options, Request
from graphprune.ranks import Ranks
from graphprune.record.checks import check_model
from graphprune.record.tensors import fingerprint, mark, named_modules
from graphprune.text import bar, noted, share, shorten
from graphprune.training.history import Entry, History, widths_of
from graphprune.training.judging import Judge
from graphprune.training.round_plans import RoundPlans
from graphprune.training.round_state import Folder, State
from graphprune.training.schedules import SparsityOf, check_count, iterative, sparsity_at
from graphprune.training.users import (
    Evaluate,
    NotFinite,
    check_callables,
    own_numbers,
    run_training,
)

Train = Callable[[nn.Module], Any]
_SHARED = "pass a folder that all of them see"


@dataclass(frozen=True)
class Outcome:
    """What :func:`iterate` found.

    Attributes:
        model: the smallest model above the floor; the user's own where no round was good enough.
        history: one entry for the original (step 0) and one for each model that was trained, with
            the values ``sparsity``, ``before`` and ``accuracy`` (before and after training) and
            ``kept`` (0 where a round was undone).
        reason: why it ended.
    """

    model: nn.Module
    history: History
    reason: str

    @property
    def plan(self) -> Plan | None:
        """Which channels of the original stayed."""
        return plan_of(self.model)

    def __str__(self) -> str:
        """The rounds as a table."""
        first, kept = self.history.entries[0], [e for e in self.history.entries if _kept(e)][-1]
        costs = (
            f"{share(kept.params, first.params)} of the parameters, "
            f"{share(kept.macs, first.macs)} of the MACs"
        )
        return f"{self.history}\n{self.reason}; the model has {costs}"


def iterate(
    model: nn.Module,
    rounds: int,
    train: Train | None,
    evaluate: Evaluate,
    *,
    sparsity: float | SparsityOf = 0.5,
    quantity: str = "channels",
    example_inputs: object = None,
    folder: str | Path | None = None,
    floor: float | None = None,
    max_drop: float | None = None,
    retries: int = 2,
    attention: str = "heads",
    **options: Unpack[Options],
) -> Outcome:
    """Remove some channels, train, evaluate, and go on from there.

    The user's functions get the small model of the round, in train and in eval mode. ``train``
    trains it in place, with an optimizer that it makes from ``model.parameters()``; it may be a
    generator that yields losses, so that one which is not finite ends the round at once.

    A round that ends below the ``floor`` is undone, and repeated from the model before with half
    the step, which stays halved from then on. Every round has random numbers of its own (``seed``),
    so that a run that was cut off and resumed ends as one that was not.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015.

    Args:
        model: the trained original; it is not touched.
        rounds: how many.
        train: trains a model in place; ``None`` for rounds without training.
        evaluate: a number for a model, larger for better ones.
        sparsity: the fraction that is gone in the end, in equal parts of what is left
            (:func:`iterative`); or any function round (from 0) -> sparsity.
        quantity: of what it is a fraction: ``"channels"``, ``"macs"``, ``"params"`` or
            ``"bytes"`` of the original.
        example_inputs: as for ``graphprune.trace``.
        folder: where to keep the last good model and the state. A later call with the same model,
            settings and folder goes on after the last finished round.
        floor: the least evaluation allowed.
        max_drop: how much less than the original's it may be, in its unit. ``evaluate`` may then
            return a number for every example, as for :func:`graphprune.smallest`: the bound of the
            drop counts, with 95 %, and is in the history as ``at most``.
        retries: how often the floor may be broken before it is the end.
        attention: as for ``graphprune.trace``.
        options: as for ``graph.plan``, without ``ratio``, ``ratios`` and ``target``. ``min_kept``
            and ``max_kept`` are fractions of the original's channels. On the ranks of a
            ``process_group``, for which ``train`` wraps the model, scores and evaluations are
            averaged; they must choose the same channels and end with the same weights, and the
            first of them writes the folder.

    Returns:
        The smallest model above the floor, and the history of all rounds.

    Raises:
        InputError: an argument is wrong; the original is below the floor; ``train`` replaced the
            model instead of training it, or changed none of its weights; the folder belongs to
            another run.
        RoundError: a loss, a weight or an evaluation was not finite, or no more can be removed; its
            ``outcome`` holds the last good model, which is in the folder, too.
        CheckpointError: the folder is damaged or cannot be written.
        RankError: a rank has failed, or does not do as the others.

    Example:
        >>> import torch
        >>> from graphprune.training import iterate
        >>> x = torch.randn(64, 4)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 1))
        >>> def train(model):
        ...     sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        ...     for _ in range(20):
        ...         sgd.zero_grad()
        ...         loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        ...         loss.backward()
        ...         sgd.step()
        ...         yield loss
        >>> def evaluate(model):
        ...     return -(model(x) - x.sum(1, keepdim=True)).square().mean()
        >>> outcome = iterate(net, 2, train, evaluate, sparsity=0.75)
        >>> [entry.widths["0"] for entry in outcome.history.entries]
        [16, 8, 4]
    """
    schedule, sparsities = _check(rounds, train, evaluate, sparsity, floor, max_drop, retries)
    progress = bool(options.pop("progress", False))
    seed = options.get("seed", 0)
    ranks = Ranks(options.get("process_group"))
    with ranks.together():
        check_model(model)
        options["criterion"] = averaged(options.get("criterion", Request.criterion), ranks)
        plans = RoundPlans(model, example_inputs, quantity, attention, options, rounds)
    settings = {
        "architecture": fingerprint(model),
        "weights": mark(model),
        "rounds": rounds,
        "sparsity": sparsities,
        "options": plans.told,
        "quantity": quantity,
        "floor": floor,
        "max_drop": max_drop,
        "retries": retries,
        "attention": attention,
    }
    kept = Folder(folder, settings, ranks.first)
    judge = Judge(evaluate, floor, max_drop, ranks)
    run = _Rounds(model, plans, schedule, train, judge, seed, kept, ranks)
    with ranks.together():
        run.start(retries)
    note = f"the finished rounds are in {str(folder)!r}: call iterate again"
    shown = bar("rounds", rounds, progress and ranks.first)
    with shown as show, noted(None if folder is None else note):
        while not run.state.reason and run.state.done < rounds:
            show(run.state.done)
            with own_numbers(model, run.seed_of_round), ranks.together():
                run.round()
    done = f"all {rounds} rounds done" if run.state.attempts else "no round could remove a channel"
    limited = run.limited()
    if limited:
        done += f"; min_kept holds {shorten(limited)}"
    return run.outcome(run.state.reason or done)


class _Rounds:
    """The state between two rounds, and how to get to the next one."""

    def __init__(
        self,
        original: nn.Module,
        plans: RoundPlans,
        schedule: SparsityOf,
        train: Train | None,
        judge: Judge,
        seed: int,
        folder: Folder,
        ranks: Ranks,
    ) -> None:
        self.original, self.plans, self.schedule = original, plans, schedule
        self.train, self.judge = train, judge
        self.seed, self.folder, self.ranks = seed, folder, ranks
        self.modes = {name: module.training for name, module in named_modules(original)}
        self.earlier = plan_of(original)
        self.model: nn.Module = original
        self.plan: Plan | None = None
        self.state = State()

    def start(self, retries: int) -> None:
        """Go on from the folder, or begin with the original."""
        found = self.folder.read()
        if found is not None:
            self.state = found
            self.model, self.plan = self.folder.model(found, self.original)
        self.ranks.check("the rounds in the folder", self.state.attempts, _SHARED)
        if found is None or self.judge.max_drop is not None:  # scores of examples are not kept
            accuracy = self.judge.original(self.original)
        if found is not None:
            return
        cost = self.plans.cost
        values = {"sparsity": 0.0, "accuracy": accuracy, "kept": 1.0}
        first = Entry(0, cost.params, cost.macs, values, widths_of(self.original))
        self.state = self.folder.write(State(retries=retries, entries=(first,)))

    def round(self) -> None:
        """One attempt at the next round; what it changes is kept only when it is finished."""
        state = self.state
        before = sparsity_at(self.schedule, state.done - 1) if state.done else 0.0
        step = sparsity_at(self.schedule, state.done) - before
        sparsity = state.sparsity + state.pace * step
        number = state.done + 1
        plan = self._plan(number, sparsity)
        if not plan.removed:
            reason = "" if state.pace == 1 else "half a step is less than one channel"
            done = replace(state, done=number, sparsity=sparsity, reason=reason)
            self.state = self.folder.write(done)
            return
        small = rebuild(self.model, plan)
        whole = plan if self.plan is None else self.plan.then(plan)
        carry(small, whole)  # from this original
        first = self._evaluated(small, number)
        self._train(small, number)
        last = self._evaluated(small, number)
        most = self.judge.most()
        kept = self.judge.keeps(last, most)
        values = {"sparsity": sparsity, "before": first, "accuracy": last, "kept": float(kept)}
        if most is not None:
            values["at most"] = most
        cost = plan.after
        note, why = self.judge.words
        note = "" if kept else note
        entry = Entry(state.attempts + 1, cost.params, cost.macs, values, widths_of(small), note)
        state = replace(state, attempts=entry.step, entries=(*state.entries, entry))
        if kept:
            done = replace(state, done=number, sparsity=sparsity, plan=whole.to_json())
            self.state = self.folder.write(done, small)
            self.model, self.plan = small, whole
            return
        reason = "" if state.retries else f"{why} in round {number}"
        left = max(0, state.retries - 1)
        self.state = self.folder.write(
            replace(state, pace=state.pace / 2, retries=left, reason=reason)
        )

    def limited(self) -> list[str]:
        """Layers that have lost less than the last sparsity says, as ``min_kept`` demands."""
        if self.plan is None or not self.plans.request.min_kept:
            return []
        slack = self.plans.request.round_to or 1
        return [
            group.layers[0]
            for group in self.plan.groups
            if 0 < group.size - len(group.kept) <= self.state.sparsity * group.size - slack
        ]

    def outcome(self, reason: str) -> Outcome:
        """The last good model in the modes of the original, and the history."""
        for name, module in named_modules(self.model):
            module.training = self.modes.get(name, module.training)
        if self.earlier is not None and self.plan is not None:
            carry(self.model, self.earlier.then(self.plan))
        return Outcome(self.model, History(self.plans.call, self.state.entries), reason)

    def _plan(self, number: int, sparsity: float) -> Plan:
        try:
            plan = self.plans.plan(self.model, sparsity)
        except InputError as error:
            if self.plan is None:
                raise
            raise self._error(f"round {number} can remove no more: {error}") from error
        self.ranks.check("the channels to remove", plan.to_json())
        return plan

    def _train(self, small: nn.Module, number: int) -> None:
        if self.train is not None:
            try:
                run_training(self.train, small, ranks=self.ranks)
            except NotFinite as error:
                raise self._error(f"round {number}: {error}") from None

    def _evaluated(self, small: nn.Module, number: int) -> float:
        try:
            return self.judge.of(small)
        except NotFinite as error:
            raise self._error(f"round {number}: {error}") from None

    def _error(self, text: str) -> RoundError:
        return RoundError(f"{text}; the last good model is kept", self.outcome(text))

    @property
    def seed_of_round(self) -> int:
        """Another one for every attempt, the same one when it is repeated after a crash."""
        return self.seed + 1_000_003 * (self.state.attempts + 1)


def _check(
    rounds: Any,
    train: Any,
    evaluate: Any,
    sparsity: Any,
    floor: Any,
    max_drop: Any,
    retries: Any,
) -> tuple[SparsityOf, list[float]]:
    """The schedule of the rounds, and what it says of each."""
    check_count("rounds", rounds, 1)
    check_count("retries", retries, 0)
    check_callables(train, evaluate)
    if floor is not None and not is_number(floor):
        raise InputError(f"floor must be a number that evaluate may return, not {floor!r}")
    if max_drop is not None and not (is_number(max_drop, 0) and max_drop < math.inf):
        raise InputError(f"max_drop must be a finite number of at least 0, not {max_drop!r}")
    if max_drop is not None and floor is not None:
        raise InputError(
            f"both floor={floor!r} and max_drop={max_drop!r} were given: max_drop is a floor below "
            "the evaluation of the original, leave one of them out"
        )
    schedule = sparsity if callable(sparsity) else iterative(sparsity, rounds)
    found = [sparsity_at(schedule, number) for number in range(rounds)]
    if found != sorted(found) or not 0 < found[-1] < 1:
        raise InputError(
            "the sparsity must grow from round to round and end in (0, 1); it is "
            + ", ".join(f"{value:.3g}" for value in found)
        )
    return schedule, found


def _kept(entry: Entry) -> bool:
    return bool(entry.values.get("kept", 1))
