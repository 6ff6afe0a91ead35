"""ONNX files by torch's own exporter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from graphprune.deploy.axes import Axis
from graphprune.deploy.engines import needed, told
from graphprune.deploy.programs import Program
from graphprune.deploy.quiet import quiet
from graphprune.errors import ExportError, InputError

LARGE = 1_900_000_000  # bytes: a file of protocol buffers holds less than 2 GiB


def write(
    program: Program,
    path: Path,
    names: tuple[Sequence[str], Sequence[str]],
    axes: Sequence[Axis],
    *,
    opset: int | None,
    external_data: bool,
) -> int:
    """Write a recorded program as an ONNX file, weights beside it where asked.

    Args:
        program: what was recorded.
        path: the file.
        names: of the inputs and of the outputs.
        axes: sizes left open, whose names the file holds.
        opset: the version of ONNX's operators; the exporter's own choice when absent.
        external_data: weights go to a second file, whose name ends in ``.data``.

    Returns:
        The version of the operators.

    Raises:
        InputError: a library is missing.
        ExportError: the exporter fails.
    """
    for library in ("onnx", "onnxscript"):
        needed(library, "writing ONNX")
    try:
        with quiet(), torch.no_grad():
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(names[0]),
                output_names=list(names[1]),
                opset_version=opset,
                verbose=False,
            )
            name_sizes(made.model, axes)
            made.save(str(path), external_data=external_data)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the first one says what is the matter
            cause = cause.__cause__
        raise ExportError(
            f"torch's ONNX exporter fails: {type(cause).__name__}: {told(cause)}; another opset= "
            "may help, or format 'pt2', a package of torch.export"
        ) from error
    written = int(made.model.opset_imports[""])
    if opset not in (None, written):
        raise ExportError(
            f"torch's exporter writes opset {written} where {opset} was asked for: leave opset "
            "out, or ask for another"
        )
    return written


def name_sizes(model: Any, axes: Sequence[Axis]) -> None:
    """Let a file call its open sizes as the user does, where the exporter numbers them."""
    found = {}
    for axis in axes:
        for number, dim in axis.places:
            symbol = model.graph.inputs[number].shape[dim]
            if not isinstance(symbol, int):
                found[str(symbol.value)] = axis.name
    if not found:
        return
    words = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in found))
    for value in _values(model.graph):
        shape = value.shape
        for dim in range(len(shape) if shape is not None else 0):
            if not isinstance(shape[dim], int) and shape[dim].value is not None:
                shape[dim] = words.sub(lambda match: found[match[0]], str(shape[dim].value))


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def check_opset(opset: object) -> None:
    """Raise unless it is a version of ONNX's operators.

    Raises:
        InputError: it is none.
    """
    if opset is not None and (not isinstance(opset, int) or isinstance(opset, bool) or opset < 7):
        raise InputError(f"opset must be a version of ONNX's operators, such as 20; got {opset!r}")
