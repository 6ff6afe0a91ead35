"""What each ATen op does to channels: one table, keyed by the op."""

from graphprune.ops.rules import (
    contraction,
    gathering,
    movement,
    normalisation,
    pointwise,
    products,
    recurrence,
    reduction,
    sources,
    spectral,
)
from graphprune.ops.rules.base import Walk
from graphprune.ops.rules.registry import Reason, Value, register_rule, registered

__all__ = [
    "Reason",
    "Value",
    "Walk",
    "contraction",
    "gathering",
    "movement",
    "normalisation",
    "pointwise",
    "products",
    "recurrence",
    "reduction",
    "register_rule",
    "registered",
    "sources",
    "spectral",
]
