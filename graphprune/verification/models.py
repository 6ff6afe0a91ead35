"""A small model and its masked original in one setting: how they run, and what is compared."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointError

from graphprune.errors import GraphPruneError
from graphprune.execute.shrink import cut, kept_indices, shrink
from graphprune.plan.leaving import leaves_modules, names_before
from graphprune.plan.plan import Plan
from graphprune.record.inputs import Call
from graphprune.record.outputs import fields
from graphprune.record.random_numbers import same_numbers, states
from graphprune.record.tensors import held_tensors, named_modules
from graphprune.verification.follow import Undecided, aside
from graphprune.verification.masked import MaskedForward, mask, run_masked
from graphprune.verification.reference import with_constants
from graphprune.verification.running import backward
from graphprune.verification.setting import Precision, copied
from graphprune.verification.vocabulary import Ids


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, on which inputs, and the largest relative difference.

    ``note`` says why nothing could be decided, or what else there is to say; ``decided`` whether
    the comparison counts.
    """

    name: str
    inputs: str
    difference: float
    note: str = ""
    decided: bool = True


class DoesNotRun(GraphPruneError):
    """The original itself does not run on these inputs, or has no gradient there."""


@dataclass
class Result:
    """What one run of a model left."""

    outputs: list[Tensor]  # those that count
    grads: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    drawn: object = None  # how far the generators of ``random`` and numpy have come


@dataclass(frozen=True)
class Trial:
    """What is compared, on which inputs and how."""

    name: str
    call: Call
    training: bool = False
    backward: bool = False


@dataclass(frozen=True)
class Pair:
    """A tensor of the masked model, without what was removed, and the same of the small model."""

    kind: str
    where: str
    wanted: Tensor
    found: Tensor
    floor: float = 0.0

    @property
    def gap(self) -> float:
        """Their relative difference."""
        return difference(self.wanted, self.found, self.floor)


def difference(wanted: Tensor, found: Tensor, floor: float = 0.0) -> float:
    """The largest absolute difference over the largest wanted magnitude."""
    if wanted.shape != found.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return 0.0 if torch.equal(wanted, found) else float("inf")
    wanted, found = wanted.detach(), found.detach()
    if torch.equal(wanted, found):
        return 0.0
    kind = torch.complex128 if wanted.is_complex() else torch.float64
    wanted, found = wanted.to(kind), found.to(kind)
    worst, scale = float((wanted - found).abs().max()), float(wanted.abs().max())
    if not (math.isfinite(worst) and math.isfinite(scale)):
        same = (wanted == found) | (wanted.isnan() & found.isnan())
        worst = float(torch.where(same, 0.0, (wanted - found).abs()).max())
        worst = worst if worst == worst else math.inf
        finite = wanted[wanted.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
    scale = max(scale, floor)
    return worst / scale if scale else worst


class Models:
    """Both models in one precision, without dropout."""

    def __init__(
        self,
        model: nn.Module,
        small: nn.Module | Plan,
        plan: Plan,
        dtype: torch.dtype,
        tolerance: float,
        seed: int,
    ) -> None:
        self.plan, self.dtype, self.tolerance, self.seed = plan, dtype, tolerance, seed
        self.original = copied(model, dtype)
        self.masked = mask(self.original, plan)
        forward = vars(self.masked).get("forward")
        self.following = forward if isinstance(forward, MaskedForward) else None
        if self.following is not None:
            self.following.remembers = True
        if isinstance(small, Plan):
            self.small = shrink(self.original, plan)
        else:
            self.small = copied(small, dtype)
            _unround(self.small, small, self.original, plan)
        self.device = next(self.original.parameters()).device
        self.kept = kept_indices(plan)
        self.ids = Ids(plan, self.original)

    @cached_property
    def followed(self) -> MaskedForward:
        """The masked model that knows what stays of every tensor, also where zeroes are enough."""
        forward = run_masked(with_constants(self.original, self.plan), self.plan)
        forward.watched = forward.remembers = True
        return forward

    def forget(self) -> bool:
        """Let the masked model find out anew what it remembers of other runs, if it does."""
        if self.following is None:
            return False
        self.following.forget()
        return True

    def run(self, model: nn.Module, trial: Trial, *modes: Any) -> Result:
        """Run one of the models; its buffers are afterwards as they were."""
        model.train(trial.training)
        small = model is self.small
        call = self.ids.small(trial.call) if small else trial.call
        args, kwargs = call.on(self.device)
        held = [module._buffers for _, module in named_modules(model) if module._buffers]
        places = [(buffers, dict(buffers)) for buffers in held]
        values = [(b, b.clone()) for buffers in held for b in buffers.values() if b is not None]
        grads: dict[str, Tensor | None] = {}
        name_of = names_before(self.plan) if model is self.small else str
        try:
            with contextlib.ExitStack() as entered:
                entered.enter_context(same_numbers(self.seed, self.device))
                entered.enter_context(torch.set_grad_enabled(trial.backward))
                for mode in (Precision(self.dtype), *modes):
                    entered.enter_context(mode)
                outputs = self._counted(model(*args, **kwargs), trial.training, small)
                if trial.backward:
                    self._backward(model, outputs)
                    grads = {name_of(name): p.grad for name, p in model.named_parameters()}
                drawn = states()
            buffers = {name_of(name): b.detach().clone() for name, b in model.named_buffers()}
        finally:
            model.zero_grad(set_to_none=True)
            for place, before in places:
                place.update(before)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):  # others may be held for a backward
                        buffer.copy_(value)
        return Result(outputs, grads, buffers, drawn)

    def _counted(self, out: object, training: bool, small: bool) -> list[Tensor]:
        """The tensors of an output that must be equal."""
        found = tensors_of(out)
        if self.plan.vocabularies and not small:
            with aside():
                found = self.ids.kept(out)
        return [found[place] for place in self.plan.counted(len(found), training)]

    def _backward(self, model: nn.Module, outputs: list[Tensor]) -> None:
        """Gradients of a random weighting of the outputs, in the modes of the forward.

        Checkpointed parts of a model run once more.
        """
        with aside():
            generator = torch.Generator().manual_seed(self.seed)
            loss = sum(
                (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum()
                for t in outputs
                if t.is_floating_point() and t.requires_grad
            )
        if isinstance(loss, Tensor):
            forward = vars(model).get("forward")
            once_more = getattr(forward, "once_more", contextlib.nullcontext)
            with once_more():
                backward((loss,), (torch.ones_like(loss),))

    def run_masked(self, model: nn.Module, trial: Trial) -> Result:
        """Run a masked model.

        Checkpointed parts save fewer tensors when they run again, as what is followed runs twice:
        once more, with all of it known.
        """
        try:
            return self.run(model, trial)
        except CheckpointError:
            return self.run(model, trial)

    def reference(self, trial: Trial) -> Result:
        """Run the masked model.

        Raises:
            DoesNotRun: neither does the original.
            Undecided: the original runs.
        """
        try:
            return self.run_masked(self.masked, trial)
        except Undecided:
            raise
        except Exception as error:
            reason = self.refusal(trial)
            if reason:
                raise DoesNotRun(reason) from error
            raise Undecided(
                f"the reference does not run ({type(error).__name__}: {error})"
            ) from error

    def refusal(self, trial: Trial) -> str:
        """Why the original does not run; empty when it does."""
        try:
            self.run(self.original, trial)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def shrunk(self, trial: Trial, *modes: object) -> tuple[Result | None, str]:
        """Run the small model; ``None`` and the error where it does not run."""
        try:
            return self.run(self.small, trial, *modes), ""
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"

    def pairs(
        self, trial: Trial, wanted: Result, found: Result, small: bool = True
    ) -> list[Pair] | None:
        """All that is compared; ``None`` where the shapes of the outputs differ.

        Args:
            trial: how the models were run.
            wanted: of the masked model.
            found: of the small model, or of the masked model as well.
            small: whether it is of the small model.
        """
        left, right = wanted.outputs, found.outputs
        if [tuple(t.shape) for t in left] != [tuple(t.shape) for t in right]:
            return None
        pairs = [Pair("output", str(n), a, b) for n, (a, b) in enumerate(zip(left, right))]
        if trial.backward:
            pairs += self._gradients(wanted, found, small)
        if trial.training:
            pairs += self._buffers(wanted, found, small)
        return pairs

    def equal(self, trial: Trial, wanted: Result, found: Result | None) -> list[Pair] | None:
        """All that is compared where it is equal, else ``None``."""
        pairs = None if found is None else self.pairs(trial, wanted, found)
        if pairs is None or not all(pair.gap <= self.tolerance for pair in pairs):
            return None
        return pairs

    def _gradients(self, wanted: Result, found: Result, small: bool) -> Iterator[Pair]:
        factors = {change.tensor: change.factor for change in self.plan.scales} if small else {}
        peak = _peak(wanted.grads.values())
        for name, grad in wanted.grads.items():
            other = found.grads.get(name)
            kept = self.kept.get(name, {})
            if other is not None:
                other = other * factors.get(name, 1.0) if small else cut(other, kept)
            grad = None if grad is None else cut(grad, kept)
            if grad is None:
                if other is None:
                    continue
                grad = torch.zeros_like(other)
            other = torch.zeros_like(grad) if other is None else other
            yield Pair("gradients", name, grad, other, 1e-3 * peak)

    def _buffers(self, wanted: Result, found: Result, small: bool) -> Iterator[Pair]:
        numbers = {change.tensor for change in self.plan.indices}
        peak = _peak(wanted.buffers.values())
        for name, buffer in self.original.named_buffers():
            kept = self.kept.get(name, {})
            if name not in found.buffers and leaves_modules(self.plan):
                continue  # of a module that left
            other = found.buffers[name] if small else cut(found.buffers[name], kept)
            shape = cut(buffer, kept).shape
            if name in numbers or other.shape != shape:
                continue  # replaced by the forward: an index for another resolution
            yield Pair("buffers", name, cut(wanted.buffers[name], kept), other, 1e-3 * peak)


def _peak(tensors: Any) -> float:
    found = [t for t in tensors if t is not None and t.is_floating_point() and t.numel()]
    return max((float(t.abs().max()) for t in found), default=0.0)


def tensors_of(out: object) -> list[Tensor]:
    """The tensors of an output, whatever holds them."""
    return [leaf for leaf in pytree.tree_leaves(fields(out)) if isinstance(leaf, Tensor)]


def _unround(copied: nn.Module, small: nn.Module, original: nn.Module, plan: Plan) -> None:
    """Undo the rounding of weights that were rescaled or added to in a lower precision."""
    if not (plan.scales or plan.biases or plan.merges):
        return
    kept, tensors = kept_indices(plan), dict(held_tensors(original))
    given, promoted = dict(held_tensors(small)), dict(held_tensors(copied))
    exacts = {
        change.tensor: tensors[change.tensor].detach() * change.factor for change in plan.scales
    }
    constants = dict(held_tensors(with_constants(original, plan)))
    for name in [b.tensor for b in plan.biases] + [m.tensor for m in plan.merges]:
        exacts[name] = constants[name].detach()
    for name, whole in exacts.items():
        exact = cut(whole, kept.get(name, {}))
        rounded = given[name].detach()
        if torch.allclose(exact.to(rounded), rounded, rtol=4 * torch.finfo(rounded.dtype).eps):
            promoted[name].data = exact
