"""The tensors of a model by name, and copies of models without their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.copying import copy_module
from graphprune.sizes import Attribute, Size


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, tied ones once, by their first name."""
    seen: set[int] = set()
    modules = list(model.named_modules())
    for members in ("_parameters", "_buffers"):
        for prefix, module in modules:
            for name, tensor in vars(module)[members].items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield (f"{prefix}.{name}" if prefix else name), tensor


def aliases(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first name (tied parameters share it)."""
    first: dict[int, str] = {}
    names = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names[name] = first.setdefault(id(tensor), name)
    return names


def skeleton(model: nn.Module, device: str) -> nn.Module:
    """A copy without weights on ``meta`` (with weights for any other device)."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        members = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in members:
            if not isinstance(tensor, Tensor) or id(tensor) in memo:
                continue
            copied = tensor.detach()
            copied = torch.empty_like(copied, device="meta") if device == "meta" else copied.clone()
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = copied
    clone = copy_module(model, memo)
    for name, module in clone.named_modules():
        for key, value in vars(module).items():
            marked = _mark(value, Attribute(name, key))
            if marked is not value:
                vars(module)[key] = marked
    return clone


def _mark(value: Any, leaf: Attribute) -> Any:
    if type(value) is int:
        return Size(value, replace(leaf, value=value))
    if type(value) in (tuple, list, torch.Size) and value:
        if not all(type(item) is int for item in value):
            return value
        marked = [
            Size(item, Attribute(leaf.module, leaf.name, (index,), item))
            for index, item in enumerate(value)
        ]
        return type(value)(marked)
    return value
