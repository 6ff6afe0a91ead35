"""Models, weights and inputs as text: what the command line accepts."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from graphprune.arguments import check_seed
from graphprune.cli.sources import RANDOM, SOURCES
from graphprune.deploy.reading.source import source_of
from graphprune.errors import CheckpointError, GraphPruneError, InputError
from graphprune.record.tensors import aliases
from graphprune.text import shorten

_FORMS = (
    "torchvision:NAME, timm:NAME, hf:FOLDER, onnx:FILE, package.module:factory or "
    "path/to/file.py:factory"
)
_WRAPPED = ("state_dict", "model_state_dict", "model")
_DTYPES = {
    "float": torch.float32,
    "int": torch.int64,
    "long": torch.int64,
    **{
        name: getattr(torch, name)
        for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64", "bool")
    },
}


def load_model(text: str, seed: int = 0) -> nn.Module:
    """Make the model that a text names.

    Args:
        text: ``torchvision:resnet50``, ``timm:resnet50``, ``hf:folder`` (that transformers wrote),
            ``onnx:file.onnx``, ``package.module:factory`` (the working directory is searched,
            too) or ``path/to/file.py:factory``. The factory takes no arguments; a module
            instance is taken as it is.
        seed: for the random weights.

    Raises:
        InputError: no such model, or the factory fails or returns something else.
        GraphPruneError: a file of ONNX cannot be read.

    Example:
        >>> load_model("torchvision:resnet18").fc.out_features
        1000
    """
    check_seed(seed)
    library, _, inside = text.partition(":")
    source, _, name = text.rpartition(":")
    if not source or not name:
        raise InputError(f"MODEL must be {_FORMS}; got {text!r}")
    if library in SOURCES:
        factory, name = _guarded(f"import {library}", lambda: SOURCES[library](inside)), text
    else:
        factory = _attribute(source, name)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise InputError(f"{text!r} is a {type(factory).__name__}: name a function or a class")
    torch.manual_seed(seed)
    model = _guarded(name if library in SOURCES else f"{name}()", factory)
    if not isinstance(model, nn.Module):
        raise InputError(f"{text!r} returned a {type(model).__name__} instead of a torch module")
    return model


def load_named(text: str, option: str) -> Any:
    """What a text names in the user's code: ``path/to/file.py:name`` or ``package.module:name``.

    Raises:
        InputError: there is no such thing.
    """
    source, _, name = text.rpartition(":")
    if not source or not name:
        raise InputError(
            f"{option} must be path/to/file.py:name or package.module:name; got {text!r}"
        )
    return _attribute(source, name)


def has_random_weights(text: str, weights: Path | None) -> bool:
    """Whether a model that a text names has drawn weights, as far as the text says.

    Example:
        >>> has_random_weights("torchvision:resnet18", None)
        True
    """
    return weights is None and text.partition(":")[0] in RANDOM


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill a model from a ``.safetensors`` file or from a file that ``torch.save`` wrote.

    A dict under ``"state_dict"``, ``"model_state_dict"`` or ``"model"`` and names that start
    with ``"module."`` (saved from a wrapped model) are understood. Nothing is unpickled but
    tensors and plain containers.

    Raises:
        CheckpointError: the file cannot be read, or says which names and shapes do not fit.
    """
    wanted = model.state_dict()
    state = _without_prefix(_unwrapped(_read(Path(path)), str(path)), wanted)
    shapes = [
        f"{name} is {list(value.shape)} in the file, {list(wanted[name].shape)} in the model"
        for name, value in state.items()
        if isinstance(wanted.get(name), Tensor) and wanted[name].shape != value.shape
    ]
    unexpected = [name for name in state if name not in wanted]
    missing = _untied(model, [name for name in wanted if name not in state], state)
    parts = [
        f"{title}: {shorten(names, 5)}"
        for title, names in (
            ("missing in the file", missing),
            ("not in the model", unexpected),
            ("shapes", shapes),
        )
        if names
    ]
    if parts:
        raise CheckpointError(
            f"{str(path)!r} does not fit {type(model).__name__}: {'; '.join(parts)}"
        )
    wanted.update(state)  # keeps the versions that some modules ask for
    model.load_state_dict(wanted)


def parse_inputs(shapes: list[str], model: nn.Module) -> tuple[Tensor, ...] | None:
    """Example inputs from texts such as ``1,3,224,224`` or ``1,16:int64``, one per argument.

    Without any, a model that was read from ONNX knows its inputs. Floats have the dtype of the
    model's parameters when none is given. Values are zero: the analysis needs shapes only.

    Raises:
        InputError: not positive sizes, or an unknown dtype.
    """
    source = source_of(model)
    if not shapes and source is not None:
        return source.example()
    default = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = []
    for text in shapes:
        sizes, _, kind = text.partition(":")
        if kind and kind not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise InputError(f"unknown dtype {kind!r} in {text!r}; choose one of {known}")
        try:
            shape = [int(size) for size in sizes.split(",")]
        except ValueError:
            shape = [0]
        if min(shape) < 1:
            raise InputError(f"--input must be positive sizes such as 1,3,224,224; got {text!r}")
        inputs.append(torch.zeros(shape, dtype=_DTYPES.get(kind, default)))
    return tuple(inputs) or None


# --- models -----------------------------------------------------------------------------------


def _attribute(source: str, name: str) -> Any:
    if source.endswith(".py"):
        module = _from_file(Path(source))
    else:
        here = os.getcwd()
        if here not in sys.path:
            sys.path.insert(0, here)
        if not all(part.isidentifier() for part in source.split(".")):
            raise InputError(f"{source!r} is no module name; MODEL must be {_FORMS}")
        try:
            found = importlib.util.find_spec(source)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise InputError(f"no module {source!r} can be imported from {here}; is it installed?")
        module = _guarded(f"import {source}", lambda: importlib.import_module(source))
    value: object = module
    for part in name.split("."):
        if not hasattr(value, part):
            public = [key for key in vars(module) if not key.startswith("_")]
            near = difflib.get_close_matches(name, public, n=4)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise InputError(f"{source!r} has no {name!r}{hint}")
        value = getattr(value, part)
    return value


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as for a script: modules beside it can be imported
    sys.modules[spec.name] = module
    loader = spec.loader
    _guarded(f"import {path}", lambda: loader.exec_module(module))
    return module


def _guarded(what: str, run: Callable[[], object]) -> Any:
    """Run the user's code; its failure is told in one message with the line it came from."""
    try:
        return run()
    except GraphPruneError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        raise InputError(f"{what} failed: {type(error).__name__}: {error}{where}") from error


# --- weights ----------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{str(path)!r} is no safetensors file: {error}") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{str(path)!r} holds more than tensors, or is no file of torch.save ({reason}): "
            "save model.state_dict() instead"
        ) from error


def _unwrapped(state: object, path: str) -> dict[str, Tensor]:
    for key in _WRAPPED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path!r} holds a {type(state).__name__} without tensors")
    others = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{path!r} is no state_dict: {shorten(others)} are no tensors")
    return dict(state)


def _without_prefix(state: dict[str, Tensor], wanted: Mapping[str, object]) -> dict[str, Tensor]:
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state) and not any(key in wanted for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _untied(model: nn.Module, missing: list[str], state: Mapping[str, Tensor]) -> list[str]:
    """The missing names that are not in the file under another name, either.

    Counters of batches are forgiven: they are not in old files, and nothing depends on them.
    """
    first = aliases(model)
    given = {first[name] for name in state if name in first}
    return [
        name
        for name in missing
        if first.get(name, name) not in given and not name.endswith("num_batches_tracked")
    ]
