"""The modules and tensors of a model by name, and what tells one model from another."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.ops.ids import Shape

_ATOMS = {int, bool, str, dict, OrderedDict, tuple, type(None)}  # most of what modules hold
Modules = list[tuple[str, nn.Module]]


def named_modules(model: nn.Module) -> Modules:
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
    return _named_tensors(named_modules(model))


def _named_tensors(modules: Modules) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for members in ("_parameters", "_buffers"):
        for prefix, module in modules:
            for name, tensor in vars(module)[members].items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield (f"{prefix}.{name}" if prefix else name), tensor


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes: tables of positions, say."""
    seen: set[int] = set()
    modules = named_modules(model)
    for name, tensor in _named_tensors(modules):
        seen.add(id(tensor))
        yield name, tensor
    for prefix, module in modules:
        for name, tensor in vars(module).items():
            if type(tensor) in _ATOMS or not isinstance(tensor, Tensor):
                continue
            if id(tensor) not in seen and _is_made(module, name):
                seen.add(id(tensor))
                yield (f"{prefix}.{name}" if prefix else name), tensor


def shapes_in(values: object) -> list[Shape]:
    """The shapes of the tensors in what is passed to a module, and from it."""
    with torch._C.DisableTorchFunction():
        return [tuple(tensor.shape) for tensor in _tensors_in(values)]


def _tensors_in(values: object) -> Iterator[Tensor]:
    """The tensors in a tree, in the order of pytree; most are tuples of tensors."""
    if isinstance(values, Tensor):
        yield values
    elif type(values) in (tuple, list):
        for value in cast(list[object], values):
            yield from _tensors_in(value)
    elif values is not None and not (type(values) is dict and not values):
        yield from (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def objects_in(given: object) -> Iterator[object]:
    """What is no tensor, number or text among arguments: caches of keys and values, say."""
    if type(given) in (tuple, list):
        for part in cast(list[object], given):
            yield from objects_in(part)
    elif type(given) is dict:
        for part in cast(dict[str, object], given).values():
            yield from objects_in(part)
    elif given is not None and not isinstance(given, Tensor | int | float | str):
        yield given


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


def fingerprint(model: nn.Module) -> str:
    """A digest of the names and shapes of all parameters and buffers."""
    named = sorted(named_tensors(model), key=lambda item: item[0])
    text = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named)
    return hashlib.sha256(text.encode()).hexdigest()


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
