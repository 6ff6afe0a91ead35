"""``graphprune shrink hf:FOLDER --out FOLDER2``: from folder to folder, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from graphprune.cli.loading import parse_inputs
from graphprune.cli.session import Session, write_plan
from graphprune.deploy.folders.streaming import shrink_folder
from graphprune.errors import InputError
from graphprune.plan.plan import Plan
from graphprune.planning.options import Options


def goes_to_folder(model: str, out: Path | None) -> Path | None:
    """``out`` where a folder of transformers is to become another one: a file has a suffix."""
    return out if model.startswith("hf:") and out is not None and not out.suffix else None


def shrink_to_folder(
    run: Session,
    model: str,
    out: Path,
    ratio: float | None,
    inputs: list[str],
    attention: str,
    options: Options,
    plan: Path | None,
    others: Mapping[str, object],
) -> Plan:
    """Write a smaller folder; nothing is compared, as the model is never in memory.

    Raises:
        InputError: ``others``, options that need the model, were given.
    """
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise InputError(
            f"{', '.join(given)} needs the model in memory, and --out {out} is a folder, which is "
            "made without: pass --out FILE.safetensors"
        )
    example = parse_inputs(inputs, nn.Identity())
    with run.status("shrinking"):
        found = shrink_folder(
            model.partition(":")[2], out, ratio, example, attention=attention, **options
        )
    if plan is not None:
        write_plan(found, plan)
    return found


def finish(run: Session, model: str, out: Path, plan: Plan) -> None:
    """The end of the command."""
    run.print(f"small model: {out} (load it with graphprune.from_pretrained)")
    run.print("[dim]not verified: the model was never in memory[/]")
    run.finish(
        {"model": model, "verified": None, "out": str(out), "plan": json.loads(plan.to_json())}
    )
