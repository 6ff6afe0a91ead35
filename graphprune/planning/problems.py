"""Sizes that could not be changed as a plan needs it: channels then stay, or are tied."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from graphprune.channels.analysis import Analysis
from graphprune.ops.rules import Reason
from graphprune.record.sizes import Expression, extents

Place = tuple[fx.Node, int]  # a dimension of a value


@dataclass(frozen=True)
class Problem:
    """A size that could not be changed as a plan needs it.

    A ``position`` (the index of a channel) must be right: no run shows whether it is.
    """

    node: fx.Node
    old: float
    new: float
    expression: Expression
    position: bool = False
    place: Place | None = None  # what the size measures
    rivals: tuple[Place, ...] = ()  # what else the same attribute measures
    layers: tuple[Tensor, ...] = ()  # what to freeze, when that is known

    @property
    def literal(self) -> bool:
        """Whether the size was a plain int: a literal, or computed where we could not follow."""
        return isinstance(self.expression, int) and not self.position and not self.layers

    @property
    def owner(self) -> str:
        """The module whose code gives the size."""
        return str(self.node.meta.get("module", ""))

    @property
    def reason(self) -> Reason:
        """For reports."""
        old = int(self.old) if self.old == int(self.old) else self.old
        return Reason(f"size {old} cannot be changed", self.owner, self.node.meta.get("line"))


def ids_around(graph: Analysis, node: fx.Node) -> list[Tensor]:
    """All layers an op reads or makes, for freezing."""
    layers = list(graph.values[node].layers) if node in graph.values else []
    for other in (*node.all_input_nodes, *node.meta.get("items", {}).values()):
        if other in graph.values:
            layers.extend(graph.values[other].layers)
    return layers


def freeze(graph: Analysis, problem: Problem) -> bool:
    """Freeze the channels that a size depends on; whether that changed anything."""
    layers = [*problem.layers]
    if not layers:
        layers = ids_around(graph, problem.node)
        for extent in extents(problem.expression):
            value = graph.values[extent.node]
            layers += [layer for layer in value.layers if layer.shape[extent.dim] > 1]
    others = [layer for node, dim in problem.rivals for layer in graph.values[node].on(dim)]
    for candidates in (layers, others):
        moving = [i for i in candidates if not graph.units.frozen[graph.units.labels[i]].all()]
        for layer in moving:
            graph.freeze(layer, problem.reason)
        if moving:
            return True
    return False


def _lines(graph: Analysis, place: Place) -> list[Tensor]:
    """The ids along a dimension; of a grid (heads x width) those of its first row."""
    node, dim = place
    return [
        layer[tuple(slice(None) if d == dim else 0 for d in range(layer.dim()))]
        for layer in graph.values[node].on(dim)
    ]


def unite(graph: Analysis, problem: Problem) -> bool:
    """Tie two dimensions of one size that one attribute measures; whether that changed anything.

    Queries, keys and values of a single head, say, that are all viewed with ``self.head_dim``.
    """
    for rival in problem.rivals:
        sides = []
        for place in (problem.place, rival):
            lines = _lines(graph, place) if place is not None else []
            sides.append(lines[0] if lines else None)
        a, b = sides
        if a is not None and b is not None and a.shape == b.shape and graph.tie(a, b):
            return True
    return False
