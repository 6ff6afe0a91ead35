"""What each ATen op does to channels: one table, keyed by the op."""

from graphprune.rules import (
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
from graphprune.rules.base import Walk
from graphprune.rules.registry import Reason, Value, register_rule, registered

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
