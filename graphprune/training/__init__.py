"""Prune and retrain: parts that fit the user's own training loop."""

from graphprune.training.history import Entry, History
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
from graphprune.training.rounds import Outcome, iterate
from graphprune.training.schedules import (
    Schedule,
    cubic,
    exponential,
    iterative,
    linear,
    one_shot,
    polynomial,
)
from graphprune.training.semi_structured import to_semi_structured
from graphprune.training.sparse import (
    LayerSparsity,
    NMStructured,
    Sparsity,
    make_permanent,
    sparsify,
    sparsity_of,
)
from graphprune.training.sparse_pruner import SparsePruner

__all__ = [
    "Entry",
    "GroupLasso",
    "Growing",
    "Growth",
    "History",
    "LayerSparsity",
    "NMStructured",
    "Outcome",
    "Pruner",
    "Regulariser",
    "Schedule",
    "Slimming",
    "SparseLearning",
    "SparsePruner",
    "Sparsity",
    "Update",
    "cubic",
    "exponential",
    "follow",
    "iterate",
    "iterative",
    "linear",
    "make_permanent",
    "one_shot",
    "polynomial",
    "sparsify",
    "sparsity_of",
    "to_semi_structured",
]
