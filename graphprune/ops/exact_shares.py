"""Softmax and mean over channels of which some have left, as if these were zero.

With k of n numbers given and the others zero, a softmax divides by ``sum(exp(x)) + (n - k)``, and a
mean by n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function_unary

from graphprune.ops.exact_norms import define
from graphprune.ops.ids import Layers
from graphprune.ops.reduction import along_fact, drop, reduced_fact, summed
from graphprune.ops.registry import declare as _declare
from graphprune.ops.registry import free, zeroes
from graphprune.ops.samples import of as sample_of
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk

declare = partial(_declare, macs=free)  # nothing is multiplied here


def softmax(input: Tensor, dim: int, *, of: int) -> Tensor:
    """As ``torch.softmax`` over ``of`` numbers; those that are not given are zero.

    Args:
        input: of any shape.
        dim: over which one unit is shared out.
        of: how many numbers there are, more than are given.

    Returns:
        The shares of those that are given.

    Example:
        >>> import torch
        >>> from graphprune.ops.exact_shares import softmax
        >>> x = torch.tensor([1.0, 2.0, 0.0, 0.0])
        >>> torch.allclose(softmax(x[:2], 0, of=4), x.softmax(0)[:2])
        True
    """
    return whole_softmax(input, dim, of)


def log_softmax(input: Tensor, dim: int, *, of: int) -> Tensor:
    """The logarithm of :func:`softmax`."""
    return whole_log_softmax(input, dim, of)


def mean(input: Tensor, dim: int | Sequence[int], keepdim: bool = False, *, of: int) -> Tensor:
    """As ``torch.mean`` along a dimension of ``of`` numbers; those that are not given are zero."""
    return whole_mean(input, [dim] if isinstance(dim, int) else list(dim), keepdim, of)


def whole_softmax(input: Tensor, dim: int, of: int) -> Tensor:
    """The same, recorded as one op."""
    if has_torch_function_unary(input):
        out: Tensor = handle_torch_function(whole_softmax, (input,), input, dim, of)
        return out
    return _softmax(input, dim, of)


def whole_log_softmax(input: Tensor, dim: int, of: int) -> Tensor:
    """The same, recorded as one op."""
    if has_torch_function_unary(input):
        out: Tensor = handle_torch_function(whole_log_softmax, (input,), input, dim, of)
        return out
    return _log_softmax(input, dim, of)


def whole_mean(input: Tensor, dim: Sequence[int], keepdim: bool, of: int) -> Tensor:
    """The same, recorded as one op."""
    if has_torch_function_unary(input):
        out: Tensor = handle_torch_function(whole_mean, (input,), input, dim, keepdim, of)
        return out
    return _mean(input, dim, keepdim, of)


def _softmax(x: Tensor, dim: int, of: int) -> Tensor:
    return _log_softmax(x, dim, of).exp()


def _log_softmax(x: Tensor, dim: int, of: int) -> Tensor:
    left = of - x.shape[dim]
    zeroes = torch.full((), math.log(left) if left else -math.inf, dtype=x.dtype, device=x.device)
    return x - torch.logaddexp(x.logsumexp(dim, keepdim=True), zeroes)


def _mean(x: Tensor, dim: Sequence[int], keepdim: bool, of: int) -> Tensor:
    return x.sum(tuple(dim), keepdim=keepdim) / of


define("softmax", "(Tensor input, int dim, int of) -> Tensor", _softmax)
define("log_softmax", "(Tensor input, int dim, int of) -> Tensor", _log_softmax)
define("mean", "(Tensor input, int[] dim, bool keepdim, int of) -> Tensor", _mean)


@declare(
    torch.ops.graphprune.softmax,
    functions=(whole_softmax,),
    fact=along_fact,
    masked=zeroes,
    sample=sample_of((2, 5), 1, 8),
    any_size=True,
)
@declare(
    torch.ops.graphprune.log_softmax,
    functions=(whole_log_softmax,),
    fact=along_fact,
    masked=zeroes,
    sample=sample_of((2, 5), 1, 8),
    any_size=True,
)
def exact_softmax(walk: Walk, node: fx.Node, x: Value, dim: int, of: int) -> Layers:
    """One unit shared out among the kept channels, and zeroes in the place of others: exact."""
    kept, gone = summed(walk, x, {dim % x.ndim})
    for layer in gone:
        walk.mask(layer)
        walk.marks.softmaxes.append((layer, walk.reason("softmax over channels")))
    return (*kept, *gone)


@declare(
    torch.ops.graphprune.mean,
    functions=(whole_mean,),
    fact=reduced_fact,
    masked=zeroes,
    sample=sample_of((2, 3, 4), [1], False, 5),
    any_size=True,
)
def exact_mean(
    walk: Walk, node: fx.Node, x: Value, dim: Sequence[int], keepdim: bool, of: int
) -> Layers:
    """A sum over channels, divided by a number that stays: exact."""
    dims = {d % x.ndim for d in dim}
    kept, gone = summed(walk, x, dims)
    walk.mask(*gone)
    return drop(kept, dims, node.meta["shape"])
