"""What rules say of channels beside how they are tied."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.ops.ids import Alternatives, Ties
from graphprune.ops.values import Reason


class Statistics(NamedTuple):
    """Ids whose removal changes statistics, why, and the op that takes them, if one does."""

    ids: Tensor
    reason: Reason
    node: fx.Node | None


@dataclass
class Marks:
    """Rules write here, by way of the walk; whoever wants to know of it asks.

    Attributes:
        grids: layers that vary along several dimensions, and those along which no row leaves alone.
        aligned: parts that must stay equally large: the first ones, and all of them.
        choices: decisions between several ways to tie, left until the walk is over.
        statistics: ids whose removal changes statistics.
        alone: ids of one group of a norm without further places: of one alone, it is a constant.
        reads: ids of parameters that are contracted away: of reading slots.
        written: ids that a parameter makes in a product.
        stacked: ids of parameters with more than two dimensions that meet others: of experts.
        combined: ids of parameters that are read together.
        renumbered: ids that the numbers in a buffer name.
        softmaxes: ids that a softmax runs over.
        rows: ids of tables that some op reads, slice by slice.
        other_rows: those beside such a slice, which may be read for other inputs.
        readers: ops that sum over channels.
        masked: ids that zeroed parameters do not zero in what an op reads.
    """

    grids: list[tuple[Tensor, frozenset[int]]] = field(default_factory=list)
    aligned: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    choices: list[Alternatives] = field(default_factory=list)
    statistics: list[Statistics] = field(default_factory=list)
    alone: list[Tensor] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)
    stacked: list[Tensor] = field(default_factory=list)
    combined: list[list[Tensor]] = field(default_factory=list)
    renumbered: dict[str, Tensor] = field(default_factory=dict)
    softmaxes: list[tuple[Tensor, Reason]] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    other_rows: list[tuple[Tensor, Reason]] = field(default_factory=list)
    readers: set[fx.Node] = field(default_factory=set)
    masked: dict[fx.Node, list[Tensor]] = field(default_factory=dict)

    def sums(self, node: fx.Node) -> bool:
        """Whether an op sums over channels: the reference zeroes what it reads."""
        return node in self.readers

    def masked_ids(self, node: fx.Node | None = None) -> np.ndarray:
        """The ids that zeroed parameters do not zero in what an op, or any op, reads."""
        found = [self.masked.get(node, [])] if node is not None else self.masked.values()
        return _flat([ids for layers in found for ids in layers]).numpy()

    def read_ids(self, size: int) -> np.ndarray:
        """For each of so many ids whether it belongs to a reading slot."""
        reads = np.zeros(size, bool)
        reads[_flat(self.reads).numpy()] = True
        for layers in reversed(self.combined):
            if any(reads[ids.numpy()].all() for ids in layers):
                for ids in layers:
                    reads[ids.numpy()] = True
        return reads

    def finish(self, ties: Ties) -> None:
        """Freeze what is known to stay only when all ops were seen."""
        self._keep_rows(ties)
        self._keep_routers(ties)

    def _keep_rows(self, ties: Ties) -> None:
        """Rows of tables that no op reads here stay."""
        rows = _flat(self.rows)
        for ids, reason in self.other_rows:
            left = ids[torch.isin(ids, rows, invert=True)]
            if left.numel():
                ties.freeze(left, reason)

    def _keep_routers(self, ties: Ties) -> None:
        """A softmax runs over the kept channels; positions and the experts of a router stay."""
        if not self.softmaxes:
            return
        labels = torch.from_numpy(ties.components())
        channels, experts = (labels[_flat(found)] for found in (self.written, self.stacked))
        for layer, reason in self.softmaxes:
            ids = layer.flatten()
            free = torch.isin(labels[ids], channels) & ~torch.isin(labels[ids], experts)
            ties.freeze(ids[~free], reason)


def _flat(layers: list[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(ids.flatten() for ids in layers)])
