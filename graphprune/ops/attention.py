"""Attention as one op: two products with a softmax between them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ops.contraction import contract, free
from graphprune.ops.fact import Fact, arguments
from graphprune.ops.factors import Factors
from graphprune.ops.heads import STAY, inward_both
from graphprune.ops.ids import Layers, along
from graphprune.ops.made import made
from graphprune.ops.registry import declare
from graphprune.ops.samples import of, rows
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten


def of_attention(query: object, key: object, value: object, *_: object, **__: object) -> Factors:
    """What reaches the result: a changed score changes all weights of its row."""
    return Factors((query, key, value), _reach)


def _reach(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if key.shape[-3:-2] != query.shape[-3:-2]:
        times = query.shape[-3] // key.shape[-3]
        key, value = (side.repeat_interleave(times, -3) for side in (key, value))
    row = (query @ key.mT).sum(-1, keepdim=True) + 1
    return row * value.sum(-2, keepdim=True)


def attention_macs(out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> object:
    """Both products."""
    return math.prod(query) * key[-2] + math.prod(query[:-1]) * key[-2] * value[-1]


def attention_fact(
    op: object, query: Fact, key: Fact, value: Fact, *args: object, **kwargs: object
) -> Fact:
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


def attention_meta(
    query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *args: Any, **kwargs: Any
) -> object:
    """The plain forms."""
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
    return made(query, (*query.shape[:-1], value.shape[-1]))


@declare(
    aten.scaled_dot_product_attention,
    factors=of_attention,
    functions=(torch.nn.functional.scaled_dot_product_attention,),
    scaled=True,
    macs=attention_macs,
    fact=attention_fact,
    meta=attention_meta,
    sample=of((2, 4, 3, 5), (2, 4, 6, 5), rows(2, 4, 6, 2), scale=0.5),
    any_size=True,
)
def attention(
    walk: Walk,
    node: fx.Node,
    query: Value,
    key: Value,
    value: Value,
    *args: object,
    **kwargs: object,
) -> Layers:
    """``softmax(query key^T + mask) value`` over ``[..., heads, length, width]``.

    With fewer key and value heads than queries, each serves several queries in a row.
    """
    masks = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Value)]
    ndim = query.ndim
    if kwargs.get("enable_gqa"):
        key, value = (_repeated(walk, other, query.shape[-3]) for other in (key, value))
    query, key = inward_both(walk, query, key, turned=False)
    contract(walk, query, key, ndim - 1, ndim - 1)
    turned = tuple(layer.transpose(-1, -2) for layer in free(walk, key, ndim - 1))
    length = key.shape[-2]
    sides = [
        Value((*query.shape[:-1], 1), tuple(free(walk, query, ndim - 1))),
        Value((*key.shape[:-2], 1, length), turned),
    ]
    scores = walk.broadcast([*sides, *masks], ndim)
    kept = walk.settle(
        Value((*query.shape[:-1], length), scores), {ndim - 1}, "softmax over channels"
    )
    weights = Value((*query.shape[:-1], length), kept)
    contract(walk, weights, value, ndim - 1, ndim - 2)
    sides = [
        Value((*query.shape[:-1], 1), tuple(free(walk, weights, ndim - 1))),
        Value((*value.shape[:-2], 1, value.shape[-1]), tuple(free(walk, value, ndim - 2))),
    ]
    return walk.broadcast(sides, ndim)


def _repeated(walk: Walk, value: Value, heads: int) -> Value:
    """Key or value heads, each as often as there are queries for it."""
    served = value.shape[-3]
    times = heads // served
    shape = (*value.shape[:-3], heads, *value.shape[-2:])
    if times > 1 and walk.attention == "queries":  # these leave: one of each head's, and so on
        for layer in value.on(-3):
            walk.freeze(layer, STAY)
        copies = along(walk.copies(times).repeat(served), value.ndim - 3, value.ndim)
        others = tuple(layer for layer in value.layers if layer.shape[-3] == 1)
        return replace(value, shape=shape, layers=(*others, copies))
    layers = [
        layer.repeat_interleave(times, -3) if layer.shape[-3] > 1 else layer
        for layer in value.layers
    ]
    return replace(value, shape=shape, layers=tuple(layers))
