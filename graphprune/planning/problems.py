"""Sizes that could not be changed as a plan needs it: channels then stay, or are tied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.channels.analysis import Analysis
from graphprune.ops.values import Reason
from graphprune.record.sizes import Expression, extents

Place = tuple[fx.Node, int]  # a dimension of a value


@dataclass(frozen=True)
class Problem:
    """A size that could not be changed as a plan needs it.

    A ``position`` (the index of a channel) must be right: shapes do not show whether it is. A run
    does where it is ``hidden``: what the op is given is compared, not what the code says.
    """

    node: fx.Node
    old: float
    new: float
    expression: Expression
    position: bool = False
    place: Place | None = None  # what the size measures
    rivals: tuple[Place, ...] = ()  # what else the same attribute measures
    layers: tuple[Tensor, ...] = ()  # what to freeze, when that is known
    hidden: bool = False  # whether no number in the code is known that it is

    @property
    def literal(self) -> bool:
        """Whether the size was a plain int: a literal, or computed where we could not follow."""
        shown = self.hidden or (not self.position and not self.layers)
        return isinstance(self.expression, int) and shown

    @property
    def owner(self) -> str:
        """The module whose code gives the size."""
        return str(self.node.meta.get("module", ""))

    @property
    def reason(self) -> Reason:
        """For reports."""
        old = int(self.old) if self.old == int(self.old) else self.old
        return Reason(f"size {old} cannot be changed", self.owner, self.node.meta.get("line"))


@dataclass(frozen=True)
class Obstacles:
    """What has to be tied, or to stay, so that the code of a model can follow.

    Of the ids ``several`` it is enough that two stay.
    """

    ties: tuple[tuple[Tensor, Tensor], ...] = ()
    frozen: tuple[tuple[Tensor, Reason], ...] = ()
    several: tuple[Tensor, ...] = ()


def obstacles(graph: Analysis, problems: Sequence[Problem]) -> Obstacles:
    """The channels that stand in the way of sizes that cannot be changed.

    Where all of those that the sizes depend on stay already, everything else does.
    """
    certain = [problem for problem in problems if not problem.literal] or problems
    for several in (certain, [problem for problem in problems if problem.hidden]):
        ties = tuple(pair for problem in several if (pair := _united(graph, problem)) is not None)
        if ties:
            return Obstacles(ties)
    for find in (_moving, _moving_before):
        frozen = tuple((ids, problem.reason) for problem in certain for ids in find(graph, problem))
        if frozen:
            return Obstacles(frozen=frozen)
    left = np.flatnonzero(~graph.units.frozen[graph.units.labels])
    return Obstacles(frozen=((torch.from_numpy(left), certain[0].reason),))


def around(graph: Analysis, node: fx.Node) -> list[Tensor]:
    """All layers an op reads or makes."""
    layers = list(graph.values[node].layers) if node in graph.values else []
    for other in (*node.all_input_nodes, *node.meta.get("items", {}).values()):
        if other in graph.values:
            layers.extend(graph.values[other].layers)
    return layers


def _moving(graph: Analysis, problem: Problem) -> list[Tensor]:
    """The channels that a size depends on, as far as they may leave."""
    layers = [*problem.layers]
    if not layers:
        layers = around(graph, problem.node)
        for extent in extents(problem.expression):
            value = graph.values[extent.node]
            layers += [layer for layer in value.layers if layer.shape[extent.dim] > 1]
    others = [layer for node, dim in problem.rivals for layer in graph.values[node].on(dim)]
    for candidates in (layers, others):
        moving = [layer for layer in candidates if not graph.stays(layer)]
        if moving:
            return moving
    return []


def _moving_before(graph: Analysis, problem: Problem) -> list[Tensor]:
    """What may leave at the last op before a problem where anything may."""
    for record in graph.records:
        ops = record.ops
        for node in reversed(ops[: ops.index(problem.node) + 1] if problem.node in ops else ()):
            moving = [layer for layer in around(graph, node) if not graph.stays(layer)]
            if moving:
                return moving
    return []


def _lines(graph: Analysis, place: Place) -> list[Tensor]:
    """The ids along a dimension; of a grid (heads x width) those of its first row."""
    node, dim = place
    return [
        layer[tuple(slice(None) if d == dim else 0 for d in range(layer.dim()))]
        for layer in graph.values[node].on(dim)
    ]


def _united(graph: Analysis, problem: Problem) -> tuple[Tensor, Tensor] | None:
    """Two dimensions of one size, not tied yet, that one attribute measures.

    Queries, keys and values of a single head, say, that are all viewed with ``self.head_dim``.
    """
    pairs = ((problem.place, rival) for rival in problem.rivals if problem.place is not None)
    return next(united(graph, pairs), None)


def united(
    graph: Analysis, pairs: Iterable[tuple[Place, Place]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of dimensions of one size that are not tied yet: their ids."""
    labels = graph.units.labels
    for one, other in pairs:
        first, second = _lines(graph, one), _lines(graph, other)
        if first and second and first[0].shape == second[0].shape:
            a, b = first[0], second[0]
            if (labels[a.numpy()] != labels[b.numpy()]).any():
                yield a, b
