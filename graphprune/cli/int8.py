"""``export --int8``: a second file of 8 bits, and both beside the original."""

from __future__ import annotations

import dataclasses
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from graphprune.cli.bench import timings
from graphprune.cli.session import Session
from graphprune.deploy.exporting import Exported
from graphprune.deploy.exporting import export as write
from graphprune.deploy.likeness import named_arrays
from graphprune.deploy.quantizing import Quantized, quantize
from graphprune.errors import InputError

_BATCH = 16
_SECONDS = 1.0


def check_int8(mode: str | None, out: Path, data: Path | None) -> None:
    """What can be told before anything is done.

    Raises:
        InputError: an option lacks another one.
    """
    if mode is None:
        if data is not None:
            raise InputError("--data is for --int8 static")
        return
    if mode not in ("static", "dynamic"):
        raise InputError(f"--int8 is static or dynamic; got {mode!r}")
    if out.suffix.lower() != ".onnx":
        raise InputError("--int8 is for ONNX: --out must end in .onnx")
    if mode == "static" and data is None:
        raise InputError(
            "--int8 static needs --data, inputs that show the ranges of values: .npz, .npy or "
            ".safetensors with arrays by the names of the inputs, and labels if you have them"
        )
    if data is not None and not data.is_file():
        raise InputError(f"no file {str(data)!r}")


def add_int8(
    run: Session,
    made: Exported,
    mode: str,
    data: Path | None,
    original: nn.Module | None,
    options: Mapping[str, Any],
) -> Quantized:
    """Quantize what was exported, and measure original, float and int8 in turns.

    Args:
        run: where it is told.
        made: the float file.
        mode: ``"static"`` or ``"dynamic"``.
        data: a file of arrays.
        original: what the small model was made from.
        options: of the export, for the original.
    """
    names = [port.name for port in made.inputs]
    size = made.inputs[0].shape[0] if made.inputs[0].shape else 1
    items = size if isinstance(size, int) else _BATCH
    batches = None if data is None else named_arrays(arrays_of(data), names, items)
    if batches is not None and len(batches[-1][0][0]) < items and isinstance(size, int):
        batches.pop()  # the file takes whole batches only
    out = made.path.with_name(f"{made.path.stem}.int8.onnx")
    with tempfile.TemporaryDirectory() as folder, run.status("quantizing"):
        beside: dict[str, nn.Module | str | Path] = {}
        if original is not None:
            file = Path(folder) / "original.onnx"
            beside["original"] = write(
                original, file, check=False, certificate=False, **options
            ).path
        found = quantize(made.path, out, batches, mode=mode, beside=beside, seconds=_SECONDS)
    for line in str(dataclasses.replace(found, timed=None)).splitlines():
        run.print(escape(line))
    if found.timed is not None:
        run.print(timings(found.timed))
    run.print(f"int8 written to [bold]{escape(str(out))}[/]")
    return found


def int8_data(found: Quantized | None) -> dict[str, Any]:
    """A quantized file as plain data."""
    if found is None:
        return {}
    return {"int8": {**dataclasses.asdict(found), "path": str(found.path)}}


def arrays_of(path: Path) -> dict[str, Tensor]:
    """Tensors by name in a file of numpy or safetensors; nothing is unpickled.

    Raises:
        InputError: it is no such file.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"": torch.from_numpy(loaded)}
            return {name: torch.from_numpy(loaded[name]) for name in loaded.files}
    except (OSError, ValueError, TypeError, SafetensorError, zipfile.BadZipFile) as error:
        raise InputError(
            f"cannot read arrays from {str(path)!r} ({error}): expected .npz, .npy or .safetensors"
        ) from error
