"""Fast shape functions for ops whose own meta kernels take up to a millisecond in Python.

They only make an empty result; whenever the arguments are not of the plain form expected here,
torch's own kernel runs (and raises the errors it has for them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
ShapeFunction = Callable[..., Any]
_FLOATING = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


def _unary(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if x.dtype not in _FLOATING or any(isinstance(arg, Tensor) for arg in args):
        return NotImplemented
    return torch.empty_like(x)


def _in_place(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if x.dtype not in _FLOATING or any(isinstance(arg, Tensor) for arg in args):
        return NotImplemented
    return x


def _binary(x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or args or kwargs:
        return NotImplemented
    if x.dtype is not y.dtype or x.dim() != y.dim():
        return NotImplemented
    if x.shape == y.shape:
        return torch.empty_like(x) if x.stride() == y.stride() else NotImplemented
    plain = x.is_contiguous() and all(n in (1, m) for m, n in zip(x.shape, y.shape))
    return torch.empty_like(x) if plain else NotImplemented


def _binary_in_place(x: Tensor, y: Any, *args: Any, **kwargs: Any) -> Any:
    same = isinstance(y, Tensor) and x.shape == y.shape and x.dtype is y.dtype
    return x if same and not kwargs else NotImplemented


def _mean(x: Tensor, dim: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    if not dim or kwargs or x.dtype not in _FLOATING or not isinstance(dim, list | tuple):
        return NotImplemented
    gone = {d % x.dim() for d in dim}
    shape = [1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone]
    return x.new_empty(shape) if len(gone) == len(dim) else NotImplemented


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *args: Any
) -> Any:
    channels = x.shape[1] if x.dim() > 1 else -1
    for vector in (weight, bias, mean, var):
        if vector is not None and tuple(vector.shape) != (channels,):
            return NotImplemented
    saved = x.new_empty(channels if training else 0)
    return torch.empty_like(x), saved, saved


def _layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    dims = len(shape)
    if not x.is_contiguous() or list(x.shape[x.dim() - dims :]) != list(shape):
        return NotImplemented
    for affine in (weight, bias):
        if affine is not None and list(affine.shape) != list(shape):
            return NotImplemented
    saved = x.new_empty((*x.shape[: x.dim() - dims], *[1] * dims))
    return torch.empty_like(x), saved, saved


def _group_norm(
    x: Tensor, weight: Any, bias: Any, batch: int, channels: int, positions: int, groups: int,
    eps: float,
) -> Any:  # fmt: skip
    if not x.is_contiguous() or x.shape[1] != channels or channels % groups:
        return NotImplemented
    for affine in (weight, bias):
        if affine is not None and tuple(affine.shape) != (channels,):
            return NotImplemented
    saved = x.new_empty((batch, groups))
    return torch.empty_like(x), saved, saved


def _addmm(bias: Tensor, left: Tensor, right: Tensor, **kwargs: Any) -> Any:
    plain = not kwargs and bias.dim() == 1 and left.dim() == right.dim() == 2
    if not plain or left.shape[1] != right.shape[0] or bias.shape[0] != right.shape[1]:
        return NotImplemented
    if not left.dtype is right.dtype is bias.dtype:
        return NotImplemented
    return left.new_empty((left.shape[0], right.shape[1]))


def _linear(x: Tensor, weight: Tensor, bias: Any = None) -> Any:
    plain = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1]
    plain = plain and x.dtype is weight.dtype
    if bias is not None:
        plain = plain and tuple(bias.shape) == (weight.shape[0],) and bias.dtype is x.dtype
    return x.new_empty((*x.shape[:-1], weight.shape[0])) if plain else NotImplemented


def _matmul(left: Tensor, right: Tensor) -> Any:
    if left.dim() < 2 or right.dim() < 2 or left.dtype is not right.dtype:
        return NotImplemented
    if left.shape[-1] != right.shape[-2]:
        return NotImplemented
    batch = left.shape[:-2]
    if batch != right.shape[:-2]:
        batch = torch.broadcast_shapes(batch, right.shape[:-2])
    return left.new_empty((*batch, left.shape[-2], right.shape[-1]))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *args: Any, **kwargs: Any
) -> Any:
    if not query.dim() == key.dim() == value.dim() > 3 or key.shape[:-1] != value.shape[:-1]:
        return NotImplemented
    if query.shape[-1] != key.shape[-1] or query.shape[:-3] != key.shape[:-3]:
        return NotImplemented
    heads, served = query.shape[-3], key.shape[-3]
    if heads != served and (not kwargs.get("enable_gqa") or heads % served):
        return NotImplemented
    mask = kwargs.get("attn_mask", mask)
    scores = (*query.shape[:-1], key.shape[-2])
    if mask is not None and torch.broadcast_shapes(mask.shape, scores) != scores:
        return NotImplemented
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


FUNCTIONS: dict[Any, ShapeFunction] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.addmm.default: _addmm,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.scaled_dot_product_attention.default: _attention,
    aten.add.Tensor: _binary,
    aten.mul.Tensor: _binary,
    aten.add_.Tensor: _binary_in_place,
    aten.mul_.Tensor: _binary_in_place,
    aten.mean.dim: _mean,
    **{
        getattr(aten, name).default: _unary
        for name in ("relu", "hardtanh", "hardswish", "hardsigmoid", "gelu", "leaky_relu", "elu",
                     "sigmoid", "tanh", "silu")
    },
    **{
        getattr(aten, name).default: _in_place
        for name in ("relu_", "sigmoid_", "tanh_", "hardtanh_", "hardswish_", "hardsigmoid_",
                     "leaky_relu_", "elu_", "silu_")
    },
}  # fmt: skip


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an op on meta tensors."""
    shape = FUNCTIONS.get(func)
    if shape is not None:
        out = shape(*args, **kwargs)
        if out is not NotImplemented:
            return out
    return func(*args, **kwargs)
