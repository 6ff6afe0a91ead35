"""Arguments to try an op with: every declaration brings its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Draw = Callable[[torch.Generator, tuple[int, ...]], Tensor]


def _real(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Of both signs; never near zero, so that quotients can be compared."""
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn + drawn.sgn() * 0.1


@dataclass(frozen=True)
class Random:
    """Stands for a random tensor: one that has channels in all its dimensions."""

    shape: tuple[int, ...]
    draw: Draw = _real


@dataclass(frozen=True)
class Length:
    """Stands for a size of a tensor among the arguments, which torch takes from it."""

    place: int
    dim: int


@dataclass(frozen=True)
class Sample:
    """Arguments of an op, with a :class:`Random` for every tensor that has channels."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    @property
    def leaves(self) -> list[Any]:
        """The arguments one by one, those in lists as well."""
        return pytree.tree_leaves((list(self.args), self.kwargs))

    def made(self, seed: int = 0) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with tensors drawn."""
        generator = torch.Generator().manual_seed(seed)
        return self.filled(lambda part: self._drawn(part, generator))

    def filled(self, make: Callable[[Any], Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with something else for every tensor; lengths are measured then."""
        args: Any
        args, kwargs = pytree.tree_map_only((Random, Tensor), make, (list(self.args), self.kwargs))
        measured: Any = pytree.tree_map_only(
            Length, lambda size: args[size.place].shape[size.dim], (args, kwargs)
        )
        return measured[0], measured[1]

    def _drawn(self, part: object, generator: torch.Generator) -> object:
        if isinstance(part, Random):
            part = part.draw(generator, part.shape)
            return part.to(self.dtype) if part.dtype is torch.float64 else part
        return part

    def single(self) -> Sample:
        """In single precision, where torch has kernels for that alone."""
        return replace(self, dtype=torch.float32)


def of(*args: object, **kwargs: object) -> Sample:
    """A sample; a tuple of ints stands for a random tensor of that shape.

    Example:
        >>> from graphprune.ops.samples import of
        >>> arguments, named = of((2, 3), [1], keepdim=True).made()
        >>> arguments[0].shape, arguments[1], named
        (torch.Size([2, 3]), [1], {'keepdim': True})
    """
    return Sample(tuple(map(_random, args)), {key: _random(arg) for key, arg in kwargs.items()})


def _random(arg: object) -> object:
    if isinstance(arg, list):
        return [_random(part) for part in arg]
    return Random(arg) if isinstance(arg, tuple) else arg


def bits(*shape: int) -> Random:
    """A random mask."""
    return Random(shape, lambda generator, size: _real(generator, size) > 0)


def pairs(*shape: int) -> Random:
    """Random complex numbers."""
    return Random(shape, lambda generator, size: _real(generator, size) + 1j)


def positive(*shape: int) -> Random:
    """Positive numbers."""
    return Random(shape, lambda generator, size: _real(generator, size).abs())


def shares(*shape: int) -> Random:
    """Numbers between 0 and 1."""
    return Random(shape, lambda generator, size: _real(generator, size).sigmoid())


def rows(*shape: int) -> Random:
    """A matrix of equal rows."""
    return Random(shape, lambda generator, size: _real(generator, size)[..., :1, :].expand(size))


def places(below: int, *shape: int) -> Random:
    """Different places along the last dimension, each below a number."""

    def draw(generator: torch.Generator, size: tuple[int, ...]) -> Tensor:
        return _real(generator, (*size[:-1], below)).argsort(-1)[..., : size[-1]]

    return Random(shape, draw)
