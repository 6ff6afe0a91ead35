"""Which layers of a recorded model can be refitted, and where their errors are seen.

The output of a layer is followed through ops that are affine in every channel: a BatchNorm, a
product or a sum with a parameter, the sum with another activation. At the end of this chain the two
models are compared. Behind a residual sum the difference holds what the shortcut carries, so that
refitting the layer makes up for it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ops.batch_norm import Norm
from graphprune.ops.calls import Args, args_of, target_of
from graphprune.ops.factors import Factors
from graphprune.ops.ids import Shape
from graphprune.ops.registry import op_of
from graphprune.ops.views import matrix_of, norm_of
from graphprune.record.windows import Window


@dataclass(frozen=True)
class Layer:
    """A product of an activation with a weight, and the affine ops behind it.

    Attributes:
        node: number of the product.
        chain: numbers of the ops behind it, in order; the two models are compared at the last.
        window: how the weight reads its input.
        weight, bias: names of the parameters.
        flipped: the weight is stored as [in, out].
        source: number of the node of the input.
        columns: inputs of each output.
    """

    node: int
    chain: tuple[int, ...]
    window: Window
    weight: str
    bias: str | None
    flipped: bool
    source: int
    columns: int

    @property
    def end(self) -> int:
        """The number of the node where the two models are compared."""
        return self.chain[-1] if self.chain else self.node

    @property
    def channel_dim(self) -> int:
        """The dimension of the channels in its output."""
        return -1 if self.window.kind == "linear" else 1

    @property
    def name(self) -> str:
        """The module that holds the weight."""
        return self.weight.rpartition(".")[0] or self.weight


def find_layers(
    nodes: Sequence[fx.Node], names: Mapping[str, Tensor]
) -> tuple[list[Layer], dict[int, tuple[str, str]]]:
    """The layers of a recorded graph that can be refitted, by where they are compared.

    Args:
        nodes: of the record.
        names: parameters and buffers.

    Returns:
        The layers; and by the number of the product names of others, with why they cannot be.
    """
    finder = _Finder(nodes, names)
    return finder.layers(), finder.others


def constants(nodes: Sequence[fx.Node]) -> dict[fx.Node, bool]:
    """Which nodes are made of parameters alone."""
    constant: dict[fx.Node, bool] = {}
    for node in nodes:
        sources = node.all_input_nodes
        constant[node] = node.op == "get_attr" or (
            node.op == "call_function"
            and bool(sources)
            and all(constant[source] for source in sources)
        )
    return constant


class _Finder:
    def __init__(self, nodes: Sequence[fx.Node], names: Mapping[str, Tensor]) -> None:
        self.nodes = nodes
        self.names = names
        self.numbers = {node: number for number, node in enumerate(nodes)}
        self.constant = constants(nodes)
        self.others: dict[int, tuple[str, str]] = {}

    def layers(self) -> list[Layer]:
        found = [layer for node in self.nodes for layer in self._product(node)]
        claimed: dict[int, Layer] = {}  # of several layers that meet in a sum, the widest is fitted
        for layer in sorted(found, key=lambda layer: layer.columns):
            for number in layer.chain:
                claimed[number] = layer
        cut = []
        for layer in found:
            own = [number for number in layer.chain if claimed[number] is layer]
            chain = layer.chain[: len(own)] if own == list(layer.chain[: len(own)]) else ()
            cut.append(_shortened(layer, chain))
        return sorted(cut, key=lambda layer: (layer.end, layer.node))

    def _product(self, node: fx.Node) -> list[Layer]:
        factors = matrix_of(node)
        if factors is None or factors.scales != (1, 1):
            return []
        x, weight, bias, flipped = factors.x, factors.weight, factors.bias, factors.turned
        window = _window(factors)
        if self.constant[x] or not self.constant[weight]:
            return []
        if not self._own(weight):
            shared = weight.op == "get_attr" and str(weight.target) in self.names
            note = "its weight is used elsewhere, too" if shared else "its weight is computed"
            name = str(weight.target).rpartition(".")[0] if shared else node.meta.get("module")
            self.others[self.numbers[node]] = name or str(node), note
            return []
        shape: Shape = weight.meta["shape"]
        if not flipped and window.kind == "linear" and len(shape) != 2:
            return []
        if flipped and (len(shape) != 2 or len(x.meta["shape"]) < 2):
            return []
        return [
            Layer(
                self.numbers[node],
                self._chain(node, len(node.meta["shape"]) - 1 if window.kind == "linear" else 1),
                window,
                str(weight.target),
                str(bias.target) if bias is not None and self._own(bias) else None,
                flipped,
                self.numbers[x],
                _columns(shape, window, flipped),
            )
        ]

    def _own(self, node: fx.Node) -> bool:
        """A parameter that nothing else reads."""
        named = isinstance(node, fx.Node) and node.op == "get_attr"
        return named and str(node.target) in self.names and len(node.users) == 1

    def _chain(self, node: fx.Node, dim: int) -> tuple[int, ...]:
        chain: list[int] = []
        shape = node.meta["shape"]
        current = node
        while len(current.users) == 1:
            (user,) = current.users
            norm = norm_of(user)
            if norm is not None and self._frozen_norm(norm, current, dim):
                parts = [item for item in user.users if item.args[1] == 0]
                if len(parts) != 1 or len(user.users) != 1:
                    break
                chain += [self.numbers[user], self.numbers[parts[0]]]
                current = parts[0]
            elif self._affine(user, current, shape, dim):
                chain.append(self.numbers[user])
                current = user
            else:
                break
        return tuple(chain)

    def _frozen_norm(self, norm: Norm, source: fx.Node, dim: int) -> bool:
        return norm.x is source and dim == 1 and not norm.of_batch

    def _affine(self, node: fx.Node, source: fx.Node, shape: Shape, dim: int) -> bool:
        """Whether an op keeps the channels apart and is affine in ``source``."""
        op = op_of(node)
        target = target_of(node)
        args = args_of(node)
        if len(op.powers) != 2 and not op.signs:
            return False
        if len(args) != 2 or node.kwargs or node.meta["shape"] != shape or args[0] is args[1]:
            return False
        if target._schema.is_mutable and args[0] is not source:
            return False  # writes into the other one
        if op.powers and op.powers[args.index(source)] != 1:
            return False
        other = args[1] if args[0] is source else args[0]
        if not isinstance(other, fx.Node):
            return True
        if not self.constant[other]:
            return bool(op.signs) and other.meta["shape"] == shape
        extents = (1,) * (len(shape) - len(other.meta["shape"])) + tuple(other.meta["shape"])
        return all(n == 1 or d == dim for d, n in enumerate(extents))


def _window(factors: Factors) -> Window:
    """How the weight reads its input."""
    if factors.window is None:
        return Window("linear")
    stride, padding, dilation, transposed, extra, groups = factors.window
    kind = "transposed" if transposed else "convolution"
    extra = extra if transposed else [0] * len(padding)
    pads = tuple((p, p - more) for p, more in zip(padding, extra))
    kernel = tuple(factors.weight.meta["shape"][2:])
    return Window(kind, kernel, tuple(stride), pads, tuple(dilation), groups)


def _columns(shape: Shape, window: Window, flipped: bool) -> int:
    if flipped:
        return shape[0]
    inputs = shape[0] // window.groups if window.kind == "transposed" else shape[1]
    columns = int(inputs)
    for size in window.kernel:
        columns *= size
    return columns


def _shortened(layer: Layer, chain: tuple[int, ...]) -> Layer:
    return layer if chain == layer.chain else replace(layer, chain=chain)


def slope_of(layer: Layer, nodes: Sequence[fx.Node], tensors: Mapping[fx.Node, Any]) -> Tensor:
    """The factor between the output of a layer and the value at its end, by channel.

    Args:
        layer: whose chain is followed.
        nodes: of the record.
        tensors: values of the parameters that the chain reads.

    Returns:
        Float64 tensor of shape [channels].
    """
    first = nodes[layer.node]
    channels = first.meta["shape"][layer.channel_dim]
    shape = [1] * len(first.meta["shape"])
    shape[layer.channel_dim] = channels
    found = []
    for level in (0.0, 1.0):
        device = next((t.device for t in tensors.values() if isinstance(t, Tensor)), None)
        start = torch.full(shape, level, dtype=torch.float64, device=device)
        values: dict[fx.Node, Any] = {first: start}
        for number in layer.chain:
            node = nodes[number]
            target = target_of(node)
            args = args_of(node)
            if target is operator.getitem:
                values[node] = values[args[0]][args[1]]
                continue
            if other_activation(node, values, tensors) is not None:
                source = next(n for n in node.all_input_nodes if n in values)
                sign = -1.0 if _negated(node, source) else 1.0
                values[node] = sign * values[source]
                continue
            known = {**{n: _double(t) for n, t in tensors.items()}, **values}
            args, kwargs = fx.map_arg((args, node.kwargs), known.__getitem__)
            values[node] = target(*_fresh(args), **kwargs)
        found.append(values[nodes[layer.end]].reshape(-1))
    return found[1] - found[0]


def other_activation(
    node: fx.Node, values: Mapping[fx.Node, object], tensors: Mapping[fx.Node, object]
) -> fx.Node | None:
    """The addend of an op that is neither on the chain nor made of parameters."""
    for source in node.all_input_nodes:
        if source not in values and source not in tensors:
            return source
    return None


def _negated(node: fx.Node, source: fx.Node) -> bool:
    return op_of(node).signs[node.args.index(source)] < 0


def _double(value: object) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _fresh(args: Args) -> Any:
    """Arguments that an in-place op may write to."""
    return (args[0].clone(), *args[1:]) if isinstance(args[0], Tensor) else args
