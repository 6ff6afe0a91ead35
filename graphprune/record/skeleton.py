"""Copies of models without their weights, ready to be recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.ops.ids import Shape
from graphprune.record.attention import replace_attention
from graphprune.record.copying import copy_module
from graphprune.record.sizes import CONTAINERS, Attribute, Size
from graphprune.record.tensors import named_modules

_BOOKKEEPING = frozenset(vars(nn.Module()))  # what every module holds
_DEPTH = 3  # of containers inside containers
_AS_THEY_ARE: Mapping[int, Shape] = {}


def skeleton(model: nn.Module, device: str) -> nn.Module:
    """A copy without weights on ``meta`` (with weights for any other device), ready to record."""
    return marked(without_weights(model) if device == "meta" else _with_weights(model))


def marked(clone: nn.Module) -> nn.Module:
    """A copy in which every int that a module remembers knows whose it is."""
    for name, module in named_modules(clone):
        replace_attention(module)
        state = vars(module)
        for key in state.keys() - _BOOKKEEPING:
            if type(state[key]) is int or type(state[key]) in CONTAINERS:
                state[key] = _marked(state[key], Attribute(name, key))
    return clone


def _marked(value: Any, place: Attribute) -> object:
    """An attribute with sizes in the place of its ints; dictionaries and lists stay themselves."""
    if type(value) is int:
        return Size(value, Attribute(place.module, place.name, place.path, value))
    if type(value) not in CONTAINERS:
        return value
    named = isinstance(value, dict)
    keys = [*value] if named else range(len(value))
    if len(place.path) > _DEPTH or not all(isinstance(key, int | str) for key in keys):
        return value
    items = {key: _marked(value[key], replace(place, path=(*place.path, key))) for key in keys}
    if all(items[key] is value[key] for key in keys):
        return value
    if named:
        value.update(items)
    elif isinstance(value, list):
        value[:] = items.values()
    else:
        return type(value)(items.values())
    return value


def without_weights(model: nn.Module, shapes: Mapping[int, Shape] = _AS_THEY_ARE) -> nn.Module:
    """A copy on ``meta``.

    Args:
        model: what to copy.
        shapes: of tensors that get another one, by their ``id``.
    """

    def empty(tensor: Tensor) -> Tensor:
        shape = shapes.get(id(tensor))
        if shape is None:
            return torch.empty_like(tensor.detach(), device="meta")
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    return _copied(model, empty)


def _with_weights(model: nn.Module) -> nn.Module:
    return _copied(model, lambda tensor: tensor.detach().clone())


def _copied(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a model with something else in the place of every tensor."""
    memo: dict[int, object] = {}
    for _, module in named_modules(model):
        members = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in members:
            if not isinstance(tensor, Tensor) or id(tensor) in memo:
                continue
            copied = change(tensor)
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = copied
    return copy_module(model, memo)
