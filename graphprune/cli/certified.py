"""Certificates on the command line: written by ``shrink`` and ``export``, checked by ``verify``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.markup import escape
from torch import nn

from graphprune.cli.loading import load_model, load_weights, parse_inputs
from graphprune.cli.session import Session
from graphprune.deploy.certificate import (
    Certificate,
    Compared,
    certificate,
    of_report,
    relative,
)
from graphprune.deploy.files import write_text
from graphprune.deploy.repeating import repeat
from graphprune.errors import InputError, VerificationError
from graphprune.execute.checkpoint import load
from graphprune.verification.report import Report


def command_of(
    model: str, small: Path | None, weights: Path | None, inputs: list[str], seed: int
) -> dict[str, Any]:
    """How the models are made again, as the command line was told."""
    paths = {name: path if path is None else str(path) for name, path in
             (("small", small), ("weights", weights))}  # fmt: skip
    return {"model": model, **paths, "inputs": list(inputs), "seed": seed}


def placed(command: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same with paths as they are found from where a certificate lies."""
    source, colon, name = command["model"].rpartition(":")
    if source.endswith(".py"):
        source = relative(Path(source), path.parent)
    elif source == "onnx":
        name = relative(Path(name), path.parent)
    found = {**command, "model": f"{source}{colon}{name}"}
    for key in ("small", "weights"):
        if command[key] is not None:
            found[key] = relative(Path(command[key]), path.parent)
    return found


def certify(
    path: Path | None,
    original: nn.Module,
    small: nn.Module,
    verified: Report | None,
    out: Path | None,
    command: dict[str, Any],
) -> None:
    """Write what ``shrink`` has verified, if it was asked for.

    Raises:
        ExportError: the file cannot be written.
    """
    if path is None:
        return
    command = placed(command, path)
    compared = [] if verified is None else [of_report(verified)]
    beside = out is not None and out.resolve().parent == path.resolve().parent
    files = [out] if out is not None and beside else []
    made = certificate(small, original, compared, files, seed=command["seed"], command=command)
    write_text(path, made.to_json())


def check_again(
    run: Session,
    path: Path,
    model: str | None,
    small: Path | None,
    weights: Path | None,
    inputs: list[str],
) -> None:
    """Repeat what a certificate says; what is given stands for what it says of paths.

    Raises:
        VerificationError: something is not as it says.
        InputError: it does not know how the models are made, and nobody says it.
    """
    known = Certificate.read(path)
    command, folder = known.command, path.parent
    text = model or _found(command.get("model"), folder)
    if text is None:
        raise InputError(f"{path} does not say how its model is made: pass MODEL as well")
    seed = int(command.get("seed", 0))
    original = load_model(text, seed)
    weights = weights or _path(command.get("weights"), folder)
    if weights is not None:
        load_weights(original, weights)
    file = small or _path(command.get("small"), folder)
    loaded = original if file is None else load(file, original)
    example = parse_inputs(inputs or list(command.get("inputs", [])), original)
    with run.status("verifying"):
        found = repeat(path, loaded, None if file is None else original, example)
    for line in (*(one.told_in_a_line() for one in found.compared), *found.notes):
        run.print(escape(line))
    if found.differences:
        raise VerificationError(f"not as {path} says: " + "; ".join(found.differences))
    run.print(f"[green]verified[/]: all is as {escape(str(path))} says, of {known.date}")
    run.finish({"certificate": str(path), **dataclasses.asdict(found)})


def said_of_masked(one: Compared) -> str:
    """The comparison with the masked original, for people."""
    if one.verdict == "equal":
        return f"the small model equals the masked original ({one.difference:.1e})"
    reason = escape(one.told.splitlines()[0] if one.told else "")
    if one.verdict == "different":
        return "[yellow]the small model is not the masked original[/], as after fine-tuning"
    return f"[yellow]not decided[/] whether it equals the masked original: {reason}"


def _found(model: Any, folder: Path) -> str | None:
    """The model of a certificate, whose file lies somewhere from its folder."""
    if not isinstance(model, str):
        return None
    source, colon, name = model.rpartition(":")
    if source == "onnx":
        return f"onnx:{folder / name}"
    return f"{folder / source}{colon}{name}" if source.endswith(".py") else model


def _path(text: Any, folder: Path) -> Path | None:
    return folder / text if isinstance(text, str) else None
