"""Which layers of a recorded model are moved together, and on which error.

A segment ends where a layer that lost inputs is compared with the original, and begins with the
products that make these inputs. What other ops read as well is no part of it: it stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from graphprune.calibration.layers import Layer, constants
from graphprune.calibration.replay import Replay
from graphprune.ops.registry import op_of
from graphprune.ops.views import multiplies, norm_of


@dataclass(frozen=True)
class Segment:
    """The ops between the products before a layer and its end.

    Attributes:
        layer: at the end.
        numbers: of the ops that depend on what is moved, in order.
        inputs: numbers of the values that they read and that stay.
        moved: names of the parameters that are moved, by number.
        activation: number of a pointwise op that alone reads the end: errors count behind it.
    """

    layer: Layer
    numbers: tuple[int, ...]
    inputs: tuple[int, ...]
    moved: Mapping[int, str]
    activation: int | None


def segments(
    original: Replay, small: Replay, layers: Sequence[Layer]
) -> Iterator[tuple[Layer, Segment]]:
    """The segments of all layers that lost inputs."""
    nodes = small.reference
    numbers = {node: number for number, node in enumerate(nodes)}
    constant = constants(nodes)
    own = {nodes[layer.node]: (layer.weight, layer.bias) for layer in layers}
    for layer in layers:
        if original.pattern.node(layer.source).meta["shape"] == nodes[layer.source].meta["shape"]:
            continue
        inside = _inside(layer, nodes, constant)
        moved = {
            numbers[source]: str(source.target)
            for node in inside
            for source in _parameters(node, own.get(node, ()))
            if isinstance(small.tensors.get(str(source.target)), nn.Parameter)
        }
        live: list[int] = []
        for number in sorted(numbers[node] for node in inside):
            sources = {numbers[source] for source in nodes[number].all_input_nodes}
            if sources & {*moved, *live}:
                live.append(number)
        read = {numbers[n] for number in live for n in nodes[number].all_input_nodes}
        inputs = tuple(sorted(read - {*moved, *live}))
        written = {numbers[n] for number in live for n in _written(nodes[number])}
        if live and live[0] < layer.node and layer.end in live and not written & set(inputs):
            behind = _activation(nodes[layer.end])
            last = None if behind is None else numbers[behind]
            yield layer, Segment(layer, tuple(live), inputs, moved, last)


def _inside(
    layer: Layer, nodes: Sequence[fx.Node], constant: Mapping[fx.Node, bool]
) -> list[fx.Node]:
    """The nodes of a layer and those before it that nothing else reads, back to products."""
    inside = [nodes[number] for number in (layer.node, *layer.chain)]
    reached = {nodes[layer.source]}  # read by an op that is walked through
    members = set(inside)
    for node in reversed(nodes[: layer.node]):
        if node.op == "call_function" and node in reached and members.issuperset(node.users):
            inside.append(node)
            members.add(node)
            if not _is_product(node, constant):
                reached.update(node.all_input_nodes)
    return inside


def _is_product(node: fx.Node, constant: Mapping[fx.Node, bool]) -> bool:
    return multiplies(node) and any(constant[source] for source in node.all_input_nodes)


def _parameters(node: fx.Node, own: tuple[str | None, ...]) -> Iterator[fx.Node]:
    """Weights and biases that a node alone reads: of a layer, or of a BatchNorm in eval form."""
    norm = norm_of(node)
    if norm is not None and not norm.training:
        affine = (norm.weight, norm.bias)
        own = tuple(str(part.target) for part in affine if isinstance(part, fx.Node))
    for source in node.all_input_nodes:
        if source.op == "get_attr" and str(source.target) in own and len(source.users) == 1:
            yield source


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """What an op writes to."""
    schema = getattr(node.target, "_schema", None)
    for place, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.kwargs.get(argument.name, *node.args[place : place + 1])
            if isinstance(value, fx.Node):
                yield value


def _activation(node: fx.Node) -> fx.Node | None:
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if op_of(user).activation and user.all_input_nodes == [node] else None
