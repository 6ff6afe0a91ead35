"""Where zeroed parameters break an op: it divides by them, or takes their logarithm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphprune.ops.calls import args_of

aten = torch.ops.aten


def _packets(*names: str) -> frozenset[object]:
    return frozenset(getattr(aten, name) for name in names)


# Ops that are infinite, or have an infinite slope, where this argument is zero.
_SINGULAR = {
    **dict.fromkeys(_packets("div", "div_", "atan2", "fmod", "remainder", "floor_divide"), 1),
    **dict.fromkeys(_packets("reciprocal", "reciprocal_", "rsqrt", "rsqrt_", "sqrt", "sqrt_"), 0),
    **dict.fromkeys(_packets("log", "log_", "log2", "log10", "logit", "pow", "pow_"), 0),
    aten.xlogy: 1,
}
# Zero for zeroes.
_UNARY = _packets(
    "relu", "relu_", "gelu", "silu", "silu_", "tanh", "tanh_", "abs", "neg", "square", "sqrt",
    "sqrt_", "sin", "erf", "leaky_relu", "leaky_relu_", "elu", "hardswish", "hardswish_", "mish",
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "unsqueeze",
    "squeeze", "slice", "select", "clone", "_to_copy", "detach", "alias", "flip", "repeat", "sum",
    "mean", "split", "split_with_sizes", "chunk", "unbind", "avg_pool2d", "upsample_nearest2d",
)  # fmt: skip
_PRODUCTS = _packets("mul", "mul_", "mm", "bmm", "matmul")  # zero when one of two is
_SUMS = _packets("add", "add_", "sub", "sub_", "cat", "stack", "maximum", "minimum")  # when all are
_LAYERS = {aten.linear: (1, 2), aten.convolution: (1, 2), aten.addmm: (2, 0)}  # weight, bias
_FAR = 300  # how many values are looked at, before the op is taken not to break


def breaks(node: fx.Node) -> fx.Node | None:
    """What an op reads that vanishes with its parameters, where it cannot stand that."""
    place = _SINGULAR.get(getattr(node.target, "overloadpacket", None))
    if place is None or place >= len(node.args):
        return None
    if getattr(node.target, "overloadpacket", None) in (aten.pow, aten.pow_):
        exponent = node.args[1]
        if isinstance(exponent, int | float) and exponent >= 1:
            return None
    source = node.args[place]
    return source if isinstance(source, fx.Node) and vanishes(source) else None


def vanishes(node: object, known: dict[fx.Node, bool] | None = None) -> bool:
    """Whether a value is zero wherever the parameters that make it are."""
    if not isinstance(node, fx.Node):
        return False
    known = {} if known is None else known
    if node not in known and len(known) > _FAR:
        return False
    if node not in known:
        known[node] = _vanishes(node, lambda other: vanishes(other, known))
    return known[node]


def _vanishes(node: fx.Node, zero: Callable[[Any], bool]) -> bool:
    if node.op != "call_function":
        return node.op == "get_attr" and not str(node.target).startswith("constant_")
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _LAYERS:
        weight, bias = (node.args[n] if n < len(node.args) else None for n in _LAYERS[packet])
        return zero(weight) and (bias is None or zero(bias))
    if packet in _PRODUCTS:
        return any(map(zero, node.args[:2]))
    if packet in _SUMS:
        operands = args_of(node)[0] if packet in (aten.cat, aten.stack) else node.args[:2]
        return all(map(zero, operands))
    if packet in _UNARY or packet in (aten.div, aten.div_) or packet is None:  # an item of a list
        return bool(node.args) and zero(node.args[0])
    return False


_OVER_CHANNELS = _packets("sum", "mean")
_NORMS = {  # weight, bias
    aten.native_layer_norm: (2, 3),
    aten.native_group_norm: (1, 2),
    aten.native_batch_norm: (1, 2),
    aten._native_batch_norm_legit: (1, 2),
    aten._native_batch_norm_legit_no_training: (1, 2),
}


def zero_by_channel(
    node: object, channels: Callable[[fx.Node], bool], known: dict[fx.Node, bool] | None = None
) -> bool:
    """Whether a value is zero in every channel whose slices of parameters are zero.

    Args:
        node: a value.
        channels: whether a parameter has channels that may leave.
        known: what was found before.
    """
    if not isinstance(node, fx.Node):
        return False
    known = {} if known is None else known
    if node in known or len(known) > _FAR:
        return known.get(node, False)
    packet = getattr(node.target, "overloadpacket", None)

    def zero(other: object) -> bool:
        return zero_by_channel(other, channels, known)

    if node.op == "get_attr":
        found = _vanishes(node, zero) and channels(node)
    elif packet in (aten.pow, aten.pow_):
        power = node.args[1]
        found = isinstance(power, int | float) and power > 0 and zero(node.args[0])
    elif packet is aten.embedding:
        found = zero(node.args[0])
    elif packet in _NORMS:
        found = all(zero(node.args[place]) for place in _NORMS[packet])
    else:
        found = packet not in _OVER_CHANNELS and _vanishes(node, zero)
    known[node] = found
    return found
