"""What each ATen op does to channels: one table, keyed by the op."""

from graphprune.rules import (
    contraction,
    movement,
    normalisation,
    pointwise,
    products,
    reduction,
    sources,
)
from graphprune.rules.base import Walk
from graphprune.rules.registry import Reason, Value, register_rule, registered

__all__ = [
    "Reason",
    "Value",
    "Walk",
    "contraction",
    "movement",
    "normalisation",
    "pointwise",
    "products",
    "reduction",
    "register_rule",
    "registered",
    "sources",
]
