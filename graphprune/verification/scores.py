"""Run a model's own code with the scores of some experts at minus infinity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphprune.ops.calls import Args, Function, Kwargs
from graphprune.plan.changes import ExpertsPlan
from graphprune.record.tensors import held_tensors
from graphprune.verification.follow import Undecided

# What multiplies inputs by the weight of a router, and where the experts then lie.
_PRODUCTS = {
    "linear": -1, "matmul": -1, "__matmul__": -1, "mm": -1, "addmm": -1, "bmm": -1, "einsum": -1,
    "tensordot": -1, "inner": -1, "conv1d": 1, "conv2d": 1,
}  # fmt: skip


class Scores(TorchFunctionMode):
    """Holds the scores that experts get which leave at minus infinity.

    Gradients do not flow through them. Which of several experts with equal scores is chosen is left
    to the kernels: that there were such is noted.

    Args:
        model: what runs.
        plans: the experts of its mixtures that stay.
    """

    def __init__(self, model: nn.Module, plans: Iterable[ExpertsPlan]) -> None:
        super().__init__()
        self.plans = {name: plan for plan in plans if plan.gone for name in plan.routers}
        self.model = model
        self.weights: dict[int, tuple[Tensor, str]] = {}  # what is made of routers alone
        self.seen: set[str] = set()
        self.tied = ""  # a mixture in which experts got equal scores

    def __enter__(self) -> object:
        tensors = dict(held_tensors(self.model))
        self.weights = {id(tensors[name]): (tensors[name], name) for name in self.plans}
        self.seen.clear()
        return TorchFunctionMode.__enter__(self)

    def __exit__(self, *exc: object) -> None:
        TorchFunctionMode.__exit__(self, *exc)
        self.weights.clear()

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = [self.weights[id(t)][1] for t in leaves if id(t) in self.weights]
        if not known or not isinstance(out, Tensor):
            return out
        dim = _PRODUCTS.get(getattr(func, "__name__", ""))
        if dim is not None and any(t.dim() > 1 and id(t) not in self.weights for t in leaves):
            return self._held(out, known[0], dim)
        if out.is_floating_point():
            self.weights[id(out)] = out, known[0]
        return out

    def _held(self, out: Tensor, router: str, dim: int) -> Tensor:
        """Scores of which those that leave are minus infinity."""
        plan = self.plans[router]
        if out.shape[dim] != plan.size:
            raise Undecided(f"the scores of the experts of {plan.mixture!r} lie in no known way")
        self.seen.add(router)
        kept = torch.tensor(plan.kept, device=out.device)
        steps = out.detach().index_select(dim, kept).sort(dim).values.diff(dim=dim)
        self.tied = plan.mixture or "the model" if bool((steps == 0).any()) else self.tied
        return out.index_fill(dim, torch.tensor(plan.gone, device=out.device), lowest(out))

    def check(self) -> None:
        """Raise unless a router of every mixture has run.

        Raises:
            Undecided: names a mixture of which none has.
        """
        ran = {self.plans[router].mixture for router in self.seen}
        for plan in self.plans.values():
            if plan.mixture not in ran:
                raise Undecided(f"nothing scores the experts of {plan.mixture!r} here")


def lowest(scores: Tensor) -> float:
    """As good as minus infinity; zero times it is zero, as in gradients of what scales scores."""
    return torch.finfo(scores.dtype).min / 4


def without_scores(tensors: Mapping[str, Tensor], plans: Iterable[ExpertsPlan]) -> None:
    """Set what is added to the scores of experts that leave to minus infinity, in place."""
    with torch.no_grad():
        for change in plans:
            for name in change.added:
                gone = torch.tensor(change.gone, dtype=torch.int64, device=tensors[name].device)
                tensors[name].index_fill_(dict(change.slices)[name], gone, lowest(tensors[name]))
