"""Folders of diffusers: models, and pipelines that hold small ones."""

from __future__ import annotations

import contextlib
import enum
import functools
import sys
from pathlib import Path
from typing import Any

from graphprune.deploy.folders import of_transformers
from graphprune.deploy.folders.files import check_builds, placed, read, read_json, write
from graphprune.deploy.folders.plain import DOOR
from graphprune.deploy.folders.plans import ENTRY, refused, told
from graphprune.errors import CheckpointError, GraphPruneError, InputError, ModelError
from graphprune.execute.saving import WRITERS, Offer

WEIGHTS = "diffusion_pytorch_model.safetensors"
_OWN = f"_{ENTRY}"  # of a config: diffusers passes over names that begin so


class DiffusersWriter:
    """Writes the config of the original, and weights with the plan."""

    def fits(self, offer: Offer) -> bool:
        """Models of diffusers that were pruned by themselves."""
        base = getattr(sys.modules.get("diffusers.models.modeling_utils"), "ModelMixin", None)
        known = isinstance(base, type) and isinstance(offer.module, base)
        return known and not offer.name and offer.origin is not None

    def whole(self, offer: Offer) -> bool:
        """They are not made of others."""
        return False

    def write(self, offer: Offer, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Write a folder.

        Raises:
            ModelError: the config builds another model than was pruned.
        """
        module: Any = offer.module
        folder = Path(args[0] if args else options.pop("save_directory"))
        if options.get("safe_serialization", True) is False or options.get("variant"):
            raise InputError("folders of small models hold one file of safetensors: no variants")
        origin = offer.origin
        assert origin is not None
        config = origin.of(module.config)
        try:
            build = functools.partial(type(module).from_config, config)
            check_builds(module, build, "was it changed by hand?")
        except GraphPruneError as error:
            raise refused(offer, error) from error
        own = vars(module)["_internal_dict"]
        try:
            vars(module)["_internal_dict"] = config
            module.save_config(folder)
        finally:
            vars(module)["_internal_dict"] = own
        write(module, folder, WEIGHTS, _OWN, **{DOOR: {"quant_method": ENTRY}})
        register()


WRITERS.append(DiffusersWriter())


def load(folder: Path, config: dict[str, Any], options: dict[str, Any]) -> Any:
    """A model from a folder; one without a plan by its class."""
    kind = _class(str(config.get("_class_name")))
    if _OWN not in config:
        return kind.from_pretrained(folder, **options)
    return placed(_small(kind, folder, config), options)


def _small(kind: Any, folder: Path, config: dict[str, Any]) -> Any:
    """The small model of a folder that holds its plan."""
    plain = {key: value for key, value in config.items() if key not in (_OWN, DOOR)}
    return read(folder, config[_OWN], functools.partial(kind.from_config, plain))


def register() -> None:
    """Let plain ``from_pretrained`` read folders with a plan, by its door for quantizers.

    See :mod:`graphprune.deploy.folders.plain`; here whatever is built is made the small model
    before weights are read into it. There is no public function to register at.
    """
    auto = sys.modules.get("diffusers.quantizers.auto")
    if auto is None or ENTRY in auto.AUTO_QUANTIZER_MAPPING:
        return
    from diffusers.quantizers.base import DiffusersQuantizer
    from diffusers.quantizers.quantization_config import QuantizationConfigMixin

    class Method(enum.StrEnum):
        """The name, as the library holds those of its own."""

        PLAN = ENTRY

    class PlanConfig(QuantizationConfigMixin):
        """Names the quantizer below; which file holds the plan says another entry."""

        def __init__(self, quant_method: Any = ENTRY, **_: Any) -> None:
            self.quant_method: Any = Method(quant_method)

        def to_diff_dict(self) -> dict[str, Any]:
            return {"quant_method": ENTRY}

    class PlanQuantizer(DiffusersQuantizer):
        """Quantizes nothing: gives what was built the parts of the small model."""

        is_serializable = is_trainable = True
        use_keep_in_fp32_modules = True

        def maybe_update_loaded_keys(self, loaded_keys: Any, checkpoint_files: Any) -> Any:
            self.folder = Path(checkpoint_files[0]).parent
            return loaded_keys

        def preprocess_model(self, model: Any, **_: Any) -> None:
            config = read_json(self.folder / "config.json")
            vars(model).update(vars(_small(type(model), self.folder, config)))

        def postprocess_model(self, model: Any, **_: Any) -> Any:
            return model

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            """Nothing else."""

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
            """Nothing else."""

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[ENTRY] = PlanConfig
    auto.AUTO_QUANTIZER_MAPPING[ENTRY] = PlanQuantizer


register()


def load_pipeline(folder: Path, options: dict[str, Any]) -> Any:
    """A pipeline from a folder: its small models are loaded by themselves."""
    index = read_json(folder / "model_index.json")
    found: dict[str, Any] = {}
    for name, value in index.items():
        path = folder / name / "config.json"
        if name in options or not isinstance(value, list) or not path.is_file():
            continue
        config = read_json(path)
        own = {k: options[k] for k in ("dtype", "torch_dtype") if options.get(k) is not None}
        if _OWN in config:
            found[name] = load(folder / name, config, own)
        elif ENTRY in config:
            found[name] = of_transformers.from_folder(folder / name, None, own)
    kind = _class(str(index.get("_class_name")))
    try:
        return kind.from_pretrained(folder, **found, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(folder)!r} cannot be loaded: {told(error)}") from error


def _class(name: str) -> Any:
    """A class of diffusers.

    Raises:
        ModelError: there is none of this name.
    """
    import diffusers

    found = None
    with contextlib.suppress(AttributeError, RuntimeError):
        found = getattr(diffusers, name)
    if isinstance(found, type) and callable(getattr(found, "from_pretrained", None)):
        return found
    raise ModelError(f"{name} is no class of diffusers {diffusers.__version__}")


def is_model(config: dict[str, Any]) -> bool:
    """Whether a config is one of diffusers."""
    return "_class_name" in config and "_diffusers_version" in config
