"""What zeroed parameters make of an op: whether it breaks, and whether its result is zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphprune.ops.calls import args_of
from graphprune.ops.registry import op_of, packet_of

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


NOTHING = _packets("zeros", "zeros_like", "new_zeros")
_NORMS = {  # weight, bias
    aten.native_layer_norm: (2, 3),
    aten.native_group_norm: (1, 2),
    aten._fused_rms_norm: (2,),
    torch.ops.graphprune.layer_norm: (2, 3),
    torch.ops.graphprune.group_norm: (2, 3),
}
_RECURRENT = {aten.mkldnn_rnn_layer: tuple(range(1, 7))}  # weights, biases, and the first state
_MAIN: dict[object, int] = {
    aten.scaled_dot_product_attention: 2,
    aten.embedding: 0,
    aten.native_dropout: 0,
}
# Every channel by itself, in several places.
_MOVING = _packets(
    "gather", "index", "index_select", "roll", "pixel_shuffle", "pixel_unshuffle", "unfold",
    "channel_shuffle", "im2col", "col2im", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
    "upsample_trilinear3d", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", "sum", "mean", "as_strided",
    "split_copy", "contiguous", "view_as_complex", "view_as_real", "real", "imag", "_conj",
    "cumsum", "resolve_conj", "_unsafe_index", "grid_sampler_2d", "diagonal", "_reshape_alias",
    "_pack_padded_sequence", "_pad_packed_sequence", "glu", "unsafe_split",
    "unsafe_split_with_sizes", "split_with_sizes_copy", "unfold_copy", "view_copy", "triu", "tril",
)  # fmt: skip


def zero_by_channel(
    node: fx.Node,
    alone: Callable[[object], bool],
    together: Callable[[Any], bool],
    joined: Callable[[Any, int], bool],
) -> bool:
    """Whether the result of an op is zero in every channel of it whose parameters are.

    Args:
        node: an op.
        alone: whether an operand is, in all channels of the result.
        together: whether one or another of several operands is, in each of these channels.
        joined: whether all of several operands are, each in its part of a dimension.
    """
    op, packet, args = op_of(node), packet_of(node), args_of(node)
    if packet is None:  # an item of a list
        return alone(args[0])
    parameters = _parameters(node)
    if parameters is not None:
        return bool(parameters) and all(map(alone, parameters))
    if packet in (aten.mul, aten.mul_):
        return together(args[:2])
    if op.factors is not None and packet not in _MOVING:
        factors = op.factors(*args, **node.kwargs)
        return together(factors.operands) and (factors.bias is None or alone(factors.bias))
    if packet in _MAIN or packet in _MOVING or op.powers == (1, -1):
        return alone(args[_MAIN.get(packet, 0)])
    if packet in (aten.cat, aten.concat):
        return joined(args[0], args[1] if len(args) > 1 else 0)
    if packet in (aten.where, aten.lerp):
        return all(map(alone, args[1:3] if packet is aten.where else args[:2]))
    if packet is aten.constant_pad_nd:
        return alone(args[0]) and not (len(args) > 2 and args[2])
    given = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, fx.Node)]
    if not given or not all(map(alone, given)):
        return False
    return zero_of_zeroes(node)


def zero_of_zeroes(node: fx.Node) -> bool:
    """Whether the result of an op is zero where all of its operands are."""
    op = op_of(node)
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return op.linear or op.hull or (pointwise and _zero_of_zeroes(node))


def _parameters(node: fx.Node) -> list[Any] | None:
    """What makes the results of a norm or a recurrent layer zero; ``None`` for other ops."""
    op, packet, args = op_of(node), packet_of(node), args_of(node)
    if packet in _RECURRENT:
        return [args[place] for place in _RECURRENT[packet]]
    if packet in _NORMS:
        affine = [args[place] for place in _NORMS[packet] if place < len(args)]
    elif op.norm is not None:
        norm = op.norm(*args)
        affine = [norm.weight, norm.bias]
    else:
        return None
    return [] if affine[0] is None else [value for value in affine if value is not None]


def _zero_of_zeroes(node: fx.Node) -> bool:
    """Whether an op that works number by number makes zeroes of zeroes."""
    zero = torch.zeros(1, dtype=torch.float64)
    args, kwargs = fx.map_arg((args_of(node), dict(node.kwargs)), lambda _: zero.clone())
    function: Any = node.target
    try:
        found = function(*args, **kwargs)
    except Exception:  # not of one number: an op that is not known here
        return False
    return isinstance(found, torch.Tensor) and not bool(found.any())
