"""Which layers of a recorded model are moved together, and on which error.

A segment ends where a layer that lost inputs is compared with the original, and begins with the
products that make these inputs. What other ops read as well is no part of it: it stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from graphprune.calibration.layers import Layer, constants
from graphprune.calibration.replay import Replay, aten

_PRODUCTS = {aten.convolution, aten.linear, aten.mm, aten.matmul, aten.addmm, aten.bmm}
_ACTIVATIONS = {
    *(aten.relu, aten.relu_, aten.hardtanh, aten.hardtanh_, aten.leaky_relu, aten.leaky_relu_),
    *(aten.gelu, aten.silu, aten.silu_, aten.hardswish, aten.hardswish_, aten.mish, aten.softplus),
    *(aten.elu, aten.elu_, aten.sigmoid, aten.hardsigmoid, aten.tanh),
}


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
    nodes = small.nodes[0]
    numbers = {node: number for number, node in enumerate(nodes)}
    constant = constants(nodes)
    own = {nodes[layer.node]: (layer.weight, layer.bias) for layer in layers}
    for layer in layers:
        if original.nodes[0][layer.source].meta["shape"] == nodes[layer.source].meta["shape"]:
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
    packet = getattr(node.target, "overloadpacket", None)
    return packet in _PRODUCTS and any(constant[source] for source in node.all_input_nodes)


def _parameters(node: fx.Node, own: tuple[str | None, ...]) -> Iterator[fx.Node]:
    """Weights and biases that a node alone reads: of a layer, or of a BatchNorm in eval form."""
    norm = getattr(node.target, "overloadpacket", None) is aten.native_batch_norm
    if norm and not node.args[5]:
        own = tuple(str(part.target) for part in node.args[1:3] if isinstance(part, fx.Node))
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
    found = getattr(user.target, "overloadpacket", None) in _ACTIVATIONS
    return user if found and user.all_input_nodes == [node] else None
