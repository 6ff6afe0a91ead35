"""Results of ops on ``meta``, where torch's own kernels take up to a millisecond."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphprune.ops.values import FLOATING


def made(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of another shape, without values."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)


def unary_meta(x: Tensor, *args: object, **kwargs: object) -> object:
    """Floating point, of the same shape."""
    if x.dtype not in FLOATING or any(isinstance(arg, Tensor) for arg in args):
        return NotImplemented
    return x.clone()  # on meta by far the quickest


def in_place_meta(x: Tensor, *args: object, **kwargs: object) -> object:
    """Floating point, of the same shape."""
    if x.dtype not in FLOATING or any(isinstance(arg, Tensor) for arg in args):
        return NotImplemented
    return x


def softmax_meta(x: Tensor, dim: int, *options: object, **named: object) -> object:
    """Floating point, of the same shape and dtype."""
    plain = x.dtype in FLOATING and x.is_contiguous()
    if not plain or any(options) or any(named.values()):
        return NotImplemented
    return made(x, x.shape)


def binary_meta(x: object, y: object, *args: object, **kwargs: object) -> object:
    """Floating point, of one dtype; memory in the order of the dimensions."""
    if args or kwargs or not isinstance(x, Tensor) or x.dtype not in FLOATING or not x.dim():
        return NotImplemented
    if type(y) in (int, float):
        return x.clone() if _in_order(x) else NotImplemented
    if not isinstance(y, Tensor) or y.dtype is not x.dtype or not y.dim():
        return NotImplemented
    if x.shape == y.shape and x.stride() == y.stride():
        return x.clone()
    shape = _broadcast(x.shape, y.shape)
    return made(x, shape) if shape and _in_order(x) and _in_order(y) else NotImplemented


def binary_in_place_meta(x: Tensor, y: object, *args: object, **kwargs: object) -> object:
    """Floating point, of one dtype."""
    if args or kwargs or x.dtype not in FLOATING:
        return NotImplemented
    number = type(y) in (int, float)
    fits = isinstance(y, Tensor) and x.dtype is y.dtype and _broadcast(x.shape, y.shape) == x.shape
    return x if number or fits else NotImplemented


def _broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of both together; ``None`` where they do not fit."""
    ndim = max(len(a), len(b))
    a, b = (1,) * (ndim - len(a)) + tuple(a), (1,) * (ndim - len(b)) + tuple(b)
    if all(m == n or 1 in (m, n) for m, n in zip(a, b)):
        return tuple(n if m == 1 else m for m, n in zip(a, b))
    return None


def _in_order(x: Tensor) -> bool:
    """Whether steps in memory shrink from each dimension to the next, as in a contiguous tensor."""
    if x.is_contiguous():
        return True
    steps = [step for size, step in zip(x.shape, x.stride()) if size != 1]
    return all(one > other for one, other in zip(steps, [*steps[1:], 0]))
