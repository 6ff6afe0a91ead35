"""The doors: a small model to a folder of its library, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from graphprune.arguments import as_path
from graphprune.deploy.folders import of_diffusers, of_sentences, of_timm, of_transformers
from graphprune.deploy.folders.files import read_json
from graphprune.deploy.folders.plans import not_installed
from graphprune.errors import InputError


def save_pretrained(small: nn.Module, folder: str | Path, **options: Any) -> Path:
    """Write a small model as a folder of its library.

    Models of transformers, diffusers and sentence-transformers have a method of this name, which
    is called; models of timm are written in the layout of its hub models.

    Args:
        small: what :func:`rebuild` returned, fine-tuned or not.
        folder: where; it is made.
        options: those of the library: ``max_shard_size``, ``model_args`` of timm, ...

    Returns:
        The folder.

    Raises:
        ModelError: config and plan do not make this model.
        InputError: the model is of no library with folders: use :func:`save`.

    Example:
        >>> import torch, graphprune
        >>> small = graphprune.rebuild(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(),
        ...     torch.nn.Linear(8, 2)), 0.5)
        >>> graphprune.save_pretrained(small, "small")
        Traceback (most recent call last):
        graphprune.errors.InputError: Sequential is of no library that has folders of models: use \
graphprune.save and graphprune.load
    """
    as_path(folder, "folder")
    method = getattr(small, "save_pretrained", None)
    if callable(method):
        method(str(folder), **options)
    elif of_timm.fits(small):
        of_timm.save(small, Path(folder), options)
    else:
        raise InputError(
            f"{type(small).__name__} is of no library that has folders of models: use "
            "graphprune.save and graphprune.load"
        )
    return Path(folder)


def from_pretrained(folder: str | Path, *, model_class: Any = None, **options: Any) -> Any:
    """Load a small model from a folder of its library.

    No code in the folder runs: the class of the original is one of the library, named in the
    config, and the plan in the folder makes it small. Where the config says the sizes itself,
    the library's own loader does everything.

    Args:
        folder: a folder of transformers (or its name on the hub), timm, sentence-transformers, or
            diffusers: a model or a pipeline.
        model_class: the class of the original, where it is none of the library's (transformers).
        options: those of the library's loader: ``dtype`` (``torch_dtype``), ``device_map``,
            ``low_cpu_mem_usage``, ``attn_implementation``, ``revision``, ...

    Returns:
        The small model in eval mode, of the class of the original, with its ``graphprune_plan``
        where the folder has one; or the pipeline.

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
    path = as_path(folder, "folder")
    try:
        if (path / "model_index.json").is_file():
            return of_diffusers.load_pipeline(path, options)
        if (path / "modules.json").is_file():
            return of_sentences.load(path, options)
        if path.is_dir():
            inside = path / str(options.get("subfolder") or "") / "config.json"
            if not inside.is_file():
                raise InputError(f"{str(folder)!r} has no config.json: pass the folder of a model")
            config = read_json(inside)
            if "architecture" in config and "pretrained_cfg" in config:
                return of_timm.load(path, config, options)
            if of_diffusers.is_model(config):
                return of_diffusers.load(path, config, options)
        return of_transformers.from_folder(folder, model_class, options)
    except ModuleNotFoundError as error:
        raise not_installed(folder, error) from error
