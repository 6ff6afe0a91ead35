"""Ops that act position by position, or do not change positions at all."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphprune.ops.ids import Layers
from graphprune.ops.rules.base import Walk, aten
from graphprune.ops.rules.registry import Value, register_rule


@register_rule(
    "pointwise",
    aten._prelu_kernel,
    aten.prelu,
    aten.copy_,
    aten.copy,
    aten.addcmul_,
    aten.addcdiv_,
    aten.hardswish,
    aten.hardswish_,
    aten.hardsigmoid,
    aten.hardsigmoid_,
    aten.hardtanh,
    aten.hardtanh_,
    aten.leaky_relu_,
    aten.elu_,
    aten.celu_,
    aten.selu_,
    aten.silu_,
    aten.gelu_,
    aten.mish_,
    aten.threshold_,
    aten.rrelu_,
    aten.rrelu_with_noise,
    aten.rrelu_with_noise_,
    aten.lerp_,
    aten.where,
    aten.masked_fill,
    aten.masked_fill_,
)
def pointwise(walk: Walk, node: fx.Node, *args: Any, **kwargs: Any) -> Layers:
    """Every operand is tied to every other at each position."""
    operands = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Value)]
    if all(operand.constant for operand in operands):  # a weight and its mask, say
        for dim in range(-len(node.meta["shape"]), 0):
            layers = [i for operand in operands if operand.ndim >= -dim for i in operand.on(dim)]
            walk.combined.append([i.reshape(-1) for i in layers if i.numel() == i.shape[dim]])
    return walk.broadcast(operands, len(node.meta["shape"]))


@register_rule(
    aten.clone,
    aten.contiguous,
    aten._to_copy,
    aten.detach,
    aten.detach_,
    aten.alias,
    aten.lift_fresh,
    aten.lift_fresh_copy,
    aten.bernoulli_,
    aten.bernoulli,
    aten.uniform_,
    aten.normal_,
    aten.fill_,
    aten.zero_,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.empty_like,
    aten.rand_like,
    aten.randn_like,
    aten.requires_grad_,
)
def same(walk: Walk, node: fx.Node, x: Value, *args: Any, **kwargs: Any) -> Layers:
    """The result has the positions of the input."""
    return x.layers


@register_rule(aten.native_dropout)
def native_dropout(walk: Walk, node: fx.Node, x: Value, *args: Any) -> list[Layers]:
    """Dropout with its mask."""
    return [x.layers, x.layers]


@register_rule(aten.log_sigmoid_forward)
def log_sigmoid(walk: Walk, node: fx.Node, x: Value) -> list[Layers]:
    """Returns a work buffer as well."""
    return [x.layers]


@register_rule(aten.glu)
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


@register_rule(aten.max_unpool2d, aten.max_unpool3d)
def max_unpool(walk: Walk, node: fx.Node, x: Value, indices: Value, *args: Any) -> Layers:
    """Values go back to where their maxima were, channel by channel."""
    spatial = range(2, x.ndim)
    sides = [Value(v.shape, walk.settle(v, spatial, "unpooled channels")) for v in (x, indices)]
    return walk.broadcast(sides, x.ndim)
