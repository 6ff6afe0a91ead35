"""A graph of torch in the making, node by node of a file of ONNX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphprune.deploy.reading import numbers
from graphprune.deploy.reading.document import Document, Node, told_ops
from graphprune.deploy.reading.naming import Names, last_word, word
from graphprune.errors import ModelError


@dataclass(frozen=True)
class Value:
    """What a name of the file stands for.

    Attributes:
        node: what computes it in the graph; ``None`` for constants.
        constant: its value, for constants.
        numbers: sizes that are known only while the model runs, with others beside them.
        floating: whether these are no whole numbers.
        source: the initializer that a constant is, for weights that several layers share.
        turned: whether it is that initializer transposed.
    """

    node: fx.Node | None = None
    constant: Tensor | None = None
    numbers: Any = None
    floating: bool = False
    source: str = ""
    turned: bool = False


class Builder:
    """Reads the nodes of a document one after the other into ``graph``, layers into ``root``."""

    def __init__(self, document: Document) -> None:
        self.document, self.opset = document, document.opset
        self.root, self.graph, self.names = nn.Module(), fx.Graph(), Names()
        self.values: dict[str, Value] = {
            name: Value(constant=tensor, source=name) for name, tensor in document.constants.items()
        }
        self.uses = Counter(name for node in document.nodes for name in node.inputs if name)
        self.uses.update(document.outputs)
        self.done: set[str] = set()
        self.parameters: dict[tuple[str, bool], nn.Parameter] = {}
        self.layers: dict[Any, str] = {}
        self.first: fx.Node | None = None
        self.sizes_of: dict[tuple[str, int], fx.Node] = {}

    # --- what converters ask for --------------------------------------------------------------

    def constant(self, name: str) -> Tensor | None:
        """The value of a constant; ``None`` for what is computed from inputs."""
        return self.values[name].constant if name else None

    def rank(self, node: Node, name: str) -> int:
        """How many dimensions a value has.

        Raises:
            ModelError: nothing says so.
        """
        if name not in self.document.shapes:
            raise self.refused(node, f"nothing says how many dimensions {name!r} has")
        return len(self.document.shapes[name])

    def known(self, node: Node, attribute: str, place: int | None = None) -> Any:
        """An argument that must be constant: an attribute, or in newer opsets an input.

        Returns:
            Numbers or a list of them; ``None`` when it is absent.

        Raises:
            ModelError: it is computed from the inputs.
        """
        if attribute in node.attributes:
            return node.attributes[attribute]
        name = node.input(place) if place is not None else ""
        if not name:
            return None
        found = self.constant(name)
        if found is None:
            raise self.refused(node, f"{attribute} is computed from the inputs")
        return found.tolist()

    def tensor(self, name: str, node: Node) -> fx.Node:
        """A value as a tensor of the graph."""
        value = self.values[name]
        if value.constant is not None:
            return self.stored(name, value, node)
        if value.numbers is not None:
            kind = torch.float32 if value.floating else torch.int64
            return self.call(numbers.as_tensor, self.sizes(name, node, "numbers"), kind)
        assert value.node is not None
        return value.node

    def operand(self, name: str, node: Node) -> Any:
        """A value beside tensors: constants of one element are numbers."""
        value = self.values[name]
        if value.constant is not None and value.constant.numel() == 1:
            return value.constant.reshape(()).item()
        if value.numbers is not None and value.numbers.size == 1:
            return value.numbers.item()
        return self.tensor(name, node)

    def sizes(self, name: str, node: Node, what: str) -> fx.Node:
        """A value as Python numbers that follow widths.

        Raises:
            ModelError: it is computed from the values of tensors.
        """
        value = self.values[name]
        if value.constant is not None:
            return self.kept_sizes(node, value.constant.tolist(), what)
        if value.numbers is None:
            raise self.refused(
                node, f"its {what} {name!r} is computed from values, not from sizes, of the inputs"
            )
        if value.numbers.ndim == 0:
            single: fx.Node = value.numbers.item()
            return single
        return self.kept_sizes(node, value.numbers.ravel().tolist(), what)

    def kept_sizes(self, node: Node, values: Any, what: str = "sizes") -> fx.Node:
        """Numbers, in a module whose attribute changes when widths do; open ones are given."""
        path = self.names.beside(node, f"{last_word(node.outputs[0])}_{what}")
        listed = values if isinstance(values, list) else []
        opened = tuple(value for value in listed if isinstance(value, fx.Node))
        closed = [None if isinstance(value, fx.Node) else value for value in listed]
        self.add(path, numbers.Sizes(closed if isinstance(values, list) else values))
        return self.graph.call_module(path, opened)

    def size(self, name: str, dim: int, node: Node) -> int | fx.Node:
        """The size of a dimension of a tensor: a number where the file fixes it."""
        known = self.document.shapes[name][dim]
        if known is not None:
            return known
        if (name, dim) not in self.sizes_of:
            self.sizes_of[name, dim] = self.method("size", self.tensor(name, node), dim)
        return self.sizes_of[name, dim]

    def parameter(self, name: str, turn: bool = False) -> nn.Parameter:
        """A constant as a weight, transposed if asked: the same one where layers share it."""
        value = self.values[name]
        assert value.constant is not None
        turned = value.turned != turn
        key = (value.source or name, turned)
        tensor = value.constant.t() if turn else value.constant
        if tensor.dim() < 2:  # exporters store equal biases once: that ties nothing
            return nn.Parameter(tensor.clone())
        if key not in self.parameters:
            self.parameters[key] = nn.Parameter(tensor.contiguous().clone())
        return self.parameters[key]

    def is_weight(self, name: str, dim: int | None = None) -> bool:
        """Whether a value is a constant that a layer can hold, of so many dimensions."""
        found = self.constant(name)
        return (
            found is not None and found.is_floating_point() and (dim is None or found.dim() == dim)
        )

    def only_reader(self, name: str) -> Node | None:
        """The node that alone reads a value."""
        if self.uses[name] != 1 or name in self.document.outputs:
            return None
        return next((node for node in self.document.nodes if name in node.inputs), None)

    def refused(self, node: Node, why: str) -> ModelError:
        """The error for a node that cannot be read."""
        return ModelError(f"{self.document.path.name}: {node} cannot be read: {why}")

    # --- what converters do -------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function."""
        found = self.graph.call_function(function, args, kwargs)
        # A pickled graph is traced when it is loaded: what is no function of torch stays whole.
        found.meta["is_wrapped"] = function.__module__.startswith(("graphprune.", "math"))
        return found

    def method(self, name: str, *args: Any) -> fx.Node:
        """A call of a method of a tensor."""
        return self.graph.call_method(name, args)

    def layer(
        self, node: Node, make: Callable[[], nn.Module], x: fx.Node, weight: str, rest: Any
    ) -> fx.Node:
        """A call of a layer, made unless one with these very weights and settings is there."""
        value = self.values[weight]
        key = (node.op, value.source or weight, rest, str(dict(node.attributes)))
        shared = value.constant is not None and value.constant.dim() > 1
        if not shared or key not in self.layers:
            alone = self.uses[value.source] == 1 or shared or not node.scopes
            path = self.names.layer(node, value.source if alone else "")
            self.add(path, make())
            self.layers[key] = path
        return self.graph.call_module(self.layers[key], (x,))

    def add(self, path: str, value: nn.Module | nn.Parameter | Tensor) -> None:
        """Put a module, parameter or buffer at a path."""
        module = self.root
        *folders, last = path.split(".")
        for folder in folders:
            if not hasattr(module, folder):
                module.add_module(folder, nn.Module())
            module = getattr(module, folder)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            module.register_buffer(last, value)
        else:
            setattr(module, last, value)

    def stored(self, name: str, value: Value, node: Node) -> fx.Node:
        """A constant as a parameter or buffer of its own: trained where a file may have meant it.

        Tensors that were computed, whole numbers, and masks (not finite, or huge) are buffers.
        """
        tensor = value.constant
        assert tensor is not None
        key = (value.source or name, value.turned)
        known = self.layers.get(("stored", key))
        if known is None:
            path = self.names.take(value.source if value.source == name else name)
            if path.startswith("value"):
                path = self.names.beside(node, last_word(name))
            self.add(path, self.held(name, value))
            known = self.layers[("stored", key)] = path
        return self.graph.get_attr(known)

    def held(self, name: str, value: Value) -> nn.Parameter | Tensor:
        """What holds a constant."""
        tensor = value.constant
        assert tensor is not None
        trained = bool(value.source) and tensor.dim() and tensor.is_floating_point()
        if trained and float(tensor.abs().max() if tensor.numel() else 0) < 1e4:
            return self.parameter(name)
        return tensor.clone()

    # --- nodes --------------------------------------------------------------------------------

    def read(
        self,
        table: Mapping[str, Callable[[Builder, Node], Any]],
        of_sizes: Callable[[Builder, Node], Value | None],
    ) -> None:
        """Read every node: by ``of_sizes`` those that compute sizes, by the table all others.

        Raises:
            ModelError: a node cannot be read.
        """
        self.of_sizes = of_sizes
        for port in self.document.inputs:
            placeholder = self.graph.placeholder(word(port.name))
            self.first = self.first or placeholder
            self.values[port.name] = Value(node=placeholder)
        for node in self.document.nodes:
            missing = [name for name in node.inputs if name and name not in self.values]
            if missing:
                raise self.refused(node, f"nothing computes its input {missing[0]!r}")
            if node.outputs[0] not in self.done:
                self.convert(node, table)
        found = {name: self.tensor_of_output(name) for name in self.document.outputs}
        self.graph.output(next(iter(found.values())) if len(found) == 1 else found)
        for unread in reversed(self.graph.nodes):
            if not unread.users and unread.op not in ("placeholder", "output"):
                self.graph.erase_node(unread)

    def tensor_of_output(self, name: str) -> fx.Node:
        """An output of the file."""
        if name not in self.values:
            raise ModelError(f"{self.document.path.name}: nothing computes the output {name!r}")
        return self.tensor(name, self.document.nodes[-1])

    def convert(self, node: Node, table: Mapping[str, Callable[[Builder, Node], Any]]) -> None:
        """Read one node: constants are computed now, sizes as numbers, all else as tensors."""
        given = [self.values[name] for name in node.inputs if name]
        if all(value.constant is not None for value in given) and self.folded(node, given):
            return
        found = self.of_sizes(self, node)
        if found is not None:
            self.check_attributes(node)
            self.values[node.outputs[0]] = found
            return
        if node.op not in table:
            raise self.refused(node, f"{node.op} is none of {told_ops(table)}")
        found = table[node.op](self, node)
        self.check_attributes(node)
        if isinstance(found, Value):
            self.values[node.outputs[0]] = found
        elif isinstance(found, Sequence):
            self.values.update(
                (name, Value(node=part)) for name, part in zip(node.outputs, found) if name
            )
        else:
            extra = [name for name in node.outputs[1:] if name and self.uses[name]]
            if extra:
                raise self.refused(node, f"its output {extra[0]!r} is used")
            self.values.setdefault(node.outputs[0], Value(node=found))

    def check_attributes(self, node: Node) -> None:
        """Refuse what the reader of the operator did not look at, unless it means nothing."""
        overlooked = node.attributes.overlooked(node.op, self.opset)
        if overlooked:
            raise self.refused(node, f"it has {overlooked}")

    def folded(self, node: Node, given: Sequence[Value]) -> bool:
        """Compute a node all of whose inputs are constants."""
        if node.op == "Identity" or (
            node.op == "Transpose" and given[0].source and given[0].constant is not None
            and given[0].constant.dim() == 2
        ):  # fmt: skip
            value = given[0]
            assert value.constant is not None
            turn = node.op == "Transpose" and list(node.attributes.get("perm", [1, 0])) == [1, 0]
            self.values[node.outputs[0]] = Value(
                constant=value.constant.t() if turn else value.constant,
                source=value.source,
                turned=value.turned != turn,
            )
            return True
        outputs = computed(node, [value.constant for value in given], self.opset)
        self.values.update(
            (name, Value(constant=found)) for name, found in zip(node.outputs, outputs)
        )
        return bool(outputs)


def computed(node: Node, given: Sequence[Tensor | None], opset: int) -> list[Tensor]:
    """The outputs of a node on constants, by the reference of the library onnx; none it lacks."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    names = [name for name in node.inputs if name]
    try:
        values = [helper.make_tensor_value_info(name, 0, None) for name in dict.fromkeys(names)]
        outputs = [helper.make_tensor_value_info(name, 0, None) for name in node.outputs]
        graph = helper.make_graph([node.proto], "constants", values, outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        feeds = {name: tensor.numpy() for name, tensor in zip(names, given) if tensor is not None}
        found = ReferenceEvaluator(model).run(None, feeds)
        return [torch.from_numpy(np.array(array)) for array in found]
    except Exception as error:  # of many classes: then the graph computes it
        del error
        return []
