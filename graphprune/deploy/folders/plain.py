"""Models of transformers made small between their config and their weights.

Plain ``from_pretrained`` does that as well, once it is told how. Its door for what changes a model
there is that of quantizers: the config names one, and transformers calls it with the model that the
config built, without weights. A process that has not imported graphprune does not know the name;
transformers then says so, and stops at the first weight of another size.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path
from typing import Any

import torch

from graphprune.deploy.folders.plans import (
    ENTRY,
    PLAN_FILE,
    Entry,
    settle_values,
    small_of,
    tie,
    told,
)
from graphprune.errors import CheckpointError
from graphprune.execute.building import Recipe
from graphprune.execute.config import Before, refuse_loaded
from graphprune.plan.plan import Plan
from graphprune.record.tensors import aliases
from graphprune.text import shorten

CODE_FILE = "modeling_graphprune.py"
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder",
       "token")  # fmt: skip
DOOR = "quantization_config"
_HELD = ("_keys_to_ignore_on_load_missing", "_initialize_missing_keys", "hf_quantizer")


# --- configs ----------------------------------------------------------------------------------


def mark(config: Any, entry: Entry) -> None:
    """Let a config say which plan makes what it builds small."""
    setattr(config, ENTRY, entry.to_dict())
    if getattr(config, DOOR, None) is None:
        setattr(config, DOOR, {"quant_method": ENTRY})


def unmark(config: Any) -> None:
    """Take from a config what the folder says of the plan."""
    vars(config).pop(ENTRY, None)
    door = getattr(config, DOOR, None)
    if door is not None and _method(door) == ENTRY:
        delattr(config, DOOR)
    if getattr(config, "auto_map", None):
        left = {k: v for k, v in config.auto_map.items() if Path(CODE_FILE).stem not in str(v)}
        config.auto_map = left
        if not left:
            del config.auto_map


def _method(door: Any) -> Any:
    """The quantizer that a config names."""
    return door.get("quant_method") if isinstance(door, dict) else door.quant_method


def attention_of(entry: Entry, own: Any) -> Any:
    """How the small model attended, where models of this config do not and its code was changed."""
    attention = entry.more.get("attention")
    return attention if attention in ("eager", "sdpa") and attention != own else None


def plan_file(folder: Any, options: dict[str, Any]) -> str | None:
    """The file of the plan: in the folder, or of a name on the hub."""
    if Path(folder).is_dir():
        return str(Path(folder) / (options.get("subfolder") or "") / PLAN_FILE)
    from transformers.utils.hub import cached_file

    hub = {key: options[key] for key in HUB if options.get(key) is not None}
    return cached_file(folder, PLAN_FILE, _raise_exceptions_for_missing_entries=False, **hub)


# --- models -----------------------------------------------------------------------------------


def before_weights(model: Any, plan: Plan, ties: dict[str, str], name: str) -> None:
    """Make a model without weights small, in place; it then draws no missing weight.

    Args:
        model: what the config of a folder built.
        plan: what makes it small.
        ties: the first name of a tensor by its others: loaders tie later than plans need it.
        name: of the folder.

    Raises:
        CheckpointError: the plan does not fit.
    """
    tie(model, ties)
    with torch.device("cpu"):
        small_of(model, plan, name)
    vars(model)["_keys_to_ignore_on_load_missing"] = None
    vars(model)["_initialize_missing_keys"] = lambda *_, **__: None


class Reference:
    """The small model of a folder without its large weights: what its loaded twin has to be.

    Args:
        kind: the class of the original.
        config: what it is built from.
        plan: what makes it small.
        name: of the folder.

    Raises:
        CheckpointError: the config builds no model, or the plan does not fit it.
    """

    def __init__(self, kind: Any, config: Any, plan: Plan, name: str) -> None:
        self.kind, self.name = kind, name
        self.config = copy.deepcopy(config)
        recipe = Recipe(kind, self.config)
        try:
            original = recipe.build(config)
        except Exception as error:
            raise CheckpointError(
                f"the config of {name!r} builds no {kind.__name__} ({told(error)})"
            ) from error
        self.ties = {other: first for other, first in aliases(original).items() if other != first}
        self.model: Any = small_of(original, plan, name)

    def after_weights(self, model: Any) -> None:
        """Give a loaded model the values that no file holds, and what its config cannot say."""
        settle_values(model, self.model)
        for key in _HELD:
            vars(model).pop(key, None)
        refuse_loaded(model, Before.of(Recipe(self.kind, self.config).build(self.config)))


def check_whole(kind: Any, name: str, missing: Any, others: Any = ()) -> None:
    """Raise unless every tensor of a small model was in the files of its folder, in its shape.

    Args:
        kind: the class of the original.
        name: of the folder.
        missing: names of those that were not there.
        others: names of those of another shape.
    """
    missing, wrong = sorted(map(str, missing)), [str(key) for key in others]
    parts = [f"missing in its files: {shorten(missing, 5)}"] if missing else []
    parts += [f"of another shape: {shorten(wrong, 3)}"] if wrong else []
    if parts:
        raise CheckpointError(
            f"{name!r} does not hold the small {kind.__name__} of its plan: {'; '.join(parts)}"
        )


# --- the door ---------------------------------------------------------------------------------


def register() -> None:
    """Tell transformers, where it is loaded and has such a door (version 5)."""
    if "transformers.core_model_loading" not in sys.modules:
        return
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if ENTRY in auto.AUTO_QUANTIZER_MAPPING:
        return

    class PlanConfig(QuantizationConfigMixin):
        """Names the quantizer below; which plan it is says another entry of the config."""

        def __init__(self, quant_method: Any = ENTRY, **_: Any) -> None:
            self.quant_method = quant_method

    class PlanQuantizer(HfQuantizer):
        """Quantizes nothing: makes models small before their weights are read."""

        requires_calibration = False
        is_trainable = True

        def update_attn_implementation(self, config: Any) -> Any:
            self.asked = getattr(config, "_attn_implementation", None) is not None
            return config

        def preprocess_model(self, model: Any, dtype: Any = None, **others: Any) -> None:
            config, name = model.config, str(model.config.name_or_path)
            entry = Entry.read(getattr(config, ENTRY, None), name)
            plan = entry.plan(_beside(config, others.get("checkpoint_files")), name)
            unmark(config)
            self.arguments = (type(model), copy.deepcopy(config), plan, name)
            attention = attention_of(entry, getattr(config, "_attn_implementation", None))
            if attention and not self.asked:
                config._attn_implementation = attention
            before_weights(model, plan, model.all_tied_weights_keys, name)

            def check(*_: Any, **__: Any) -> None:
                held = model.state_dict(keep_vars=True).items()
                empty = [key for key, t in held if not getattr(t, "_is_hf_initialized", False)]
                check_whole(type(model), name, empty)

            vars(model)["_initialize_missing_keys"] = check

        def postprocess_model(self, model: Any, **_: Any) -> Any:
            unmark(model.config)
            Reference(*self.arguments).after_weights(model)
            return model

        def is_serializable(self) -> bool:
            return True

    with contextlib.suppress(ValueError):  # another thread was first
        auto.register_quantization_config(ENTRY)(PlanConfig)
    with contextlib.suppress(ValueError):
        auto.register_quantizer(ENTRY)(PlanQuantizer)


def _beside(config: Any, files: Any) -> str | None:
    """The file of the plan, beside those of the weights."""
    for path in files or ():
        beside = Path(path).parent / PLAN_FILE
        if beside.is_file():
            return str(beside)
    revision = getattr(config, "_commit_hash", None)
    return plan_file(config.name_or_path, {"revision": revision})
