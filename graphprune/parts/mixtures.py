"""Find mixtures of experts, of which some can leave.

Nothing is told by names or classes. What ranks the products of a weight chooses among its rows, or
weighs them all; the smallest module around it that holds a slice of a tensor or a module for each
of them is a mixture. Whether its code goes on with fewer, and computes then what it computes when
the scores of the others are minus infinity, is tried: on a copy of the mixture alone, with drawn
weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from graphprune.measurement import drawn
from graphprune.ops.registry import op_of
from graphprune.parts.fewer import (
    LARGE,
    Attribute,
    Refusal,
    Result,
    Trial,
    given_to,
    plan_of_experts,
)
from graphprune.parts.find import Finder
from graphprune.parts.routers import Candidate, Routers, Scoring, stacked
from graphprune.parts.stream import covers
from graphprune.plan.changes import Container, ExpertsPlan
from graphprune.plan.checks import may_be_size
from graphprune.plan.plan import Plan
from graphprune.record.batches import at_rest, device_of
from graphprune.record.inputs import Call
from graphprune.record.tensors import held_tensors, named_modules
from graphprune.text import shorten

_WIDTHS = {nn.Linear: "out_features", nn.Conv1d: "out_channels", nn.Conv2d: "out_channels"}
_PARAMETRIZED = ".parametrizations."  # of torch: what a layer computes a weight from


@dataclass(frozen=True)
class Experts:
    """A mixture of experts, of which some can leave.

    Attributes:
        name: the module that chooses among them.
        size: how many there are.
        least: how many must stay.
        groups: into so many groups they are put, in each of which equally many stay.
        params: parameters of one expert, with its scores.
        plan: which tensors, containers and scores belong to them.
        numbers: the attributes that say how many there are.
        fixed: those that are not like the others, and stay.
        apart: the places of what it returns that depends on how many there are: scores, or a loss.
    """

    name: str
    size: int
    least: int
    groups: int
    params: int
    plan: ExpertsPlan = field(repr=False)
    numbers: tuple[Attribute, ...] = field(repr=False)
    fixed: tuple[int, ...] = ()
    apart: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name or 'model'} ({self.size})"

    @property
    def whole(self) -> ExpertsPlan:
        """What belongs to the experts, by its names in the model."""
        return _whole(self.plan, self.name)

    @property
    def modules(self) -> tuple[str, ...]:
        """What the experts lie in."""
        whole = self.whole
        stacks = (name.rpartition(".")[0] for name, _ in whole.slices if name not in whole.routers)
        names = [container.name for container in whole.containers] or [*stacks]
        return tuple(dict.fromkeys(filter(None, names)))

    def keeping(self, kept: Sequence[int], model: nn.Module) -> Plan:
        """The plan by which only these stay.

        Args:
            kept: the places of those that stay, in order.
            model: the one that holds the mixture.
        """
        whole = self.whole
        numbers = [(_join(self.name, module), name) for module, name in self.numbers]
        return plan_of_experts(model, replace(whole, kept=tuple(kept)), numbers)


def _join(owner: str, name: str) -> str:
    return ".".join(filter(None, (owner, name)))


def _whole(plan: ExpertsPlan, name: str) -> ExpertsPlan:
    """A plan for a mixture as one for the model that it is a part of."""
    return replace(
        plan,
        mixture=name,
        routers=tuple(_join(name, tensor) for tensor in plan.routers),
        slices=tuple((_join(name, tensor), dim) for tensor, dim in plan.slices),
        added=tuple(_join(name, tensor) for tensor in plan.added),
        containers=tuple(replace(c, name=_join(name, c.name)) for c in plan.containers),
    )


@dataclass
class Mixtures:
    """The mixtures of a model, as its recorded graph and trials tell."""

    model: nn.Module
    call: Call
    finder: Finder

    @cached_property
    def found(self) -> tuple[Experts, ...]:
        """The mixtures of which experts can leave, in the order in which they run."""
        found: dict[str, Experts] = {}
        for candidate in self._candidates:
            experts = None if candidate.name in found else self._tried(candidate)
            if experts is not None:
                found[candidate.name] = experts
        inside = [f"{c.name}." for experts in found.values() for c in experts.whole.containers]
        return tuple(e for n, e in found.items() if not n.startswith(tuple(inside) or "\0"))

    @property
    def refused(self) -> dict[str, str]:
        """What looks like a mixture, and why its experts stay."""
        known = {experts.name for experts in self.found}
        return {name: why for name, why in self._reasons.items() if name not in known}

    @cached_property
    def _reasons(self) -> dict[str, str]:
        return {}

    @property
    def told(self) -> str:
        """The mixtures, for tables; of large ones trials would take long, and are left out."""
        names = [candidate.name for candidate in self._candidates]
        modules = [self.finder.modules[name] for name in names]
        if any(sum(p.numel() for p in module.parameters()) > LARGE for module in modules):
            return f"mixtures of experts, not tried yet: {shorten(names, 12)}"
        found = shorten(map(str, self.found), 12)
        return f"experts of which some can leave: {found}" if found else ""

    @cached_property
    def _candidates(self) -> list[Candidate]:
        return Scoring(self.finder, self.model).candidates

    # --- trials -------------------------------------------------------------------------------

    def _tried(self, candidate: Candidate) -> Experts | None:
        """A mixture, if its code goes on with fewer experts."""
        name, size = candidate.name, candidate.size
        module, prefix = self.finder.modules[name], f"{name}." if name else ""
        if self._shared(module, candidate):
            self._reasons[name] = "another module holds parts of it as well"
            return None
        kernels = {tensor.removeprefix(prefix) for tensor in candidate.kernels}
        told = Refusal(-1, "")
        for routers in candidate.ways:
            inner = {router.removeprefix(prefix): dim for router, dim in routers.items()}
            silent = _silent(module, candidate, inner)
            for known in (inner, {**inner, **silent}) if silent else (inner,):
                plan = _described(module, known, candidate, self._added(prefix), kernels)
                fixed = _fixed(module, plan)
                for far in (False, True):
                    plan = replace(plan, far=far)
                    result = self._result(name, plan, candidate.least, fixed)
                    if isinstance(result, Result):
                        params = _params(module, plan)
                        return Experts(
                            name, size, result.least, result.groups, params, plan,
                            result.numbers, fixed, result.apart,
                        )  # fmt: skip
                    told = max(told, result, key=lambda each: each.rank)
                    if not result.rank:
                        break  # its code does not run
        self._reasons[name] = told.why
        return None

    def _shared(self, module: nn.Module, candidate: Candidate) -> bool:
        """Whether something else holds tensors or layers of a mixture as well."""
        sides = {candidate.size, candidate.held}
        inside = {id(part) for part in module.modules() if any(True for _ in part.parameters())}
        mine = {id(t) for _, t in held_tensors(module) if not sides.isdisjoint(t.shape[:2])}
        parts = list(self.model.named_modules(remove_duplicate=False))
        names = [name for name, part in parts if part is module]
        for other, part in parts:
            if any(covers(name, other) or not name for name in names):
                continue
            held = {id(t) for t in (*part._parameters.values(), *part._buffers.values())}
            if id(part) in inside or held & mine:
                return True
        return False

    def _result(
        self, name: str, plan: ExpertsPlan, least: int, fixed: tuple[int, ...]
    ) -> Result | Refusal:
        """What trials tell, or why experts stay; of equal mixtures one is tried."""
        module = self.finder.modules[name]
        kind = (type(module), plan, least, fixed, _outline(module))
        if kind not in self._known:
            args, kwargs = drawn(self.call, device_of(self.model))
            with given_to(self.model, [name]) as calls, at_rest(self.model), torch.no_grad():
                self.model(*args, **kwargs)
            self._known[kind] = Refusal(0, "it does not run on the example inputs")
            if calls[name]:
                trial = Trial(module, calls[name][0], plan, least, fixed)
                self._known[kind] = trial.result(_numbers(module, plan))
        return self._known[kind]

    @cached_property
    def _known(self) -> dict[object, Result | Refusal]:
        return {}

    def _added(self, prefix: str) -> set[str]:
        """The vectors that are added to scores."""
        found = set()
        for node in self.finder.nodes:
            if node.op == "call_function" and op_of(node).signs:
                for name in filter(None, map(self._held, node.all_input_nodes)):
                    if name.startswith(prefix) and _is_vector(self._tensors[name]):
                        found.add(name.removeprefix(prefix))
        return found

    def _held(self, node: fx.Node) -> str | None:
        """The tensor of the model of which a value is a view, or a copy in another type."""
        while node.op == "call_function" and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        name = str(node.target)
        return name if node.op == "get_attr" and name in self._tensors else None

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return dict(held_tensors(self.model))


def _owner(tensor: str) -> str:
    """The module that a tensor is the weight of, or makes it."""
    tensor = f".{tensor}"
    owner = tensor.partition(_PARAMETRIZED)[0] if _PARAMETRIZED in tensor else tensor
    return (owner if owner != tensor else tensor.rpartition(".")[0]).lstrip(".")


def _silent(module: nn.Module, candidate: Candidate, routers: Routers) -> Routers:
    """What may score experts in training alone: layers as wide, and weights beside a router."""
    inside = tuple(f"{name}." for name in candidate.lists)
    tensors = dict(held_tensors(module))
    likes = {(_owner(name), tensors[name].shape): dim for name, dim in routers.items()}
    found = {}
    for name, tensor in tensors.items():
        owner, _, own = name.rpartition(".")
        if name in routers or name.startswith(inside or "\0"):
            continue
        layer = own == "weight" and type(module.get_submodule(owner)) in _WIDTHS
        if layer and tensor.shape[0] == candidate.size:
            found[name] = 0
        elif (owner, tensor.shape) in likes:
            found[name] = likes[owner, tensor.shape]
    return found


def _described(
    module: nn.Module, routers: Routers, candidate: Candidate, added: set[str], kernels: set[str]
) -> ExpertsPlan:
    """What belongs to the experts of a mixture."""
    size, held = candidate.size, candidate.held
    lists = tuple(Container(*found) for found in candidate.lists.items())
    inside = tuple(f"{container.name}." for container in lists)
    tensors = {n: t for n, t in held_tensors(module) if not n.startswith(inside or "\0")}
    owners = {_owner(name) for name in routers}
    stacks = {*stacked(module, held), *stacked(module, size), *kernels} & tensors.keys()
    beside = {_owner(name) for name in stacks}
    sides = {size, held, *(tensors[name].shape[dim] for name, dim in routers.items())}
    slices = dict(routers)
    for name, tensor in tensors.items():
        owner = _owner(name)
        if name in slices or sides.isdisjoint(tensor.shape):
            continue
        scored = owner in {"", *beside} or any(covers(router, owner) for router in owners)
        if _is_vector(tensor) and scored:
            slices[name] = next(dim for dim, side in enumerate(tensor.shape) if side in sides)
        elif name in stacks or (owner in beside - owners and tensor.shape[0] in (size, held)):
            slices[name] = 0
    scores = tuple(sorted(name for name in slices if name in added))
    return ExpertsPlan(
        "", tuple(routers), size, tuple(range(size)), tuple(slices.items()), scores, lists
    )


def _fixed(module: nn.Module, plan: ExpertsPlan) -> tuple[int, ...]:
    """The experts that are not like the others, by the classes of their modules."""
    found = set[int]()
    for container in plan.containers:
        held = module.get_submodule(container.name)._modules
        kinds = [type(held[key]) for key in container.keys]
        most = Counter(kinds).most_common(1)[0][0]
        found |= {place for place, kind in enumerate(kinds) if kind is not most}
        found |= {*range(len(kinds), plan.size)}
    return tuple(sorted(found))


def _is_vector(tensor: Tensor) -> bool:
    return tensor.dim() > 0 and max(tensor.shape) == tensor.numel()


def _numbers(module: nn.Module, plan: ExpertsPlan) -> list[Attribute]:
    """The attributes of a mixture that may say how many experts there are."""
    inside = tuple(f"{container.name}." for container in plan.containers)
    tensors = dict(held_tensors(module))
    owners = {_owner(name) for name in plan.routers}
    sizes = {plan.size, *(tensors[name].shape[dim] for name, dim in plan.slices)}
    sizes |= {len(container.keys) for container in plan.containers}
    found = []
    for name, part in named_modules(module):
        if name.startswith(inside or "\0"):
            continue
        width = next((width for kind, width in _WIDTHS.items() if isinstance(part, kind)), None)
        for attribute, value in vars(part).items():
            if type(value) is not int or value not in sizes or not may_be_size(part, attribute):
                continue
            own = attribute == width and name in owners
            if own or not type(part).__module__.startswith("torch.nn"):
                found.append((name, attribute))
    return found


def _outline(module: nn.Module) -> tuple[object, ...]:
    """What the code of a module may depend on besides the values of tensors."""
    return tuple(
        (name, type(part), tuple((k, v) for k, v in vars(part).items() if type(v) in (int, bool)),
         tuple((k, tuple(t.shape)) for k, t in part._parameters.items() if t is not None))
        for name, part in named_modules(module)
    )  # fmt: skip


def _params(module: nn.Module, plan: ExpertsPlan) -> int:
    """The parameters of one expert."""
    tensors = {name: t for name, t in held_tensors(module) if isinstance(t, nn.Parameter)}
    expert = next(e for e in range(plan.size) if e not in _fixed(module, plan))
    alone = replace(plan, kept=tuple(e for e in range(plan.size) if e != expert))
    count = 0
    for name, dim in plan.slices:
        side = tensors[name].shape[dim] if name in tensors else 0
        count += tensors[name].numel() // side * len(alone.gone_of(side)) if side else 0
    for container in plan.containers:
        for key in container.of([expert]):
            part = module.get_submodule(f"{container.name}.{key}")
            count += sum(parameter.numel() for parameter in part.parameters())
    return count
