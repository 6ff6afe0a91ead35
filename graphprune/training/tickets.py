"""Lottery tickets: sparse models that train as well as the whole one, and their controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.utils import prune

from graphprune.api import rebuild, trace
from graphprune.criteria.averaged import averaged
from graphprune.errors import InputError
from graphprune.plan.plan import plan_of
from graphprune.planning.options import Request, check_ratio
from graphprune.ranks import Ranks
from graphprune.record.batches import takes
from graphprune.record.checks import check_model
from graphprune.record.copying import copy_module
from graphprune.record.tensors import fingerprint, mark, named_modules
from graphprune.training.history import History
from graphprune.training.rewind import RewindPoint
from graphprune.training.round_plans import RoundPlans
from graphprune.training.schedules import iterative
from graphprune.training.sparse import prune_hook, sparsify, sparsity_of
from graphprune.training.users import (
    Evaluate,
    NotFinite,
    check_callables,
    own_numbers,
    run_evaluation,
    run_training,
)

KINDS = ("filters", "weights")
RANDOM_MASK, RANDOM_REINIT = "random mask", "random reinit"


@dataclass(frozen=True)
class Lottery:
    """What :func:`lottery` found; ``print`` it.

    Attributes:
        history: one entry for the whole model, one for the ticket of each round, one for each
            control; ``note`` says which, ``accuracy`` how good it is.
        ticket: of the last round, rewound and trained.
        controls: ``"random mask"`` and ``"random reinit"``, trained.
    """

    history: History
    ticket: nn.Module
    controls: Mapping[str, nn.Module]

    @property
    def accuracy(self) -> dict[str, float]:
        """By what was trained: ``"whole"``, ``"ticket"`` (of the last round), the controls."""
        return {entry.note: entry.values["accuracy"] for entry in self.history.entries}

    def __str__(self) -> str:
        """A table of all that was trained."""
        return str(self.history)


def lottery(
    point: RewindPoint,
    train: Callable[[nn.Module, int], object],
    evaluate: Evaluate,
    *,
    sparsity: float,
    rounds: int = 1,
    kind: str = "filters",
    controls: bool = True,
    factory: Callable[[], nn.Module] | None = None,
    example_inputs: object = None,
    seed: int = 0,
    process_group: object = None,
    **options: object,
) -> Lottery:
    """Find a lottery ticket: train, prune, rewind what is left to the point, and train again.

    Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; Frankle et al., "Stabilizing the
    Lottery Ticket Hypothesis", 2019 (rewinding to a step k). Beside the ticket, two controls
    that have as many channels or weights in every layer: a random mask over the weights of the
    point, and the mask of the ticket over weights that are drawn anew and trained from step 0.

    Args:
        point: the weights at step k, of the original model.
        train: ``train(model, step)`` trains a model in place from that step to the end; it makes
            its own optimizer. It may be a generator that yields losses.
        evaluate: a number for a model, larger for better ones.
        sparsity: the fraction of channels or weights that is gone in the end, in (0, 1).
        rounds: in how many steps; each removes the same fraction of what is left.
        kind: ``"filters"`` removes channels, ``"weights"`` masks single weights (global magnitude).
        controls: whether to train the controls, too.
        factory: makes a model with new weights; by default all modules draw theirs anew with
            ``reset_parameters``.
        example_inputs: as for ``graphprune.trace``.
        seed: of every training, and of the controls.
        process_group: as for :func:`iterate`.
        options: as for ``graph.plan`` without ``ratio``, ``ratios`` and ``target`` (filters), or
            ``scope`` and ``keep`` of :func:`sparsify` (weights).

    Raises:
        InputError: an argument is wrong, ``train`` replaced the model or did nothing, or a loss or
            evaluation is not finite.
        RankError: a rank has failed, or does not do as the others.

    Example:
        >>> import torch
        >>> from graphprune.training import RewindPoint, lottery
        >>> x = torch.randn(64, 4)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        >>> def train(model, step):
        ...     sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        ...     for _ in range(step, 20):
        ...         sgd.zero_grad()
        ...         loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        ...         loss.backward()
        ...         sgd.step()
        ...         yield loss
        >>> def evaluate(model):
        ...     return -(model(x) - x.sum(1, keepdim=True)).square().mean()
        >>> found = lottery(RewindPoint(net, step=0), train, evaluate, sparsity=0.5)
        >>> sorted(found.accuracy)
        ['random mask', 'random reinit', 'ticket', 'whole']
    """
    check_callables(train, evaluate)
    if not callable(train) or not takes(train, 2):
        raise InputError("train must be a function of a model and a step: train(model, step)")
    if not isinstance(point, RewindPoint):
        raise InputError(
            f"point must be a RewindPoint, such as RewindPoint(model, step=0); got "
            f"{type(point).__name__}"
        )
    if not check_ratio(sparsity, "sparsity", ""):
        raise InputError("sparsity must be above 0: nothing would be removed")
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if plan_of(point.model) is not None:
        raise InputError("the rewind point is of a small model: take it from the original")
    schedule = iterative(sparsity, rounds)
    ranks = Ranks(process_group)
    finder: _Finder = (
        _Filters(point, example_inputs, seed, options, ranks, rounds)
        if kind == "filters"
        else _Weights(point, options)
    )
    fresh: nn.Module | None = None
    if controls:
        with own_numbers(point.model, seed + 2):
            fresh = _fresh(point.model) if factory is None else factory()
        if not isinstance(fresh, nn.Module) or fingerprint(fresh) != fingerprint(point.model):
            raise InputError(
                "factory must make a model of the same architecture as that of the rewind point; "
                f"got {type(fresh).__name__}"
            )
    history = History(example_inputs)

    def trained(model: nn.Module, step: int, note: str) -> nn.Module:
        with own_numbers(model, seed), ranks.together():
            ranks.check(f"what is left of the {note}", mark(model))
            try:
                run_training(train, model, step, ranks=ranks)
                accuracy = run_evaluation(evaluate, model, ranks)
            except NotFinite as error:
                raise InputError(f"{note}: {error}") from None
        zero = 1 - finder.left(model)
        history.record(model, note=note, accuracy=accuracy, sparsity=zero)
        return model

    model = trained(copy_module(point.model, {}), point.step, "whole")
    for number in range(rounds):
        with ranks.together():
            model = point.rewind_weights(finder.prune(model, schedule(number)))
        text = "ticket" if number == rounds - 1 else f"ticket of round {number + 1}"
        model = trained(model, point.step, text)
    found = {}
    if fresh is not None:
        drawn = finder.like(model, None, seed + 1)
        found[RANDOM_MASK] = trained(drawn, point.step, RANDOM_MASK)
        found[RANDOM_REINIT] = trained(finder.like(model, fresh, seed), 0, RANDOM_REINIT)
    return Lottery(history, model, found)


class _Finder(Protocol):
    """How channels or weights are found, and the controls made."""

    def prune(self, model: nn.Module, sparsity: float) -> nn.Module:
        """A trained model with so much less than the original."""

    def like(self, ticket: nn.Module, fresh: nn.Module | None, seed: int) -> nn.Module:
        """The ticket's mask over other weights; without them a random one over the point's."""

    def left(self, model: nn.Module) -> float:
        """The fraction of channels or weights that a model has."""


class _Filters:
    """Channels, which are removed."""

    def __init__(
        self,
        point: RewindPoint,
        example_inputs: object,
        seed: int,
        options: Mapping[str, Any],
        ranks: Ranks,
        rounds: int,
    ) -> None:
        self.point = point
        self.graph = trace(point.model, example_inputs)
        criterion = averaged(options.get("criterion", Request.criterion), ranks)
        options = {"seed": seed, **options, "criterion": criterion, "process_group": ranks.asked}
        self.plans = RoundPlans(point.model, self.graph.call, "channels", "heads", options, rounds)

    def prune(self, model: nn.Module, sparsity: float) -> nn.Module:
        return rebuild(model, self.plans.plan(model, sparsity))

    def like(self, ticket: nn.Module, fresh: nn.Module | None, seed: int) -> nn.Module:
        plan = plan_of(ticket)
        assert plan is not None  # a ticket comes out of rounds
        if fresh is not None:
            return rebuild(fresh, plan)
        kept = {group.layers: len(group.kept) for group in plan.groups}
        ratios = {g.name: 1 - kept.get(g.layers, g.size) / g.size for g in self.graph.groups}
        drawn = self.graph.plan(ratios=ratios, criterion="random", seed=seed)
        return rebuild(self.point.model, drawn)

    def left(self, model: nn.Module) -> float:
        plan = plan_of(model)
        total = sum(group.size for group in self.graph.groups)
        return 1.0 if plan is None else 1 - plan.removed / total


class _Weights:
    """Single weights, which are masked."""

    def __init__(self, point: RewindPoint, options: Mapping[str, Any]) -> None:
        unknown = set(options) - {"scope", "keep"}
        if unknown:
            raise InputError(
                f"{', '.join(sorted(unknown))}: for single weights only scope and keep are known"
            )
        self.point, self.options = point, dict(options)

    def prune(self, model: nn.Module, sparsity: float) -> nn.Module:
        sparsify(model, sparsity, **self.options)
        return model

    def like(self, ticket: nn.Module, fresh: nn.Module | None, seed: int) -> nn.Module:
        model = copy_module(self.point.model, {}) if fresh is None else fresh
        check_model(model)
        modules = dict(named_modules(model))
        generator = torch.Generator().manual_seed(seed)
        for name, module in named_modules(ticket):
            if prune_hook(module) is None:
                continue
            mask: Any = module.weight_mask
            if fresh is None:  # as many weights in every layer, others
                order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
                mask = mask.flatten()[order].reshape(mask.shape)
            prune.custom_from_mask(modules[name], "weight", mask.clone())
        return model

    def left(self, model: nn.Module) -> float:
        return 1 - sparsity_of(model).fraction


def _fresh(model: nn.Module) -> nn.Module:
    """A copy whose modules have drawn their weights anew.

    Raises:
        InputError: a module cannot.
    """
    fresh = copy_module(model, {})
    for name, module in named_modules(fresh):
        reset = getattr(module, "reset_parameters", None) or getattr(
            module, "_reset_parameters", None
        )
        if callable(reset):
            reset()
        elif module._parameters:
            raise InputError(
                f"{name or type(module).__name__!r} has weights but no reset_parameters to draw "
                "them anew: pass factory=, a function that makes a new model"
            )
    return fresh
