"""Which items a batch holds: images, texts. Rows of one item are not independent of each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.ranks import Ranks
from graphprune.record.batches import Batch

FOLDS = 4  # parts of the items; each is held out from a fit in turn
_FEWEST = 4  # items that a check needs
_MOST = 128  # and more than it needs
_FAR = 7919  # between the seeds of two batches
FEW = 16  # items from which some can be set apart for one


def count(batch: Batch) -> int | None:
    """How many items a batch has along the first dimension of all its tensors, if that is told."""
    sizes = {
        leaf.shape[0] if leaf.dim() else None
        for leaf in pytree.tree_leaves((batch.args, batch.kwargs))
        if isinstance(leaf, Tensor)
    }
    lists = any(isinstance(arg, tuple | list) for arg in (*batch.args, *batch.kwargs.values()))
    return sizes.pop() if len(sizes) == 1 and not lists else None


def part(batch: Batch, items: slice) -> Batch:
    """Some items of a batch that tells how many it has."""
    cut = pytree.tree_map_only(Tensor, lambda t: t[items], (batch.args, batch.kwargs))
    return Batch(cut[0], cut[1], ())


def set_apart(
    batches: Sequence[Batch], share: float, ranks: Ranks
) -> tuple[list[Batch], list[Batch], list[int]]:
    """Set items apart that no layer is fitted to.

    Whole batches where there are enough, evenly spaced; else the last items of every batch that
    can be split.

    Args:
        batches: all there is on this rank.
        share: of the items, at most one half.
        ranks: which have the others.

    Returns:
        Batches for the fit, and batches for a check of its result; without any of these on any
        rank, there are too few items for a check to mean anything; and the places of the first
        among those of all ranks.
    """
    sizes, places = ranks.in_turn([count(batch) or 1 for batch in batches])
    total = sum(sizes)
    if not share or total < FEW:
        return list(batches), [], places
    share = max(min(share, _MOST / total), _FEWEST / total)
    wanted = round(share * len(sizes))
    if wanted:
        step = len(sizes) / wanted
        chosen = {int((number + 0.5) * step) for number in range(wanted)}
        return (
            [batch for place, batch in zip(places, batches) if place not in chosen],
            [batch for place, batch in zip(places, batches) if place in chosen],
            [place for place in places if place not in chosen],
        )
    fit, check = [], []
    for batch in batches:
        items = count(batch) or 1
        leave = min(math.ceil(share * items), items // 2)
        fit.append(part(batch, slice(0, items - leave)) if leave else batch)
        if leave:
            check.append(part(batch, slice(items - leave, items)))
    return fit, check, places


def doubt(items: int) -> float:
    """How far a mean of squares of so few items is from the truth, as a fraction; 0: not few."""
    return 0.0 if items >= FEW else items**-0.5


class Folds:
    """Which part each row of an output belongs to, so that all rows of an item are in one part.

    Args:
        batches: that layers are fitted to.
        turns: of these batches, among those of all ranks.
        seed: of the assignment.
        ranks: which have the other batches.
    """

    def __init__(
        self, batches: Sequence[Batch], turns: Sequence[int], seed: int, ranks: Ranks
    ) -> None:
        self.counts, self.turns = [count(batch) for batch in batches], turns
        sizes, places = ranks.in_turn([items or 1 for items in self.counts], turns)
        total = sum(sizes)
        self.doubt = doubt(total)
        self.whole = total < 2  # a single item: its rows are all there is
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(total, generator=generator) % min(FOLDS, max(total, 2))
        parts = order.split(sizes)
        self.parts = [parts[place] for place in places]
        self.seeds = [seed + _FAR * place for place in places]  # of what is drawn for a batch

    def of(self, which: int, rows: Tensor, places: int) -> Tensor:
        """The part of each of some rows of a batch.

        Args:
            which: number of the batch.
            rows: numbers of rows.
            places: how many rows the batch has in all.
        """
        items = self.counts[which]
        if self.whole:  # in stretches
            return rows * FOLDS // max(places, 1)
        if items is None or places % items:
            return self.parts[which][:1].expand(len(rows))
        return self.parts[which][rows * items // places]
