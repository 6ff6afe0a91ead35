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
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graphprune.errors import VerificationError
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
Shape = tuple[int, ...]
_WITHIN = 0.25  # of what is usual: scores in trials, which something may bound
_UNSURE = 4  # attributes that may or may not say how many experts there are
Attribute = tuple[str, str]  # a module, and what it remembers


class Refusal(NamedTuple):
    """Why experts stay; of several reasons that with the higher ``rank`` is the truer."""

    rank: int
    why: str


@dataclass(frozen=True)
class Result:
    """What trials tell.

    Attributes:
        least: how many experts must stay.
        groups: in how many groups equally many stay.
        numbers: the attributes that follow.
        apart: the places of outputs that depend on how many there are: scores, or a loss.
    """

    least: int
    groups: int
    numbers: tuple[Attribute, ...]
    apart: tuple[int, ...] = ()


def plan_of_experts(model: nn.Module, experts: ExpertsPlan, numbers: Sequence[Attribute]) -> Plan:
    """The plan by which experts leave, and attributes say how many stay."""
    tensors = dict(held_tensors(model))
    sides = [(name, dim, tensors[name].shape[dim]) for name, dim in experts.slices]
    sizes = [(module, name, vars(model.get_submodule(module))[name]) for module, name in numbers]
    return Plan(
        fingerprint(model),
        (),
        tuple(SlotPlan(name, dim, side, experts.kept_of(side)) for name, dim, side in sides),
        tuple(SizeChange(m, name, (), n, len(experts.kept_of(n))) for m, name, n in sizes),
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

    def __init__(
        self,
        module: nn.Module,
        call: Call,
        plan: ExpertsPlan,
        least: int,
        fixed: tuple[int, ...] = (),
    ) -> None:
        self.module, self.plan, self.fixed = copy_module(module, {}), plan, fixed
        self.least = max(least, len(fixed) + 1)
        self.apart: set[int] = set()  # places of outputs that depend on how many there are
        self.why = Refusal(-1, "")
        vars(self.module).pop("graphprune_plan", None)
        self.parameters = sum(parameter.numel() for parameter in module.parameters())
        generator = torch.Generator().manual_seed(0)
        scores = {name for name, _ in plan.slices}
        with torch.no_grad():
            for name, tensor in held_tensors(self.module):
                if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                    scale = 1 / math.sqrt(max(tensor.shape[-1], 1)) if tensor.dim() else 1.0
                    scale *= _WITHIN if name in scores and tensor.dim() < 3 else 1.0
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

    def result(self, numbers: Sequence[Attribute]) -> Result | Refusal:
        """How many must stay, in how many groups, and which attributes follow; or why all stay."""
        for groups in self._groupings():
            half = self._rounded(self.plan.size / 2, groups)
            for chosen in _subsets(numbers):
                self.apart.clear()
                one = self._equal_with(self._choices(self.plan.size - groups, groups, 1)[0], chosen)
                if not one or not self._equal(half, groups, chosen, _CHOICES):
                    continue
                chosen = self._meant(chosen)
                for count in range(self._rounded(self.least, groups), half + 1, groups):
                    if count == half or self._equal(count, groups, chosen, 1):
                        return Result(count, groups, chosen, tuple(sorted(self.apart)))
        return self.why

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
        return [1] if self.fixed else [1, *sorted(values)]

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
        free = [expert for expert in range(self.plan.size) if expert not in self.fixed]
        height, gone = len(free) // groups, (self.plan.size - count) // groups
        generator = torch.Generator().manual_seed(count)
        known = min(most, math.comb(height, gone) ** groups)
        found: dict[tuple[int, ...], None] = {}
        for _ in range(_ROUNDS * most):
            orders = [torch.randperm(height, generator=generator).tolist() for _ in range(groups)]
            for start in range(0, height, gone):
                leaving = {
                    free[number * height + order[(start + step) % height]]
                    for number, order in enumerate(orders)
                    for step in range(gone)
                }
                found[tuple(e for e in range(self.plan.size) if e not in leaving)] = None
            if len(found) >= known:
                break
        return list(found)

    def _equal_with(self, kept: tuple[int, ...], numbers: Sequence[Attribute]) -> bool:
        plan = plan_of_experts(self.module, replace(self.plan, kept=kept), numbers)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._verified(plan)
        except VerificationError:
            self._fails(
                2,
                "with fewer experts its code computes something else than with scores of minus "
                f"infinity: it counts them{self._told(numbers)}, or scores depend on each other",
            )
        except Exception as error:  # whatever the code of a model raises where experts are missing
            self._fails(0, f"its code does not run with fewer experts ({_line(error)})")
        return False

    def _told(self, numbers: Sequence[Attribute]) -> str:
        kinds = {name: type(self.module.get_submodule(name)).__module__ for name, _ in numbers}
        names = dict.fromkeys(n for name, n in numbers if not kinds[name].startswith("torch.nn"))
        return f" ({', '.join(names)})" if names else ""

    def _fails(self, rank: int, why: str) -> None:
        self.why = max(self.why, Refusal(rank, why), key=lambda each: each.rank)

    def _verified(self, plan: Plan) -> bool:
        """Whether outputs are equal, all but losses of the mixture's own."""
        dtype = torch.float32 if self.parameters > LARGE else torch.float64
        shapes, same = self._shapes(plan)
        self.apart |= {*range(len(shapes))} - {*same}
        losses = {place for place in same if math.prod(shapes[place]) == 1}
        losses = losses if len(losses) < len(same) else set()
        for apart in (self.apart, self.apart | losses):
            counted = {"outputs": {"eval": [place for place in same if place not in apart]}}
            try:
                report = verify(self.module, replace(plan, request=counted), self.call, dtype=dtype)
            except VerificationError:
                if apart | losses == self.apart:
                    raise
                continue
            self.apart |= apart
            if report.verdict != "equal":
                self._fails(1, f"it cannot be told whether its code goes on: {report.reason}")
            return report.verdict == "equal"
        return False

    def _shapes(self, plan: Plan) -> tuple[list[Shape], list[int]]:
        """The shapes of the outputs, and the places of those that are the same without experts."""
        args, kwargs = self.call.on(device_of(self.module))
        shapes = []
        for model in (self.module, shrink(self.module, plan)):
            with at_rest(model), torch.no_grad():
                shapes.append([tuple(t.shape) for t in tensors_of(model(*args, **kwargs))])
        same = [place for place, (a, b) in enumerate(zip(*shapes)) if a == b]
        return shapes[0], same


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _subsets(numbers: Sequence[Attribute]) -> Iterator[tuple[Attribute, ...]]:
    """All attributes, then fewer and fewer of them."""
    yield tuple(numbers)
    if len(numbers) <= _UNSURE:
        for count in range(len(numbers) - 1, -1, -1):
            yield from itertools.combinations(numbers, count)
