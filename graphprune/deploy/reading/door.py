"""The door: a file of ONNX as a module of torch, compared with the file before it is handed out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import fx, nn

from graphprune.arguments import as_path, check_seed, check_tolerance
from graphprune.deploy.agreeing import Agreement, Comparison
from graphprune.deploy.axes import find_axes
from graphprune.deploy.engines import load_engine, needed
from graphprune.deploy.flat import Flat
from graphprune.deploy.reading import elementwise, layers, shaping
from graphprune.deploy.reading.arithmetic import as_numbers
from graphprune.deploy.reading.builder import Builder
from graphprune.deploy.reading.document import Document, read
from graphprune.deploy.reading.module import OnnxModule
from graphprune.deploy.reading.source import Source, remember
from graphprune.errors import ModelError, TraceError, warn
from graphprune.record.inputs import Call

TABLE = {**elementwise.TABLE, **layers.TABLE, **shaping.TABLE}


def from_onnx(
    path: str | Path,
    example_inputs: object = None,
    *,
    check: bool = True,
    tolerance: float | None = None,
    seed: int = 0,
) -> fx.GraphModule:
    """Read a file of ONNX as a module of torch that can be made smaller and written back.

    Convolutions, linear layers, normalisations and embeddings become torch's own layers, under
    the names that the file tells; all else are calls of functions in the ``code`` of a
    ``torch.fx.GraphModule``. Sizes that the file fixes stand in attributes, so that they follow
    when channels leave. The model returns a tensor, or a dict of several by name.

    :func:`graphprune.deploy.export` gives a smaller model the file's names of inputs and outputs,
    and leaves the sizes open that the file leaves open.

    Args:
        path: the file, with a data file beside it where it has one.
        example_inputs: to compare on, as for :func:`graphprune.trace`; drawn in the sizes that
            the file says when absent.
        check: compare with the file in ONNX Runtime, on the inputs, on other values and at
            another size of every open dimension.
        tolerance: largest relative difference allowed, as for :func:`graphprune.deploy.export`.
        seed: for the values.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        ModelError: the file is missing or damaged, or holds what cannot be read here: it names
            the node.
        VerificationError: the model computes something else than the file.
        TraceError: the model does not run on the inputs.
        InputError: an argument is wrong, or a library is missing.

    Example:
        >>> import tempfile, torch, graphprune
        >>> from graphprune.deploy import export, from_onnx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = export(net, f"{folder}/net.onnx", torch.randn(1, 4))
        ...     model = from_onnx(f"{folder}/net.onnx")
        >>> graphprune.rebuild(model, 0.5, torch.randn(1, 4)).get_submodule("model.0").out_features
        4
    """
    path = as_path(path)
    check_seed(seed)
    if tolerance is not None:
        check_tolerance(tolerance)
    if check:
        needed("onnxruntime", "comparing with the file")
    document = read(path)
    builder = Builder(document)
    builder.read(TABLE, as_numbers)
    model = OnnxModule(builder.root, builder.graph, "OnnxModel").eval()
    source = Source(
        file=path.name,
        opset=document.opset,
        nodes=len(document.nodes),
        inputs=document.inputs,
        outputs=document.outputs,
        rows=tuple(looked_up(model, document)),
    )
    if check:
        source = replace(source, agreement=compared(model, source, path, example_inputs,
                                                    tolerance, seed))  # fmt: skip
    remember(model, source)
    return model


def looked_up(model: fx.GraphModule, document: Document) -> list[tuple[str, int]]:
    """Inputs that are rows of tables, and how many rows these have."""
    found = []
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    for port, placeholder in zip(document.inputs, placeholders):
        readers = list(placeholder.users)
        casts = [node for node in readers if node.op == "call_method" and node.target == "to"]
        readers += [user for cast in casts for user in cast.users]
        tables = [model.get_submodule(str(n.target)) for n in readers if n.op == "call_module"]
        rows = [table.num_embeddings for table in tables if isinstance(table, nn.Embedding)]
        if rows:
            found.append((port.name, min(rows)))
    return found


def compared(
    model: nn.Module,
    source: Source,
    path: Path,
    example_inputs: object,
    tolerance: float | None,
    seed: int,
) -> Agreement:
    """The model beside its file in ONNX Runtime.

    Raises:
        VerificationError: they differ.
        TraceError: the model does not run.
    """
    call = Call.of(source.example(seed) if example_inputs is None else example_inputs)
    tensors = call.tensors()
    if len(tensors) != len(source.inputs):
        raise ModelError(
            f"{source.file} takes {len(source.inputs)} inputs, {', '.join(source.names)}; "
            f"example_inputs has {len(tensors)}"
        )
    flat = Flat(model, call)
    try:
        with torch.no_grad():
            flat.whole(*(tensor.clone() for tensor in tensors))
    except Exception as error:
        raise TraceError(
            f"the model read from {source.file} does not run on {call} "
            f"({type(error).__name__}: {error}): pass example_inputs that the file takes"
        ) from error
    axes = find_axes(source.dynamic, source.names, tensors)
    comparison = Comparison(flat, source.outputs, load_engine(path), tolerance, seed)
    found = comparison.all(tensors, axes)
    if found.reason:
        warn(f"from_onnx could not decide whether {source.file} was read right: {found.reason}")
    return found
