"""Prune and retrain: parts that fit the user's own training loop.

The user's model, optimizer and loop enter; schedules, masks, rounds, distillation and reports help
it along; ``search`` looks for the smallest model that loses at most so much. All pruning is asked
of ``api``. The user and the command line import it.
"""

from graphprune.training.distil import Distillation, divergence
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
from graphprune.training.rewind import RewindPoint
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
from graphprune.training.tickets import Lottery, lottery

__all__ = [
    "Distillation",
    "Entry",
    "GroupLasso",
    "Growing",
    "Growth",
    "History",
    "LayerSparsity",
    "Lottery",
    "NMStructured",
    "Outcome",
    "Pruner",
    "Regulariser",
    "RewindPoint",
    "Schedule",
    "Slimming",
    "SparseLearning",
    "SparsePruner",
    "Sparsity",
    "Update",
    "cubic",
    "divergence",
    "exponential",
    "follow",
    "iterate",
    "iterative",
    "linear",
    "lottery",
    "make_permanent",
    "one_shot",
    "polynomial",
    "sparsify",
    "sparsity_of",
    "to_semi_structured",
]
