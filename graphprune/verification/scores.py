"""Run a model's own code with the scores of some experts at minus infinity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from graphprune.ops.calls import Args, Function, Kwargs
from graphprune.plan.changes import ExpertsPlan
from graphprune.plan.plan import Plan
from graphprune.record.tensors import held_tensors
from graphprune.verification.follow import Undecided, aside

# What takes scores for what they are; what bounded them before does not count.
_ENDS = frozenset({
    "softmax", "log_softmax", "gumbel_softmax", "logsumexp", "sigmoid", "topk", "sort", "argsort",
    "max", "amax", "argmax",
})  # fmt: skip


class _Made(NamedTuple):
    """A tensor that experts have parts of: the same with NaN there, and whether it has scores."""

    twin: Tensor
    router: str
    scored: bool


class Scores(TorchFunctionMode):
    """Holds the scores that experts get which leave at minus infinity.

    Which values are scores of which experts is found out by what becomes NaN when their rows of a
    router are. Where a function first makes something of a router and of what the model is given,
    these are held, and once more where they are ranked or weigh something, as something may have
    bounded them. Gradients do not flow through them. Which of several experts with equal scores is
    chosen is left to the kernels: that there were such is noted.

    Args:
        model: what runs.
        plans: the experts of its mixtures that stay.
    """

    def __init__(self, model: nn.Module, plans: Iterable[ExpertsPlan]) -> None:
        super().__init__()
        self.plans = {name: plan for plan in plans if plan.gone for name in plan.routers}
        self.model = model
        self.made = WeakIdKeyDictionary()
        self.constant = WeakIdKeyDictionary()  # what is made of tensors that the model holds
        self.seen: set[str] = set()
        self.tied = ""  # where experts got equal scores

    def __enter__(self) -> object:
        tensors = dict(held_tensors(self.model))
        self.seen.clear()
        for tensor in tensors.values() if self.plans else ():
            self.constant[tensor] = True
        for name, plan in self.plans.items():
            dim, twin = dict(plan.slices)[name], tensors[name].detach().clone()
            gone = plan.gone_of(twin.shape[dim])
            twin.index_fill_(dim, torch.tensor(gone, device=twin.device), torch.nan)
            self.made[tensors[name]] = _Made(twin, name, False)
        return TorchFunctionMode.__enter__(self)

    def __exit__(self, *exc: object) -> None:
        TorchFunctionMode.__exit__(self, *exc)
        self.made.clear()
        self.constant.clear()

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.plans:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in _ENDS:
            args, kwargs = pytree.tree_map_only(Tensor, self._bounded, (args, kwargs))
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        twin = self._twin(func, args, kwargs) if any(t in self.made for t in given) else None
        out = func(*args, **kwargs)
        constant = all(tensor in self.constant for tensor in given)
        for tensor in pytree.tree_leaves(out):
            if constant and isinstance(tensor, Tensor):
                self.constant[tensor] = True
            elif isinstance(tensor, Tensor):
                self.constant.pop(tensor, None)  # it was written into
        if isinstance(twin, Tensor) and isinstance(out, Tensor) and twin.shape == out.shape:
            with aside():
                twin = twin.to(out)
                filled = self._followed(out, twin, given, constant)
            return self._filled(out, twin, filled, given)
        return out

    def _followed(
        self, out: Tensor, twin: Tensor, given: list[Tensor], constant: bool
    ) -> float | None:
        """What is held of what a function has made of routers or of scores."""
        made: list[_Made] = [self.made[tensor] for tensor in given if tensor in self.made]
        first = min(made, key=lambda each: each.scored)  # a router that scores are made with now
        gone = twin.isnan()
        if not bool(gone.any()) or (first.scored and bool(gone.all())):
            return None  # after a softmax, say, which says what scores mean
        self.made[out] = _Made(twin, first.router, not constant)
        if first.scored or constant:
            return None
        plan = self.plans[first.router]
        self.seen.add(first.router)
        self._note(out, gone, plan)
        return -lowest(out) if plan.far else lowest(out)

    def _bounded(self, scores: Tensor) -> Tensor:
        """Scores that are as low as they were before something bounded them."""
        made: _Made | None = self.made.get(scores)
        if made is None or not made.scored:
            return scores
        with aside():
            low = made.twin.isnan() & (scores.detach() > lowest(scores) / 2)
            self._note(scores, made.twin.isnan(), self.plans[made.router])
            twin = scores.detach().masked_fill(low, torch.nan)
        return self._filled(scores, twin, lowest(scores), [])

    def _twin(self, func: Function, args: Args, kwargs: Kwargs) -> object:
        """What a function makes where the parts of experts that leave are NaN."""
        mutates = getattr(func, "__name__", "").endswith("_") or "out" in kwargs

        def swap(tensor: Tensor) -> Tensor:
            made = self.made.get(tensor)
            found: Tensor = tensor.detach() if made is None else made.twin
            return found.clone() if mutates else found

        state = torch.get_rng_state()
        try:
            with aside(), torch.no_grad():
                args, kwargs = pytree.tree_map_only(Tensor, swap, (args, kwargs))
                return func(*args, **kwargs)
        except Exception:  # it looks at values: what it makes is no score
            return None
        finally:
            torch.set_rng_state(state)

    def _note(self, scores: Tensor, gone: Tensor, plan: ExpertsPlan) -> None:
        """Note whether scores of experts that stay are equal."""
        dims = [dim for dim in range(scores.dim()) if _along(gone, dim)]
        if len(dims) == 1 and scores.shape[dims[0]] == plan.size:
            kept = torch.tensor(plan.kept, device=scores.device)
            known = scores.detach().index_select(dims[0], kept)
            steps = known.sort(dims[0]).values.diff(dim=dims[0])
            where = f"of {plan.mixture!r}" if plan.mixture else "here"
            self.tied = where if bool((steps == 0).any()) else self.tied

    def _filled(
        self, out: Tensor, twin: Tensor, value: float | None, given: list[Tensor]
    ) -> Tensor:
        """A tensor with a value where its twin is NaN; what a function has changed is changed."""
        if value is None:
            return out
        with aside():
            gone = twin.isnan()
            for dim in range(gone.dim()):  # as small as it can be: others may lose channels
                first = gone.narrow(dim, 0, min(1, gone.shape[dim]))
                gone = first if bool((gone == first).all()) else gone
            made = self.made.get(out)
        if any(out is tensor for tensor in given):
            return out.masked_fill_(gone, value)
        found = out.masked_fill(gone, value)
        if made is not None:
            self.made[found] = made
        return found

    def check(self) -> None:
        """Raise unless a router of every mixture has run.

        Raises:
            Undecided: names a mixture of which none has.
        """
        ran = {self.plans[router].mixture for router in self.seen}
        for plan in self.plans.values():
            if plan.mixture not in ran:
                raise Undecided(f"nothing scores the experts of {plan.mixture!r} here")


def _along(gone: Tensor, dim: int) -> bool:
    """Whether what is gone is whole slices along a dimension, and not all of them."""
    sliced = gone.movedim(dim, 0).flatten(1)
    return bool((sliced.any(1) == sliced.all(1)).all())


def lowest(scores: Tensor) -> float:
    """As good as minus infinity.

    Zero times it is zero, as in gradients of what scales scores; its square is finite, as of
    distances, where the type has room for that.
    """
    largest = torch.finfo(scores.dtype).max
    return -(largest**0.4) if largest > 1e30 else -largest / 4


def without_scores(tensors: Mapping[str, Tensor], plans: Iterable[ExpertsPlan]) -> None:
    """Set what is added to the scores of experts that leave to minus infinity, in place."""
    with torch.no_grad():
        for change in plans:
            for name in change.added:
                dim = dict(change.slices)[name]
                gone = torch.tensor(
                    change.gone_of(tensors[name].shape[dim]), device=tensors[name].device
                )
                tensors[name].index_fill_(dim, gone.long(), lowest(tensors[name]))


def with_gone(model: nn.Module, plan: Plan) -> Plan:
    """The plan by which experts that leave lose the channels of one that stays.

    A later plan is of a model that they have left. What they make is never read, but code may put
    it beside what the others make.
    """
    tensors = dict(held_tensors(model))
    known = {slot.key for slot in plan.slots}
    added = []
    for change in plan.experts:
        for container in change.containers:
            like = f"{container.name}.{container.of(change.kept)[0]}."
            slots = [slot for slot in plan.slots if slot.tensor.startswith(like)]
            for key in container.of(change.gone):
                for slot in slots:
                    name = f"{container.name}.{key}.{slot.tensor.removeprefix(like)}"
                    shape = tensors[name].shape if name in tensors else ()
                    if (name, slot.dim) not in known and shape[slot.dim : slot.dim + 1] == (
                        slot.size,
                    ):
                        added.append(replace(slot, tensor=name))
    return replace(plan, slots=(*plan.slots, *added)) if added else plan
