"""A model as a program of ``torch.export``, with sizes left open, or compiled to machine code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.deploy.axes import Axis, resized
from graphprune.deploy.engines import OF_PACKAGE, told
from graphprune.deploy.flat import Flat, Port
from graphprune.deploy.quiet import quiet
from graphprune.errors import ExportError, InputError
from graphprune.record.inputs import parameter_names
from graphprune.record.random_numbers import same_numbers

Program = torch.export.ExportedProgram
_FIXED = ("onstraints violated", "specialized", "conflicts between user-specified ranges")
MACHINE = "machine code of this kind of processor: compile it where it will run"
_VALUES = ("data-dependent", "data dependent", "GuardOnDataDependent", "unbacked")


class Fixed(ExportError):
    """The model's code makes a size a constant that was to be left open."""


def exported(
    flat: Flat, tensors: Sequence[Tensor], axes: Sequence[Axis], *, whole: bool = False
) -> Program:
    """Record a model that takes flat tensors, or with ``whole`` the model inside with its call.

    A size of 1 is recorded as 2: torch takes 1 for a constant.

    Raises:
        Fixed: a size cannot be left open.
        ExportError: the model cannot be recorded.
    """
    given = list(tensors)
    open_sizes: list[dict[int, Any]] = [{} for _ in given]
    for axis in axes:
        if axis.size == 1:
            given = resized(given, axis, 2)
        for number, dim in axis.places:
            open_sizes[number][dim] = torch.export.Dim.DYNAMIC  # a named one allows no guards
    if not whole:
        shapes: Any = {"tensors": tuple(found or None for found in open_sizes)}
        return _recorded(flat, tuple(given), {}, shapes)
    args, kwargs = flat.call(given)
    sizes = iter(open_sizes)
    tree = pytree.tree_map(lambda leaf: next(sizes) or None if isinstance(leaf, Tensor) else None,
                           (args, kwargs))  # fmt: skip
    names = parameter_names(flat.model)
    shapes = {**dict(zip(names, tree[0])), **tree[1]} if len(names) >= len(args) else None
    if shapes is None:
        raise ExportError("the model's forward has no names for its arguments: pass a dict of them")
    return _recorded(flat.model, args, kwargs, shapes)


def _recorded(model: nn.Module, args: Any, kwargs: Any, shapes: Any) -> Program:
    try:
        with quiet(), torch.no_grad(), same_numbers():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of many classes, some of the user's code
        text = str(error)
        if any(word in text for word in _FIXED):
            raise Fixed(told_of_sizes(text)) from error
        name = type(model.model if isinstance(model, Flat) else model).__name__
        if any(word in text or word in type(error).__name__ for word in _VALUES):
            raise ExportError(
                f"{name} decides by values of its inputs, which no file can hold ({told(error)}): "
                "export the part before that, or write the decision with torch.where or torch.cond"
            ) from error
        raise ExportError(
            f"torch.export cannot record {name}: {type(error).__name__}: {told(error)}"
        ) from error


def write_compiled(
    program: Program, file: Path, ports: Sequence[Port], tensors: Sequence[Tensor]
) -> None:
    """Compile a recorded program to a package.

    Args:
        program: of a model that takes flat tensors.
        file: the package, ``.pt2``.
        ports: its inputs; machine code checks no sizes, so the package tells them.
        tensors: example inputs.

    Raises:
        InputError: there is no C++ compiler.
        ExportError: the compiler of torch cannot compile it.
    """
    from torch._inductor import aoti_compile_and_package

    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise InputError("compiled=True needs a C++ compiler (g++): install one, or leave it out")
    inputs = [
        {"name": port.name, "dtype": port.dtype, "shape": port.shape, "example": [*tensor.shape]}
        for port, tensor in zip(ports, tensors, strict=True)
    ]
    settings = {"aot_inductor.metadata": {OF_PACKAGE: json.dumps(inputs)}}
    try:
        with quiet(), torch.no_grad():
            aoti_compile_and_package(program, package_path=str(file), inductor_configs=settings)
    except Exception as error:  # of many classes, its compiler's too
        raise ExportError(f"AOTInductor cannot compile the program: {told(error)}") from error


def told_of_sizes(text: str) -> str:
    """Which sizes are fixed, and at what, as far as torch says it."""
    found = re.findall(r"size\(\)\[(\d+)\] as dynamic but your code", text)
    if found:
        return f"in dimension {', '.join(dict.fromkeys(found))} of an input"
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    return (lines[1:] or lines)[0][:200]


def open_shapes(program: Program, axes: Sequence[Axis]) -> list[tuple[int | str, ...]]:
    """The shapes of the outputs of a recorded program, with the names of what is open."""
    inputs = _shapes(program, program.graph_signature.user_inputs)
    names = {str(inputs[number][dim]): axis.name for axis in axes for number, dim in axis.places}
    words = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in names) or r"(?!)")

    def told_size(size: object) -> int | str:
        if isinstance(size, int):
            return size
        return words.sub(lambda match: names[match[0]], str(size))

    outputs = _shapes(program, program.graph_signature.user_outputs)
    return [tuple(map(told_size, shape)) for shape in outputs]


def _shapes(program: Program, names: Sequence[object]) -> list[tuple[Any, ...]]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    tensors = (values.get(name) for name in names if isinstance(name, str))
    return [tuple(value.shape) for value in tensors if isinstance(value, Tensor)]
