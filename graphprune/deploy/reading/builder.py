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
from graphprune.deploy.reading.document import Document, Node
from graphprune.deploy.reading.naming import Names, last_word, word
from graphprune.errors import ModelError


@dataclass(frozen=True)
class Value:
    """What a name of the file stands for.

    Attributes:
        node: what computes it in the graph; ``None`` for constants.
        constant: its value, for constants.
        numbers: whether it is a Python number, or a list of some, instead of a tensor.
        source: the initializer that a constant is, for weights that several layers share.
        turned: whether it is that initializer transposed.
    """

    node: fx.Node | None = None
    constant: Tensor | None = None
    numbers: bool = False
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
        assert value.node is not None
        return self.call(numbers.as_tensor, value.node) if value.numbers else value.node

    def operand(self, name: str, node: Node) -> Any:
        """A value beside tensors: constants of one element are numbers."""
        value = self.values[name]
        if value.constant is not None and value.constant.numel() == 1:
            return value.constant.reshape(()).item()
        if value.numbers:
            return self.call(numbers.operand, value.node)
        return self.tensor(name, node)

    def sizes(self, name: str, node: Node, what: str) -> fx.Node:
        """A value as Python numbers that follow widths.

        Raises:
            ModelError: it is computed from the values of tensors.
        """
        value = self.values[name]
        if value.constant is not None:
            return self.kept_sizes(node, value.constant.tolist(), what)
        if not value.numbers:
            raise self.refused(
                node, f"its {what} {name!r} is computed from values, not from sizes, of the inputs"
            )
        assert value.node is not None
        return value.node

    def kept_sizes(self, node: Node, values: Any, what: str = "sizes") -> fx.Node:
        """Constant numbers, in a module whose attribute changes when widths do."""
        path = self.names.beside(node, f"{last_word(node.outputs[0])}_{what}")
        self.add(path, numbers.Sizes(values))
        return self.graph.call_module(path)

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
        return self.graph.call_function(function, args, kwargs)

    def layer(
        self, node: Node, make: Callable[[], nn.Module], x: fx.Node, weight: str, rest: Any
    ) -> fx.Node:
        """A call of a layer, made unless one with these very weights and settings is there."""
        value = self.values[weight]
        key = (node.op, value.source or weight, rest, str(dict(node.attributes)))
        shared = value.constant is not None and value.constant.dim() > 1
        if not shared or key not in self.layers:
            path = self.names.layer(node, value.source)
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

    def read(self, table: Mapping[str, Callable[[Builder, Node], Any]]) -> None:
        """Read every node.

        Raises:
            ModelError: a node cannot be read.
        """
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
        length = self.document.shapes.get(node.input(0), ())
        if node.op == "Shape" and given[0].numbers and length and length[0] is not None:
            self.values[node.outputs[0]] = Value(constant=torch.tensor(length))
            return
        if is_of_numbers(node, given):
            found = as_numbers(self, node)
            if found is not None:
                self.values[node.outputs[0]] = Value(node=found, numbers=True)
                return
        if node.op not in table:
            from graphprune.deploy.reading.document import told_ops

            raise self.refused(node, f"{node.op} is none of {told_ops(table)}")
        found = table[node.op](self, node)
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


# --- sizes ------------------------------------------------------------------------------------


def is_of_numbers(node: Node, given: Sequence[Value]) -> bool:
    """Whether a node computes numbers: from numbers, with constants beside them."""
    if node.op not in numbers.POINTWISE and node.op != "Concat" and not given[0].numbers:
        return False
    beside = [value.constant for value in given if not value.numbers]
    few = all(constant is not None and constant.dim() < 2 for constant in beside)
    return few and len(beside) < len(given)


def as_numbers(b: Builder, node: Node) -> fx.Node | None:
    """A node on Python numbers; ``None`` for what makes a tensor of them."""

    def given(place: int) -> Any:
        name = node.input(place)
        return b.sizes(name, node, f"operand{place}") if name else None

    op, every = node.op, range(len(node.inputs))
    if op in numbers.POINTWISE:
        return b.call(numbers.POINTWISE[op], *(given(place) for place in every))
    if op == "Cast":
        kind = node.attributes["to"]
        return b.call(numbers.cast, given(0), kind not in (1, 10, 11, 16))
    if op == "Slice":
        return b.call(numbers.part, given(0), given(1), given(2), given(4))
    if op == "Reshape":
        target = b.constant(node.input(1))
        if target is None or target.numel() > 1:
            return None
        return b.call(numbers.listed if target.numel() else numbers.single, given(0))
    if op in _OF_LISTS:
        places = every if op in ("Concat", "Gather") else range(1)
        return b.call(_OF_LISTS[op], *(given(place) for place in places))
    return None


_OF_LISTS: dict[str, Callable[..., Any]] = {
    "Concat": numbers.concat, "Gather": numbers.gather, "Shape": numbers.shape,
    "Unsqueeze": numbers.listed, "Squeeze": numbers.single, "Identity": numbers.same,
    "ReduceProd": numbers.product, "ReduceSum": numbers.total,
}  # fmt: skip
