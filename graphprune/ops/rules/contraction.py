"""Products that sum over channels: slice k of the left meets slice k of the right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ops.ids import Alternatives, Layers, along, spread, varying
from graphprune.ops.rules.base import Walk, aten
from graphprune.ops.rules.heads import inward_both
from graphprune.ops.rules.registry import Value, register_rule

FIXED_INPUT = "reads a model input"


def contract(walk: Walk, left: Value, right: Value, left_dim: int, right_dim: int) -> None:
    """Tie the contracted dimensions of two values and note who only reads.

    Ids that vary over the contracted dimension and another one are tied along the contracted
    dimension first (attention: whole heads).
    """
    walk.reading()
    sides = []
    for value, dim in ((left, left_dim), (right, right_dim)):
        layers = walk.single(value, dim)
        pure = [layer for layer in layers if varying(layer) == {dim}]
        for layer in value.on(dim):
            if len(varying(layer)) > 1:
                walk.collapse(layer, {dim})
        sides.append([layer.reshape(-1) for layer in pure])
    here, there = sides
    walk.write(left, [right], free(left, left_dim))
    walk.write(right, [left], free(right, right_dim))
    for value, other, own, others in ((left, right, here, there), (right, left, there, here)):
        for ids in own:
            if not others:
                walk.freeze(ids, FIXED_INPUT if other.given else "multiplied with a fixed tensor")
            if value.constant:
                walk.read(ids)
            for partner in others:
                walk.tie(ids, partner)
    if not (left.linear or right.linear):
        walk.mask(*sides[0], *sides[1])


def free(value: Value, dim: int) -> list[Tensor]:
    """The layers of a value that remain when ``dim`` is summed away (kept with size 1)."""
    rest = []
    for layer in value.layers:
        if layer.shape[dim] == 1:
            rest.append(layer)
        elif len(varying(layer)) > 1:
            rest.append(layer.narrow(dim, 0, 1))
    return rest


@register_rule(aten.mm)
def mm(walk: Walk, node: fx.Node, left: Value, right: Value) -> Layers:
    """``[n, k] @ [k, m]``."""
    contract(walk, left, right, 1, 0)
    return (*free(left, 1), *free(right, 0))


@register_rule(aten.linear)
def linear(walk: Walk, node: fx.Node, x: Value, weight: Value, bias: Value | None = None) -> Layers:
    """``x @ weight.T + bias`` along the last dimension."""
    if weight.ndim == 1:
        weight = Value((1, *weight.shape), tuple(i.unsqueeze(0) for i in weight.layers),
                       weight.constant, weight.given, weight.linear)  # fmt: skip
    contract(walk, x, weight, x.ndim - 1, 1)
    out = [layer.reshape(-1) for layer in free(weight, 1)]
    shape = (*x.shape[:-1], weight.shape[0])
    layers = [*free(x, x.ndim - 1), *(along(ids, x.ndim - 1, x.ndim) for ids in out)]
    product = Value(shape, tuple(layers))
    found = product.layers if bias is None else walk.broadcast([product, bias], x.ndim)
    return tuple(layer.reshape(layer.shape[: len(node.meta["shape"])]) for layer in found)


@register_rule(aten.matmul)
def matmul(walk: Walk, node: fx.Node, left: Value, right: Value) -> Layers:
    """Products of matrices; a vector is a matrix of one row or column; batches broadcast."""
    wide_left = _reshaped(left, (1, *left.shape)) if left.ndim == 1 else left
    wide_right = _reshaped(right, (*right.shape, 1)) if right.ndim == 1 else right
    wide_left, wide_right = inward_both(walk, wide_left, wide_right, turned=True)
    contract(walk, wide_left, wide_right, wide_left.ndim - 1, wide_right.ndim - 2)
    a, b = (tuple(free(v, d)) for v, d in
            ((wide_left, wide_left.ndim - 1), (wide_right, wide_right.ndim - 2)))  # fmt: skip
    sides = [
        Value((*wide_left.shape[:-1], 1), a),
        Value((*wide_right.shape[:-2], 1, wide_right.shape[-1]), b),
    ]
    layers = walk.broadcast(sides, max(wide_left.ndim, wide_right.ndim))
    shape = node.meta["shape"]
    if left.ndim == 1:
        layers = tuple(layer.squeeze(-2) for layer in layers)
    if right.ndim == 1:
        layers = tuple(layer.squeeze(-1) for layer in layers)
    assert all(layer.dim() == len(shape) for layer in layers)
    return layers


def _reshaped(value: Value, shape: tuple[int, ...]) -> Value:
    layers = [along(layer.reshape(-1), shape.index(max(shape)), 2) for layer in value.layers]
    return replace(value, shape=shape, layers=tuple(layers))


@register_rule(aten.addmm)
def addmm(walk: Walk, node: fx.Node, bias: Value, left: Value, right: Value, **_: Any) -> Layers:
    """``bias + left @ right``."""
    shape = node.meta["shape"]
    product = Value(shape, mm(walk, node, left, right))
    return walk.broadcast([product, bias], 2)


@register_rule(aten.mv)
def mv(walk: Walk, node: fx.Node, left: Value, right: Value) -> Layers:
    """``[n, k] @ [k]``."""
    contract(walk, left, right, 1, 0)
    return tuple(layer.reshape(-1) for layer in free(left, 1))


@register_rule(aten.dot, aten.vdot)
def dot(walk: Walk, node: fx.Node, left: Value, right: Value) -> Layers:
    """``[k] @ [k]``."""
    contract(walk, left, right, 0, 0)
    return ()


@register_rule(aten.bmm)
def bmm(walk: Walk, node: fx.Node, left: Value, right: Value) -> Layers:
    """``[b, n, k] @ [b, k, m]``."""
    left, right = inward_both(walk, left, right, turned=True)
    contract(walk, left, right, 2, 1)
    b, n, _ = left.shape
    m = right.shape[2]
    return walk.broadcast(
        [Value((b, n, 1), tuple(free(left, 2))), Value((b, 1, m), tuple(free(right, 1)))], 3
    )


@register_rule(aten.baddbmm)
def baddbmm(walk: Walk, node: fx.Node, bias: Value, left: Value, right: Value, **_: Any) -> Layers:
    """``bias + left @ right``, batched."""
    product = Value(node.meta["shape"], bmm(walk, node, left, right))
    return walk.broadcast([product, bias], 3)


@register_rule(aten.convolution)
def convolution(
    walk: Walk,
    node: fx.Node,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Layers:
    """A convolution of any number of dimensions, grouped or transposed.

    A kernel of one position is pointwise: channels may lie along the places as well.
    """
    ndim = x.ndim
    moves = any(s != 1 for s in stride) or any(padding) or any(output_padding)
    mixed = [dim for dim in range(2, ndim) if moves or weight.shape[dim] > 1]
    x = replace(x, layers=walk.settle(x, mixed, "convolution over channels"))
    weight = replace(weight, layers=walk.settle(weight, range(2, ndim), "kernel size"))
    out_channels = node.meta["shape"][1]
    rows = free(x, 1)
    for layer in x.on(1):
        walk.collapse(layer, {1} if len(varying(layer)) > 1 else ())
    if groups == 1:
        in_dim = 0 if transposed else 1
        contract(walk, x, weight, 1, in_dim)
        own = [layer.reshape(-1) for layer in free(weight, in_dim)]
    else:
        own = _grouped(walk, x, weight, groups, transposed, out_channels)
    product = Value(
        (x.shape[0], out_channels, *node.meta["shape"][2:]),
        tuple(rows) + tuple(along(ids, 1, ndim) for ids in own),
    )
    if bias is None:
        return product.layers
    shape = (1, out_channels, *[1] * (ndim - 2))
    shaped = Value(shape, tuple(along(ids, 1, ndim) for ids in bias.layers))
    return walk.broadcast([product, shaped], ndim)


def _grouped(
    walk: Walk, x: Value, weight: Value, groups: int, transposed: bool, out_channels: int
) -> list[Tensor]:
    """Ties of a grouped convolution; returns the ids of its output channels.

    ``[groups, in / groups]`` input ids meet ``[groups, out / groups]`` output ids. One of them
    lies along dimension 0 of the weight; the other dimension is shared by all groups. Either
    whole groups go, or equal columns of all groups.
    """
    walk.reading()
    inputs = [spread(i.reshape(-1, 1), (x.shape[1], 1)) for i in x.on(1) if varying(i) == {1}]
    walk.write(weight, [x], weight.layers)
    long = [layer.reshape(groups, -1) for layer in weight.on(0) if varying(layer) == {0}]
    short = [layer.reshape(1, -1) for layer in weight.on(1) if varying(layer) == {1}]
    entering = [layer.reshape(groups, -1) for layer in inputs]
    text = FIXED_INPUT if x.given else "grouped convolution with a fixed side"
    if not long or not entering:
        for ids in (*long, *short, *entering):
            walk.freeze(ids, text)
    if transposed:
        for mine, other in zip(entering, long, strict=False):
            walk.tie(mine, other)
        walk.read(*long)
        width = out_channels // groups
        leaving = [walk.ties.fresh(out_channels).reshape(groups, width)]
        in_short, out_short = [], short
        if not entering:
            walk.freeze(leaving[0], text)
    else:
        leaving, in_short, out_short = long, short, []
        walk.read(*short)
    if not (entering and long):
        return [ids.reshape(-1) for ids in leaving]
    if not weight.linear:
        walk.mask(*entering)
    rows = [(ids[:, :1], ids) for ids in (*entering, *leaving)]
    rows += [(a[:, :1], b[:, :1]) for a in entering for b in leaving]
    columns = [(ids[:1], ids) for ids in (*entering, *leaving)]
    columns += [(ids, entering[0][:1]) for ids in in_short]
    columns += [(ids, leaving[0][:1]) for ids in out_short]
    everything = torch.cat([ids.reshape(-1) for ids in (*entering, *leaving)])
    if entering[0].shape[1] == 1:
        for a, b in rows:
            walk.tie(a, b)
        for ids in short:
            walk.freeze(ids, "depthwise kernel")
    else:
        walk.choose(
            Alternatives(
                everything,
                ((tuple(rows), tuple(short)), (tuple(columns), ())),
                ("whole groups", "equal columns"),
            )
        )
    return [ids.reshape(-1) for ids in leaving]


@register_rule(aten.scaled_dot_product_attention)
def attention(
    walk: Walk, node: fx.Node, query: Value, key: Value, value: Value, *args: Any, **kwargs: Any
) -> Layers:
    """``softmax(query key^T + mask) value`` over ``[..., heads, length, width]``.

    With fewer key and value heads than queries, each serves several queries in a row.
    """
    masks = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Value)]
    ndim = query.ndim
    if kwargs.get("enable_gqa"):
        key, value = (_repeated(other, query.shape[-3]) for other in (key, value))
    query, key = inward_both(walk, query, key, turned=False)
    contract(walk, query, key, ndim - 1, ndim - 1)
    turned = tuple(layer.transpose(-1, -2) for layer in free(key, ndim - 1))
    length = key.shape[-2]
    sides = [
        Value((*query.shape[:-1], 1), tuple(free(query, ndim - 1))),
        Value((*key.shape[:-2], 1, length), turned),
    ]
    scores = walk.broadcast([*sides, *masks], ndim)
    kept = walk.settle(
        Value((*query.shape[:-1], length), scores), {ndim - 1}, "softmax over channels"
    )
    weights = Value((*query.shape[:-1], length), kept)
    contract(walk, weights, value, ndim - 1, ndim - 2)
    sides = [
        Value((*query.shape[:-1], 1), tuple(free(weights, ndim - 1))),
        Value((*value.shape[:-2], 1, value.shape[-1]), tuple(free(value, ndim - 2))),
    ]
    return walk.broadcast(sides, ndim)


def _repeated(value: Value, heads: int) -> Value:
    """Key or value heads, each as often as there are queries for it."""
    times = heads // value.shape[-3]
    layers = [
        layer.repeat_interleave(times, -3) if layer.shape[-3] > 1 else layer
        for layer in value.layers
    ]
    return replace(value, shape=(*value.shape[:-3], heads, *value.shape[-2:]), layers=tuple(layers))
