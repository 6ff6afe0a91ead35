"""What generic readers ask of a recorded op: its cost, the factors of a product, its constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from graphprune.ops.batch_norm import Norm
from graphprune.ops.factors import Factors
from graphprune.ops.ids import Shape
from graphprune.ops.registry import Op, free, op_of

ShapeOf = Callable[[fx.Node], Shape]


def factors_of(node: fx.Node) -> Factors | None:
    """What a product multiplies; ``None`` for other ops."""
    rule = op_of(node).factors
    return None if rule is None else rule(*node.args, **node.kwargs)


def matrix_of(node: object) -> Factors | None:
    """The factors of a linear layer or a convolution; ``None`` for other ops."""
    factors = factors_of(node) if isinstance(node, fx.Node) else None
    return factors if factors is not None and factors.matrix else None


def norm_of(node: fx.Node) -> Norm | None:
    """The arguments of a BatchNorm, in whichever spelling; ``None`` for other ops."""
    rule = op_of(node).norm
    return None if rule is None else rule(*node.args)


def multiplies(node: fx.Node) -> bool:
    """Whether an op costs multiply-accumulates."""
    op = op_of(node)
    return op.macs is not free and (op.macs is not None or op.factors is not None)


def uncounted(node: fx.Node) -> bool:
    """Whether it is not known what an op costs."""
    op = op_of(node)
    return op.macs is None and op.factors is None


def macs_of(node: fx.Node, shape: ShapeOf) -> Any:
    """The multiply-accumulates of an op, from the shapes of its values; 0 where it does not run."""
    op = op_of(node)
    if node.meta.get("beside") or not multiplies(node):
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), shape)
    first = node if "shape" in node.meta else node.meta["items"].get(0)
    out = None if first is None else shape(first)
    if op.macs is not None:
        return op.macs(out, *args, **kwargs)
    assert op.factors is not None
    return op.factors(*args, **kwargs).macs(out)


def fact_rule(op: Op) -> Callable[..., Any] | None:
    """What an op does to facts: declared, or that of its factors."""
    if op.fact is not None or op.factors is None:
        return op.fact
    factors = op.factors
    return lambda _, *args, **kwargs: factors(*args, **kwargs).fact()


def run_on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an op on meta tensors; some of torch's own kernels take a millisecond there."""
    rule = op_of(func).meta
    if rule is not None and not func._overloadname.endswith("out"):
        out = rule(*args, **kwargs)
        if out is not NotImplemented:
            return out
    return func(*args, **kwargs)
