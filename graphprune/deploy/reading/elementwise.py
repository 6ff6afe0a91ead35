"""Operators that work element by element, and those that reduce: tables."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from graphprune.deploy.reading import functions
from graphprune.deploy.reading.builder import Builder, Value
from graphprune.deploy.reading.document import DTYPES, Node

Converter = Callable[[Builder, Node], Any]

OF_ONE: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Asin": torch.asin, "Atan": torch.atan,
    "Ceil": torch.ceil, "Cos": torch.cos, "Erf": torch.erf, "Exp": torch.exp,
    "Floor": torch.floor, "HardSwish": F.hardswish, "IsInf": torch.isinf, "IsNaN": torch.isnan,
    "Log": torch.log, "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round,
    "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Softplus": F.softplus,
    "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip

# Python's operators, which take numbers on either side.
OF_TWO: dict[str, Callable[..., Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": functions.div,
    "Pow": operator.pow, "Equal": operator.eq, "Greater": operator.gt,
    "GreaterOrEqual": operator.ge, "Less": operator.lt, "LessOrEqual": operator.le,
    "And": operator.and_, "Or": operator.or_, "Xor": operator.xor,
}  # fmt: skip

# Function of a tensor with settings: (function, attributes with defaults by argument).
WITH_SETTINGS: dict[str, tuple[Callable[..., Any], dict[str, tuple[str, float]]]] = {
    "Celu": (F.celu, {"alpha": ("alpha", 1.0)}),
    "Elu": (F.elu, {"alpha": ("alpha", 1.0)}),
    "LeakyRelu": (F.leaky_relu, {"negative_slope": ("alpha", 0.01)}),
    "ThresholdedRelu": (functions.thresholded, {"alpha": ("alpha", 1.0)}),
}

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax,
    "ReduceMin": torch.amin, "ReduceL1": functions.norm_of_one, "ReduceL2": functions.norm_of_two,
    "ReduceLogSumExp": torch.logsumexp, "ReduceSumSquare": functions.sum_of_squares,
}  # fmt: skip


def of_one(function: Callable[..., Any]) -> Converter:
    """A converter for a function of one tensor."""
    return lambda b, node: b.call(function, b.tensor(node.inputs[0], node))


def of_two(function: Callable[..., Any]) -> Converter:
    """A converter for an operator between two values."""

    def convert(b: Builder, node: Node) -> fx.Node:
        left, right = (b.operand(name, node) for name in node.inputs)
        if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
            left = b.tensor(node.inputs[0], node)
        return b.call(function, left, right)

    return convert


def with_settings(name: str) -> Converter:
    """A converter for a function with settings."""
    function, settings = WITH_SETTINGS[name]

    def convert(b: Builder, node: Node) -> fx.Node:
        given = {key: float(node.attributes.get(own, x)) for key, (own, x) in settings.items()}
        return b.call(function, b.tensor(node.inputs[0], node), **given)

    return convert


def reduced(function: Callable[..., Any]) -> Converter:
    """A converter for a reduction; until opset 17 the axes are an attribute."""

    def convert(b: Builder, node: Node) -> fx.Node:
        x = b.tensor(node.inputs[0], node)
        axes = b.known(node, "axes", 1)
        if not axes and node.attributes.get("noop_with_empty_axes", 0):
            return x
        axes = list(axes) if axes else list(range(b.rank(node, node.inputs[0])))
        return b.call(function, x, axes, keepdim=bool(node.attributes.get("keepdims", 1)))

    return convert


def clip(b: Builder, node: Node) -> fx.Node:
    """Bounds are attributes until opset 10."""
    low, high = b.known(node, "min", 1), b.known(node, "max", 2)
    x = b.tensor(node.inputs[0], node)
    if (low, high) == (0, 6):
        return b.call(F.relu6, x)
    return b.call(torch.clamp, x, low, high) if (low, high) != (None, None) else x


def hard_sigmoid(b: Builder, node: Node) -> fx.Node:
    """``max(0, min(1, alpha * x + beta))``: torch's own for the usual numbers."""
    alpha, beta = node.attributes.get("alpha", 0.2), node.attributes.get("beta", 0.5)
    x = b.tensor(node.inputs[0], node)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return b.call(F.hardsigmoid, x)
    return b.call(functions.hard_sigmoid, x, float(alpha), float(beta))


def gelu(b: Builder, node: Node) -> fx.Node:
    """Exact, or by tanh."""
    kind = node.attributes.get("approximate", b"none")
    kind = kind.decode() if isinstance(kind, bytes) else kind
    return b.call(F.gelu, b.tensor(node.inputs[0], node), approximate=kind)


def softmax(b: Builder, node: Node) -> fx.Node:
    """Along one axis; until opset 12 over all from an axis on."""
    log = node.op == "LogSoftmax"
    x = b.tensor(node.inputs[0], node)
    if b.opset < 13:
        axis, rank = node.attributes.get("axis", 1), b.rank(node, node.inputs[0])
        if axis % rank != rank - 1:
            return b.call(functions.softmax_of_matrix, x, axis, log)
    axis = node.attributes.get("axis", -1 if b.opset >= 13 else 1)
    return b.call(torch.log_softmax if log else torch.softmax, x, axis)


def cast(b: Builder, node: Node) -> fx.Node:
    """To another dtype."""
    kind = node.attributes["to"]
    if kind not in DTYPES:
        raise b.refused(node, f"torch has no type for number {kind} of ONNX's")
    return b.method("to", b.tensor(node.inputs[0], node), DTYPES[kind])


def where(b: Builder, node: Node) -> fx.Node:
    """One of two by a condition."""
    condition, *names = node.inputs
    yes, no = (b.operand(name, node) for name in names)
    if not isinstance(yes, fx.Node) and not isinstance(no, fx.Node):
        yes = b.tensor(names[0], node)  # which says the dtype
    return b.call(torch.where, b.tensor(condition, node), yes, no)


def extreme(function: Callable[..., Any], bound: str, among: Callable[..., Any]) -> Converter:
    """The largest or smallest of several; numbers among them are a bound of the others."""

    def convert(b: Builder, node: Node) -> fx.Node:
        values = [b.operand(name, node) for name in node.inputs]
        plain = [value for value in values if not isinstance(value, fx.Node)]
        tensors = [value for value in values if isinstance(value, fx.Node)]
        found = reduce(lambda x, y: b.call(function, x, y), tensors)
        return b.call(torch.clamp, found, **{bound: among(plain)}) if plain else found

    return convert


def added(b: Builder, node: Node) -> Any:
    """The sum of several."""
    values = [b.operand(name, node) for name in node.inputs]
    return reduce(lambda x, y: b.call(operator.add, x, y), values)


def same(b: Builder, node: Node) -> Value:
    """Itself."""
    return b.values[node.inputs[0]]


def dropout(b: Builder, node: Node) -> Value:
    """Itself, as in eval mode."""
    mode = node.input(2)
    training = b.constant(mode) if mode else None
    if mode and (training is None or bool(training.any())):
        raise b.refused(node, "it is in training mode: export the model in eval mode")
    return same(b, node)


def prelu(b: Builder, node: Node) -> fx.Node:
    """A slope for each channel."""
    x, slope = (b.operand(name, node) for name in node.inputs)
    return b.call(functions.prelu, x, slope)


def counted(b: Builder, node: Node) -> fx.Node:
    """Numbers in a row."""
    given = [b.operand(name, node) for name in node.inputs]
    return b.call(functions.count, *given, b.first)


TABLE: dict[str, Converter] = {
    **{op: of_one(function) for op, function in OF_ONE.items()},
    **{op: of_two(function) for op, function in OF_TWO.items()},
    **{op: with_settings(op) for op in WITH_SETTINGS},
    **{op: reduced(function) for op, function in REDUCTIONS.items()},
    "Cast": cast, "Clip": clip, "Dropout": dropout, "Gelu": gelu, "HardSigmoid": hard_sigmoid,
    "Identity": same, "LogSoftmax": softmax, "Max": extreme(torch.maximum, "min", max),
    "Min": extreme(torch.minimum, "max", min), "PRelu": prelu, "Range": counted,
    "Softmax": softmax, "Sum": added, "Where": where,
}  # fmt: skip
