"""What a file of ONNX holds, checked: nodes, constants, inputs and outputs."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.deploy.engines import needed, told
from graphprune.deploy.flat import Port, type_name
from graphprune.deploy.reading.attributes import Attributes
from graphprune.errors import ModelError
from graphprune.text import shorten

OLDEST = 9  # the first opset that today's exporters wrote
_SCOPES = "pkg.torch.onnx.name_scopes"
_OWN = ("", "ai.onnx")
_QUANTIZED = ("Quantize", "Dequantize", "QLinear", "MatMulInteger", "ConvInteger", "DynamicQuant")
_CONTROL = ("If", "Loop", "Scan", "SequenceMap")
DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32,
    7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A node of the graph; absent inputs are empty names."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Attributes
    scopes: tuple[str, ...]
    proto: Any

    def __str__(self) -> str:
        """As messages name it."""
        return f"{self.op} {self.name!r}" if self.name else f"{self.op} -> {self.outputs[0]!r}"

    def input(self, place: int) -> str:
        """The name of an input, empty when it is absent."""
        return self.inputs[place] if place < len(self.inputs) else ""


@dataclass(frozen=True)
class Document:
    """A file of ONNX.

    Attributes:
        path: the file.
        opset: the version of its operators.
        nodes: in an order in which they can run.
        constants: initializers by name.
        inputs: what is to be given.
        outputs: names of what is returned.
        shapes: sizes of values, as far as they can be inferred; ``None`` for open ones.
    """

    path: Path
    opset: int
    nodes: tuple[Node, ...]
    constants: Mapping[str, Tensor]
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    shapes: Mapping[str, tuple[int | None, ...]]


def read(path: Path) -> Document:
    """Read and check a file.

    Raises:
        InputError: onnx is not installed.
        ModelError: there is no such file, it is damaged, or holds what cannot be read here.
    """
    needed("onnx", "reading ONNX")
    model = _loaded(path)
    opset = _opset(model, path)
    model = _inlined(model, path)
    graph = model.graph
    nodes = tuple(_node(proto) for proto in graph.node)
    _check(nodes, graph, path)
    constants = {item.name: _tensor(item, path) for item in graph.initializer}
    given = [value for value in graph.input if value.name not in constants]
    return Document(
        path=path,
        opset=opset,
        nodes=nodes,
        constants=constants,
        inputs=tuple(_port(value, path) for value in given),
        outputs=tuple(value.name for value in graph.output),
        shapes=_shapes(model, constants),
    )


def _loaded(path: Path) -> Any:
    import onnx

    if not path.is_file():
        raise ModelError(f"no file {str(path)!r}")
    try:
        model = onnx.load(path)
    except Exception as error:  # of the library of protocol buffers, or of data beside the file
        beside = "data" in str(error).lower() and path.stat().st_size > 0
        hint = ": the weights of large models lie in a file beside it" if beside else ""
        raise ModelError(f"{str(path)!r} cannot be read as ONNX ({told(error)}){hint}") from error
    try:
        _check_texts(model)
    except UnicodeError as error:
        raise ModelError(f"{str(path)!r} is damaged: a name in it is no text ({error})") from error
    if not model.graph.node or not model.graph.output:
        raise ModelError(f"{str(path)!r} holds no graph of ONNX, or an empty one")
    return model


def _check_texts(message: Any) -> None:
    """Libraries of protocol buffers hand out bytes, or fail, where a text is none."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        single = isinstance(value, str | bytes) or hasattr(value, "ListFields")
        for item in [value] if single else value:
            if field.type == field.TYPE_MESSAGE:
                _check_texts(item)
            elif isinstance(item, bytes):
                item.decode()  # which fails


def _opset(model: Any, path: Path) -> int:
    import onnx

    versions = [item.version for item in model.opset_import if item.domain in _OWN]
    version, newest = max(versions, default=0), onnx.defs.onnx_opset_version()
    if not OLDEST <= version <= newest:
        raise ModelError(
            f"{path.name} has opset {version}; opsets {OLDEST} to {newest} can be read here "
            f"(onnx {onnx.__version__}): convert it with onnx.version_converter"
        )
    return int(version)


def _inlined(model: Any, path: Path) -> Any:
    """The same without functions of its own."""
    if not model.functions:
        return model
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model)
    except Exception as error:
        raise ModelError(f"the functions in {path.name} cannot be resolved: {told(error)}") from (
            error
        )


def _node(proto: Any) -> Node:
    from onnx import helper

    notes = {item.key: item.value for item in getattr(proto, "metadata_props", ())}
    return Node(
        op=proto.op_type if proto.domain in _OWN else f"{proto.domain}::{proto.op_type}",
        name=proto.name,
        inputs=tuple(proto.input),
        outputs=tuple(proto.output),
        attributes=Attributes(
            {item.name: helper.get_attribute_value(item) for item in proto.attribute}
        ),
        scopes=_scopes(notes.get(_SCOPES, ""), proto.name),
        proto=proto,
    )


def _scopes(noted: str, name: str) -> tuple[str, ...]:
    """The module of torch that a node comes from, as a path of names, from either exporter."""
    if noted:
        try:
            found = ast.literal_eval(noted)
        except (ValueError, SyntaxError):
            found = []
        if len(found) > 1 and isinstance(found[-2], str):
            return tuple(found[-2].split(".")) if found[-2] else ()
    parts = name.split("/")[1:-1] if name.startswith("/") else []
    whole = ""  # /layer1/layer1.0/conv1/Conv: a name that repeats the one before stands for it
    for part in parts:
        head = part.rpartition(".")[0]
        if head and whole == head:
            whole = part
        elif head and whole.endswith(f".{head}"):
            whole = f"{whole[: -len(head)]}{part}"
        else:
            whole = f"{whole}.{part}" if whole else part
    return tuple(whole.split(".")) if whole else ()


def _check(nodes: tuple[Node, ...], graph: Any, path: Path) -> None:
    if graph.sparse_initializer:
        raise ModelError(f"{path.name} holds sparse weights, which cannot be read: make them dense")
    for node in nodes:
        if node.op in _CONTROL:
            raise ModelError(
                f"{path.name} decides while it runs ({node}), which one recorded graph cannot "
                "hold: export the model without control flow"
            )
        if node.op.startswith(_QUANTIZED):
            raise ModelError(
                f"{path.name} is quantized ({node}): shrink the float model, and quantize the "
                "small one with graphprune.deploy.quantize"
            )
        if "::" in node.op:
            raise ModelError(
                f"{path.name} holds {node}, an operator of another domain than ONNX's own: export "
                "the model without fused or custom operators (before an engine optimizes it)"
            )


def _tensor(item: Any, path: Path) -> Tensor:
    from onnx import numpy_helper

    if item.data_type not in DTYPES:
        raise ModelError(f"{path.name} holds {item.name!r} of a type that torch does not have")
    try:
        found = numpy_helper.to_array(item)
    except Exception as error:
        raise ModelError(f"{item.name!r} in {path.name} is damaged: {told(error)}") from error
    if item.data_type == 16:  # bfloat16, which numpy does not know
        return torch.from_numpy(found.astype("float32").copy()).bfloat16()
    return torch.from_numpy(found.copy())


def _port(value: Any, path: Path) -> Port:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or kind.elem_type not in DTYPES:
        raise ModelError(f"input {value.name!r} of {path.name} is no tensor that torch has")
    if not kind.HasField("shape"):
        raise ModelError(
            f"{path.name} does not say how many dimensions input {value.name!r} has: export it "
            "with shapes (open sizes may have names)"
        )
    sizes = tuple(_sizes(value.name, kind.shape.dim))
    return Port(value.name, type_name(DTYPES[kind.elem_type]), sizes)


def _sizes(name: str, dims: Any) -> Iterator[int | str]:
    for place, dim in enumerate(dims):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            yield int(dim.dim_value)
        else:
            yield dim.dim_param or f"{name}_{place}"


def _shapes(model: Any, constants: Mapping[str, Tensor]) -> dict[str, tuple[int | None, ...]]:
    from onnx import shape_inference

    with contextlib.suppress(Exception):  # beyond what it knows: what is declared has to do
        model = shape_inference.infer_shapes(model, data_prop=True)
    graph = model.graph
    found = {
        value.name: tuple(
            int(dim.dim_value) if dim.HasField("dim_value") else None
            for dim in value.type.tensor_type.shape.dim
        )
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape")
    }
    return {**found, **{name: tuple(tensor.shape) for name, tensor in constants.items()}}


def told_ops(ops: Mapping[str, object]) -> str:
    """What can be read, for messages."""
    return shorten(sorted(ops), 200)
