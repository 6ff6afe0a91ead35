"""ONNX files of models with recurrent layers, by torch's exporter that traces.

The other one unrolls a recurrent layer over the time steps of the example: files get long and
slow, and the number of steps is fixed. This one keeps it as one operator.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from graphprune.deploy.axes import Axis, resized
from graphprune.deploy.engines import needed, told
from graphprune.deploy.flat import Flat
from graphprune.deploy.quiet import quiet
from graphprune.errors import ExportError
from graphprune.record.random_numbers import same_numbers

NOTE = "recurrent layers are one operator each: written by torch's exporter that traces"
_OPSET = 18  # the latest that this exporter is made for
_TORCH = str(Path(torch.__file__).parent)


def is_recurrent(model: nn.Module) -> bool:
    """Whether a model has recurrent layers of torch that ONNX has an operator for."""
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    return bool(layers) and not any(layer.proj_size for layer in layers)


def write_traced(
    flat: Flat,
    tensors: Sequence[Tensor],
    path: Path,
    names: tuple[Sequence[str], Sequence[str]],
    axes: Sequence[Axis],
    *,
    opset: int | None,
    external_data: bool,
) -> int:
    """Write a model as an ONNX file; what its arguments mean, ``onnx_files.write`` says.

    Raises:
        ExportError: the exporter fails, or the code decides by values, which a trace does not see.
    """
    needed("onnx", "writing ONNX")
    given = list(tensors)
    open_sizes: dict[str, dict[int, str]] = {}
    for axis in axes:
        given = resized(given, axis, 2) if axis.size == 1 else given
        for number, dim in axis.places:
            open_sizes.setdefault(names[0][number], {})[dim] = axis.name
    version = _OPSET if opset is None else opset
    try:
        with (
            quiet(),
            torch.no_grad(),
            same_numbers(),
            warnings.catch_warnings(record=True) as seen,
        ):
            warnings.simplefilter("always")
            torch.onnx.export(
                flat,
                tuple(given),
                str(path),
                dynamo=False,
                input_names=list(names[0]),
                output_names=list(names[1]),
                dynamic_axes=open_sizes,
                opset_version=version,
            )
    except Exception as error:  # of many classes, some of the user's code
        raise ExportError(
            f"torch's ONNX exporter fails: {type(error).__name__}: {told(error)}"
        ) from error
    # Of the tracer: that a tensor became a number. Torch's own layers only check shapes so.
    decides = [w for w in seen if w.category.__name__ == "TracerWarning"]
    own = [w for w in decides if not w.filename.startswith(_TORCH)]
    if own:
        raise ExportError(
            f"{type(flat.model).__name__} decides by values or sizes of its inputs, which a trace "
            f"does not see ({Path(own[0].filename).name}:{own[0].lineno}): write the decision with "
            "torch.where, or leave it out of what is exported"
        )
    if external_data:
        _apart(path)
    return version


def _apart(path: Path) -> None:
    """Move the weights of a file into a second one."""
    import onnx

    data = f"{path.name}.data"
    onnx.save_model(
        onnx.load(path), path, save_as_external_data=True, location=data, size_threshold=0
    )


def shapes_of(path: Path, axes: Sequence[Axis]) -> list[tuple[int | str, ...]]:
    """The shapes of the outputs of a file, ``?`` for what nobody named."""
    import onnx

    known = {axis.name for axis in axes}
    found = []
    for output in onnx.load(path, load_external_data=False).graph.output:
        dims = output.type.tensor_type.shape.dim
        names = (dim.dim_param if dim.dim_param in known else "?" for dim in dims)
        shape = (dim.dim_value or name for dim, name in zip(dims, names))
        found.append(tuple(shape))
    return found
