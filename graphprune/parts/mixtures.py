"""Find mixtures of experts, of which some can leave.

Nothing is told by names or classes. What ranks the products of a weight chooses among its rows; the
smallest module around it that holds a slice of a tensor or a module for each of them is a mixture.
Whether its code goes on with fewer, and computes then what it computes when the scores of the
others are minus infinity, is tried: on a copy of the mixture alone, with drawn weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from graphprune.measurement import drawn
from graphprune.ops.fact import arguments
from graphprune.ops.registry import op_of
from graphprune.parts.fewer import LARGE, Attribute, Result, Trial, given_to, plan_of_experts
from graphprune.parts.find import Finder
from graphprune.parts.stream import covers
from graphprune.plan.changes import Container, ExpertsPlan
from graphprune.plan.checks import may_be_size
from graphprune.plan.plan import Plan
from graphprune.record.batches import at_rest, device_of
from graphprune.record.inputs import Call
from graphprune.record.tensors import held_tensors, named_modules
from graphprune.text import shorten

_LISTS = nn.ModuleList | nn.ModuleDict | nn.Sequential
_WIDTHS = {nn.Linear: "out_features", nn.Conv1d: "out_channels", nn.Conv2d: "out_channels"}


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
    """

    name: str
    size: int
    least: int
    groups: int
    params: int
    plan: ExpertsPlan = field(repr=False)
    numbers: tuple[Attribute, ...] = field(repr=False)

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
        for name, (least, routers) in self._candidates.items():
            experts = self._tried(name, least, routers)
            if experts is not None:
                found[name] = experts
        inside = [f"{c.name}." for experts in found.values() for c in experts.whole.containers]
        return tuple(e for n, e in found.items() if not n.startswith(tuple(inside) or "\0"))

    @property
    def seen(self) -> list[str]:
        """What looks like a mixture, whether experts can leave or not."""
        return [name or "the model" for name in self._candidates]

    @property
    def told(self) -> str:
        """The mixtures, for tables; of large ones trials would take long, and are left out."""
        names = self._candidates
        modules = [self.finder.modules[name] for name in names]
        if any(sum(p.numel() for p in module.parameters()) > LARGE for module in modules):
            return f"mixtures of experts, not tried yet: {shorten(names, 12)}"
        found = shorten(map(str, self.found), 12)
        return f"experts of which some can leave: {found}" if found else ""

    # --- candidates ---------------------------------------------------------------------------

    @cached_property
    def _candidates(self) -> dict[str, tuple[int, dict[str, int]]]:
        """Modules that may be mixtures: how many experts they choose, and their routers."""
        ranked: dict[str, list[tuple[fx.Node, dict[str, int]]]] = {}
        for node in self.finder.nodes:
            if node.op == "call_function" and op_of(node).chooses:
                routers = self._routers(node)
                if len({self._size(item) for item in routers.items()}) == 1:
                    owner = next(iter(routers)).rpartition(".")[0]
                    ranked.setdefault(owner, []).append((node, routers))
        found: dict[str, tuple[int, dict[str, int]]] = {}
        for owner, choices in ranked.items():
            routers = {name: dim for _, known in choices for name, dim in known.items()}
            size = self._size(next(iter(routers.items())))
            name = self._mixture(owner, size)
            if name is not None:
                least = max(_least(node, size) for node, _ in choices)
                known, others = found.get(name, (1, {}))
                found[name] = max(known, least), {**others, **routers}
        return found

    def _size(self, router: tuple[str, int]) -> int:
        name, dim = router
        return self._tensors[name].shape[dim]

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return dict(held_tensors(self.model))

    def _routers(self, node: fx.Node) -> dict[str, int]:
        """The weights of which products are ranked, with the dimension of what is chosen."""
        found: dict[str, int] = {}
        waiting, seen = [*node.all_input_nodes], set[fx.Node]()
        while waiting:
            each = waiting.pop()
            if each in seen or each.op != "call_function":
                continue
            seen.add(each)
            if not self.finder.macs.get(each):
                waiting += each.all_input_nodes
                continue
            shape = each.meta.get("shape", ())
            for name in filter(None, map(self._weight, each.all_input_nodes)):
                sides = self._tensors[name].shape
                wide = [dim for dim, n in enumerate(sides[:2]) if len(sides) > 1 and n in shape[1:]]
                if wide:
                    found[name] = wide[0]
        return found

    def _weight(self, node: fx.Node) -> str | None:
        """The tensor of the model of which a value is a view, or a copy in another type."""
        while node.op == "call_function" and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        name = str(node.target)
        return name if node.op == "get_attr" and name in self._tensors else None

    def _mixture(self, owner: str, size: int) -> str | None:
        """The smallest module around a router that holds so many of what an expert is made of."""
        name = owner
        while True:
            below = self.finder.modules[name]
            if self.finder.calls.get(name) or not name:
                stacks = any(t.dim() > 2 and t.shape[0] == size for _, t in held_tensors(below))
                if stacks or any(_containers(below, size)):
                    return name
            if not name:
                return None
            name = name.rpartition(".")[0]

    # --- trials -------------------------------------------------------------------------------

    def _tried(self, name: str, least: int, routers: dict[str, int]) -> Experts | None:
        """A mixture, if its code goes on with fewer experts."""
        module = self.finder.modules[name]
        prefix = f"{name}." if name else ""
        if not all(router.startswith(prefix) for router in routers):
            return None
        inner = {router.removeprefix(prefix): dim for router, dim in routers.items()}
        size = self._size(next(iter(routers.items())))
        if self._shared(module, size):
            return None
        silent = {n: 0 for n in _scoring(module, size) if n not in inner}
        added = self._added(routers, prefix)
        for known in (inner, {**inner, **silent}) if silent else (inner,):
            plan = _described(module, known, size, added)
            result = self._result(name, plan, least)
            if result is not None:
                return Experts(name, size, *result[:2], _params(module, plan), plan, result[2])
        return None

    def _shared(self, module: nn.Module, size: int) -> bool:
        """Whether something else holds tensors or layers of a mixture as well."""
        inside = {id(part) for part in module.modules() if any(True for _ in part.parameters())}
        mine = {id(t) for _, t in held_tensors(module) if size in t.shape[:2]}
        parts = list(self.model.named_modules(remove_duplicate=False))
        names = [name for name, part in parts if part is module]
        for other, part in parts:
            if any(covers(name, other) or not name for name in names):
                continue
            held = {id(t) for t in (*part._parameters.values(), *part._buffers.values())}
            if id(part) in inside or held & mine:
                return True
        return False

    def _result(self, name: str, plan: ExpertsPlan, least: int) -> Result | None:
        """What trials tell; of equal mixtures one is tried."""
        module = self.finder.modules[name]
        kind = (type(module), plan, least, _outline(module))
        if kind not in self._known:
            args, kwargs = drawn(self.call, device_of(self.model))
            with given_to(self.model, [name]) as calls, at_rest(self.model), torch.no_grad():
                self.model(*args, **kwargs)
            trial = Trial(module, calls[name][0], plan, least) if calls[name] else None
            self._known[kind] = None if trial is None else trial.result(_numbers(module, plan))
        return self._known[kind]

    @cached_property
    def _known(self) -> dict[object, Result | None]:
        return {}

    def _added(self, routers: dict[str, int], prefix: str) -> set[str]:
        """The vectors that are added to scores."""
        found = set()
        for node in self.finder.nodes:
            if node.op == "call_function" and op_of(node).signs:
                for name in filter(None, map(self._weight, node.all_input_nodes)):
                    if name.startswith(prefix) and _is_vector(self._tensors[name]):
                        found.add(name.removeprefix(prefix))
        return found


def _least(node: fx.Node, size: int) -> int:
    """How many of so many experts a ranking needs."""
    operand = node.all_input_nodes[0].meta["shape"]
    found = arguments(node.target, node.args, node.kwargs)
    count, wide = found.get("k", 1), operand[-1] if operand else size
    whole = isinstance(count, int) and wide and size % wide == 0
    return count * (size // wide) if whole else 1


def _containers(module: nn.Module, size: int) -> Iterator[Container]:
    """The containers of so many modules with parameters of their own."""
    for name, part in named_modules(module):
        if not isinstance(part, _LISTS):
            continue
        held = {
            key: list(child.parameters())
            for key, child in part._modules.items()
            if child is not None
        }
        keys = tuple(key for key, own in held.items() if own)
        apart = {id(parameter) for own in held.values() for parameter in own}
        if len(keys) == size and len(apart) == sum(map(len, held.values())):
            yield Container(name, keys)


def _scoring(module: nn.Module, size: int) -> Iterator[str]:
    """The weights of layers with an output for every expert: some run in training alone."""
    inside = tuple(f"{container.name}." for container in _containers(module, size))
    for name, part in named_modules(module):
        own = type(part) in _WIDTHS and not f"{name}.".startswith(inside or "\0")
        weight = part._parameters.get("weight") if own else None
        if weight is not None and weight.shape[0] == size:
            yield f"{name}.weight".lstrip(".")


def _described(
    module: nn.Module, routers: dict[str, int], size: int, added: set[str]
) -> ExpertsPlan:
    """What belongs to the experts of a mixture."""
    containers = tuple(_containers(module, size))
    inside = tuple(f"{container.name}." for container in containers)
    tensors = {n: t for n, t in held_tensors(module) if not n.startswith(inside or "\0")}
    owners = {name.rpartition(".")[0] for name in routers}
    stacks = {name.rpartition(".")[0] for name, t in tensors.items() if _is_stack(t, size)}
    slices = dict(routers)
    for name, tensor in tensors.items():
        owner = name.rpartition(".")[0]
        if name in slices or size not in tensor.shape:
            continue
        scored = owner in {"", *stacks} or any(covers(router, owner) for router in owners)
        rows = _is_stack(tensor, size) or (owner in stacks and owner not in owners)
        if _is_vector(tensor) and scored:
            slices[name] = tensor.shape.index(size)
        elif rows and tensor.shape[0] == size:
            slices[name] = 0
    scores = tuple(sorted(name for name in slices if name in added))
    return ExpertsPlan(
        "", tuple(routers), size, tuple(range(size)), tuple(slices.items()), scores, containers
    )


def _is_vector(tensor: Tensor) -> bool:
    return tensor.dim() > 0 and max(tensor.shape) == tensor.numel()


def _is_stack(tensor: Tensor, size: int) -> bool:
    return tensor.dim() > 2 and tensor.shape[0] == size


def _numbers(module: nn.Module, plan: ExpertsPlan) -> list[Attribute]:
    """The attributes of a mixture that may say how many experts there are."""
    inside = tuple(f"{container.name}." for container in plan.containers)
    owners = {name.rpartition(".")[0] for name in plan.routers}
    found = []
    for name, part in named_modules(module):
        if name.startswith(inside or "\0"):
            continue
        width = next((width for kind, width in _WIDTHS.items() if type(part) is kind), None)
        for attribute, value in vars(part).items():
            if type(value) is not int or value != plan.size or not may_be_size(part, attribute):
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
    count = sum(tensors[name].numel() for name, _ in plan.slices if name in tensors)
    count += sum(
        p.numel() for c in plan.containers for p in module.get_submodule(c.name).parameters()
    )
    return count // plan.size
