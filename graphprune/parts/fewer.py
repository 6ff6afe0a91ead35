"""Trials with a mixture alone: whether its code goes on with fewer experts, and computes the same.

What it computes with fewer must be what it computes when the scores of the others are minus
infinity: with drawn weights, on drawn inputs that choose every expert, as often as it takes for
each of them to leave once.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from graphprune.execute.shrink import shrink
from graphprune.ops.calls import Args, Kwargs
from graphprune.plan.changes import ExpertsPlan, SizeChange, SlotPlan
from graphprune.plan.plan import Plan
from graphprune.record.batches import at_rest, device_of
from graphprune.record.copying import copy_module
from graphprune.record.inputs import Call
from graphprune.record.tensors import fingerprint, held_tensors, named_modules
from graphprune.verification.models import tensors_of
from graphprune.verification.report import verify

LARGE = 1 << 24  # parameters of a mixture: beyond, trials are made on request, in float32
_TOKENS = 4  # for every expert, in trials
_CHOICES = 12  # of experts that leave, in trials: a few may be symmetric by chance
_ROUNDS = 8  # of drawing them, for each that is wanted
_UNSURE = 4  # attributes that may or may not say how many experts there are
Attribute = tuple[str, str]  # a module, and what it remembers
Result = tuple[int, int, tuple[Attribute, ...]]  # how many must stay; groups; what follows


def plan_of_experts(model: nn.Module, experts: ExpertsPlan, numbers: Sequence[Attribute]) -> Plan:
    """The plan by which experts leave, and attributes say how many stay."""
    size, kept = experts.size, experts.kept
    return Plan(
        fingerprint(model),
        (),
        tuple(SlotPlan(name, dim, size, kept) for name, dim in experts.slices),
        tuple(SizeChange(module, name, (), size, len(kept)) for module, name in numbers),
        experts=(experts,),
    )


@contextlib.contextmanager
def given_to(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Call]]]:
    """What modules are given while a model runs inside, by their names; copies."""
    found: dict[str, list[Call]] = {name: [] for name in names}

    def seen(calls: list[Call]) -> Callable[..., None]:
        def note(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
            calls.append(Call(args, kwargs).map(lambda tensor: tensor.detach().clone()))

        return note

    handles = [
        model.get_submodule(name).register_forward_pre_hook(seen(calls), with_kwargs=True)
        for name, calls in found.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Trial:
    """Trials with a mixture alone, with drawn weights, on what it is given in the model."""

    def __init__(self, module: nn.Module, call: Call, plan: ExpertsPlan, least: int) -> None:
        self.module, self.plan, self.least = copy_module(module, {}), plan, least
        vars(self.module).pop("graphprune_plan", None)
        self.parameters = sum(parameter.numel() for parameter in module.parameters())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, tensor in held_tensors(self.module):
                if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                    scale = 1 / math.sqrt(max(tensor.shape[-1], 1)) if tensor.dim() else 1.0
                    values = torch.randn(tensor.shape, generator=generator) * scale
                    values = values.abs() if tensor.numel() == 1 else values  # a temperature, say
                    tensor.copy_(values.to(tensor))
        self.call = self._widened(call, generator)

    def _widened(self, call: Call, generator: torch.Generator) -> Call:
        """Drawn inputs of more tokens, so that each expert is chosen; the given ones if need be."""
        rows = max(
            (t.shape[:-1].numel() for t in call.tensors() if t.is_floating_point()), default=1
        )
        wide = call.repeated(math.ceil(_TOKENS * self.plan.size / rows))

        def draw(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return (values * tensor.double().std().clamp(min=0.1).cpu()).to(tensor)

        return next(filter(self._runs, (wide.map(draw), call.map(draw))), call)

    def result(self, numbers: Sequence[Attribute]) -> Result | None:
        """How many must stay, in how many groups, and which attributes follow."""
        for groups in self._groupings():
            half = self._rounded(self.plan.size / 2, groups)
            for chosen in _subsets(numbers):
                one = self._equal_with(self._choices(self.plan.size - groups, groups, 1)[0], chosen)
                if not one or not self._equal(half, groups, chosen, _CHOICES):
                    continue
                chosen = self._meant(chosen)
                for count in range(self._rounded(self.least, groups), half + 1, groups):
                    if count == half or self._equal(count, groups, chosen, 1):
                        return count, groups, chosen
        return None

    def _rounded(self, count: float, groups: int) -> int:
        """The next number of experts that can stay."""
        return min(max(1, math.ceil(max(count, self.least) / groups)) * groups,
                   self.plan.size - groups)  # fmt: skip

    def _meant(self, numbers: tuple[Attribute, ...]) -> tuple[Attribute, ...]:
        """The attributes that say how many there are.

        Where the number means other things as well, those that the code reads.
        """
        sides = {
            side
            for name, tensor in held_tensors(self.module)
            for dim, side in enumerate(tensor.shape)
            if (name, dim) not in self.plan.slices
        }
        return tuple(filter(self._is_read, numbers)) if self.plan.size in sides else numbers

    def _is_read(self, number: Attribute) -> bool:
        """Whether the code does not run without an attribute."""
        owner, name = self.module.get_submodule(number[0]), number[1]
        value = vars(owner).pop(name)
        try:
            return not self._runs(self.call)
        finally:
            vars(owner)[name] = value

    def _runs(self, call: Call) -> bool:
        args, kwargs = call.on(device_of(self.module))
        try:
            with at_rest(self.module), torch.no_grad():
                self.module(*args, **kwargs)
        except Exception:  # whatever the code of a model raises
            return False
        return True

    def _groupings(self) -> list[int]:
        """In how many groups experts may be put."""
        size = self.plan.size
        values = {
            value
            for _, part in named_modules(self.module)
            for value in vars(part).values()
            if type(value) is int and 1 < value < size and size % value == 0
        }
        return [1, *sorted(values)]

    def _equal(self, count: int, groups: int, numbers: Sequence[Attribute], most: int) -> bool:
        """Whether the mixture with so many experts is the one without the scores of the others.

        Args:
            count: how many stay.
            groups: in equally many of which.
            numbers: the attributes that follow.
            most: with so many different choices it is tried; with all where there are no more.
        """
        if not 0 < count < self.plan.size:
            return False
        return all(self._equal_with(kept, numbers) for kept in self._choices(count, groups, most))

    def _choices(self, count: int, groups: int, most: int) -> list[tuple[int, ...]]:
        """Different choices of experts that stay; every expert leaves in one of the first."""
        height, gone = self.plan.size // groups, (self.plan.size - count) // groups
        generator = torch.Generator().manual_seed(count)
        known = min(most, math.comb(height, gone) ** groups)
        found: dict[tuple[int, ...], None] = {}
        for _ in range(_ROUNDS * most):
            orders = [torch.randperm(height, generator=generator).tolist() for _ in range(groups)]
            for start in range(0, height, gone):
                leaving = {
                    number * height + order[(start + step) % height]
                    for number, order in enumerate(orders)
                    for step in range(gone)
                }
                found[tuple(e for e in range(self.plan.size) if e not in leaving)] = None
            if len(found) >= known:
                break
        return list(found)

    def _equal_with(self, kept: tuple[int, ...], numbers: Sequence[Attribute]) -> bool:
        plan = plan_of_experts(self.module, replace(self.plan, kept=kept), numbers)
        dtype = torch.float32 if self.parameters > LARGE else torch.float64
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plan = self._counted(plan)
                return verify(self.module, plan, self.call, dtype=dtype).verdict == "equal"
        except Exception:  # whatever the code of a model raises where experts are missing
            return False

    def _counted(self, plan: Plan) -> Plan:
        """The plan, by which those outputs count that have the same shape without experts."""
        args, kwargs = self.call.on(device_of(self.module))
        shapes = []
        for model in (self.module, shrink(self.module, plan)):
            with at_rest(model), torch.no_grad():
                shapes.append([tuple(t.shape) for t in tensors_of(model(*args, **kwargs))])
        same = [place for place, (a, b) in enumerate(zip(*shapes)) if a == b]
        return replace(plan, request={"outputs": {"eval": same}})


def _subsets(numbers: Sequence[Attribute]) -> Iterator[tuple[Attribute, ...]]:
    """All attributes, then fewer and fewer of them."""
    yield tuple(numbers)
    if len(numbers) <= _UNSURE:
        for count in range(len(numbers) - 1, -1, -1):
            yield from itertools.combinations(numbers, count)
