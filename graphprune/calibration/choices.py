"""Where a model chooses by values what it runs, and which rows of an activation it goes on with.

Two models may choose differently: a detector keeps other boxes, a router sends other tokens to an
expert. Row 3 of one is then not row 3 of the other, and comparing them would mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from graphprune.ops.registry import op_of
from graphprune.record.modes import leak


class Choices:
    """The choices of one run.

    Attributes:
        decisive: ops through which values of activations reach the code of the model.
        made: what chose the rows, by the op that picked them.
    """

    def __init__(self, nodes: Sequence[fx.Node], tensors: Mapping[str, Tensor]) -> None:
        learnt: set[fx.Node] = set()
        given: set[fx.Node] = set()
        for node in nodes:
            sources = set(node.all_input_nodes)
            weight = node.op == "get_attr" and isinstance(
                tensors.get(str(node.target)), nn.Parameter
            )
            if weight or sources & learnt:
                learnt.add(node)
            if node.op == "placeholder" or sources & given:
                given.add(node)
        active = learnt & given
        self.decisive = {n for n in active if _reads_values(n)}
        self.picks = {n: found for n in active if (found := _choosers(n, given)) is not None}
        self.made: dict[fx.Node, tuple[Tensor, ...]] = {}

    def note(self, node: fx.Node, values: Mapping[fx.Node, object]) -> None:
        """Remember what an op that has just run chose by."""
        if node in self.picks:
            found = [values[chooser] for chooser in self.picks[node]]
            kept = [t for value in found for t in (value if isinstance(value, tuple) else (value,))]
            self.made[node] = tuple(
                t.clone() for t in kept if isinstance(t, Tensor) and not t.is_floating_point()
            )

    def differing(self, other: Choices, pairs: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
        """The nodes whose rows were chosen otherwise than in the other model.

        Args:
            other: the choices of the other model on the same batch.
            pairs: its nodes by those of this one.
        """
        first = {
            node
            for node, made in self.made.items()
            if not _same(made, other.made.get(pairs.get(node, node)))
        }
        found: set[fx.Node] = set()
        for node in next(iter(first)).graph.nodes if first else ():
            sources = node.all_input_nodes[: 1 if op_of(node).rows == "written" else None]
            if node in first or not found.isdisjoint(sources):
                found.add(node)
        return found


def _reads_values(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.target is leak or torch.Tag.data_dependent_output in tags


def _choosers(node: fx.Node, given: set[fx.Node]) -> tuple[fx.Node, ...] | None:
    """What tells an op which rows of an activation to pick; ``None`` if it picks none."""
    packet = getattr(node.target, "overloadpacket", None)
    sources = node.all_input_nodes
    rows = op_of(node).rows
    if rows == "ordered" or (packet is not None and not str(packet).startswith("aten")):
        return (node,)
    if rows != "picked" or node.args[0] not in given:  # a table is read where it is asked
        return None
    return tuple(source for source in sources if source is not node.args[0])


def _same(first: tuple[Tensor, ...], second: tuple[Tensor, ...] | None) -> bool:
    return second is not None and len(first) == len(second) and all(map(torch.equal, first, second))
