"""LayerNorm and GroupNorm over channels of which some have left, as if these were zero.

With k of n numbers given and the others zero, ``mean = sum(x) / n`` and
``var = sum(x ** 2) / n - mean ** 2``. That difference loses few digits: at least the part
``(n - k) / n`` of the mean square is variance, as the zeroes are not at the mean. Where all n are
given it would lose more, and torch's own norms are the ones to use.

Sums leave out what has left, so that a norm that is cut once more needs no change: n stays that of
the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function

from graphprune.ops.batch_norm import affine_fact, vector_fact
from graphprune.ops.calls import Overload, args_of
from graphprune.ops.fact import Fact, along_unknown
from graphprune.ops.given import Given, Pruned
from graphprune.ops.ids import Layers
from graphprune.ops.normalisation import (
    channel_groups,
    groups_given,
    layer_norm_fact,
    normalised,
    shape_given,
)
from graphprune.ops.registry import declare as _declare
from graphprune.ops.registry import free, zeroes
from graphprune.ops.samples import of as sample_of
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk

declare = partial(_declare, macs=free)  # nothing is multiplied here
Parts = tuple[Tensor, Tensor, Tensor]  # the result, the mean, and one over the deviation
_NARROW = (torch.float16, torch.bfloat16)  # squares of what they hold may be too large for them


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    of: int,
) -> Tensor:
    """As ``torch.nn.functional.layer_norm`` over ``of`` numbers; those that are not given are zero.

    Args:
        input: ``[..., *normalized_shape]``.
        normalized_shape: the last dimensions, over which statistics are taken.
        weight: of the normalized shape, or ``None``.
        bias: of the normalized shape, or ``None``.
        eps: added to the variance.
        of: how many numbers the statistics are over, more than are given.

    Returns:
        The shape and dtype of the input.

    Example:
        >>> import torch
        >>> from graphprune.ops.exact_norms import layer_norm
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0]])
        >>> whole = torch.nn.functional.layer_norm(x, (5,))[:, :3]
        >>> torch.allclose(layer_norm(x[:, :3], (3,), of=5), whole)
        True
    """
    return layer_norm_parts(input, normalized_shape, weight, bias, eps, of)[0]


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    of: int,
) -> Tensor:
    """As ``torch.nn.functional.group_norm`` of groups of ``of`` channels, some of them zero.

    Args:
        input: ``[batch, channels, ...]``.
        num_groups: into how many equal groups the channels are divided.
        weight: one number for each channel, or ``None``.
        bias: one number for each channel, or ``None``.
        eps: added to the variance.
        of: how many channels each group has, more than are given.

    Returns:
        The shape and dtype of the input.

    Example:
        >>> import torch
        >>> from graphprune.ops.exact_norms import group_norm
        >>> x = torch.randn(2, 6, 5)
        >>> x[:, 2::3] = 0  # the last channel of both groups
        >>> kept = [0, 1, 3, 4]
        >>> whole = torch.nn.functional.group_norm(x, 2)[:, kept]
        >>> torch.allclose(group_norm(x[:, kept], 2, of=3), whole, atol=1e-6)
        True
    """
    return group_norm_parts(input, num_groups, weight, bias, eps, of)[0]


def layer_norm_parts(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    of: int,
) -> Parts:
    """The same with the mean and one over the deviation: what is recorded as one op."""
    tensors = (input, weight, bias)
    if has_torch_function(tensors):
        parts: Parts = handle_torch_function(
            layer_norm_parts, tensors, input, normalized_shape, weight, bias, eps, of
        )
        return parts
    return _layer_norm(input, normalized_shape, weight, bias, eps, of)


def group_norm_parts(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    of: int,
) -> Parts:
    """The same with the mean and one over the deviation: what is recorded as one op."""
    tensors = (input, weight, bias)
    if has_torch_function(tensors):
        parts: Parts = handle_torch_function(
            group_norm_parts, tensors, input, num_groups, weight, bias, eps, of
        )
        return parts
    return _group_norm(input, num_groups, weight, bias, eps, of)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, of: int
) -> Parts:
    dims, wide = [*range(-len(shape), 0)], _wide(x)
    mean, scale = _statistics(wide, dims, of, eps)
    out = (wide - mean) * scale  # torch is slow where two operands of three are one number a row
    if weight is not None:
        out = out * weight if bias is None else torch.addcmul(bias, out, weight)
    elif bias is not None:
        out = out + bias
    return out.to(x.dtype), mean, scale


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, of: int
) -> Parts:
    batch, channels, *places = x.shape
    wide = _wide(x)
    blocks = wide.reshape(batch, groups, -1)
    mean, scale = _statistics(blocks, [2], of * math.prod(places), eps)
    per_channel = (batch, groups, channels // groups)
    by_place = (batch, channels, *[1] * len(places))
    factor = scale.expand(per_channel).reshape(batch, channels)
    added = (-mean * scale).expand(per_channel).reshape(batch, channels)
    if weight is not None:
        factor, added = factor * weight, added * weight
    added = added if bias is None else added + bias
    out = wide * factor.reshape(by_place) + added.reshape(by_place)
    return out.to(x.dtype), mean, scale


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _NARROW else x


def _statistics(x: Tensor, dims: list[int], count: int, eps: float) -> tuple[Tensor, Tensor]:
    """The mean of so many numbers, and one over their deviation."""
    mean = x.sum(dims, keepdim=True) / count
    var = x.square().sum(dims, keepdim=True) / count - mean.square()
    return mean, (var + eps).rsqrt()


def define(name: str, signature: str, kernel: Callable[..., object]) -> None:
    """Define an op of ours, which is made of ops of torch; once in a process."""
    if not hasattr(torch.ops.graphprune, name):
        torch.library.define(f"graphprune::{name}", signature)
        torch.library.impl(f"graphprune::{name}", "CompositeImplicitAutograd", kernel)


_REST = "Tensor? weight, Tensor? bias, float eps, int of) -> (Tensor, Tensor, Tensor)"
define("layer_norm", f"(Tensor input, SymInt[] normalized_shape, {_REST}", _layer_norm)
define("group_norm", f"(Tensor input, SymInt group, {_REST}", _group_norm)


@declare(
    torch.ops.graphprune.layer_norm,
    functions=(layer_norm_parts,),
    fact=layer_norm_fact,
    masked=zeroes,
    saves=True,
    given=shape_given,
    layer=True,
    sample=sample_of((2, 3, 4), [4], (4,), (4,), 1e-5, 6),
    any_size=True,
)
def exact_layer_norm(
    walk: Walk, node: fx.Node, x: Value, shape: Sequence[int], weight: Value | None,
    bias: Value | None, *args: object,
) -> list[Layers]:  # fmt: skip
    """Statistics over the last dimensions, in which what leaves counts as zero: exact."""
    dims = range(x.ndim - len(shape), x.ndim)
    return normalised(walk, x, set(dims), [weight, bias], "LayerNorm", exact=True)


def exact_group_norm_fact(
    op: Overload, x: Fact, groups: int, weight: Fact | None, bias: Fact | None, eps: float, of: int
) -> list[Fact]:
    """Statistics over the channels of a group and all places."""
    ndim, batch = x.value.dim(), len(x.value)
    unknown = along_unknown(x.unknown.reshape(batch, groups, -1), [2])
    wide = unknown.expand(batch, groups, x.value[0].numel() // groups).reshape(x.value.shape)
    normed = op(x.filled(), groups, None, None, eps, of)[0]
    return [affine_fact(normed, wide, vector_fact(weight, ndim), vector_fact(bias, ndim))]


def exact_group_norm_given(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Given]:
    """Groups that lose all of their channels leave."""
    return groups_given(graph, node, alive, int(args_of(node)[1]))


@declare(
    torch.ops.graphprune.group_norm,
    functions=(group_norm_parts,),
    fact=exact_group_norm_fact,
    masked=zeroes,
    saves=True,
    given=exact_group_norm_given,
    layer=True,
    sample=sample_of((2, 6, 4), 3, (6,), (6,), 1e-5, 3),
    any_size=True,
)
def exact_group_norm(
    walk: Walk, node: fx.Node, x: Value, groups: int, weight: Value | None, bias: Value | None,
    *args: Any,
) -> list[Layers]:  # fmt: skip
    """Whole groups, or equal columns of all groups, which count as zero: exact both ways."""
    return [channel_groups(walk, x, weight, bias, groups, exact=True)]
