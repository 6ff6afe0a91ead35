"""From a folder to a smaller one: a plan from shapes, and slices of files; no model in memory."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from graphprune.api import rebuild, trace
from graphprune.arguments import as_path, is_int
from graphprune.deploy.folders import of_transformers
from graphprune.deploy.folders.plans import ENTRY, not_installed, write_text
from graphprune.deploy.folders.shards import INDEX, SINGLE, Layout, Named, Shards, write_shard
from graphprune.errors import CheckpointError, InputError
from graphprune.execute.shrink import cut, kept_indices, written
from graphprune.plan.leaving import names_before
from graphprune.plan.plan import Plan
from graphprune.planning.options import Options
from graphprune.record.tensors import aliases
from graphprune.text import tracked

STATE = ".graphprune_unfinished.json"
_SPARE = 64 << 20  # bytes that a disk should have left
_COPIED = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".vocab")  # no code, no weights


def shrink_folder(
    folder: str | Path,
    out: str | Path,
    ratio: float | None = None,
    example_inputs: object = None,
    *,
    attention: str = "heads",
    shard_bytes: int = 2 << 30,
    **options: Unpack[Options],
) -> Plan:
    """Shrink a folder of transformers that may be larger than the memory.

    The model is built on the meta device from its config, and traced there. Criteria of weights
    (``l2``, the default, and others) read one tensor of the files at a time, and so does the
    writing: memory holds one shard that is being written, and the largest tensor twice. Called
    again after an interruption, with the same arguments, it makes only the shards that are missing.

    Args:
        folder: with a ``config.json`` of a class of transformers, and safetensors.
        out: the folder to write: new, empty, or left unfinished by the same call.
        ratio: the fraction of channels to remove; or pass ``target`` among the options.
        example_inputs: what the model is traced on, as for :func:`graphprune.trace`; by default
            sixteen tokens for models of text, usual shapes for others.
        attention: as for :func:`graphprune.trace`.
        shard_bytes: the size of a file, at most, unless one tensor is larger.
        options: those of ``graph.plan``, but for data.

    Returns:
        The plan. ``graphprune.from_pretrained(out)`` loads the small model, and so do the
        AutoModel classes with ``trust_remote_code=True``.

    Raises:
        InputError: a wrong argument, a plan that needs the model in memory, no transformers, too
            little room on the disk, or an ``out`` that holds something else.
        CheckpointError: the folder is damaged or not whole, or cannot be written.
        ModelError: the config names no class of transformers.

    Example:
        >>> import graphprune
        >>> graphprune.shrink_folder(".", "smaller", 0.5)
        Traceback (most recent call last):
        graphprune.errors.InputError: '.' has no config.json: pass the folder of a model
    """
    source, target = as_path(folder, "folder"), as_path(out, "out")
    if not is_int(shard_bytes, 1):
        raise InputError(f"shard_bytes must be a positive int; got {shard_bytes!r}")
    if options.get("data") is not None:
        raise InputError(
            "shrink_folder runs no model, and so takes no data: load the model and use rebuild, or "
            "choose a criterion of weights alone"
        )
    model = _weightless(source)
    shards = Shards(source)
    weights = Named(shards, model, of_transformers.spelled(model))
    _check_target(source, target)
    inputs = _inputs(model) if example_inputs is None else example_inputs
    graph = trace(model, inputs, attention=attention, weights=weights)
    plan = graph.plan(ratio, **options)
    changed = written(plan)
    if changed:
        raise InputError(
            f"this plan changes values, not only shapes ({', '.join(sorted(changed)[:3])}): load "
            "the model and use rebuild, or leave out exact_only and the like"
        )
    small = rebuild(model, plan)
    _Writing(shards, weights, small, plan, target, shard_bytes).run(options.get("progress", False))
    return plan


def _weightless(folder: Path) -> nn.Module:
    """The model that a config builds, on the meta device."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{str(folder)!r} has no config.json: pass the folder of a model")
    try:
        config = of_transformers.config_of(folder)
    except ModuleNotFoundError as error:
        raise not_installed(folder, error) from error
    if hasattr(config, ENTRY):
        raise InputError(
            f"{str(folder)!r} holds a small model already: load it with from_pretrained, and prune "
            "it in memory"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"the weights of {str(folder)!r} are quantized: prune the float model")
    kind = of_transformers.class_named(config, None, str(folder))
    with torch.device("meta"):
        model: nn.Module = kind._from_config(config)
    return model.eval()


def _inputs(model: Any) -> object:
    """Tokens for models of text; others are tried."""
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    if model.main_input_name != "input_ids":
        return None
    both = getattr(model.config, "is_encoder_decoder", False)
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if both else {})}


def _check_target(source: Path, target: Path) -> None:
    if target.resolve().is_relative_to(source.resolve()) and target.resolve() != source.resolve():
        raise InputError(f"{str(target)!r} lies in {str(source)!r}: name a folder elsewhere")
    if target.exists() and not target.is_dir():
        raise InputError(f"{str(target)!r} is a file: name a new folder")
    if not target.is_dir():
        return
    if target.resolve() == source.resolve():
        raise InputError("out is the folder itself: name another one, nothing is overwritten")
    if any(target.iterdir()) and not (target / STATE).is_file():
        raise InputError(f"{str(target)!r} is not empty: name a new folder, nothing is overwritten")


class _Writing:
    """One folder that is being written."""

    def __init__(
        self,
        shards: Shards,
        weights: Named,
        small: Any,
        plan: Plan,
        target: Path,
        shard_bytes: int,
    ) -> None:
        self.shards, self.weights, self.small, self.target = shards, weights, small, target
        self.kept = kept_indices(plan)
        shapes = {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
        first = aliases(small)
        left = {first[name]: shape for name, shape in shapes.items() if name in first}
        before = names_before(plan)
        self.names, self.shapes = {}, {}  # in the original; of the small model, by names in files
        for name, shape in left.items():
            old = before(name)
            inside = weights.inside[old] if old == name else name
            self.names[inside], self.shapes[inside] = old, shape
        sizes = {name: self._bytes(name) for name in self.names}
        self.layout = Layout.of(sizes, shard_bytes)
        key = [plan.to_json(), shards.state(), list(self.layout.files)]
        self.key = hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def _bytes(self, name: str) -> int:
        kind = self.shards.kinds[self.weights.inside[self.names[name]]]
        return kind.bytes // max(math.prod(kind.shape), 1) * math.prod(self.shapes[name])

    def run(self, progress: bool) -> None:
        """Write what is missing; the config comes last, so that half a folder is none."""
        try:
            self.target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write {str(self.target)!r}: {error}") from error
        state = self.target / STATE
        if state.is_file() and state.read_text(encoding="utf-8") != self.key:
            raise InputError(
                f"{str(self.target)!r} is the unfinished folder of another call: remove it, or "
                "name a new one"
            )
        missing = [file for file in self.layout.files if not (self.target / file).is_file()]
        self._check_room(missing)
        write_text(state, self.key)
        for file in tracked(missing, "shards", len(missing), progress):
            write_shard(self.target / file, self.layout.files[file], self._read)
        if len(self.layout.files) > 1:
            write_text(self.target / INDEX, self.layout.index())
        self._copy_others()
        with tempfile.TemporaryDirectory(dir=self.target) as folder:  # it removes other weights
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of nothing
                self.small.save_pretrained(folder, state_dict={})
            (Path(folder) / SINGLE).unlink(missing_ok=True)
            for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, self.target / path.name)
        state.unlink()

    def _check_room(self, missing: list[str]) -> None:
        names = [name for file in missing for name in self.layout.files[file]]
        needed = sum(map(self._bytes, names)) + _SPARE
        free = shutil.disk_usage(self.target).free
        if free < needed:
            raise InputError(
                f"the disk of {str(self.target)!r} has {free / 1e9:.1f} GB left, and "
                f"{needed / 1e9:.1f} are needed: make room, or name a folder on another disk"
            )

    def _read(self, name: str) -> Tensor:
        before = self.names[name]
        return cut(self.weights[before], self.kept.get(before, {}))

    def _copy_others(self) -> None:
        """Tokenizers and the like; no weights, no code, nothing that is written here."""
        for path in sorted(self.shards.folder.iterdir()):
            own = path.name in (INDEX, "config.json", "generation_config.json")
            if path.is_file() and path.suffix in _COPIED and not own:
                shutil.copyfile(path, self.target / path.name)
