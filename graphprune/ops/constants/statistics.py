"""Reductions, normalisation, pooling and resampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphprune.ops.constants.fact import Fact, Unfollowed, arguments, register_fact

aten = torch.ops.aten


def _dims(dim: Any, ndim: int) -> list[int]:
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(ndim))
    return [d % max(ndim, 1) for d in (dim if isinstance(dim, list | tuple) else [dim])]


def _any(unknown: Tensor, dims: list[int]) -> Tensor:
    """Whether anything along ``dims`` is unknown; the dimensions stay, with size 1."""
    for dim in dims:
        unknown = unknown.any(dim, keepdim=True)
    return unknown


@register_fact(
    aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.var, aten.std, aten.var_mean,
    aten.std_mean, aten.linalg_vector_norm, aten.norm, aten.logsumexp, aten.prod, aten.any,
    aten.all, aten.argmax, aten.argmin,
)  # fmt: skip
def reduced(op: Any, x: Fact, *args: Any, **kwargs: Any) -> Any:
    """Known where all that goes into it is known."""
    bound = arguments(op, (x, *args), kwargs)
    if any(isinstance(value, Fact) for value in (*args, *kwargs.values())):
        raise Unfollowed("the larger of two tensors")
    dims = _dims(bound.get("dim"), x.value.dim())
    unknown = _any(x.unknown, dims)
    out = op(x.filled(), *args, **kwargs)
    if isinstance(out, Tensor):
        return Fact.checked(out, unknown.reshape(out.shape))
    return [Fact.checked(part, unknown.reshape(part.shape)) for part in out]


@register_fact(aten._softmax, aten._log_softmax, aten._safe_softmax, aten.cumsum, aten.cumprod)
def along(op: Any, x: Fact, dim: int, *args: Any, **kwargs: Any) -> Fact:
    """Every position depends on all others along a dimension."""
    out = op(x.filled(), dim, *args, **kwargs)
    return Fact.checked(out, _any(x.unknown, [dim]).expand(out.shape).clone())


def _vector(fact: Fact | None, ndim: int) -> Fact | None:
    """A vector of one entry per channel, shaped to broadcast."""
    if fact is None:
        return None
    shape = (1, -1, *[1] * (ndim - 2))
    return Fact(fact.value.reshape(shape), fact.unknown.reshape(shape))


def _affine(normed: Tensor, unknown: Tensor, weight: Fact | None, bias: Fact | None) -> Fact:
    """``normed * weight + bias``; a weight of zero leaves only the bias."""
    if weight is not None:
        unknown = (unknown & weight.nonzero) | weight.unknown
        normed = (normed * weight.value).masked_fill(weight.zero, 0)
    if bias is not None:
        normed, unknown = normed + bias.value, unknown | bias.unknown
    return Fact.checked(normed, unknown.expand(normed.shape).clone())


@register_fact(
    aten.native_batch_norm, aten.cudnn_batch_norm, aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training, aten._batch_norm_no_update,
)  # fmt: skip
def batch_norm(op: Any, *args: Any, **kwargs: Any) -> list[Fact]:
    """Channel by channel; statistics of the batch are known where the whole channel is."""
    bound = arguments(op, args, kwargs)
    x, eps = bound["input"], bound.get("eps", bound.get("epsilon"))
    ndim = x.value.dim()
    weight, bias, mean, var = (
        _vector(bound.get(name), ndim) for name in ("weight", "bias", "running_mean", "running_var")
    )
    if bound.get("training") or mean is None or var is None:
        others = [dim for dim in range(ndim) if dim != 1]
        unknown = _any(x.unknown, others).expand(x.value.shape)
        values = x.filled()
        spread, centre = torch.var_mean(values, others, correction=0, keepdim=True)
    else:
        unknown = x.unknown | mean.unknown | var.unknown
        values, centre, spread = x.filled(), mean.value, var.value
    return [_affine((values - centre) * (spread + float(eps or 0)).rsqrt(), unknown, weight, bias)]


@register_fact(aten.native_layer_norm, aten._fused_rms_norm)
def layer_norm(
    op: Any, x: Fact, shape: Any, weight: Fact | None = None, *args: Any, **kwargs: Any
) -> list[Fact]:
    """Statistics over the last dimensions."""
    bias = args[0] if args and isinstance(args[0], Fact) else None
    rest = args[1:] if op.overloadpacket is aten.native_layer_norm else args
    dims = list(range(x.value.dim() - len(shape), x.value.dim()))
    unknown = _any(x.unknown, dims).expand(x.value.shape)
    nothing = (None, None) if op.overloadpacket is aten.native_layer_norm else (None,)
    normed = op(x.filled(), shape, *nothing, *rest, **kwargs)[0]
    return [_affine(normed, unknown, weight, bias)]


@register_fact(aten.native_group_norm)
def group_norm(
    op: Any, x: Fact, weight: Fact | None, bias: Fact | None,
    batch: int, channels: int, positions: int, groups: int, eps: float,
) -> list[Fact]:  # fmt: skip
    """Statistics over the channels of a group and all places."""
    unknown = _any(x.unknown.reshape(batch, groups, -1), [2])
    wide = unknown.expand(batch, groups, x.value[0].numel() // groups).reshape(x.value.shape)
    normed = op(x.filled(), None, None, batch, channels, positions, groups, eps)[0]
    ndim = x.value.dim()
    return [_affine(normed, wide, _vector(weight, ndim), _vector(bias, ndim))]


@register_fact(
    aten.avg_pool2d, aten.avg_pool3d, aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d,
    aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.adaptive_max_pool2d,
    aten.adaptive_max_pool3d, aten.upsample_linear1d, aten.upsample_bilinear2d,
    aten.upsample_trilinear3d, aten._upsample_bilinear2d_aa,
)  # fmt: skip
def pooled(op: Any, x: Fact, *args: Any, **kwargs: Any) -> Any:
    """Weights are never negative: what an unknown position reaches, a one reaches as well."""
    out = op(x.filled(), *args, **kwargs)
    marks = op(x.unknown.double(), *args, **kwargs)
    if isinstance(out, Tensor):
        return Fact.checked(out, marks > 0)
    unknown = marks[0] > 0
    return [Fact.checked(part, unknown.clone()) for part in out]


@register_fact(aten.upsample_bicubic2d, aten._upsample_bicubic2d_aa)
def resampled(op: Any, x: Fact, *args: Any, **kwargs: Any) -> Fact:
    """Weights of both signs: a map is known when all of it is."""
    out = op(x.filled(), *args, **kwargs)
    return Fact.checked(out, _any(x.unknown, [2, 3]).expand(out.shape).clone())
