"""Models of libraries by name, and of folders: what stands before the colon of MODEL."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graphprune.deploy.folders.door import from_pretrained
from graphprune.deploy.folders.plans import ENTRY
from graphprune.deploy.reading.door import from_onnx
from graphprune.errors import InputError
from graphprune.text import shorten

Factory = Callable[[], Any]


def torchvision(name: str) -> Factory:
    """What makes a model of torchvision, with random weights."""
    try:
        import torchvision
    except ImportError as error:
        raise InputError(
            f"torchvision:{name} needs torchvision ({error}): pip install torchvision"
        ) from None
    known = torchvision.models.list_models()
    if name not in known:
        raise _unknown("torchvision", name, known, "torchvision.models")
    builder = torchvision.models.get_model_builder(name)
    parameters = inspect.signature(builder).parameters
    none = {key: None for key in ("weights", "weights_backbone") if key in parameters}

    def factory() -> Any:
        with warnings.catch_warnings():  # GoogLeNet and Inception announce a slow initialisation
            warnings.simplefilter("ignore", FutureWarning)
            return builder(**none)

    return factory


def timm(name: str) -> Factory:
    """What makes a model of timm, with random weights."""
    try:
        import timm
    except ImportError as error:
        raise InputError(f"timm:{name} needs timm ({error}): pip install timm") from None
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models(), 'timm.list_models("*resnet*")')
    return lambda: timm.create_model(name, pretrained=False)


def hugging_face(folder: str) -> Factory:
    """What loads a model from a folder that ``save_pretrained`` wrote, also of a small model."""
    path = Path(folder)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("config.json holds no object")
    except (OSError, ValueError) as error:
        raise InputError(
            f"hf:{folder} must name a folder with the config.json that save_pretrained wrote "
            f"({type(error).__name__}: {error}); nothing is downloaded here: hf download NAME "
            "--local-dir FOLDER fetches a model"
        ) from None
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"hf:{folder} needs transformers ({error}): pip install transformers"
        ) from None
    if ENTRY in config:
        return lambda: from_pretrained(path, local_files_only=True)
    named = config.get("architectures") or ["AutoModel"]
    kind = getattr(transformers, str(named[0]), None)
    if kind is None:
        raise InputError(
            f"hf:{folder} holds a {named[0]}, which transformers {transformers.__version__} does "
            "not have: install the version that wrote it (see transformers_version in "
            "config.json), or write a function that loads it and pass path/to/file.py:function"
        )

    def factory() -> Any:
        logging: Any = importlib.import_module("transformers.utils.logging")
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model, told = kind.from_pretrained(
                path, local_files_only=True, output_loading_info=True
            )
        finally:
            if shown:
                logging.enable_progress_bar()
        missing = sorted(told["missing_keys"])
        if missing:
            raise InputError(
                f"hf:{folder} has no weights for {shorten(missing)}: they would be random"
            )
        return model

    return factory


def onnx(file: str) -> Factory:
    """What reads a file of ONNX and compares the model with it in ONNX Runtime."""
    return lambda: from_onnx(file)


SOURCES: Mapping[str, Callable[[str], Factory]] = {
    "torchvision": torchvision,
    "timm": timm,
    "hf": hugging_face,
    "onnx": onnx,
}
RANDOM = ("torchvision", "timm")  # architectures, whose weights are drawn


def _unknown(library: str, name: str, known: Sequence[str], where: str) -> InputError:
    near = difflib.get_close_matches(name, known, n=4)
    hint = f"did you mean {', '.join(near)}?" if near else f"see {where}"
    return InputError(f"{library} has no model {name!r}; {hint}")
