"""Branches that are concatenated: what leaves when groups lose their last channel.

A dense layer, a branch of an Inception block. Where every channel of an operand of a concatenation
leaves, the operand is not there any more, nor is what was computed for it alone. In the masked
original its channels are zero, with what readers do to them, as in any plan for channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import fx

from graphprune.channels.analysis import Analysis, Group
from graphprune.ops.fact import arguments
from graphprune.parts.stream import Narrowed, Stream, covers, is_getitem
from graphprune.plan.plan import GroupPlan, Plan
from graphprune.planning.settle import Settled, bare_plan
from graphprune.record.sizes import Settable


@dataclass
class Joined:
    """What is concatenated in a model, and which groups of channels that is.

    Args:
        stream: the recorded graph with the calls of its modules.
        settled: the groups, as another record of the same run tells them.
    """

    stream: Stream
    settled: Settled

    @property
    def analysis(self) -> Analysis:
        """The channel ids behind the groups."""
        return self.settled.analysis

    @cached_property
    def candidates(self) -> tuple[tuple[str, ...], ...]:
        """The groups without which an operand of a concatenation is not there, as it runs."""
        found: dict[tuple[str, ...], None] = {}
        for node in (node for node, twin in self._twins.items() if twin in self.stream.joins):
            for operand in node.all_input_nodes:
                groups = self._groups(operand, _dim_of(node))
                if groups:
                    found[groups] = None
        return tuple(groups for groups in found if self.narrowed(groups))

    @cached_property
    def _twins(self) -> dict[fx.Node, fx.Node]:
        """The nodes of the analysed record, and the same ones of the stream's."""
        own, others = self.analysis.records[0].ops, self.stream.record.ops
        if len(own) != len(others) or any(a.target != b.target for a, b in zip(own, others)):
            return {}
        twins = dict(zip(own, others))
        items = {node.args: node for node in self.stream.nodes if is_getitem(node)}
        for node in filter(is_getitem, self.analysis.records[0].graph.nodes):
            twin = items.get((twins.get(node.args[0]), node.args[1]))
            if twin is not None:
                twins[node] = twin
        return twins

    @cached_property
    def _named(self) -> dict[int, Group]:
        """The groups that may lose channels, by the labels of their units."""
        return {
            int(label): group for group in self.analysis.groups for label in group.units.tolist()
        }

    def _groups(self, operand: fx.Node, dim: int) -> tuple[str, ...]:
        """The groups whose channels an operand has; none where some of them must stay."""
        labels = {
            label
            for layer in self.analysis.values[operand].on(dim)
            for label in self.analysis.units.labels[layer.flatten().numpy()].tolist()
        }
        if not labels or not all(label in self._named for label in labels):
            return ()
        return tuple(sorted({self._named[label].name for label in labels}))

    def narrowed(self, groups: tuple[str, ...]) -> Narrowed | None:
        """The values of the stream that are narrower without some groups.

        ``None`` where something else than a concatenation reads one that has no channels.
        """
        if groups not in self._known:
            self._known[groups] = self._narrowed(groups)
        return self._known[groups]

    @cached_property
    def _known(self) -> dict[tuple[str, ...], Narrowed | None]:
        return {}

    def _narrowed(self, groups: tuple[str, ...]) -> Narrowed | None:
        alive = self._alive(groups)
        pruned = self.analysis.pruned(alive)
        dims: dict[fx.Node, frozenset[int]] = {}
        empty: dict[fx.Node, frozenset[int]] = {}
        for node, twin in self._twins.items():
            if node not in self.analysis.values:
                continue
            before, after = self.analysis.values[node].shape, pruned.shape(node)
            if before != after:
                pairs = list(enumerate(zip(before, after)))
                dims[twin] = frozenset(dim for dim, (old, new) in pairs if old != new)
                if 0 in after:
                    empty[twin] = frozenset(dim for dim, (old, new) in pairs if old > new == 0)
        for node in filter(is_getitem, list(empty)):  # an op with several results
            empty.setdefault(node.all_input_nodes[0], frozenset())
        found = Narrowed(dims, empty)
        needed = self.stream.needed({}, found)
        go_on = empty and needed.isdisjoint(empty) and self._whole(needed, alive)
        return found if go_on else None

    def _whole(self, needed: set[fx.Node], alive: np.ndarray) -> bool:
        """Whether every parameter that is needed keeps something of all its dimensions."""
        read = {str(node.target) for node in needed if node.op == "get_attr"}
        return all(
            alive[slot.start : slot.start + slot.size].any()
            for slot in self.analysis.slots
            if slot.tensor in read
        )

    def _alive(self, groups: Iterable[str]) -> np.ndarray:
        return self.analysis.alive({name: () for name in groups})

    def plan(self, groups: Sequence[str], gone: Sequence[str]) -> Plan | None:
        """The plan by which all channels of some groups leave; ``None`` if the code cannot follow.

        Args:
            groups: their names.
            gone: the modules that leave with them, in which no size needs to follow.
        """
        alive = self._alive(groups)
        solved = self.settled.changes(alive)
        places = (problem.node.meta.get("module", "") for problem in solved.problems)
        if not all(_lies_in(place, gone) for place in places):
            return None
        values: dict[Settable, float] = {
            leaf: new for leaf, new in solved.values.items() if not _lies_in(leaf.module, gone)
        }
        plan = bare_plan(self.analysis, alive, replace(solved, values=values))
        emptied = [
            GroupPlan(group.name, group.size, (), group.layers, group.exact)
            for group in self.analysis.groups
            if group.name in groups
        ]
        return replace(plan, groups=tuple(emptied), evaluated=True)


def _lies_in(module: str, roots: Sequence[str]) -> bool:
    return any(covers(root, module) for root in roots)


def _dim_of(node: fx.Node) -> int:
    """The dimension in which operands stand side by side."""
    dim: int = arguments(node.target, node.args, node.kwargs).get("dim", 0)
    return dim % len(node.meta["shape"])
