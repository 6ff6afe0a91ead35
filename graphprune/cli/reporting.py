"""The option ``--report`` of commands."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from graphprune.cli.session import Session
from graphprune.measurement import Measurement
from graphprune.plan.plan import Plan
from graphprune.report.content import command_line
from graphprune.verification.report import Report

RANDOM = "the weights of the original are random: only an architecture was named"


def write_report(
    run: Session,
    path: Path | None,
    plan: Plan,
    original: nn.Module,
    example: object,
    small: nn.Module,
    verified: Report | None,
    random: bool,
    measured: tuple[Measurement, Measurement] | None = None,
) -> None:
    """Write what was done for people, when it was asked for.

    Args:
        run: of the command.
        path: the file; nothing is written when it is absent.
        plan: what was applied.
        original: the model.
        example: its inputs.
        small: what the plan made of it.
        verified: both side by side.
        random: whether the weights were drawn.
        measured: both, for latencies.
    """
    if path is None:
        return
    with run.status("writing the report"):
        plan.report(
            path,
            original,
            example,
            small=small,
            verification=verified,
            measured=measured,
            command=command_line(),
            notes=(RANDOM,) if random else (),
        )
