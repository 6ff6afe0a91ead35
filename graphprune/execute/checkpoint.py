"""One safetensors file that holds a small model together with its plan."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from graphprune.arguments import as_path
from graphprune.errors import CheckpointError, InputError, PlanError, RewriteError
from graphprune.execute.config import Before, refuse_loaded
from graphprune.execute.fold import recompute_masked
from graphprune.execute.shrink import shrink
from graphprune.execute.weightless import weightless
from graphprune.plan.coding import loads
from graphprune.plan.leaving import in_what_left, names_after
from graphprune.plan.plan import Plan, plan_of
from graphprune.record.checks import check_model
from graphprune.record.masked_names import masked_names, masks_of_state, renamed, set_masks
from graphprune.record.tensors import aliases, fingerprint
from graphprune.text import shorten

FORMAT = "graphprune"
VERSION = 1
_LAYOUTS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}
_KEYS = ("aliases", "layouts", "dtypes")
_HOST = re.sub(r"\W", "", platform.node())
_ABANDONED = 86_400.0  # seconds after which a file that another machine was writing is left over


def save(small: nn.Module, path: str | Path) -> Path:
    """Write a small model and its plan into one safetensors file.

    The file holds every tensor of the ``state_dict`` once; its metadata holds the plan and the
    names of tied tensors. It is written beside ``path`` and then moved there, so that a crash
    leaves no half-written file. Nothing is pickled.

    Args:
        small: what :func:`rebuild` returned, fine-tuned or not.
        path: the file to write.

    Returns:
        The path.

    Raises:
        InputError: ``small`` carries no plan.
        ModelError: ``small`` is wrapped or compiled: pass the module inside.
        CheckpointError: its state cannot be stored without pickle, or the file not be written.

    Example:
        >>> import tempfile, torch, graphprune
        >>> from graphprune.execute.checkpoint import load, save
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> small = graphprune.rebuild(net, 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loaded = load(save(small, f"{folder}/small.safetensors"), net)
        >>> torch.equal(loaded[1].weight, small[1].weight)
        True
    """
    path = as_path(path)
    plan = plan_of(small)
    if plan is None:
        raise InputError(
            f"expected a model made by rebuild, got {type(small).__name__} without a "
            "graphprune_plan"
        )
    check_model(small, values=False)
    tensors, tied = _distinct(small.state_dict(keep_vars=True))
    extra = {
        "aliases": tied,
        "layouts": {n: layout for n, t in tensors.items() if (layout := _layout(t))},
        "dtypes": {n: _dtype_name(t.dtype) for n, t in _unsaved_buffers(small).items()},
    }
    stored = _apart(tensors)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "plan": plan.to_json(),
        **{key: json.dumps(extra[key], sort_keys=True) for key in _KEYS},
    }
    metadata["digest"] = _digest(stored, metadata)
    return _write(stored, metadata, path)


def load(path: str | Path, model_or_factory: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Read a small model back.

    Args:
        path: what :func:`save` wrote.
        model_or_factory: the original architecture: a model (it is not touched, its weights do
            not matter) or a function without arguments that makes one (it is called on the
            ``meta`` device when that is enough, so that no full-size weights are made).

    Returns:
        The small model with the dtypes of the file; devices, ``requires_grad``, train/eval
        state and hooks come from the original architecture. A factory's model is on the CPU
        unless the factory says otherwise.

    Raises:
        CheckpointError: the file is damaged, foreign, or does not fit: says what differs.
        InputError: ``model_or_factory`` is neither a model nor makes one.

    Example:
        >>> import tempfile, torchvision, graphprune
        >>> from graphprune.execute.checkpoint import load, save
        >>> small = graphprune.rebuild(torchvision.models.resnet18(), 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(small, f"{folder}/small.safetensors")
        ...     loaded = load(path, torchvision.models.resnet18)
        >>> loaded.fc.in_features
        256
    """
    content = _read(as_path(path))
    original = weightless(model_or_factory)
    before = Before.of(original.model)
    _mask_as_planned(original.model, content)
    _check_fit(content, original.model)
    try:
        small = shrink(original.model, content.plan)
    except (PlanError, RewriteError) as error:
        raise CheckpointError(f"{content.path} does not fit the model: {error}") from error
    set_masks(small, content.masked)
    _fill(small, content, original.devices)
    recompute_masked(small)
    refuse_loaded(small, before)
    return small


# --- writing ----------------------------------------------------------------------------------


def _distinct(state: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, by its first name; and the other names of tied tensors."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"the state {name!r} is a {type(value).__name__}, not a tensor: it cannot be "
                "stored without pickle; let get_extra_state return a tensor"
            )
        owner = first.setdefault(id(value), name)
        if owner == name:
            tensors[name] = value
        else:
            tied[name] = owner
    return tensors, tied


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two in the same memory: safetensors refuses that."""
    stored = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if pointer in memory else tensor
        memory.add(pointer)
    return stored


def _layout(tensor: Tensor) -> str | None:
    if tensor.is_contiguous():
        return None
    for name, ndim in (("channels_last", 4), ("channels_last_3d", 5)):
        if tensor.dim() == ndim and tensor.is_contiguous(memory_format=_LAYOUTS[name]):
            return name
    return None


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not in the ``state_dict``."""
    found = {}
    for prefix, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(name)
            if buffer is not None:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Safetensors files have no checksum of their own."""
    state = hashlib.sha256()
    for key in ("plan", *_KEYS):
        state.update(metadata[key].encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> Path:
    """Beside the path first, synced, then moved there: what is there is always whole."""
    part = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex}.part")
    try:
        _tidy(path)
        part.touch()
        mode = part.stat().st_mode  # as the user's umask has it; safetensors makes it private
        save_file(tensors, part, metadata=metadata)
        part.chmod(mode)
        _sync(part)
        os.replace(part, path)
        if os.name == "posix":
            _sync(path.parent)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _sync(path: Path) -> None:
    """Wait until what was written is on the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tidy(path: Path) -> None:
    """Remove what saves to a path left behind that were killed."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        host, _, rest = part.name.removeprefix(f".{path.name}.").rpartition("-")[0].rpartition("-")
        try:
            if host == _HOST and os.name == "posix":
                os.kill(int(rest), 0)  # raises when there is no such process
            elif time.time() - part.stat().st_mtime > _ABANDONED:
                part.unlink(missing_ok=True)
        except (ProcessLookupError, ValueError):
            part.unlink(missing_ok=True)
        except OSError:  # not ours
            continue


# --- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Content:
    """What a file holds."""

    path: str
    plan: Plan
    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    layouts: Mapping[str, str]
    dtypes: Mapping[str, str]

    @property
    def masked(self) -> set[str]:
        """What is masked in the file."""
        return masks_of_state({*self.tensors, *self.aliases})


def _read(path: Path) -> _Content:
    name = repr(str(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(name, metadata)
            # Clones: the tensors of an open file are a map of it, not memory of our own.
            keys = file.keys()
            tensors = {key: file.get_tensor(key).clone() for key in keys}
    except OSError as error:
        raise CheckpointError(f"cannot read {name}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{name} is damaged or no safetensors file ({error}): pass what graphprune.save wrote"
        ) from error
    missing = [key for key in ("plan", "digest", *_KEYS) if key not in metadata]
    if missing or _digest(tensors, metadata) != metadata["digest"]:
        raise CheckpointError(f"{name} is damaged: its content does not match its digest")
    try:
        extra = {key: _texts(metadata[key], key) for key in _KEYS}
        plan = Plan.from_text(metadata["plan"], f"the plan in {name}")
    except PlanError as error:
        raise CheckpointError(f"the metadata of {name} is damaged: {error}") from error
    lost = set(extra["aliases"].values()) - tensors.keys() or extra["aliases"].keys() & tensors
    if lost:
        raise CheckpointError(f"the metadata of {name} is damaged: it ties {sorted(lost)[0]!r}")
    return _Content(name, plan, tensors, **extra)


def _texts(text: str, name: str) -> dict[str, str]:
    """Texts by name."""
    found = loads(text, name)
    if not isinstance(found, dict) or not all(isinstance(item, str) for item in found.values()):
        raise PlanError(f"{name} must be texts by name")
    return found


def _check_format(name: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{name} holds tensors but no graphprune plan: pass what graphprune.save wrote"
        )
    if metadata.get("version") != str(VERSION):
        raise CheckpointError(
            f"{name} has format version {metadata.get('version')!r}; this graphprune reads "
            f"version {VERSION}"
        )


# --- fitting and filling ----------------------------------------------------------------------


def _mask_as_planned(original: nn.Module, content: _Content) -> None:
    """Masks may have been put on, or made permanent, before or after the model was made smaller."""
    now = masked_names(original)
    planned = masks_of_state(slot.tensor for slot in content.plan.slots)
    for wanted in (now, planned, planned | content.masked, set[str]()):
        set_masks(original, wanted)
        if fingerprint(original) == content.plan.architecture:
            return
    set_masks(original, now)


def _check_fit(content: _Content, original: nn.Module) -> None:
    """Compare names and shapes before anything is built.

    Raises:
        CheckpointError: lists what is missing, unexpected or of another shape.
    """
    if plan_of(original) == content.plan:
        raise CheckpointError(
            f"{content.path} is loaded into the original architecture: pass the model before "
            "rebuild, not the small one"
        )
    first, left = aliases(original), in_what_left(original, content.plan)
    sizes = {(slot.tensor, slot.dim): slot.width for slot in content.plan.slots}
    found = {name: tuple(tensor.shape) for name, tensor in content.tensors.items()}
    found |= {name: found[owner] for name, owner in content.aliases.items() if owner in found}
    after = names_after(content.plan)
    expected = {
        after(name): tuple(
            sizes.get((first.get(name, name), d), n) for d, n in enumerate(value.shape)
        )
        for name, value in original.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not left(name)
    }
    expected |= {  # biases for the constants of removed channels
        after(change.tensor): (sizes.get(change.like, len(change.values)),)
        for change in content.plan.biases
        if change.like is not None
    }
    expected = renamed(expected, content.masked)
    shapes = [
        f"{name} is {list(found[name])} in the file, the plan makes it {list(shape)} in the model"
        for name, shape in expected.items()
        if name in found and found[name] != shape and not name.endswith("_extra_state")
    ]
    parts = [
        _listed("missing in the file", [name for name in expected if name not in found]),
        _listed("not in the model", [name for name in found if name not in expected]),
        _listed("shapes", shapes),
    ]
    if any(parts):
        text = "; ".join(filter(None, parts))
        raise CheckpointError(
            f"{content.path} does not fit {type(original).__name__}: {text}. "
            "Pass the architecture that was pruned"
        )


def _listed(title: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"{title}: {shorten(names, 5)}" if names else ""


def _fill(small: nn.Module, content: _Content, devices: Mapping[str, torch.device]) -> None:
    state = small.state_dict(keep_vars=True)  # with the versions that some modules ask for
    values: dict[int, Tensor] = {}  # one new tensor for each tensor of the model: ties stay
    owners = {**{name: name for name in content.tensors}, **content.aliases}
    olds, usual = dict(state), next(iter(devices.values()), None)
    for name, old in olds.items():
        if id(old) not in values:
            values[id(old)] = _ready(content, owners[name], old, devices.get(name, usual))
        state[name] = values[id(old)]
    small.load_state_dict(state, assign=True)
    _filled_in_place(
        small, {id(values[id(old)]): old for old in olds.values() if id(old) in values}
    )
    for name, buffer in _unsaved_buffers(small).items():
        dtype = getattr(torch, content.dtypes.get(name, ""), None)
        known = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if known and buffer.is_floating_point() and buffer.dtype != dtype:
            owner, _, leaf = name.rpartition(".")
            small.get_submodule(owner)._buffers[leaf] = buffer.to(dtype)


def _filled_in_place(small: nn.Module, emptied: Mapping[int, Tensor]) -> None:
    """Let the tensors that were on meta hold the values: hooks may hold them, too.

    Args:
        small: holds the new tensors.
        emptied: the old tensors, by the ``id`` of the new ones.
    """
    swapped: set[int] = set()
    for module in small.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in places:
            for name, new in held.items():
                old = emptied.get(id(new))
                if not isinstance(old, Tensor):
                    continue
                if id(new) not in swapped:
                    try:
                        torch.utils.swap_tensors(old, new)
                    except RuntimeError:  # something watches one of them: only modules are told
                        continue
                    swapped.add(id(new))
                held[name] = old


def _ready(content: _Content, name: str, old: Any, device: torch.device | None) -> Tensor:
    """A tensor of the file in the place's device, layout and kind."""
    tensor = content.tensors[name]
    floats = tensor.is_floating_point() and old.is_floating_point()
    if not floats and tensor.dtype != old.dtype and not name.endswith("_extra_state"):
        found, wanted = _dtype_name(tensor.dtype), _dtype_name(old.dtype)
        raise CheckpointError(
            f"{content.path} does not fit: {name} is {found} in the file, {wanted} in the model"
        )
    if device is not None and device.type not in ("meta", "cpu"):
        tensor = tensor.to(device)
    layout = _LAYOUTS.get(content.layouts.get(name, ""))
    if layout is not None and tensor.dim() == (4 if layout is torch.channels_last else 5):
        tensor = tensor.contiguous(memory_format=layout)
    if not isinstance(old, nn.Parameter):
        return tensor
    parameter = nn.Parameter(tensor, requires_grad=old.requires_grad)
    vars(parameter).update(vars(old))
    return parameter
