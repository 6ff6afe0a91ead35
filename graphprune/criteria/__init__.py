"""Importance of channels: one score for each, by name or by any callable.

A group, the weights and, where asked for, gradients or activations on batches enter; a score for
every channel leaves. It knows neither ops nor layers nor plans. Imports ``channels`` and
``record``.
"""

from graphprune.criteria.activations import Apoz, MeanActivation, TaylorActivation, Wanda
from graphprune.criteria.evidence import (
    Collector,
    Evidence,
    check_needs,
    gather,
    register_statistic,
    statistics,
)
from graphprune.criteria.gradients import Fisher, Taylor
from graphprune.criteria.magnitude import (
    BatchNormScale,
    GeometricMedian,
    GroupNorm,
    Lamp,
    Magnitude,
    Random,
)
from graphprune.criteria.reconstruction import Auto, Reconstruction
from graphprune.criteria.registry import (
    Criterion,
    Unseen,
    criteria,
    find,
    name_of,
    register_criterion,
)
from graphprune.criteria.scoring import AGGREGATES, NORMALISATIONS, comparable, scores

__all__ = [
    "AGGREGATES",
    "NORMALISATIONS",
    "Apoz",
    "Auto",
    "BatchNormScale",
    "Collector",
    "Criterion",
    "Evidence",
    "Fisher",
    "GeometricMedian",
    "GroupNorm",
    "Lamp",
    "Magnitude",
    "MeanActivation",
    "Random",
    "Reconstruction",
    "Taylor",
    "TaylorActivation",
    "Unseen",
    "Wanda",
    "check_needs",
    "comparable",
    "criteria",
    "find",
    "gather",
    "name_of",
    "register_criterion",
    "register_statistic",
    "scores",
    "statistics",
]
