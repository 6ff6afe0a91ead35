"""Folders of timm, in the layout of its ``hf-hub:`` and ``local-dir:`` models."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.deploy.folders.files import check_builds, placed, read, read_json, write
from graphprune.deploy.folders.plans import ENTRY, told
from graphprune.errors import InputError, ModelError

WEIGHTS = "model.safetensors"


def fits(model: nn.Module) -> bool:
    """Whether a model was made by timm: it then says by which name."""
    found = getattr(model, "pretrained_cfg", None)
    return type(model).__module__.startswith("timm.") and bool(found)


def save(small: Any, folder: Path, options: dict[str, Any]) -> None:
    """Write a folder.

    Args:
        small: the small model.
        folder: where.
        options: ``model_args`` for ``timm.create_model``, where timm does not remember them, and
            others of ``timm.models.save_for_hf``.

    Raises:
        ModelError: name and arguments make another model.
    """
    from timm.models import save_for_hf

    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_for_hf(small, str(folder), safe_serialization=True, **options)
    except TypeError as error:
        raise InputError(f"timm.models.save_for_hf: {told(error)}") from error
    advice = "pass model_args={...}, the arguments that timm.create_model was given"
    try:
        check_builds(small, functools.partial(_build, read_json(folder / "config.json")), advice)
        write(small, folder, WEIGHTS, ENTRY)
    except ModelError:
        (folder / "config.json").unlink(missing_ok=True)  # of no model
        (folder / WEIGHTS).unlink(missing_ok=True)
        raise


def load(folder: Path, config: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """A model from a folder; one without a plan by timm."""
    if ENTRY in config:
        return placed(read(folder, config[ENTRY], functools.partial(_build, config)), options)
    import timm

    return placed(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), options)


def _build(config: dict[str, Any]) -> nn.Module:
    """The original, as its config says."""
    import timm

    more = dict(config.get("model_args") or {})
    for name in ("num_classes", "global_pool"):
        if name in config:
            more.setdefault(name, config[name])
    return timm.create_model(str(config["architecture"]), pretrained=False, **more)
