"""Folders in which the file of the weights holds the plan: of libraries with one file each.

The library writes its config, :func:`graphprune.save` the weights; an entry of the config says so.
Whoever loads builds the original by the library and the config, without weights, and fills it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.deploy.folders.plans import FORMAT, told, write_text
from graphprune.errors import CheckpointError, InputError, ModelError
from graphprune.execute.checkpoint import load, save
from graphprune.execute.weightless import weightless
from graphprune.plan.plan import plan_of
from graphprune.record.tensors import fingerprint


def read_json(path: Path) -> dict[str, Any]:
    """An object of a file.

    Raises:
        CheckpointError: there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {told(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{str(path)!r} is damaged: expected an object")
    return found


def check_builds(small: nn.Module, build: Callable[[], nn.Module], advice: str) -> None:
    """Raise unless what is built is what the plan of a small model was made for.

    Raises:
        ModelError: it is not, or cannot be built.
    """
    plan, kind = plan_of(small), type(small).__name__
    if plan is None:
        raise InputError(f"expected a model made by rebuild, got {kind} without a graphprune_plan")
    try:
        original = weightless(build).model
    except Exception as error:
        raise ModelError(f"the config of {kind} builds no model ({told(error)}): {advice}") from (
            error
        )
    if fingerprint(original) != plan.architecture:
        raise ModelError(f"the config of {kind} builds another model than was pruned: {advice}")


def write(small: nn.Module, folder: Path, weights: str, entry: str, **more: Any) -> None:
    """Write the weights with the plan into a folder, and name them and ``more`` in its config."""
    config = folder / "config.json"
    content = {**read_json(config), entry: {"format": FORMAT, "weights": weights}, **more}
    save(small, folder / weights)
    write_text(config, json.dumps(content, indent=2) + "\n")


def read(folder: Path, entry: Any, build: Callable[[], nn.Module]) -> nn.Module:
    """Load the small model of a folder.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit what is built.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("weights"), str):
        raise CheckpointError(f"the config in {str(folder)!r} is damaged: it names no weights")
    if entry.get("format") != FORMAT:
        found = repr(entry.get("format"))[:20]
        raise CheckpointError(f"{str(folder)!r} has format {found}; this graphprune reads {FORMAT}")
    if Path(entry["weights"]).name != entry["weights"]:
        raise CheckpointError(f"the config in {str(folder)!r} names a file of another folder")
    return load(folder / entry["weights"], build).eval()


def placed(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """With the dtype and device that are asked for.

    Raises:
        InputError: other options.
    """
    dtype = options.pop("dtype", options.pop("torch_dtype", None))
    device = options.pop("device_map", None)
    options.pop("low_cpu_mem_usage", None)  # weights are never made at full size
    if options:
        names = ", ".join(options)
        raise InputError(f"unknown options: {names}; dtype and device_map are known here")
    if device is not None and not isinstance(device, str | int):
        raise InputError("device_map must be one device here, such as 'cpu' or 0")
    model = model if dtype in (None, "auto") else model.to(dtype)
    return model if device in (None, "auto") else model.to(device)
