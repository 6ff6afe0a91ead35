"""What each ATen op means, declared once and read by everything else.

An op of a recorded graph enters; what leaves is knowledge about it: which channels it ties, the
sizes it was given, what it costs, what it makes of constants, its statistics when channels left.
One file holds a family of ops with all that is known of them. Imports nothing of the package but
``errors``: no model, no record, no plan.
"""

from graphprune.ops import (
    attention,
    batch_norm,
    contraction,
    convolution,
    exact_norms,
    exact_shares,
    gathering,
    joining,
    normalisation,
    pointwise,
    pooling,
    recurrence,
    reduction,
    reshaping,
    sources,
    spectral,
    sums,
    systems,
)
from graphprune.ops.check import check
from graphprune.ops.fact import Fact
from graphprune.ops.factors import Factors
from graphprune.ops.registry import Op, declare, forget, free, op_of, zeroes
from graphprune.ops.values import Reason, Value
from graphprune.ops.walk import Walk

__all__ = [
    "Fact",
    "Factors",
    "Op",
    "Reason",
    "Value",
    "Walk",
    "attention",
    "batch_norm",
    "check",
    "contraction",
    "convolution",
    "declare",
    "exact_norms",
    "exact_shares",
    "forget",
    "free",
    "gathering",
    "joining",
    "normalisation",
    "op_of",
    "pointwise",
    "pooling",
    "recurrence",
    "reduction",
    "reshaping",
    "sources",
    "spectral",
    "sums",
    "systems",
    "zeroes",
]
