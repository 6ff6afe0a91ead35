"""Ops that act position by position, and copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphprune.ops.constants.fact import Fact, Unfollowed, found, register_fact, values

aten = torch.ops.aten


@register_fact(
    aten.hardswish, aten._prelu_kernel, aten.threshold, aten.rsub, aten.polar, aten.complex
)
def pointwise(op: Any, *args: Any, **kwargs: Any) -> Fact:
    """A position is known where it is known in every operand."""
    out = op(*values(args), **values(kwargs))
    unknown = torch.zeros_like(out, dtype=torch.bool)
    for fact in found((args, kwargs)):
        unknown |= fact.unknown
    return Fact.checked(out, unknown)


@register_fact(aten.mul)
def mul(op: Any, a: Fact, b: Any, **kwargs: Any) -> Fact:
    """Zero times anything is zero."""
    out = pointwise(op, a, b, **kwargs)
    if not isinstance(b, Fact):
        if b != 0:
            return out
        b = Fact.known(torch.zeros_like(a.value))
    zero = (a.zero | b.zero).expand(out.value.shape)
    return Fact(out.value.masked_fill(zero, 0), out.unknown & ~zero)


@register_fact(aten.where)
def where(op: Any, condition: Fact, *sides: Any) -> Any:
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


@register_fact(aten.glu)
def glu(op: Any, x: Fact, dim: int = -1) -> Fact:
    """The first half times the sigmoid of the second."""
    a, b = (
        Fact(value, unknown)
        for value, unknown in zip(x.value.chunk(2, dim), x.unknown.chunk(2, dim))
    )
    return mul(aten.mul.Tensor, a, pointwise(aten.sigmoid.default, b))


@register_fact(aten.log_sigmoid_forward)
def log_sigmoid(op: Any, x: Fact) -> list[Fact]:
    """Returns a work buffer as well, which nothing reads."""
    return [Fact.checked(op(x.filled())[0], x.unknown.clone())]


@register_fact(aten.clone, aten._to_copy, aten.lift_fresh_copy)
def copied(op: Any, x: Fact, **kwargs: Any) -> Fact:
    """Memory of its own."""
    out = op(x.value, **kwargs)
    unknown = torch.empty_like(out, dtype=torch.bool)
    return Fact.checked(out, unknown.copy_(x.unknown))


@register_fact(aten.copy_)
def written(op: Any, x: Fact, source: Fact, *args: Any) -> Fact:
    """What stood there does not matter."""
    x.value.copy_(source.value)
    x.unknown.copy_(source.unknown)
    return x


@register_fact(aten.zero_, aten.fill_)
def overwritten(op: Any, x: Fact, *value: Any) -> Fact:
    """One number everywhere."""
    op(x.value, *values(value))
    x.unknown.fill_(any(bool(fact.unknown.any()) for fact in found(value)))
    return x


@register_fact(aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones,
               aten.new_full)  # fmt: skip
def made(op: Any, x: Fact, *args: Any, **kwargs: Any) -> Fact:
    """Only the shape of the operand matters."""
    out: Tensor = op(x.value, *values(args), **kwargs)
    if any(not fact.constant for fact in found(args)):
        return Fact(out, torch.ones_like(out, dtype=torch.bool))
    return Fact.known(out)
