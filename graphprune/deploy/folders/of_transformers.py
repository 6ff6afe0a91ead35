"""Folders of transformers: ``AutoModel...from_pretrained`` and ``graphprune.from_pretrained``.

A folder holds the config of the original, the plan, the small model's weights, and a file of code
that ``auto_map`` names. Loading is that of transformers, shards, dtypes and devices included, of a
class whose constructor makes what the config builds small.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from graphprune.deploy.folders.plain import (
    CODE_FILE,
    HUB,
    Reference,
    attention_of,
    before_weights,
    check_whole,
    mark,
    plan_file,
    register,
    unmark,
)
from graphprune.deploy.folders.plans import (
    ENTRY,
    Entry,
    fitting,
    refused,
    told,
    write_plan,
    write_text,
)
from graphprune.errors import CheckpointError, GraphPruneError, InputError, ModelError
from graphprune.execute.saving import WRITERS, Offer
from graphprune.plan.plan import Plan

_CODE = '''"""Loads the small model of this folder; written by graphprune.

AutoModel classes import this file when they are given trust_remote_code=True. Without it,
graphprune.from_pretrained(folder) gives the same model.
"""

from graphprune.deploy.folders.of_transformers import small_class
from transformers import {kind}

Small{kind} = small_class({kind})
'''


# --- writing ----------------------------------------------------------------------------------


class TransformersWriter:
    """Writes what ``save_pretrained`` writes, and the plan with the code that applies it."""

    def fits(self, offer: Offer) -> bool:
        """Models of transformers."""
        base = _base_class()
        return base is not None and isinstance(offer.module, base)

    def whole(self, offer: Offer) -> bool:
        """They are not made of others."""
        return False

    def write(self, offer: Offer, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Write a folder.

        Raises:
            ModelError: config and plan do not make this model.
        """
        module: Any = offer.module
        folder, args = (args[0], args[1:]) if args else (options.pop("save_directory"), args)
        if options.pop("safe_serialization", True) is False:
            raise InputError("folders of small models hold safetensors: leave safe_serialization")
        config = module.config if offer.origin is None else offer.origin.of(module.config)
        try:
            plan = fitting(offer, config)
        except GraphPruneError as error:
            raise refused(offer, error) from error
        if options.pop("push_to_hub", False):  # which saves once more, into a folder of its own
            name = options.pop("repo_id", Path(folder).name)
            hub = {k: options.pop(k) for k in ("commit_message", "create_pr") if k in options}
            module.push_to_hub(name, token=options.get("token"), **hub)
        if args[0] if args else options.get("is_main_process", True):
            write_plan(plan, folder)
            register()
            if _in_library(type(module)):
                write_text(Path(folder) / CODE_FILE, _CODE.format(kind=type(module).__name__))
        with _said(module, config, plan):
            return type(module).save_pretrained(module, folder, *args, **options)


@contextlib.contextmanager
def _said(module: Any, config: Any, plan: Plan) -> Iterator[None]:
    """For a while, a model has the config that its folder gets, and forgets no tensor."""
    own, mine = module.config, vars(module)
    attention = getattr(own, "_attn_implementation", None)
    mark(config, Entry.of(plan, attention=attention))
    known = {k: v for k, v in (getattr(config, "auto_map", None) or {}).items() if "Model" not in k}
    reference = f"{Path(CODE_FILE).stem}.Small{type(module).__name__}"
    auto_map = {**known, **dict.fromkeys(_auto_classes(type(module), type(config)), reference)}
    if auto_map:
        config.auto_map = auto_map
    elif hasattr(config, "auto_map"):
        del config.auto_map
    try:
        mine["_keys_to_ignore_on_save"] = None  # of computed tables, which would be the original's
        module.config = config
        yield
    finally:
        module.config = own
        del mine["_keys_to_ignore_on_save"]


def _auto_classes(kind: type, config: type) -> list[str]:
    """The auto classes that make a class of its config."""
    import transformers.models.auto.modeling_auto as auto

    found = []
    for name, thing in vars(auto).items():
        mapping = getattr(thing, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or not _in_library(kind):
            continue
        try:
            made = mapping.get(config, None)
        except Exception:  # a class of this kind needs a library that is not there
            continue
        if kind in (made if isinstance(made, tuple | list) else (made,)):
            found.append(name)
    return found


def _in_library(kind: type) -> bool:
    """Whether a class is one of transformers' own, found by its name."""
    import transformers

    return getattr(transformers, kind.__name__, None) is kind


def _base_class() -> Any:
    """``PreTrainedModel``, once somebody has imported it."""
    loaded = sys.modules.get("transformers.modeling_utils")
    return getattr(loaded, "PreTrainedModel", None)


WRITERS.append(TransformersWriter())
register()


# --- loading ----------------------------------------------------------------------------------


def small_class(kind: Any) -> Any:
    """A class that loads folders of small models: what ``auto_map`` names.

    Args:
        kind: the class of the original. Folders without a plan, and models made from a config,
            are its own.
    """

    def from_pretrained(cls: Any, folder: Any, *args: Any, **options: Any) -> Any:
        return load(kind, folder, *args, **options)

    def from_config(cls: Any, config: Any, **options: Any) -> Any:
        return kind._from_config(config, **options)

    found = type(f"Small{kind.__name__}", (kind,), {"__module__": __name__})
    members: dict[str, Callable[..., Any]] = {
        "from_pretrained": from_pretrained,
        "_from_config": from_config,
    }
    for name, method in members.items():
        setattr(found, name, classmethod(method))
    return found


def load(kind: Any, folder: Any, *args: Any, **options: Any) -> Any:
    """A small model from a folder; see :func:`graphprune.from_pretrained`.

    Args:
        kind: the class of the original.
        folder: where it is, or a name on the hub.
        args: for the constructor.
        options: those of ``from_pretrained`` of transformers.

    Raises:
        CheckpointError: the folder is damaged, not whole, or does not fit.
    """
    name = str(folder)
    config, options = _config(kind, folder, options)
    value = getattr(config, ENTRY, None)
    if value is None:
        with _reported(name):
            return kind.from_pretrained(folder, *args, config=config, **options)
    entry = Entry.read(value, name)
    config = copy.deepcopy(config)
    unmark(config)
    plan = entry.plan(plan_file(folder, options), name)
    options.setdefault("use_safetensors", True)
    reference = Reference(kind, config, plan, name)
    own = getattr(reference.model.config, "_attn_implementation", None)
    attention = attention_of(entry, own)
    if attention and "attn_implementation" not in options:
        config._attn_implementation = attention
    asked = options.pop("output_loading_info", False)
    with _reported(name):
        model, info = _from_pretrained(
            _planned(kind, plan, reference.ties, name), folder, args, config, options
        )
    check_whole(kind, name, info.get("missing_keys", ()), info.get("mismatched_keys", ()))
    for text in info.get("error_msgs", ()):
        raise CheckpointError(f"{name!r} cannot be loaded: {text}")
    reference.after_weights(model)
    return (model, info) if asked else model


def _from_pretrained(
    kind: Any, folder: Any, args: tuple[Any, ...], config: Any, options: dict[str, Any]
) -> Any:
    with torch.device("meta"):  # torch lists its constructors at the first such call, for good
        torch.empty(0)  # transformers replaces some of them while it loads
    return kind.from_pretrained(folder, *args, config=config, output_loading_info=True, **options)


def _config(kind: Any, folder: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config in a folder, and the options that it did not take."""
    config = options.pop("config", None)
    if config is not None and not isinstance(config, str | Path):
        return config, options
    own = ("dtype", "torch_dtype", "quantization_config", "output_loading_info")
    mine = {key: options.pop(key) for key in own if key in options}
    try:
        found, rest = kind.config_class.from_pretrained(
            folder if config is None else config, return_unused_kwargs=True, **options
        )
    except (OSError, ValueError, TypeError) as error:
        here = "" if Path(str(folder)).exists() else ", and there is no such folder"
        raise CheckpointError(
            f"cannot read the config of {str(folder)!r}{here}: {told(error)}"
        ) from error
    hub = {key: options[key] for key in HUB if key in options}
    return found, {**rest, **hub, **mine}


def _planned(kind: Any, plan: Plan, ties: dict[str, str], name: str) -> Any:
    """A class for one call: what its constructor makes is small, of the original's class."""

    def init(self: Any, config: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, config, *args, **options)
        self.__class__ = kind
        before_weights(self, plan, ties, name)

    members = {"__init__": init, "__module__": kind.__module__, "_auto_class": None}
    return type(kind.__name__, (kind,), members)


@contextlib.contextmanager
def _reported(name: str) -> Iterator[None]:
    """Errors of files as one kind of error."""
    try:
        yield
    except (GraphPruneError, torch.OutOfMemoryError, TypeError, ImportError):
        raise
    except Exception as error:
        raise CheckpointError(f"{name!r} cannot be loaded: {told(error)}") from error


def from_folder(folder: Any, model_class: Any, options: dict[str, Any]) -> Any:
    """A model of the class that a config names; see :func:`load`.

    Raises:
        CheckpointError: as there.
        ModelError: the config names no class of the library.
    """
    hub = {key: options[key] for key in HUB if key in options}
    config = config_of(folder, **hub)
    return load(class_named(config, model_class, str(folder)), folder, **options)


def config_of(folder: Any, **hub: Any) -> Any:
    """The config in a folder; no code of it is run.

    Raises:
        CheckpointError: it cannot be read.
        ModuleNotFoundError: the library is not installed.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **hub)
    except (OSError, ValueError, KeyError) as error:
        here = "" if Path(str(folder)).exists() else ", and there is no such folder"
        raise CheckpointError(
            f"cannot read the config of {str(folder)!r}{here}: {told(error)}"
        ) from error


def class_named(config: Any, model_class: Any, folder: str) -> Any:
    """The class of the original: the one given, or the one of transformers that a config names.

    Raises:
        ModelError: it names none.
    """
    import transformers

    if model_class is not None:
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class
        raise InputError(f"model_class must be a class of transformers models; got {model_class!r}")
    names = getattr(config, "architectures", None) or [None]
    kind = getattr(transformers, str(names[0]), None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    raise ModelError(
        f"{folder!r} holds a {names[0]}, which is no class of transformers "
        f"{transformers.__version__}: pass model_class, the class of the original"
    )


def spelled(model: Any) -> dict[str, str]:
    """What the files of a folder call tensors of a model, where that is something else.

    Tensors that are made of several in files have no name there.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 files have the names of the model
        return {}
    state = model.state_dict()
    names = {id(tensor): name for name, tensor in state.items()}
    saved = revert_weight_conversion(model, dict(state))
    return {names[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in names}
