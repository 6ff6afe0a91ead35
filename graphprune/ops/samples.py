"""Arguments to try an op with: every declaration brings its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Random:
    """Stands for a random tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    positive: bool = False

    def made(self, generator: torch.Generator) -> Tensor:
        """Of both signs; never near zero, so that quotients and roots can be compared."""
        real = torch.float64 if self.dtype is torch.bool else self.dtype
        drawn = torch.randn(self.shape, generator=generator, dtype=real)
        if self.dtype is torch.bool:
            return drawn > 0
        return drawn.abs() + 0.1 if self.positive else drawn + drawn.sgn() * 0.1


@dataclass(frozen=True)
class Sample:
    """Arguments of an op, with a :class:`Random` for every tensor that has channels."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def made(self, seed: int = 0) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with tensors drawn."""
        generator = torch.Generator().manual_seed(seed)
        made: Any = pytree.tree_map_only(
            Random, lambda part: part.made(generator), ([*self.args], self.kwargs)
        )
        return made[0], made[1]


def of(*args: Any, **kwargs: Any) -> Sample:
    """A sample; a tuple of ints stands for a random tensor of that shape.

    Example:
        >>> from graphprune.ops.samples import of
        >>> arguments, named = of((2, 3), [1], keepdim=True).made()
        >>> arguments[0].shape, arguments[1], named
        (torch.Size([2, 3]), [1], {'keepdim': True})
    """
    return Sample(tuple(map(_random, args)), {key: _random(arg) for key, arg in kwargs.items()})


def _random(arg: Any) -> Any:
    if isinstance(arg, list):
        return [_random(part) for part in arg]
    return Random(arg) if isinstance(arg, tuple) else arg


def bits(*shape: int) -> Random:
    """A random mask."""
    return Random(shape, torch.bool)


def pairs(*shape: int) -> Random:
    """Random complex numbers."""
    return Random(shape, torch.complex128)
