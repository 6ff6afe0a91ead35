"""The tensors of a model by name, and copies of models without their weights."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.ops.ids import Shape
from graphprune.record.attention import replace_attention
from graphprune.record.copying import copy_module
from graphprune.record.sizes import CONTAINERS, Attribute, Size

_BOOKKEEPING = frozenset(vars(nn.Module()))  # what every module holds
_DEPTH = 3  # of containers inside containers


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` yields, without its nested generators."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    waiting: list[tuple[str, nn.Module | None]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        if module._modules:
            prefix = f"{name}." if name else ""
            waiting += [(prefix + key, child) for key, child in module._modules.items()][::-1]
    return found


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, tied ones once, by their first name."""
    seen: set[int] = set()
    modules = named_modules(model)
    for members in ("_parameters", "_buffers"):
        for prefix, module in modules:
            for name, tensor in vars(module)[members].items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield (f"{prefix}.{name}" if prefix else name), tensor


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes: tables of positions, say."""
    seen: set[int] = set()
    for name, tensor in named_tensors(model):
        seen.add(id(tensor))
        yield name, tensor
    for prefix, module in named_modules(model):
        for name, tensor in vars(module).items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen and _is_made(module, name):
                seen.add(id(tensor))
                yield (f"{prefix}.{name}" if prefix else name), tensor


def _is_made(module: nn.Module, name: str) -> bool:
    """Whether a tensor was put there once: hooks compute others anew from parameters."""
    tensor = vars(module)[name]
    sources = any(known.startswith(f"{name}_") for known in module._parameters)
    return tensor.is_leaf and tensor.layout is torch.strided and not sources


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


def shared_by_modules(model: nn.Module) -> frozenset[str]:
    """The tensors that several modules hold, by first name; not those of one module with two."""
    members = ("_parameters", "_buffers")
    holders = Counter(
        id(tensor)
        for _, module in named_modules(model)
        for tensors in (vars(module)[name] for name in members)
        for tensor in tensors.values()
        if tensor is not None
    )
    return frozenset(name for name, tensor in named_tensors(model) if holders[id(tensor)] > 1)


def skeleton(model: nn.Module, device: str) -> nn.Module:
    """A copy without weights on ``meta`` (with weights for any other device), ready to record."""
    clone = without_weights(model) if device == "meta" else _with_weights(model)
    for name, module in named_modules(clone):
        replace_attention(module)
        state = vars(module)
        for key in state.keys() - _BOOKKEEPING:
            state[key] = _marked(state[key], Attribute(name, key))
    return clone


def _marked(value: Any, place: Attribute) -> Any:
    """An attribute with sizes in the place of its ints; dictionaries and lists stay themselves."""
    if type(value) is int:
        return Size(value, replace(place, value=value))
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


def without_weights(model: nn.Module, shapes: Mapping[str, Shape] | None = None) -> nn.Module:
    """A copy on ``meta``.

    Args:
        model: what to copy.
        shapes: of parameters and buffers that get another one, by name.
    """
    named = dict(held_tensors(model)) if shapes else {}
    other = {id(named[name]): shape for name, shape in (shapes or {}).items()}

    def empty(tensor: Tensor) -> Tensor:
        shape = other.get(id(tensor))
        if shape is None:
            return torch.empty_like(tensor.detach(), device="meta")
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    return _copied(model, empty)


def _with_weights(model: nn.Module) -> nn.Module:
    return _copied(model, lambda tensor: tensor.detach().clone())


def _copied(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a model with something else in the place of every tensor."""
    memo: dict[int, Any] = {}
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


def mark(model: nn.Module | Mapping[str, Tensor]) -> float:
    """A number that tells the weights of two models apart, the same in every precision."""
    total = squares = 0.0
    named = named_tensors(model) if isinstance(model, nn.Module) else model.items()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        step = tensor.numel() // 4096 + 1
        part = tensor.detach().reshape(-1)[::step].to("cpu", torch.float64)
        part = part[part.isfinite()]
        start = int(hashlib.sha256(name.encode()).hexdigest()[:4], 16)
        total += float((part * (start + torch.arange(len(part))).sin()).sum())
        squares += float(part.square().sum())
    return float(total / (squares**0.5 or 1.0))
