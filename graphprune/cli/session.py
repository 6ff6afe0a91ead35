"""A run of a command: where it writes, and how it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from graphprune.cli.loading import has_random_weights
from graphprune.errors import (
    CheckFailed,
    GraphPruneError,
    InputError,
    PruningWarning,
    VerificationError,
)
from graphprune.measurement import bytes_text
from graphprune.plan.plan import Plan
from graphprune.verification.report import Report

OK, DIFFERS, MISTAKE = 0, 1, 2
_OTHERS = (Path(__file__).resolve().parents[1], Path(sysconfig.get_path("stdlib")).resolve())


class Session:
    """Where a command writes: tables for people, or one JSON document."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.stdout = sys.stdout
        self.console = Console(quiet=as_json, highlight=False)
        self.errors = Console(stderr=True, highlight=False, soft_wrap=True)
        self.warnings: list[str] = []

    def print(self, what: object) -> None:
        """Show something to people."""
        self.console.print(what)

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Show what takes time and how long it has taken, on a terminal."""
        if self.as_json or not self.console.is_terminal:
            yield
            return
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=self.console, transient=True) as shown:
            shown.add_task(f"{text} ...", total=None)
            yield

    def say_random(self, model: str, weights: Path | None) -> bool:
        """Say that weights were drawn, where that is known."""
        random = has_random_weights(model, weights)
        if random:
            self.print(
                f"[yellow]the weights are random[/]: {escape(model)} names an architecture; pass "
                "--weights FILE for trained ones"
            )
        return random

    def warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Stands in for ``warnings.showwarning``: what other libraries warn of is not shown."""
        if issubclass(category, PruningWarning):
            self.warnings.append(str(message))
        elif not of_the_user(filename):
            return
        self.errors.print(f"warning: {message}", markup=False, style="yellow")

    def finish(self, document: dict[str, object]) -> None:
        """Print the JSON document when it was asked for."""
        if self.as_json:
            content = {"ok": "error" not in document, **document, "warnings": self.warnings}
            print(json.dumps(content, indent=2), file=self.stdout)

    def fail(self, error: Exception) -> int:
        """Tell a person or a script what went wrong; the exit code."""
        self.errors.print(f"error: {error}", markup=False, style="red")
        self.finish({"error": {"type": type(error).__name__, "message": str(error)}})
        return DIFFERS if isinstance(error, VerificationError | CheckFailed) else MISTAKE


@contextlib.contextmanager
def session(as_json: bool) -> Iterator[Session]:
    """A run of a command, which ends with its exit code."""
    run = Session(as_json)
    code = OK
    # A model's own prints must not get into the JSON document.
    quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with warnings.catch_warnings(), quiet, quiet_libraries():
        warnings.simplefilter("default")
        warnings.showwarning = run.warn
        try:
            yield run
        except GraphPruneError as error:
            code = run.fail(error)
    if code:
        raise typer.Exit(code)


def of_the_user(file: str) -> bool:
    """Whether a file is the user's: of no installed package, neither Python's own nor ours."""
    path = Path(file).resolve()
    if {"site-packages", "dist-packages"} & {*path.parts}:
        return False
    return not any(path.is_relative_to(place) for place in _OTHERS)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """What installed libraries log below an error is not shown while a command runs."""
    call = logging.Logger.callHandlers

    def called(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or of_the_user(record.pathname):
            call(logger, record)

    setattr(logging.Logger, "callHandlers", called)  # noqa: B010 (which type checkers refuse)
    try:
        yield
    finally:
        setattr(logging.Logger, "callHandlers", call)  # noqa: B010


def check_folders(*paths: Path | None) -> None:
    """A wrong folder is told before anything long is done."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise InputError(f"no folder {str(path.parent)!r} to write {path.name!r} into")
        if path is not None and path.is_dir():
            raise InputError(f"{str(path)!r} is a folder: name a file")


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan into a file."""
    try:
        plan.to_json(path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from error


def say_written(session: Session, title: str, path: Path) -> None:
    """Where a file is, and how large."""
    size = bytes_text(path.stat().st_size)
    session.print(f"{title} written to [bold]{escape(str(path))}[/] ({size})")


def say_verified(session: Session, report: Report | None) -> None:
    """What a verification found."""
    if report is None:
        session.print("[yellow]not verified[/]")
        return
    if report.verdict != "equal":
        session.print(f"[yellow]not decided[/]: {report.reason}")
        return
    reference = "" if report.exact else " (statistics over the kept channels)"
    session.print(
        f"[green]verified[/]: the small model equals the masked original{reference}, largest "
        f"relative difference {report.difference:.1e}"
    )
