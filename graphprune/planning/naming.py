"""Modules in options, in place of the glob patterns that name them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from torch import nn

from graphprune.errors import InputError
from graphprune.record.tensors import named_modules

T = TypeVar("T", bound=Mapping[str, Any])
_FOR_LAYERS = ("ratios", "min_kept", "max_kept")  # mappings from layers


def named(options: T, model: nn.Module) -> T:
    """Options with the patterns of the layers that they hold as modules.

    Args:
        options: of ``graph.plan``; ``keep`` may hold modules of the model, and ``ratios``,
            ``min_kept`` and ``max_kept`` may have them as keys.
        model: whose modules these are.

    Raises:
        InputError: a module is none of the model.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
        >>> named({"keep": [net[0], "1.1"], "ratios": {net[1]: 0.5}}, net)
        {'keep': ['0', '1.1'], 'ratios': {'1.*': 0.5}}
    """
    found: dict[str, Any] = dict(options)
    if "keep" in found:
        found["keep"] = patterns_of(found["keep"], model, "keep")
    for name in _FOR_LAYERS:
        given = found.get(name)
        if isinstance(given, Mapping) and any(isinstance(key, nn.Module) for key in given):
            found[name] = {
                pattern: value
                for key, value in given.items()
                for pattern in (_patterns(key, model, name) if _is_module(key) else [key])
            }
    return cast(T, found)


def patterns_of(keep: Any, model: nn.Module, option: str) -> Any:
    """What an option names, with patterns where it holds modules; else as it is."""
    if isinstance(keep, nn.Module):
        return _patterns(keep, model, option)
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        return keep
    items = list(keep)
    if not any(map(_is_module, items)):
        return items
    return [
        pattern
        for item in items
        for pattern in (_patterns(item, model, option) if _is_module(item) else [item])
    ]


def _is_module(item: object) -> bool:
    return isinstance(item, nn.Module)


def _patterns(module: nn.Module, model: nn.Module, option: str) -> list[str]:
    """The layers of a module: itself where it has parameters, and all inside."""
    name = next((name for name, other in named_modules(model) if other is module), None)
    if name is None:
        raise InputError(
            f"{option} holds a {type(module).__name__} that is no module of this model, but "
            "perhaps of a copy of it: pass a module of the model, or its name, such as "
            f'{option}=["layer1.*"]'
        )
    if not name:
        return ["*"]
    name = re.sub(r"([*?[])", r"[\1]", name)  # as it stands
    inside = any(True for child in module.children() for _ in child.parameters())
    own = any(value is not None for value in module._parameters.values())
    return [*([name] if own or not inside else []), *([f"{name}.*"] if inside else [])]
