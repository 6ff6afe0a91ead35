"""Prune and retrain: parts that fit the user's own training loop."""

from graphprune.training.optimizers import follow
from graphprune.training.pruner import Pruner, Update
from graphprune.training.schedules import (
    Schedule,
    cubic,
    exponential,
    iterative,
    linear,
    one_shot,
    polynomial,
)

__all__ = [
    "Pruner",
    "Schedule",
    "Update",
    "cubic",
    "exponential",
    "follow",
    "iterative",
    "linear",
    "one_shot",
    "polynomial",
]
