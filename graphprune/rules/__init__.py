"""What each ATen op does to channels: one table, keyed by the op."""

from graphprune.rules import contraction, movement, normalisation, pointwise, reduction, sources
from graphprune.rules.base import Reason, Value, Walk, register_rule, registered

__all__ = [
    "Reason",
    "Value",
    "Walk",
    "contraction",
    "movement",
    "normalisation",
    "pointwise",
    "reduction",
    "register_rule",
    "registered",
    "sources",
]
