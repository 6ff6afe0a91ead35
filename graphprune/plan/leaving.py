"""Modules that leave by a plan: which these are, what stays, and what that is called then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from graphprune.plan.changes import ExpertsPlan, StandIn
from graphprune.record.tensors import held_tensors, named_modules

T = TypeVar("T")
# The fields of changes that hold names of modules and tensors; these hold none.
_NAMES = frozenset(
    {"name", "tensor", "module", "mask", "mixture", "routers", "slices", "added", "layers", "like"}
)
_OTHERS = frozenset({"kept", "values", "factors", "sources", "path", "keys", "site", "notes"})


class Leaving(Protocol):
    """What of a plan says which modules leave."""

    @property
    def stand_ins(self) -> tuple[StandIn, ...]:
        """What takes the place of modules."""

    @property
    def experts(self) -> tuple[ExpertsPlan, ...]:
        """Which experts stay."""


def leaves_modules(plan: Leaving) -> bool:
    """Whether any module leaves."""
    return bool(plan.stand_ins or any(change.containers for change in plan.experts))


def gone_modules(model: nn.Module, plan: Leaving) -> list[nn.Module]:
    """The modules that leave: those that something stands in for, and experts of containers."""
    found = [model.get_submodule(stand_in.module) for stand_in in plan.stand_ins]
    for change in plan.experts:
        for container in change.containers:
            keys = container.of(change.gone)
            found += [model.get_submodule(f"{container.name}.{key}") for key in keys]
    return found


def left_of(model: nn.Module, plan: Leaving) -> tuple[set[str], set[str]]:
    """The names of modules and of tensors that stay when modules have left."""
    gone = {id(module) for module in gone_modules(model, plan)}
    names = {id(module): name for name, module in named_modules(model)}
    modules: set[str] = set()
    seen: set[int] = set()
    held: set[int] = set()
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in seen or id(module) in gone:
            continue
        seen.add(id(module))
        modules.add(names[id(module)])
        held |= {id(value) for value in _values(module) if isinstance(value, Tensor)}
        waiting += [child for child in module._modules.values() if child is not None]
    return modules, {name for name, tensor in held_tensors(model) if id(tensor) in held}


def _values(module: nn.Module) -> list[object]:
    state = vars(module)
    return [*state["_parameters"].values(), *state["_buffers"].values(), *state.values()]


def in_what_left(model: nn.Module, plan: Leaving) -> Callable[[str], bool]:
    """Tells of every name in a ``state_dict`` whether it lies in a module that leaves."""
    gone = {id(module) for module in gone_modules(model, plan)}
    named = model.named_modules(remove_duplicate=False) if gone else ()
    prefixes = tuple(f"{name}." for name, module in named if id(module) in gone)
    return lambda name: name.startswith(prefixes)


def names_after(plan: Leaving) -> Callable[[str], str]:
    """What a module or tensor that stays is called in the small model."""
    return _renaming({old: new for change in plan.experts for old, new in change.moved()})


def names_before(plan: Leaving) -> Callable[[str], str]:
    """What a module or tensor of the small model was called in the original."""
    return _renaming({new: old for change in plan.experts for old, new in change.moved()})


def _renaming(names: Mapping[str, str]) -> Callable[[str], str]:
    names = {old: new for old, new in names.items() if old != new}

    def name_of(name: str) -> str:
        parts = name.split(".") if names else ()
        for count in range(len(parts), 0, -1):
            known = names.get(".".join(parts[:count]))
            if known is not None:
                return ".".join([known, *parts[count:]])
        return name

    return name_of


def renamed(record: T, name_of: Callable[[str], str]) -> T:
    """A plan or a change in it with other names of modules and tensors.

    Args:
        record: what is not touched.
        name_of: the other name.
    """
    return _renamed(record, name_of, named=False)


def _renamed(value: Any, name_of: Callable[[str], str], named: bool) -> Any:
    if isinstance(value, str):
        return name_of(value) if named else value
    if isinstance(value, tuple):
        return tuple(_renamed(item, name_of, named) for item in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    found = {
        field.name: _renamed(getattr(value, field.name), name_of, field.name in _NAMES)
        for field in fields(value)
        if field.name not in _OTHERS
    }
    return replace(value, **found)
