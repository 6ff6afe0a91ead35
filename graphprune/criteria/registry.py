"""The registry of criteria."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from graphprune.analysis import Group
from graphprune.errors import InputError

Criterion = Callable[[Group, Mapping[str, Tensor], torch.Generator], Tensor]
_REGISTRY: dict[str, Criterion] = {}


def register_criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Register a criterion under a name.

    A criterion is called with a group, all parameters and buffers by name, and a seeded
    generator; it returns one score per channel, high for important ones.

    Raises:
        KeyError: the name is taken.

    Example:
        >>> import torch
        >>> from graphprune.criteria import register_criterion
        >>> @register_criterion("first-channels")
        ... def first(group, tensors, generator):
        ...     return -torch.arange(float(group.size))
    """

    def decorate(criterion: Criterion) -> Criterion:
        if name in _REGISTRY:
            raise KeyError(f"criterion {name!r} is registered already")
        _REGISTRY[name] = criterion
        return criterion

    return decorate


def criteria() -> tuple[str, ...]:
    """The names of all registered criteria."""
    return tuple(sorted(_REGISTRY))


def scores(
    criterion: str | Criterion,
    groups: Sequence[Group],
    tensors: Mapping[str, Tensor],
    seed: int,
) -> dict[str, Tensor]:
    """The score of every channel, by group name, in float64 on the CPU.

    Raises:
        InputError: an unknown name, a criterion of the wrong shape, or a score that is not finite.
    """
    if isinstance(criterion, str):
        if criterion not in _REGISTRY:
            raise InputError(
                f"unknown criterion {criterion!r}; choose one of {', '.join(criteria())}, or pass "
                "a callable (group, tensors, generator) -> scores"
            )
        name, function = criterion, _REGISTRY[criterion]
    elif callable(criterion):
        name, function = getattr(criterion, "__name__", "criterion"), criterion
    else:
        raise InputError(f"criterion must be a name or a callable, not {type(criterion).__name__}")
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in groups:
        result = torch.as_tensor(function(group, tensors, generator))
        if tuple(result.shape) != (group.size,):
            raise InputError(
                f"criterion {name!r} returned shape {tuple(result.shape)} for group {group.name} "
                f"of {group.size} channels; return one score per channel"
            )
        score = result.detach().to("cpu", torch.float64)
        if not bool(score.isfinite().all()):
            raise InputError(
                f"criterion {name!r} is not finite for group {group.name} ({group.layers[0]}): "
                "look for NaN or infinite weights"
            )
        found[group.name] = score
    return found
