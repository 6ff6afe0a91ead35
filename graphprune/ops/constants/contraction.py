"""Sums of products: a position is known when every product that is added is known.

A product is known when both factors are, or one is a known zero. ``of`` runs an op on zeroes and
ones to see which positions an unknown product reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphprune.ops.constants.fact import Fact, arguments, register_fact

aten = torch.ops.aten
Product = Callable[..., Tensor]


def reached(product: Product, factors: Sequence[Fact]) -> Tensor:
    """Where an unknown product is added, as a boolean tensor."""
    marks = [fact.nonzero.double() for fact in factors]
    total: Tensor | None = None
    for place, fact in enumerate(factors):
        if fact.constant:
            continue
        open_ = [*marks[:place], fact.unknown.double(), *marks[place + 1 :]]
        part = product(*open_) > 0.5
        total = part if total is None else total | part
    return torch.zeros_like(product(*marks), dtype=torch.bool) if total is None else total


def contracted(product: Product, factors: Sequence[Fact], bias: Fact | None = None) -> Fact:
    """A sum of products, and what is added to it afterwards (already in shape)."""
    value = product(*(fact.filled(0) for fact in factors))
    unknown = reached(product, factors)
    if bias is not None:
        value, unknown = value + bias.filled(0), unknown | bias.unknown
    return Fact.checked(value, unknown)


@register_fact(aten.mm, aten.bmm, aten.matmul, aten.mv, aten.dot, aten.vdot)
def product(op: Any, left: Fact, right: Fact) -> Fact:
    """Products of matrices."""
    return contracted(op, [left, right])


@register_fact(aten.linear)
def linear(op: Any, x: Fact, weight: Fact, bias: Fact | None = None) -> Fact:
    """``x @ weight.T + bias``."""
    if _all_unknown(x, weight):
        return Fact.nothing((*x.value.shape[:-1], len(weight.value)), torch.float64)
    return contracted(lambda a, b: op(a, b), [x, weight], bias)


def _all_unknown(x: Fact, weight: Fact) -> bool:
    """Whether plainly nothing comes out known: spares the work for layers without zeroes."""
    if weight.value.dim() < 2 or not bool(x.unknown.all()):
        return False
    whole = weight.nonzero.flatten(2).all(2) if weight.value.dim() > 2 else weight.nonzero
    return bool(whole.any(1).all())


@register_fact(aten.addmm, aten.baddbmm)
def addmm(op: Any, bias: Fact, left: Fact, right: Fact, **scales: Any) -> Fact:
    """``beta * bias + alpha * left @ right``."""
    value = op(bias.filled(0), left.filled(0), right.filled(0), **scales)
    return Fact.checked(value, reached(torch.matmul, [left, right]) | bias.unknown)


@register_fact(aten.convolution)
def convolution(op: Any, x: Fact, weight: Fact, bias: Fact | None, *how: Any) -> Fact:
    """A convolution; the padding is a known zero."""
    transposed = how[3]
    if not transposed and _all_unknown(x, weight):
        shape = torch.ops.aten.convolution(
            x.value.to("meta"), weight.value.to("meta"), None, *how
        ).shape
        return Fact.nothing(shape, torch.float64)
    if bias is not None:
        shaped = (-1, *[1] * (x.value.dim() - 2))
        bias = Fact(bias.value.reshape(shaped), bias.unknown.reshape(shaped))
    return contracted(lambda a, b: op(a, b, None, *how), [x, weight], bias)


@register_fact(aten.einsum)
def einsum(op: Any, equation: str, tensors: Sequence[Fact], **_: Any) -> Fact:
    """Any sum of products."""
    return contracted(lambda *factors: torch.einsum(equation, *factors), tensors)


@register_fact(aten.sum)
def sum_(op: Any, x: Fact, *args: Any, **kwargs: Any) -> Fact:
    """A sum."""
    named = {key: value for key, value in kwargs.items() if key != "dtype"}
    marks = op(x.unknown.double(), *args, **named)
    return Fact.checked(op(x.filled(0), *args, **kwargs), marks > 0.5)


@register_fact(aten.scaled_dot_product_attention)
def attention(op: Any, query: Fact, key: Fact, value: Fact, *args: Any, **kwargs: Any) -> Fact:
    """Weights that add up to one: a column that is the same at all places comes out as it is.

    With a mask only zeroes do, because all places may be masked.
    """
    bound = arguments(op, (query, key, value, *args), kwargs)
    shape = (*query.value.shape[:-1], value.value.shape[-1])
    if bound["enable_gqa"]:
        times = query.value.shape[-3] // value.value.shape[-3]
        value = Fact(*(part.repeat_interleave(times, -3) for part in (value.value, value.unknown)))
    first = value.value[..., :1, :]
    same = (value.value == first).all(-2, keepdim=True) & ~value.unknown.any(-2, keepdim=True)
    if bound["attn_mask"] is not None:
        same &= first == 0
    if bound["dropout_p"]:
        same &= first == 0
    return Fact(first.expand(shape).clone(), (~same).expand(shape).clone())
