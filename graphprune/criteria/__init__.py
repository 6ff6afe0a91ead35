"""Importance of channels."""

from graphprune.criteria.magnitude import l1, l2, random
from graphprune.criteria.registry import Criterion, criteria, register_criterion, scores

__all__ = ["Criterion", "criteria", "l1", "l2", "random", "register_criterion", "scores"]
