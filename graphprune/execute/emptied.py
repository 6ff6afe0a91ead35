"""Modules that leave whole: what takes their place, and what of a plan is then left to do."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.plan.changes import StandIn
from graphprune.plan.leaving import gone_modules, left_of
from graphprune.plan.plan import Plan
from graphprune.record.tensors import named_modules

_PLAIN = (int, float, str, bool, tuple, type(None))
_BOOKKEEPING = frozenset(vars(nn.Module()))


class Emptied(nn.Module):
    """In the place of a module that left: takes the same arguments and hands one of them on.

    It has the plain attributes of the module that left, as code around it may read them.

    Example:
        >>> import torch
        >>> from graphprune.execute.emptied import Emptied
        >>> from graphprune.plan.changes import StandIn
        >>> layer = Emptied(torch.nn.Linear(4, 4), StandIn("0", ("args.0",)))
        >>> layer(torch.ones(2)), layer.in_features
        (tensor([1., 1.]), 4)
    """

    def __init__(self, left: nn.Module, stand_in: StandIn) -> None:
        super().__init__()
        self.stood, self.gives, self.holder = type(left).__name__, stand_in.gives, stand_in.holder
        self.names = _parameters(left)
        for name, value in vars(left).items():
            if name not in _BOOKKEEPING and name not in vars(self) and isinstance(value, _PLAIN):
                setattr(self, name, value)
        self.train(left.training)

    def forward(self, *args: object, **kwargs: object) -> Any:
        """What the module that left would hand on."""
        items = [self._item(text, args, kwargs) for text in self.gives]
        if not self.holder:
            return items[0]
        return tuple(items) if self.holder == "tuple" else items

    def _item(self, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if text == "none":
            return None
        if text in ("empty", "zero"):
            like, shape = _tensor((args, kwargs)), (0,) if text == "empty" else ()
            return torch.zeros(shape) if like is None else like.new_zeros(shape)
        if text.startswith("zeros "):
            way, _, dims = text.removeprefix("zeros ").partition(" in ")
            like = self._given(way, args, kwargs)
            if not dims:
                return torch.zeros_like(like)
            known = {int(dim) for dim in dims.split(",")}
            return like.new_zeros([n if dim in known else 1 for dim, n in enumerate(like.shape)])
        if text.startswith("none of "):
            way, _, dims = text.removeprefix("none of ").partition(" in ")
            like = self._given(way, args, kwargs)
            for dim in map(int, dims.split(",")):
                like = like.narrow(dim, 0, 0)
            return like
        return self._given(text, args, kwargs)

    def _given(self, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An argument, given by place or by name."""
        kind, first, *rest = text.split(".")
        if kind == "args":
            place = int(first)
            value = args[place] if place < len(args) else kwargs[self.names[place]]
        else:
            value = kwargs[first] if first in kwargs else args[self.names.index(first)]
        for key in rest:
            value = value[int(key) if isinstance(value, tuple | list) else key]
        return value

    def extra_repr(self) -> str:
        """What stood here."""
        return f"was {self.stood}"


def _parameters(module: nn.Module) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # no signature to be had
        return ()


def _tensor(tree: object) -> Tensor | None:
    """The first tensor of nested arguments."""
    if isinstance(tree, Tensor):
        return tree
    items = tree.values() if isinstance(tree, dict) else tree
    found = map(_tensor, items if isinstance(items, tuple | list | type({}.values())) else ())
    return next((tensor for tensor in found if tensor is not None), None)


def empty(model: nn.Module, plan: Plan) -> None:
    """Put something small in the place of modules that leave, in place."""
    gone = stood_for(model, plan)
    for _, module in named_modules(model) if gone else ():
        for name, child in module._modules.items():
            if child is not None and id(child) in gone:
                module._modules[name] = gone[id(child)]


def move_up(model: nn.Module, plan: Plan) -> None:
    """Take experts out of their containers; those that stay take the first keys."""
    for change in plan.experts:
        for container in change.containers:
            held = model.get_submodule(container.name)._modules
            modules = [held[key] for key in container.of(change.kept)]
            held.update(zip(container.keys, modules))
            for key in container.keys[len(modules) :]:
                del held[key]


def stood_for(model: nn.Module, plan: Plan) -> dict[int, nn.Module]:
    """What takes the place of modules that leave, by their ``id``: of experts for a moment."""
    found: dict[int, nn.Module] = {id(gone): nn.Identity() for gone in gone_modules(model, plan)}
    modules = dict(named_modules(model)) if plan.stand_ins else {}
    for stand_in in plan.stand_ins:
        module = modules[stand_in.module]
        found[id(module)] = Emptied(module, stand_in)
    return found


def remaining(model: nn.Module, plan: Plan) -> Plan:
    """What a plan changes in the modules that stay."""
    modules, tensors = left_of(model, plan)
    return replace(
        plan,
        slots=tuple(slot for slot in plan.slots if slot.tensor in tensors),
        sizes=tuple(change for change in plan.sizes if change.module in modules),
        literals=tuple(change for change in plan.literals if change.module in modules),
        indices=tuple(change for change in plan.indices if change.tensor in tensors),
        scales=tuple(change for change in plan.scales if change.tensor in tensors),
        norms=tuple(change for change in plan.norms if change.module in modules),
        biases=tuple(c for c in plan.biases if _owner(c.tensor) in modules),
        merges=tuple(change for change in plan.merges if change.tensor in tensors),
        zeroed=tuple(slot for slot in plan.zeroed if slot.tensor in tensors),
    )


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]
