"""The door: a small model from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from graphprune.errors import CheckpointError, InputError
from graphprune.folders import of_transformers
from graphprune.folders.plans import told


def from_pretrained(folder: str | Path, *, model_class: Any = None, **options: Any) -> nn.Module:
    """Load a small model from a folder that its ``save_pretrained`` wrote.

    No code in the folder runs: the class of the original is one of the library, named in the
    config, and the plan in the folder makes it small. Where the config says the sizes itself,
    the library's own ``from_pretrained`` does everything.

    Args:
        folder: a folder, or the name of a model on the hub.
        model_class: the class of the original, where it is none of the library's.
        options: those of the library's ``from_pretrained``: ``dtype`` (``torch_dtype``),
            ``device_map``, ``low_cpu_mem_usage``, ``attn_implementation``, ``revision``, ...

    Returns:
        The small model in eval mode, of the class of the original, with its ``graphprune_plan``
        where the folder has one.

    Raises:
        CheckpointError: the folder is damaged or not whole, or plan, config and weights do not fit.
        ModelError: the config names no class that is known.
        InputError: it is no folder of a model, or its library is not installed.

    Example:
        >>> import graphprune
        >>> graphprune.from_pretrained(".")
        Traceback (most recent call last):
        graphprune.errors.InputError: '.' has no config.json: pass the folder of a model
    """
    path = Path(folder)
    if path.is_dir() and not (path / str(options.get("subfolder") or "") / "config.json").is_file():
        raise InputError(f"{str(folder)!r} has no config.json: pass the folder of a model")
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise InputError(
            f"{str(folder)!r} holds a model of transformers, which is not installed: "
            "pip install transformers"
        ) from error
    hub = {key: options[key] for key in of_transformers._HUB if key in options}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **hub)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"cannot read the config of {str(folder)!r}: {told(error)}"
        ) from error
    kind = of_transformers.class_named(config, model_class, str(folder))
    return of_transformers.load(kind, folder, **options)
