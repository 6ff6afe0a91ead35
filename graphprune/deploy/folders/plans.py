"""The plan in a folder: a file beside the config, which names it and its digest.

Whoever reads a folder reads data of strangers: a plan that is not the one that the config names, or
that does not fit what the config builds, is refused before any weight is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from graphprune.errors import (
    CheckpointError,
    GraphPruneError,
    InputError,
    ModelError,
    PlanError,
    RewriteError,
)
from graphprune.execute.building import Recipe
from graphprune.execute.likeness import loose, shapes_of
from graphprune.execute.saving import Offer
from graphprune.execute.shrink import hollow, shrink
from graphprune.plan.leaving import renamed
from graphprune.plan.plan import Cost, Plan
from graphprune.record.masked_names import masked_names
from graphprune.record.tensors import fingerprint, named_modules, named_tensors
from graphprune.text import shorten

PLAN_FILE = "graphprune_plan.json"
ENTRY = "graphprune"  # of a config: which plan makes what it builds small
FORMAT = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """What a config says of the plan beside it.

    Attributes:
        digest: of the text of the file.
        more: what else has to be known to build the model as it was.
    """

    digest: str
    more: Mapping[str, Any]

    @classmethod
    def of(cls, plan: Plan, **more: Any) -> Entry:
        """For a plan that is going to be written."""
        return cls(_digest(plan.to_json()), more)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a config."""
        return {"format": FORMAT, "plan": PLAN_FILE, "digest": self.digest, **self.more}

    @classmethod
    def read(cls, value: object, folder: str) -> Entry:
        """From what a config holds.

        Raises:
            CheckpointError: it is damaged, or of another version.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("digest"), str):
            raise CheckpointError(f"the config of {folder!r} is damaged: {ENTRY} says no plan")
        if value.get("format") != FORMAT:
            found = repr(value.get("format"))[:20]
            raise CheckpointError(
                f"{folder!r} has format {found}; this graphprune reads {FORMAT}: install "
                "a newer one"
            )
        known = ("format", "plan", "digest")
        return cls(value["digest"], {k: v for k, v in value.items() if k not in known})

    def plan(self, path: str | Path | None, folder: str) -> Plan:
        """The plan in a file of a folder.

        Raises:
            CheckpointError: it is missing, damaged, or another one.
        """
        if path is None or not Path(path).is_file():
            raise CheckpointError(
                f"{folder!r} has no file {PLAN_FILE}, which its config names: the folder is not "
                "whole; copy it again, or save the small model once more"
            )
        try:
            text = Path(path).read_text(encoding="utf-8")
            plan = Plan.from_text(text, f"{PLAN_FILE} in {folder!r}")
        except (OSError, UnicodeDecodeError, PlanError) as error:
            raise CheckpointError(f"cannot read the plan of {folder!r}: {error}") from error
        if _digest(text) != self.digest:
            raise CheckpointError(
                f"{PLAN_FILE} in {folder!r} is not the plan that its config names: files of two "
                "models were mixed; save the small model once more"
            )
        return plan


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_plan(plan: Plan, folder: str | Path) -> None:
    """Write the file, whole or not at all."""
    write_text(Path(folder) / PLAN_FILE, plan.to_json())


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then move it there.

    Raises:
        CheckpointError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


# --- what a config and a plan make ------------------------------------------------------------


def fitting(offer: Offer, config: Any) -> Plan:
    """The plan that makes a small model of what a config builds.

    Args:
        offer: the small model, or a part of one.
        config: what its config said before the plan.

    Raises:
        ModelError: there is none; says why.
    """
    module, kind = offer.module, type(offer.module).__name__
    if masked_names(module):
        raise ModelError(
            f"{kind} has masks of torch.nn.utils.prune: make them permanent with prune.remove "
            "before it is saved"
        )
    recipe = Recipe(type(module), config)
    try:
        original = recipe.build(config)
    except Exception as error:
        told = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelError(f"the config of {kind} builds no model ({told})") from error
    plan = part_of(offer, original)
    if not offer.name and fingerprint(original) != plan.architecture:
        raise ModelError(
            f"the config of {kind} does not build the model that was pruned (other tensors or "
            "shapes: was it changed by hand?)"
        )
    try:
        plan.check(original)
        small = hollow(original, plan)
    except (PlanError, RewriteError) as error:
        raise ModelError(f"the plan does not fit what the config of {kind} builds: {error}") from (
            error
        )
    odd = {key for key, _ in shapes_of(small).items() ^ shapes_of(module).items()}
    if odd:
        names = sorted({name for name, _ in odd})
        raise ModelError(
            f"the config of {kind} and the plan make another model: {shorten(names, 3)} differ"
        )
    return plan


def small_of(original: nn.Module, plan: Plan, folder: str) -> nn.Module:
    """Make what a config built small, in place; weights do not matter and may be on meta.

    Raises:
        CheckpointError: the plan does not fit.
    """
    if fingerprint(original) != plan.architecture:
        raise CheckpointError(
            f"the plan of {folder!r} does not fit what its config builds "
            f"({type(original).__name__} has other tensors or shapes): the config was changed, or "
            "this version of the library builds another model"
        )
    try:
        return shrink(original, replace(plan, weights=None), inplace=True)
    except (PlanError, RewriteError) as error:
        raise CheckpointError(
            f"the plan of {folder!r} does not fit what its config builds: {error}"
        ) from error


def tie(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Let tensors be one: the first name by the others."""
    for other, first in ties.items():
        (owner, _, key), (home, _, leaf) = other.rpartition("."), first.rpartition(".")
        mine, there = vars(model.get_submodule(owner)), vars(model.get_submodule(home))
        for held in ("_parameters", "_buffers"):
            if key in mine[held] and leaf in there[held]:
                mine[held][key] = there[held][leaf]


def settle_values(model: nn.Module, reference: nn.Module) -> None:
    """Give tensors that no file holds the values of a model that was built for real.

    Loaders make them empty, or compute them anew from a config that says the original's sizes.
    """
    saved = set(model.state_dict(keep_vars=True))
    values = dict(loose(reference))
    for prefix, module in named_modules(model):
        stores: tuple[dict[str, Any], ...] = (module._buffers, vars(module))
        for store in stores:
            for key, tensor in store.items():
                name = f"{prefix}.{key}" if prefix else key
                value = values.get(name)
                if value is None or name in saved or value.is_meta or tensor is value:
                    continue
                device = _device(module, tensor)
                store[key] = value.to(device, tensor.dtype if value.is_floating_point() else None)


def _device(module: nn.Module, tensor: Any) -> Any:
    """Where a tensor belongs."""
    if not tensor.is_meta:
        return tensor.device
    held = (t.device for t in (*module.parameters(), *module.buffers()) if not t.is_meta)
    return next(held, "cpu")


# --- plans of parts ---------------------------------------------------------------------------


def part_of(offer: Offer, original: nn.Module) -> Plan:
    """The plan for a part of a model alone: what it changes there.

    Args:
        offer: the part.
        original: what the part was.
    """
    plan, head = offer.plan, f"{offer.name}."
    if not offer.name:
        return plan

    def inside(change: Any) -> bool:
        tensor = getattr(change, "tensor", None)
        if tensor is not None:
            return offer.names.get(tensor) is not None or tensor.startswith(head)
        module = getattr(change, "module", getattr(change, "mixture", None))
        if module is not None:
            return f"{module}.".startswith(head)
        return any(name in offer.names for name, _ in getattr(change, "rows", ()))

    def name_of(name: str) -> str:
        short = "" if name == offer.name else name.removeprefix(head)
        return offer.names.get(name, short)

    chosen: dict[str, Any] = {
        field.name: tuple(renamed(change, name_of) for change in held if inside(change))
        for field in fields(plan)
        if field.name not in ("groups", "parts", "notes")
        and isinstance(held := getattr(plan, field.name), tuple)
    }
    groups = tuple(
        replace(group, layers=_within(group.layers, head))
        for group in plan.groups
        if _within(group.layers, head)
    )
    parts = tuple(renamed(part, name_of) for part in plan.parts if part.name.startswith(head))
    return replace(
        plan,
        architecture=fingerprint(original),
        groups=groups,
        parts=parts,
        weights=None,
        before=_cost(original),
        after=_cost(offer.module),
        **chosen,
    )


def _cost(model: nn.Module) -> Cost:
    """Parameters and bytes; MACs of a part alone were not counted."""
    held = [tensor for _, tensor in named_tensors(model)]
    parameters = [tensor for tensor in held if isinstance(tensor, nn.Parameter)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return Cost(sum(tensor.numel() for tensor in parameters), 0, size)


def _within(layers: Iterable[str], head: str) -> tuple[str, ...]:
    return tuple(layer.removeprefix(head) for layer in layers if layer.startswith(head))


def told(error: BaseException) -> str:
    """The first lines of an error of another library."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:400]


def refused(offer: Offer, error: GraphPruneError) -> ModelError:
    """Why a model cannot be saved as a folder, neither by its config nor with its plan."""
    return ModelError(
        f"the config of {type(offer.module).__name__} cannot express this model: {offer.reason}; "
        f"nor can a folder hold its plan: {error}; use graphprune.save and graphprune.load"
    )


def not_installed(folder: object, error: ModuleNotFoundError) -> InputError:
    """What is said where the library of a folder is missing, or the folder itself."""
    install = f"pip install {(error.name or '').replace('_', '-')}"
    if not Path(str(folder)).exists():
        return InputError(
            f"there is no folder {str(folder)!r}; if it is a name on the hub, its library is "
            f"needed: {install}"
        )
    return InputError(
        f"{str(folder)!r} holds a model of a library that is not installed ({error}): {install}"
    )
