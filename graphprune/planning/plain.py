"""Where what an op sums over is zero when the parameters of channels are, and where it is not.

The reference masks what ops read. A sum over ``sigmoid(h)`` is then one over the kept channels,
whereas zeroed parameters leave a half for each that left. ``exact_only=True`` asks for the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from torch import Tensor, fx

from graphprune.channels.analysis import Analysis, Group
from graphprune.ops.registry import op_of, packet_of
from graphprune.ops.vanishing import NOTHING, zero_by_channel


class Plain:
    """Which values are zero in every channel of theirs whose slices of parameters are.

    Args:
        graph: the analysed model.
    """

    def __init__(self, graph: Analysis) -> None:
        self.graph = graph
        self._labels: dict[fx.Node, np.ndarray] = {}

    @cached_property
    def zero(self) -> set[fx.Node]:
        """These values."""
        found: set[fx.Node] = set()
        for record in self.graph.records:
            for node in record.graph.nodes:
                if self._is_zero(node, found):
                    found.add(node)
        return found

    def _is_zero(self, node: fx.Node, found: set[fx.Node]) -> bool:
        if node.op == "get_attr":
            return not str(node.target).startswith("constant_") and self.labels(node).size > 0
        if node.op != "call_function" or packet_of(node) in NOTHING:
            return packet_of(node) in NOTHING
        mine = self.labels(node)

        def covered(operands: Sequence[fx.Node], asked: np.ndarray = mine) -> bool:
            if any(packet_of(operand) in NOTHING for operand in operands):
                return True
            for operand in operands:
                asked = np.setdiff1d(asked, self.labels(operand), assume_unique=True)
            return not asked.size

        def alone(operand: object) -> bool:
            return isinstance(operand, fx.Node) and operand in found and covered([operand])

        def together(operands: tuple[object, ...]) -> bool:
            return covered([o for o in operands if isinstance(o, fx.Node) and o in found])

        def joined(parts: Sequence[fx.Node], dim: int) -> bool:
            layers = [ids for ids in self.graph.values[node].layers if ids.shape[dim] == 1]
            every = self._removable(layers)
            return found.issuperset(parts) and all(covered([part], every) for part in parts)

        return mine.size > 0 and zero_by_channel(node, alone, together, joined)

    def labels(self, node: fx.Node) -> np.ndarray:
        """The removable units that a value has channels of."""
        if node not in self._labels:
            values = self.graph.values
            parts = [n for n in (node, *node.meta.get("items", {}).values()) if n in values]
            self._labels[node] = self._removable([ids for n in parts for ids in values[n].layers])
        return self._labels[node]

    def _removable(self, layers: Sequence[Tensor]) -> np.ndarray:
        units, flat = self.graph.units, [ids.reshape(-1).numpy() for ids in layers]
        labels = np.unique(units.labels[np.concatenate([np.zeros(0, np.int64), *flat])])
        return labels[~units.frozen[labels]]

    @cached_property
    def other(self) -> np.ndarray:
        """The units of which an op sums something up that zeroed parameters do not zero."""
        marks, units = self.graph.marks, self.graph.units
        found = [np.zeros(0, np.int64)]
        for node in marks.readers:
            asked = np.unique(units.labels[marks.masked_ids(node)])
            mine = [n for n in node.all_input_nodes if np.isin(asked, self.labels(n)).any()]
            zero = [n for n in mine if n in self.zero]
            product = op_of(node).factors is not None
            for operand in () if product and zero else mine:
                if operand not in self.zero:
                    found.append(np.intersect1d(asked, self.labels(operand)))
        return np.unique(np.concatenate(found))

    def covers(self, group: Group) -> bool:
        """Whether all that is summed over the channels of a group is zero with its parameters."""
        return not np.isin(group.units, self.other).any()
