"""Run a model's own code as if whole parts had left: what they add is zero, or never chosen."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.ops.calls import Args, Function, Kwargs
from graphprune.plan.changes import StandIn
from graphprune.plan.plan import Plan
from graphprune.record import scope
from graphprune.record.copying import copy_module
from graphprune.record.joins import Place, Sums, at_zero
from graphprune.record.tensors import held_tensors
from graphprune.verification.follow import Undecided
from graphprune.verification.scores import Scores, without_scores


def hold(model: nn.Module, plan: Plan) -> None:
    """Let parts that leave by a plan count for nothing while a model runs, in place."""
    without_scores(dict(held_tensors(model)), plan.experts)
    model.forward = HeldForward(model, vars(model).get("forward"), plan)


class HeldForward:
    """A forward that runs the model's own, where parts that leave count for nothing.

    Operands of some sums are zero, and scores of some experts minus infinity. Gradients flow as in
    the model: not at all through what counts as zero.
    """

    def __init__(self, module: nn.Module, inner: Any, plan: Plan) -> None:
        self.module, self.inner, self.plan = module, inner, plan
        self.sides = {cut.key: cut.side for cut in plan.cuts}
        self.seen: set[Place] = set()
        self.tied = ""  # where experts got equal scores in the last run

    def __deepcopy__(self, memo: dict[int, object]) -> HeldForward:
        """A copy for a copied module."""
        inner = copy.deepcopy(self.inner, memo)
        return HeldForward(copy_module(self.module, memo), inner, self.plan)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the model.

        Raises:
            Undecided: a sum or a router of the plan is not reached.
        """
        self.seen.clear()
        scores = Scores(self.module, self.plan.experts)
        sums = Sums(self.module, self._sum)
        with scope.recording(None), sums, scores, undrawn(self.module, self.plan.stand_ins):
            sums.running.append(["", 0])  # of this module, which is running already
            if self.inner is not None:
                out = self.inner(*args, **kwargs)
            else:
                out = type(self.module).forward(self.module, *args, **kwargs)
        missing = sorted(self.sides.keys() - self.seen)
        if missing:
            name, place = missing[0]
            raise Undecided(f"sum {place} in the code of {name!r} does not run here")
        scores.check()
        self.tied = scores.tied
        return out

    def _sum(self, place: Place, func: Function, args: Args, kwargs: Kwargs) -> object:
        side = self.sides.get(place)
        if side is None:
            return func(*args, **kwargs)
        self.seen.add(place)
        return at_zero(func, args, kwargs, side)


def tied(model: nn.Module) -> str:
    """Where experts of a masked model got equal scores in its last run."""
    forward = vars(model).get("forward")
    while forward is not None and not isinstance(forward, HeldForward):
        forward = getattr(forward, "inner", None)
    return "" if forward is None else forward.tied


@contextlib.contextmanager
def undrawn(model: nn.Module, stand_ins: Iterable[StandIn]) -> Iterator[None]:
    """Inside, what modules that leave draw takes no random numbers from the others."""
    states: list[tuple[Tensor, tuple[object, ...], dict[str, object]]] = []

    def enter(module: nn.Module, args: object) -> None:
        states.append((torch.get_rng_state(), random.getstate(), np.random.get_state()))

    def leave(module: nn.Module, args: object, out: object) -> None:
        numbers, python, numpy = states.pop()
        torch.set_rng_state(numbers)
        random.setstate(python)
        np.random.set_state(numpy)

    handles = []
    for stand_in in stand_ins:
        module = model.get_submodule(stand_in.module)
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
