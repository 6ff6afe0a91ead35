"""Ops that act position by position, or do not change positions at all.

Ops that torch tags as pointwise need no declaration, unless something more is known of them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ops.calls import Overload
from graphprune.ops.fact import Fact, Unfollowed, found, moved_fact, values
from graphprune.ops.ids import Layers
from graphprune.ops.made import (
    binary_in_place_meta,
    binary_meta,
    in_place_meta,
    unary_meta,
)
from graphprune.ops.registry import between, free
from graphprune.ops.registry import declare as _declare
from graphprune.ops.samples import bits, of, shares
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten
declare = partial(_declare, macs=free)  # nothing is multiplied here


def pointwise_fact(op: Any, *args: Any, **kwargs: Any) -> Fact:
    """A position is known where it is known in every operand."""
    out = op(*values(args), **values(kwargs))
    unknown = torch.zeros_like(out, dtype=torch.bool)
    for fact in found((args, kwargs)):
        unknown |= fact.unknown
    return Fact.checked(out, unknown)


def mul_fact(op: object, a: Fact, b: object, **kwargs: object) -> Fact:
    """Zero times anything is zero."""
    out = pointwise_fact(op, a, b, **kwargs)
    if not isinstance(b, Fact):
        if b != 0:
            return out
        b = Fact.known(torch.zeros_like(a.value))
    zero = (a.zero | b.zero).expand(out.value.shape)
    return Fact(out.value.masked_fill(zero, 0), out.unknown & ~zero)


def where_fact(op: Overload, condition: Fact, *sides: object) -> object:
    """The side that is taken must be known, or both must agree."""
    if len(sides) != 2:
        raise Unfollowed("positions where a condition holds")
    a, b = (
        side if isinstance(side, Fact) else Fact.known(torch.as_tensor(side, dtype=torch.float64))
        for side in sides
    )
    out = op(condition.filled(), *(values(side) for side in sides))
    which, left, right = torch.broadcast_tensors(condition.filled(), a.unknown, b.unknown)
    agree = (a.value == b.value) & ~a.unknown & ~b.unknown
    unknown = torch.where(which, left, right) | condition.unknown
    return Fact.checked(out, unknown & ~agree)


def glu_fact(op: object, x: Fact, dim: int = -1) -> Fact:
    """The first half times the sigmoid of the second."""
    a, b = (
        Fact(value, unknown)
        for value, unknown in zip(x.value.chunk(2, dim), x.unknown.chunk(2, dim))
    )
    return mul_fact(aten.mul.Tensor, a, pointwise_fact(aten.sigmoid.default, b))


def log_sigmoid_fact(op: Overload, x: Fact) -> list[Fact]:
    """Returns a work buffer as well, which nothing reads."""
    return [Fact.checked(op(x.filled())[0], x.unknown.clone())]


def copied_fact(op: Overload, x: Fact, **kwargs: object) -> Fact:
    """Memory of its own."""
    out = op(x.value, **kwargs)
    unknown = torch.empty_like(out, dtype=torch.bool)
    return Fact.checked(out, unknown.copy_(x.unknown))


def written_fact(op: object, x: Fact, source: Fact, *args: object) -> Fact:
    """What stood there does not matter."""
    x.value.copy_(source.value)
    x.unknown.copy_(source.unknown)
    return x


def overwritten_fact(op: Overload, x: Fact, *value: object) -> Fact:
    """One number everywhere."""
    op(x.value, *values(value))
    x.unknown.fill_(any(bool(fact.unknown.any()) for fact in found(value)))
    return x


def made_fact(op: Overload, x: Fact, *args: object, **kwargs: object) -> Fact:
    """Only the shape of the operand matters."""
    out: Tensor = op(x.value, *values(args), **kwargs)
    if any(not fact.constant for fact in found(args)):
        return Fact(out, torch.ones_like(out, dtype=torch.bool))
    return Fact.known(out)


def clamped(
    x: object, low: float | None = -1.0, high: float | None = 1.0, **named: float | None
) -> tuple[float, float]:
    """The bounds that are given."""
    low, high = named.get("min", low), named.get("max", high)
    return (-math.inf if low is None else low), (math.inf if high is None else high)


def between_given(x: object, *args: object, **named: object) -> tuple[float, float]:
    """The bounds of a clamp, which has none by default; those that are tensors are not known."""
    ends = [named.get("min"), named.get("max")]
    ends[: len(args)] = args
    low, high = (end if isinstance(end, int | float) else None for end in ends)
    return clamped(x, low, high)


@declare("pointwise", fact=pointwise_fact)
@declare("pointwise_")
@declare(
    aten.exp, fact=pointwise_fact, meta=unary_meta, bounds=between(0.0, math.inf), sample=of((2, 3))
)
@declare(
    aten.clamp,
    fact=pointwise_fact,
    bounds=between_given,
    clips=True,
    sample=of((2, 3), -0.5, 0.5),
)
@declare(aten.clamp_, bounds=between_given, clips=True, sample=of((2, 3), -0.5, 0.5))
@declare(aten._prelu_kernel, fact=pointwise_fact, sample=of((2, 3), (1, 3)))
@declare(aten.prelu, fact=pointwise_fact, sample=of((2, 3), (3,)))
@declare(aten.mul, fact=mul_fact, meta=binary_meta, powers=(1, 1), sample=of((2, 3), (2, 3)))
@declare(aten.mul_, meta=binary_in_place_meta, powers=(1, 1), sample=of((2, 3), (2, 3)))
@declare(aten.div, fact=pointwise_fact, meta=binary_meta, powers=(1, -1), sample=of((2, 3), (2, 3)))
@declare(aten.div_, powers=(1, -1), sample=of((2, 3), (2, 3)))
@declare(aten.rsqrt, fact=pointwise_fact, meta=unary_meta, powers=(-0.5,), sample=of((2, 3)))
@declare(aten.sqrt, fact=pointwise_fact, meta=unary_meta, powers=(0.5,), sample=of((2, 3)))
@declare(aten.reciprocal, fact=pointwise_fact, meta=unary_meta, powers=(-1.0,), sample=of((2, 3)))
@declare(aten.add, fact=pointwise_fact, meta=binary_meta, signs=(1, 1), sample=of((2, 3), (2, 3)))
@declare(aten.add_, meta=binary_in_place_meta, signs=(1, 1), sample=of((2, 3), (2, 3)))
@declare(aten.sub, fact=pointwise_fact, meta=binary_meta, signs=(1, -1), sample=of((2, 3), (2, 3)))
@declare(aten.sub_, signs=(1, -1), sample=of((2, 3), (2, 3)))
@declare(aten.neg, fact=pointwise_fact, meta=unary_meta, linear=True, sample=of((2, 3)))
@declare(aten.where, fact=where_fact, sample=of(bits(2, 3), (2, 3), (2, 3)))
@declare(aten.rsub, aten.complex, aten.polar, fact=pointwise_fact, sample=of((2, 3), (2, 3)))
@declare(aten.threshold, fact=pointwise_fact, sample=of((2, 3), 0.1, 0.2))
@declare(aten.threshold_, sample=of((2, 3), 0.1, 0.2))
@declare(
    aten.relu,
    fact=pointwise_fact,
    meta=unary_meta,
    activation=True,
    sample=of((2, 3)),
    bounds=between(0.0, math.inf),
    clips=True,
)
@declare(
    aten.hardtanh,
    fact=pointwise_fact,
    meta=unary_meta,
    activation=True,
    sample=of((2, 3)),
    bounds=clamped,
    clips=True,
)
@declare(
    aten.hardswish,
    aten.gelu,
    aten.leaky_relu,
    aten.elu,
    aten.silu,
    fact=pointwise_fact,
    meta=unary_meta,
    activation=True,
    sample=of((2, 3)),
)
@declare(
    aten.hardsigmoid,
    aten.sigmoid,
    fact=pointwise_fact,
    meta=unary_meta,
    activation=True,
    sample=of((2, 3)),
    bounds=between(0.0, 1.0),
)
@declare(
    aten.tanh,
    fact=pointwise_fact,
    meta=unary_meta,
    activation=True,
    sample=of((2, 3)),
    bounds=between(-1.0, 1.0),
)
@declare(aten.mish, aten.softplus, fact=pointwise_fact, activation=True, sample=of((2, 3)))
@declare(
    aten.relu_,
    meta=in_place_meta,
    activation=True,
    sample=of((2, 3)),
    bounds=between(0.0, math.inf),
    clips=True,
)
@declare(
    aten.hardtanh_,
    meta=in_place_meta,
    activation=True,
    sample=of((2, 3)),
    bounds=clamped,
    clips=True,
)
@declare(
    aten.hardswish_,
    aten.leaky_relu_,
    aten.elu_,
    aten.silu_,
    meta=in_place_meta,
    activation=True,
    sample=of((2, 3)),
)
@declare(
    aten.sigmoid_,
    aten.hardsigmoid_,
    meta=in_place_meta,
    activation=True,
    sample=of((2, 3)),
    bounds=between(0.0, 1.0),
)
@declare(
    aten.tanh_, meta=in_place_meta, activation=True, sample=of((2, 3)), bounds=between(-1.0, 1.0)
)
@declare(aten.gelu_, aten.mish_, activation=True, sample=of((2, 3)))
@declare(aten.celu_, aten.selu_, aten.rrelu_, sample=of((2, 3)))
@declare(aten.rrelu_with_noise, aten.rrelu_with_noise_, sample=of((2, 3), (2, 3)))
@declare(aten.ldexp, fact=pointwise_fact, sample=of((2, 3), (2, 3)))  # torch 2.8 has no tag for it
@declare(aten.ldexp_, sample=of((2, 3), (2, 3)))
@declare(aten.copy_, fact=written_fact, sample=of((2, 3), (2, 3)))
@declare(aten.copy, sample=of((2, 3), (2, 3)))
@declare(aten.bernoulli, sample=of(shares(2, 3)))
@declare(aten.bernoulli_, sample=of((2, 3), shares(2, 3)))
@declare(aten.addcmul_, aten.addcdiv_, aten.lerp_, sample=of((2, 3), (2, 3), (2, 3)))
@declare(aten.masked_fill, fact=pointwise_fact, sample=of((2, 3), bits(2, 3), 0.5))
@declare(aten.masked_fill_, sample=of((2, 3), bits(2, 3), 0.5))
def pointwise(walk: Walk, node: fx.Node, *args: object, **kwargs: object) -> Layers:
    """Every operand is tied to every other at each position."""
    operands = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Value)]
    if all(operand.constant for operand in operands):  # a weight and its mask, say
        for dim in range(-len(node.meta["shape"]), 0):
            layers = [i for operand in operands if operand.ndim >= -dim for i in operand.on(dim)]
            walk.combine(i for i in layers if i.numel() == i.shape[dim])
    return walk.broadcast(operands, len(node.meta["shape"]))


@declare(
    aten.clone,
    fact=copied_fact,
    linear=True,
    sample=of((2, 3)),
    any_size=True,
    hull=True,
    keeps="values",
)
@declare(aten._to_copy, fact=copied_fact, linear=True, sample=of((2, 3)), any_size=True, hull=True)
@declare(aten.lift_fresh_copy, fact=copied_fact, sample=of((2, 3)))
@declare(
    aten.detach,
    aten.alias,
    fact=moved_fact,
    linear=True,
    sample=of((2, 3)),
    any_size=True,
    hull=True,
    keeps="values",
)
@declare(aten.lift_fresh, fact=moved_fact, sample=of((2, 3)))
@declare(aten.contiguous, aten.detach_, aten.requires_grad_, sample=of((2, 3)))
@declare(aten.poisson, aten._standard_gamma, sample=of(shares(2, 3)))
@declare(aten.uniform_, aten.normal_, aten.random_, sample=of((2, 3)))
@declare(aten.exponential_, aten.cauchy_, aten.log_normal_, sample=of((2, 3)))
@declare(aten.geometric_, sample=of((2, 3), 0.5))
@declare(aten.randint_like, sample=of((2, 3), 5))
@declare(aten.zero_, fact=overwritten_fact, sample=of((2, 3)))
@declare(aten.fill_, fact=overwritten_fact, fills=True, sample=of((2, 3), 0.5))
@declare(aten.zeros_like, aten.ones_like, fact=made_fact, sample=of((2, 3)), any_size=True)
@declare(aten.full_like, fact=made_fact, fills=True, sample=of((2, 3), 0.5), any_size=True)
@declare(aten.empty_like, aten.rand_like, aten.randn_like, sample=of((2, 3)))
def same(walk: Walk, node: fx.Node, x: Value, *args: object, **kwargs: object) -> Layers:
    """The result has the positions of the input."""
    return x.layers


@declare(aten.native_dropout, sample=of((2, 3), 0.5, False))
def native_dropout(walk: Walk, node: fx.Node, x: Value, *args: object) -> list[Layers]:
    """Dropout with its mask."""
    return [x.layers, x.layers]


@declare(aten.log_sigmoid_forward, fact=log_sigmoid_fact, sample=of((2, 3)))
def log_sigmoid(walk: Walk, node: fx.Node, x: Value) -> list[Layers]:
    """Returns a work buffer as well."""
    return [x.layers]


@declare(aten.glu, fact=glu_fact, sample=of((2, 6), 1))
def glu(walk: Walk, node: fx.Node, x: Value, dim: int = -1) -> Layers:
    """The first half times the sigmoid of the second: the halves stay equal."""
    dim %= x.ndim
    halves = []
    for layer in x.layers:
        if layer.shape[dim] > 1:
            walk.collapse(layer.unflatten(dim, (2, -1)), {dim})
            layer = layer.narrow(dim, 0, x.shape[dim] // 2)
        halves.append(layer)
    return tuple(halves)
