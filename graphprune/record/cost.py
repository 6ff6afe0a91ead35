"""What a recorded graph costs, as a function of the shapes of its values: MACs, peak memory."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from graphprune.ops.ids import Shape
from graphprune.ops.registry import op_name
from graphprune.ops.views import ShapeOf, macs_of, uncounted
from graphprune.record.modes import leak
from graphprune.record.recorder import Record

_ALIASING = {torch.ops.aten._unsafe_view.default}  # share storage though the schema is silent


def recorded_shape(node: fx.Node) -> Shape:
    """The shape a value had when it was recorded."""
    return node.meta["shape"]


def macs(record: Record, shape: ShapeOf = recorded_shape) -> int:
    """Multiply-accumulates of one forward pass: convolutions, matrix products and attention."""
    return sum(macs_of(node, shape) for node in record.ops)


def left_out(record: Record) -> tuple[str, ...]:
    """Ops of which nothing is declared: their multiply-accumulates are not counted."""
    names = (op_name(node) for node in record.ops if node.target is not leak and uncounted(node))
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Lifetime:
    """A value with storage of its own, alive while the ops ``first`` to ``last`` run."""

    node: fx.Node
    first: int
    last: int


def lifetimes(recorded: Record) -> list[Lifetime]:
    """What is alive when, while a recorded graph runs.

    Inputs are alive all the time, as the caller holds them; outputs to the end; every other
    value until its last use. Views and results of in-place ops share their input's storage.
    Parameters, buffers and constants are left out.
    """
    nodes = list(recorded.graph.nodes)
    roots = storages(nodes)
    places = {node: position for position, node in enumerate(nodes)}
    last: dict[fx.Node, int] = {}
    for node in nodes:
        for used in (node, *node.all_input_nodes):
            if used in roots:
                last[roots[used]] = places[node]
    found = []
    for root in dict.fromkeys(roots.values()):
        if root.op == "placeholder":
            found.append(Lifetime(root, 0, len(nodes) - 1))
        elif root.op == "call_function":
            producer, _ = _producer(root)  # all outputs of an op are born together
            found.append(Lifetime(root, places[producer], last[root]))
    return found


def peak_activations(
    recorded: Record, size: Callable[[fx.Node], int] = lambda node: recorded_bytes(node)
) -> int:
    """The largest number of bytes alive at once while a recorded graph runs."""
    change: dict[int, int] = {}
    for life in lifetimes(recorded):
        amount = size(life.node)
        change[life.first] = change.get(life.first, 0) + amount
        change[life.last + 1] = change.get(life.last + 1, 0) - amount
    alive = peak = 0
    for position in sorted(change):
        alive += change[position]
        peak = max(peak, alive)
    return peak


def recorded_bytes(node: fx.Node) -> int:
    """The bytes of a value when it was recorded."""
    dtype: torch.dtype = node.meta["dtype"]
    shape: tuple[int, ...] = node.meta["shape"]
    return math.prod(shape) * dtype.itemsize


def storages(nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The node that allocated the storage of every value."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if "shape" in node.meta:
            source = _aliased(*_producer(node))
            roots[node] = node if source is None else roots.get(source, source)
    return roots


def _producer(node: fx.Node) -> tuple[fx.Node, int]:
    """The op that made a value, and which of its outputs the value is."""
    if node.target is not operator.getitem:
        return node, 0
    producer, index = node.args
    assert isinstance(producer, fx.Node)
    assert isinstance(index, int)
    return producer, index


def _aliased(node: fx.Node, index: int) -> fx.Node | None:
    """The input whose storage output ``index`` of an op shares."""
    if node.target in _ALIASING:
        return node.all_input_nodes[0]
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.returns:
        return None
    returned = schema.returns[min(index, len(schema.returns) - 1)].alias_info
    if returned is None:
        return None
    names = returned.before_set  # empty for lists of views, which have one source
    for position, argument in enumerate(schema.arguments):
        source = argument.alias_info
        if source is not None and (not names or names & source.before_set):
            rest = node.kwargs.get(argument.name)
            value = node.args[position] if position < len(node.args) else rest
            return value if isinstance(value, fx.Node) else None
    return None
