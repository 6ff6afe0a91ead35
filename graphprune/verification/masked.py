"""A plan executed without changing a shape: the reference that a small model must equal.

Where zeroed parameters say it all, the reference is a copy of the model with zeroes on the
writing and on the reading side of every removed channel. Where they do not (a sum over channels
after a sigmoid, the statistics of a LayerNorm, a division), the copy runs its own code, and every
op that sums over channels reads zeroes for the removed ones; statistics are taken over the kept
ones.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.errors import InputError, PlanError
from graphprune.plan.plan import Plan
from graphprune.record.attention import replace_attention
from graphprune.record.copying import copy_module
from graphprune.record.tensors import held_tensors
from graphprune.verification.follow import Follower, Undecided
from graphprune.verification.reference import with_constants
from graphprune.verification.running import Functions
from graphprune.verification.scores import with_gone


def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """The masked model of a plan, with the shapes of the original.

    Args:
        model: a model of the architecture the plan was made for; it is not touched.
        plan: which channels stay.

    Returns:
        A copy of ``model`` in which the removed channels contribute nothing. Groups reported as
        renormalising take their statistics over the kept channels only.

    Raises:
        PlanError: the plan does not fit the model.
        InputError: ``plan`` is no plan.

    Example:
        >>> import torch, graphprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = graphprune.trace(net).plan(0.5)
        >>> x = torch.randn(3, 4)
        >>> small = graphprune.rebuild(net, plan)
        >>> torch.allclose(graphprune.mask(net, plan)(x), small(x), atol=1e-6)
        True
    """
    if not isinstance(plan, Plan):
        raise InputError(
            "plan must be a Plan, such as graphprune.trace(model).plan(0.5) makes; "
            f"got {type(plan).__name__}"
        )
    plan.check(model)
    if plan.plain_statistics and not plan.exact:
        raise PlanError(
            "this plan follows a renormalising one by an exact one: no single masked model equals "
            "both; verify them one by one"
        )
    masked = with_constants(model, plan)
    if plan.evaluated:
        run_masked(masked, plan)
        return masked
    tensors = dict(held_tensors(masked))
    with torch.no_grad():
        for slot in with_gone(model, plan).widths:
            tensor = tensors[slot.tensor]
            tensor.masked_fill_(~slot.stays(tensor.shape).to(tensor.device), 0)
    return masked


def run_masked(model: nn.Module, plan: Plan) -> MaskedForward:
    """Let a model hold the removed channels at zero while it runs, in place."""
    for module in model.modules():
        replace_attention(module)
    plan = with_gone(model, plan)
    model.forward = forward = MaskedForward(model, vars(model).get("forward"), plan)
    return forward


class MaskedForward:
    """A forward that runs the model's own, with removed channels held at zero.

    It sits in the ``__dict__`` of the module, before the method of the class, and can be copied
    with the module.

    Attributes:
        watched: ``last`` knows what the last run has seen.
        remembers: what was found in one run serves the next ones.
        careful: functions are taken apart on ``meta`` before they run. At first that is done while
            they run, which is quicker, but kernels of a device may have ops of their own.
    """

    def __init__(self, module: nn.Module, inner: Any, plan: Plan) -> None:
        self.module, self.inner, self.plan = module, inner, plan
        self.watched = self.remembers = self.careful = False
        self.last: Functions | None = None
        self._follower: Follower | None = None
        self._functions: Functions | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> MaskedForward:
        """A copy for a copied module."""
        inner = copy.deepcopy(self.inner, memo)
        return MaskedForward(copy_module(self.module, memo), inner, self.plan)

    def forget(self) -> None:
        """Find everything anew in the next run."""
        self._follower = None

    @contextlib.contextmanager
    def once_more(self) -> Iterator[None]:
        """A backward, in which checkpointed parts of the model run once more.

        Raises:
            Undecided: constants of the code turned out to leave with channels only there.
        """
        functions = self._functions
        assert functions is not None
        functions.backward = True
        with functions:
            yield
        if not functions.follower.fates.settled():
            raise Undecided("it cannot be told which constants of checkpointed code leave")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the masked model.

        Constants that the code makes may turn out to belong to removed channels only after they
        were used: then all runs once more.
        """
        if not self.remembers:
            self.forget()
        anew = self._follower is None
        state = torch.get_rng_state()
        buffers = [(b, b.detach().clone()) for b in self.module.buffers()]
        for _ in range(6):
            follower = self._follower = self._follower or Follower(self.module, self.plan)
            follower.careful = self.careful
            functions = self._functions = Functions(follower, self.watched)
            leaves = pytree.tree_leaves((args, kwargs))
            follower.start(self.module, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
            try:
                with functions.dispatch, functions:
                    if self.inner is not None:
                        out = self.inner(*args, **kwargs)
                    else:
                        out = type(self.module).forward(self.module, *args, **kwargs)
                settled = follower.fates.settled()
            except Undecided:
                if self.careful:
                    raise
                self.careful, settled, anew = True, False, True
                self.forget()
            if settled and (anew or not follower.fates.clash or not follower.calls.used):
                self.last = functions if self.watched else None
                if self.remembers and not self.watched:
                    follower.calls.simplify(follower.fates.any_gone)
                return out
            if settled:  # ids that calls of an earlier run made mean other channels now
                self.forget()
                anew = True
            torch.set_rng_state(state)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        raise Undecided("it cannot be told which constants of the code leave with the channels")
