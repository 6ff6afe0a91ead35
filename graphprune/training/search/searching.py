"""The search: one budget after the other, planned, repaired and evaluated."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import nn

from graphprune.api import ChannelGraph, rebuild, trace
from graphprune.calibration import calibrate
from graphprune.errors import InputError
from graphprune.plan.plan import Plan
from graphprune.ranks import Ranks
from graphprune.record.batches import device_of
from graphprune.record.random_numbers import same_numbers
from graphprune.training.search.bounds import upper_bound
from graphprune.training.search.budgets import next_budget
from graphprune.training.search.evaluating import check_alike, evaluated, span_of, together
from graphprune.training.search.outcome import Tried
from graphprune.training.search.stored import Stored

_MORE = 4  # plans that are made for one evaluation, at most: some cannot be met, some are alike


class Search:
    """The budgets that were tried, and what it takes to try one more."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        evaluate: Callable[[nn.Module], object],
        quantity: str,
        asked: Mapping[str, Any],
        further: Mapping[str, Any] | None,
        stored: Stored,
        ranks: Ranks,
        confidence: float,
    ) -> None:
        self.model, self.graph, self.evaluate = model, graph, evaluate
        self.quantity, self.asked, self.further = quantity, asked, further
        self.stored, self.ranks, self.confidence = stored, ranks, confidence
        self.seed = asked.get("seed", 0)
        self.base = np.zeros(0)
        self.curve: list[Tried] = []
        self.losses: dict[float, float] = {}
        self.best: tuple[Tried, nn.Module] | None = None

    def start(self) -> np.ndarray:
        """The scores of the original, [examples] or [1]."""
        known = self.stored.base
        if known is None:
            known = self._scores(self.model, "the original")
            self.stored.begin(known)
        self.base = known
        return known

    def run(
        self,
        max_drop: float,
        least: float,
        evaluations: int,
        sure: bool,
        tick: Callable[..., None],
    ) -> None:
        """Try budgets until nothing is left to find out, or to be spent.

        Raises:
            InputError: none can be met, or an evaluation is none.
        """
        for tried in self.stored.tried.values():
            self._note(tried, sure)
        failure: InputError | None = None
        for _ in range(_MORE * evaluations):
            tick(min(len(self.curve), evaluations))
            budget = next_budget(self.losses, max_drop, least)
            if budget is None or len(self.curve) >= evaluations:
                break
            try:
                plan = self._plan(budget)
            except InputError as error:  # what cannot be met: a larger budget may be
                failure, self.losses[budget] = error, math.inf
                continue
            same = [tried for tried in self.curve if _leaves(tried.plan) == _leaves(plan)]
            if same:
                self.losses[budget] = same[0].loss(sure)
                continue
            tried, small = self._try(budget, plan)
            self._note(tried, sure)
            if tried.loss(sure) <= max_drop:
                self.best = tried, small
            self.stored.add(tried)
        if failure is not None and not self.curve:
            raise failure

    def model_of(self, tried: Tried) -> nn.Module:
        """The small model of a budget, made again where another process has evaluated it."""
        if self.best is not None and self.best[0] is tried:
            return self.best[1]
        return self._made(tried.plan)

    def _plan(self, budget: float) -> Plan:
        with self._numbers():
            return self.graph.plan(target={self.quantity: budget}, **self.asked)

    def _made(self, plan: Plan) -> nn.Module:
        with self._numbers():
            small = rebuild(self.model, plan)
            if self.further is not None:
                group = self.asked.get("process_group")
                further = {"process_group": group, **self.further}
                calibrate(small, self.model, self.asked["data"], **further)
        return small

    def _try(self, budget: float, plan: Plan) -> tuple[Tried, nn.Module]:
        small = self._made(plan)
        what = f"the model of {100 * budget:.4g} % of the {self.quantity}"
        scores = self._scores(small, what)
        check_alike(scores, self.base, what)
        lost, most = self.base - scores, None
        if len(lost) > 1:
            most = upper_bound(lost, span_of(self.base, scores), self.confidence)
        reached = self._reached(budget, plan, small)
        told = self.ranks.decided((reached, float(lost.mean()), most))
        return Tried(budget, *told, plan), small

    def _scores(self, model: nn.Module, what: str) -> np.ndarray:
        """The scores of the examples of all ranks, or the mean of their numbers."""
        alone = self.ranks.size == 1
        own = evaluated(self.evaluate, model, what, self.seed, empty=not alone)
        return own if alone else together(self.ranks.share(own), what)

    def _reached(self, budget: float, plan: Plan, small: nn.Module) -> float:
        """What a plan came to, as a fraction of the original's."""
        if self.quantity == "latency":
            told = plan.request.get("latency")
            return budget if told is None else float(told["measured"] / told["before"])
        if self.quantity == "memory":
            return trace(small, self.graph.call).memory / self.graph.memory
        return float(getattr(plan.after, self.quantity) / getattr(plan.before, self.quantity))

    def _note(self, tried: Tried, sure: bool) -> None:
        self.curve.append(tried)
        self.losses[tried.budget] = tried.loss(sure)

    def _numbers(self) -> contextlib.AbstractContextManager[None]:
        return same_numbers(self.seed, device_of(self.model))


def _leaves(plan: Plan) -> tuple[object, ...]:
    """What leaves a model, however it was asked for."""
    return plan.slots, plan.parts, plan.experts
