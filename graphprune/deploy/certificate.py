"""A certificate: what a file was made from, what it was compared with, and how to do it again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.arguments import as_path, is_int, is_number
from graphprune.deploy.agreeing import Agreement
from graphprune.deploy.axes import Axis
from graphprune.deploy.files import digest_of
from graphprune.errors import CheckpointError, VerificationError
from graphprune.plan.plan import Plan, plan_of
from graphprune.record.tensors import fingerprint
from graphprune.verification.report import Report, verify
from graphprune.version import __version__

FORMAT, VERSION = "graphprune certificate", 1
SUFFIX = ".certificate.json"
DIFFERENT = "different"
MASKED = "masked original"


@dataclass(frozen=True)
class Compared:
    """One comparison: what with what, within which bound, and what came of it.

    Attributes:
        what: ``"masked original"``, or the name of a file that was run in an engine.
        engine: what ran it.
        tolerance: the largest relative difference allowed.
        verdict: ``"equal"``, ``"different"`` or ``"not decided"``.
        difference: the largest relative difference found; ``None`` where it was not told.
        told: why it was not decided, or what differs.
    """

    what: str
    engine: str
    tolerance: float | None
    verdict: str
    difference: float | None
    told: str = ""

    def told_in_a_line(self) -> str:
        """As ``small.onnx: equal, largest relative difference 3.1e-07``."""
        line = f"{self.what}: {self.verdict}"
        if self.difference is not None:
            line += f", largest relative difference {self.difference:.1e}"
        return line


@dataclass(frozen=True)
class Ran:
    """How a file is run beside the model.

    Attributes:
        file: its name; it lies beside the certificate.
        inputs: names of the inputs.
        outputs: names of the outputs.
        chosen: places of the outputs among those of the model; ``None`` for all.
        sizes: open sizes by name, with inputs and dimensions.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    chosen: tuple[int, ...] | None
    sizes: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Certificate:
    """What was made from what, and what was compared; read with :meth:`read`.

    Attributes:
        date: when, in UTC.
        versions: of Python, torch, graphprune and the engines.
        original: class and SHA-256 of the weights of the original, where it was at hand.
        small: the same of the small model.
        plan: SHA-256 of the plan that the small model carries.
        files: SHA-256 and bytes by name.
        compared: all comparisons.
        ran: how a file is run, for those of engines.
        seed: of the values that models were compared on.
        command: what the command line was asked for.
    """

    date: str
    versions: dict[str, str]
    original: dict[str, str] | None
    small: dict[str, str]
    plan: str | None
    files: dict[str, dict[str, Any]]
    compared: tuple[Compared, ...]
    ran: Ran | None = None
    seed: int = 0
    command: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> Certificate:
        """Read a certificate.

        Raises:
            CheckpointError: it cannot be read, is damaged, or of a later version.

        Example:
            >>> import tempfile, torch, graphprune
            >>> from graphprune.deploy import Certificate, export
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            >>> small = graphprune.rebuild(net, 0.5)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     made = export(small, f"{folder}/small.pt2", torch.randn(1, 4), original=net)
            ...     found = Certificate.read(made.certificate)
            >>> [(one.what, one.verdict) for one in found.compared]
            [('masked original', 'equal'), ('small.pt2', 'equal')]
        """
        name = repr(str(path))
        try:
            content = json.loads(as_path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"cannot read {name}: {error.strerror or error}") from error
        except ValueError as error:
            raise CheckpointError(f"{name} is no certificate: {error}") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise CheckpointError(f"{name} is no certificate: pass what export wrote")
        version = content.pop("version", None)
        if version != VERSION:
            raise CheckpointError(
                f"{name} is of version {version!r}; this graphprune reads version {VERSION}"
            )
        try:
            ran = content.pop("ran")
            listed = content.pop("compared")
            if not isinstance(listed, list):
                raise TypeError(f"compared is {listed!r} where it should be a list")
            compared = tuple(Compared(**one) for one in listed)
            found = cls(**content, compared=compared)
            _check_types(found)
            return found if ran is None else replace(found, ran=_ran(ran))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{name} is damaged: {type(error).__name__}: {error}") from error


def _check_types(found: Certificate) -> None:
    """Raise a ``TypeError`` unless all fields are what they are declared to be."""
    texts: dict[str, type] = dict.fromkeys(("class", "architecture", "weights"), str)
    models = [found.small] if found.original is None else [found.small, found.original]
    held: list[tuple[Any, dict[str, type]]] = [(model, texts) for model in models]
    held += [(file, {"sha256": str, "bytes": int}) for file in _values(found.files)]
    for one in found.compared:
        declared: dict[str, type] = {"what": str, "engine": str, "verdict": str, "told": str}
        held.append((vars(one), declared))
        for name in ("tolerance", "difference"):
            value = getattr(one, name)
            if value is not None and not is_number(value):
                raise TypeError(f"{name} of {one.what!r} is {value!r}")
    for content, kinds in held:
        for name, kind in kinds.items():
            value = content.get(name) if isinstance(content, dict) else None
            if not isinstance(value, kind):
                raise TypeError(f"{name} is {value!r} where it should be {kind.__name__}")
    plan = found.plan is None or isinstance(found.plan, str)
    said = all(isinstance(text, str) for text in (found.date, *_values(found.versions)))
    if not plan or not said or not is_int(found.seed) or not isinstance(found.command, dict):
        raise TypeError("plan, date, versions, seed or command is of another type")


def _values(content: object) -> list[Any]:
    if not isinstance(content, dict):
        raise TypeError(f"{content!r} is no mapping")
    return [*content.values()]


def _ran(content: dict[str, Any]) -> Ran:
    names = {key: tuple(content[key]) for key in ("inputs", "outputs")}
    chosen = content["chosen"]
    sizes = {str(name): dict(places) for name, places in content["sizes"].items()}
    return Ran(content["file"], **names, chosen=chosen and tuple(chosen), sizes=sizes)


# --- what is written --------------------------------------------------------------------------


def certificate(
    small: nn.Module,
    original: nn.Module | None,
    compared: Sequence[Compared],
    files: Sequence[Path],
    *,
    ran: Ran | None = None,
    engines: Mapping[str, str] | None = None,
    seed: int = 0,
    command: Mapping[str, Any] | None = None,
) -> Certificate:
    """Put a certificate together."""
    plan = plan_of(small)
    return Certificate(
        datetime.now(UTC).isoformat(timespec="seconds"),
        {**versions(), **(engines or {})},
        None if original is None else identity(original),
        identity(small),
        None if plan is None else plan_digest(plan),
        {p.name: {"sha256": digest_of(p), "bytes": p.stat().st_size} for p in files},
        tuple(compared),
        ran,
        seed,
        dict(command or {}),
    )


def versions() -> dict[str, str]:
    """What computes here."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "graphprune": __version__,
    }


def identity(model: nn.Module) -> dict[str, str]:
    """What tells a model: its class, and digests of names with shapes and of all weights."""
    return {
        "class": type(model).__name__,
        "architecture": fingerprint(model),
        "weights": weights_digest(model.state_dict()),
    }


def weights_digest(tensors: Mapping[str, object]) -> str:
    """The SHA-256 of tensors with their names, dtypes and shapes."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):
            continue
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()


def plan_digest(plan: Plan) -> str:
    """The SHA-256 of a plan."""
    return hashlib.sha256(plan.to_json().encode()).hexdigest()


def of_report(report: Report) -> Compared:
    """A comparison with the masked original."""
    return Compared(
        MASKED,
        f"PyTorch {torch.__version__}",
        report.tolerance,
        report.verdict,
        report.difference,
        report.reason,
    )


def with_masked(
    original: nn.Module, small: nn.Module, example_inputs: object, seed: int
) -> Compared:
    """Compare a small model with the masked original; fine-tuned ones differ, as they should."""
    try:
        return of_report(verify(original, small, example_inputs, seed=seed))
    except VerificationError as error:
        return Compared(MASKED, "PyTorch", None, DIFFERENT, None, str(error))


def of_agreement(file: str, agreement: Agreement) -> Compared:
    """A comparison of a file in its engine with the model."""
    return Compared(
        file,
        agreement.engine,
        agreement.tolerance,
        agreement.verdict,
        agreement.difference,
        agreement.reason,
    )


def sizes_of(axes: Sequence[Axis], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Open sizes as plain data."""
    return {axis.name: {names[number]: dim for number, dim in axis.places} for axis in axes}


def beside(path: Path) -> Path:
    """Where the certificate of a file lies."""
    return path.with_name(path.name + SUFFIX)


def relative(path: Path, folder: Path) -> str:
    """A path as it is found from a folder."""
    return os.path.relpath(path.resolve(), folder.resolve())
