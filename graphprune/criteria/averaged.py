"""Criteria of several processes: what each makes of its own data, averaged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphprune.channels.analysis import Group
from graphprune.criteria.registry import Criterion, Unseen, find, name_of
from graphprune.ranks import Ranks


def averaged(criterion: str | Criterion, ranks: Ranks) -> str | Criterion:
    """The same criterion, with its scores averaged over the ranks."""
    return criterion if ranks.size == 1 else Averaged(criterion, ranks)


class Averaged:
    """A criterion whose scores are the mean over all ranks, each of which sees other data."""

    def __init__(self, criterion: str | Criterion, ranks: Ranks) -> None:
        entry = find(criterion)
        self.function = entry.function
        self.ranks = ranks
        self.__name__ = name_of(criterion)
        self.needs = entry.needs
        self.aggregate = entry.aggregate
        self.comparable = entry.comparable
        self.scope, self.normalise = entry.scope, entry.normalise

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [channels] or [slots, channels].

        Raises:
            Unseen: one of the ranks cannot judge the group.
        """
        unseen = ""
        scores = torch.zeros(group.size)
        try:
            scores = self.function(group, tensors, generator)
        except Unseen as reason:
            unseen = str(reason)
        first = next(filter(None, self.ranks.share(unseen)), "")
        if first:
            raise Unseen(first)
        return self.ranks.mean(scores)
