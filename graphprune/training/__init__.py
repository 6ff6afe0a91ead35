"""Prune and retrain: parts that fit the user's own training loop."""

from graphprune.training.optimizers import follow
from graphprune.training.pruner import Pruner, Update
from graphprune.training.regularise import (
    GroupLasso,
    Growing,
    Growth,
    Regulariser,
    Slimming,
    SparseLearning,
)
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
    "GroupLasso",
    "Growing",
    "Growth",
    "Pruner",
    "Regulariser",
    "Schedule",
    "Slimming",
    "SparseLearning",
    "Update",
    "cubic",
    "exponential",
    "follow",
    "iterative",
    "linear",
    "one_shot",
    "polynomial",
]
