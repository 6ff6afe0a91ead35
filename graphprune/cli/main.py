"""The command line: ``graphprune demo | shrink | inspect | verify | check``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import typer
from rich.console import Console
from rich.markup import escape

from graphprune.api import rebuild, trace
from graphprune.cli.loading import load_model, load_weights, parse_inputs
from graphprune.cli.printing import (
    checks,
    cost,
    costs,
    groups_of_graph,
    groups_of_plan,
    report_data,
)
from graphprune.criteria import criteria, find
from graphprune.criteria.registry import WEIGHTS
from graphprune.errors import (
    CheckFailed,
    GraphPruneError,
    InputError,
    PruningWarning,
    VerificationError,
)
from graphprune.execute.checkpoint import load, save
from graphprune.measurement import measure
from graphprune.plan.plan import Plan, plan_of
from graphprune.planning.options import Options, short
from graphprune.testing import check as try_plans
from graphprune.verification.report import Report
from graphprune.verification.report import verify as compare
from graphprune.version import __version__

OK, DIFFERS, MISTAKE = 0, 1, 2

app = typer.Typer(
    name="graphprune",
    help="Make PyTorch models genuinely smaller, and prove that nothing else changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:resnet50, package.module:factory or path/to/file.py:factory",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="Weights of MODEL: .safetensors, or a torch.save state_dict."),
]
Inputs = Annotated[
    list[str],
    typer.Option("--input", help="Shape of an input: 1,3,224,224 or 1,16:int64; one per argument."),
]
Attention = Annotated[
    str, typer.Option("--attention", help="heads: whole heads go; head_dim: all get narrower.")
]
Seed = Annotated[int, typer.Option("--seed", help=short("seed"))]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training.")] = 15,
    out: Annotated[Path, typer.Option(help="Folder for the small model and the picture.")] = Path(
        "graphprune-demo"
    ),
    as_json: Json = False,
) -> None:
    """Train, shrink, verify and fine-tune a small ResNet on handwritten digits (half a minute)."""
    from graphprune.cli.demo import run

    with _session(as_json) as session:
        session.finish(dataclasses.asdict(run(epochs, out, session.console)))


@app.command()
def shrink(
    model: Model,
    ratio: Annotated[
        float | None, typer.Option(help="Fraction of the channels to remove, in [0, 1).")
    ] = None,
    target: Annotated[
        list[str],
        typer.Option(help=short("target")),
    ] = [],
    criterion: Annotated[str, typer.Option(help=short("criterion"))] = "l2",
    scope: Annotated[
        str | None,
        typer.Option(help=short("scope")),
    ] = None,
    keep: Annotated[list[str], typer.Option(help=short("keep"))] = [],
    ratios: Annotated[list[str], typer.Option(help=short("ratios"))] = [],
    min_kept: Annotated[float, typer.Option(help=short("min_kept"))] = 0.0,
    max_kept: Annotated[float, typer.Option(help=short("max_kept"))] = 1.0,
    round_to: Annotated[int, typer.Option(help=short("round_to"))] = 1,
    uniform: Annotated[bool, typer.Option(help=short("uniform"))] = False,
    parts: Annotated[str, typer.Option(help=short("parts"))] = "channels",
    threads: Annotated[int | None, typer.Option(help=short("threads"))] = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Write the small model (safetensors).")] = None,
    plan: Annotated[Path | None, typer.Option(help="Write the plan (JSON).")] = None,
    inputs: Inputs = [],
    seed: Seed = 0,
    attention: Attention = "heads",
    as_json: Json = False,
    verify: Annotated[bool, typer.Option(help="Compare with the masked original.")] = True,
) -> None:
    """Remove channels, branches or blocks from a model and save what is left."""
    with _session(as_json) as session:
        _check_folders(out, plan)
        _check_criterion(criterion)
        options: Options = {
            "criterion": criterion,
            "keep": keep,
            "seed": seed,
            "round_to": round_to,
            "uniform": uniform,
            "parts": [part.strip() for part in parts.split(",")],
            "threads": threads,
            "ratios": {name: _number("ratios", text) for name, text in _pairs("ratios", ratios)},
        }
        if scope is not None:
            options["scope"] = scope
        if target:
            options["target"] = dict(_pairs("target", target))
        if min_kept:
            options["min_kept"] = min_kept
        if max_kept < 1:
            options["max_kept"] = max_kept
        original = _model(model, weights, seed)
        example = parse_inputs(inputs, original)
        with session.status("analysing"):
            small = rebuild(original, ratio, example, attention=attention, **options)
        applied = plan_of(small)
        assert applied is not None  # rebuild leaves it there
        report = None
        if verify:
            with session.status("verifying"):
                report = compare(original, small, example, seed=seed)
        with session.status("measuring"):
            before, after = measure(original, example), measure(small, example)
        if plan is not None:
            _write_plan(applied, plan)
        if out is not None:
            save(small, out)
        _say_plan(session, applied)
        session.print(costs(before, after))
        for note in applied.notes:
            session.print(escape(note))
        _say_verified(session, report)
        for title, path in (("small model", out), ("plan", plan)):
            if path is not None:
                session.print(f"{title} written to [bold]{escape(str(path))}[/]")
        if out is None:
            session.print("[dim]nothing was saved: pass --out small.safetensors[/]")
        session.finish(
            {
                "model": model,
                "before": dataclasses.asdict(before),
                "after": dataclasses.asdict(after),
                "verified": report_data(report),
                "out": None if out is None else str(out),
                "plan": json.loads(applied.to_json()),
            }
        )


@app.command()
def inspect(
    model: Model,
    inputs: Inputs = [],
    draw: Annotated[Path | None, typer.Option(help="Write a picture: .svg, .png, .pdf.")] = None,
    attention: Attention = "heads",
    as_json: Json = False,
) -> None:
    """Show which channels live and die together, and which branches and blocks can leave."""
    with _session(as_json) as session:
        _check_folders(draw)
        original = _model(model, None, 0)
        example = parse_inputs(inputs, original)
        with session.status("analysing"):
            graph = trace(original, example, attention=attention)
        measured = measure(original, graph.call, latency=False)
        session.print(groups_of_graph(graph))
        for line in graph.told_parts():
            session.print(escape(line))
        session.print(cost(measured))
        if draw is not None:
            graph.draw(draw)
            session.print(f"picture written to [bold]{escape(str(draw))}[/]")
        session.finish(
            {
                "model": model,
                "cost": dataclasses.asdict(measured),
                "groups": [
                    {
                        "name": group.name,
                        "channels": group.size,
                        "kind": group.kind,
                        "layers": list(group.layers),
                        "why": group.note,
                    }
                    for group in graph.analysis.all_groups
                ],
                "blocks": [dataclasses.asdict(part) for part in graph.blocks],
                "branches": [dataclasses.asdict(part) for part in graph.branches],
            }
        )


@app.command()
def verify(
    model: Model,
    small: Annotated[Path, typer.Argument(help="What shrink --out wrote.", show_default=False)],
    weights: Weights = None,
    inputs: Inputs = [],
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Check that a saved small model equals the masked original (not after fine-tuning)."""
    with _session(as_json) as session:
        original = _model(model, weights, seed)
        example = parse_inputs(inputs, original)
        loaded = load(small, original)
        with session.status("verifying"):
            report = compare(original, loaded, example, seed=seed)
        session.print(checks(report))
        _say_verified(session, report)
        session.finish({"model": model, "small": str(small), "verified": report_data(report)})


@app.command()
def check(
    model: Model,
    plans: Annotated[int, typer.Option(help="How many random plans to try.")] = 50,
    weights: Weights = None,
    inputs: Inputs = [],
    seed: Seed = 0,
    attention: Attention = "heads",
    as_json: Json = False,
) -> None:
    """Try random plans on a model: rebuild, run, verify, save and load, original untouched."""
    with _session(as_json) as session:
        original = _model(model, weights, seed)
        example = parse_inputs(inputs, original)
        with session.status(f"trying {plans} plans"):
            report = try_plans(original, example, plans, seed, attention=attention)
        session.print(escape(str(report)))
        session.finish({**vars(report), "model": model})


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"graphprune {__version__} (torch {torch.__version__})")
        raise typer.Exit()


@app.callback()
def _about(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the versions of graphprune and torch.",
        ),
    ] = False,
) -> None:
    """Make PyTorch models genuinely smaller, and prove that nothing else changed."""


def main() -> None:
    """The entry point of the ``graphprune`` command."""
    app()


# --- a run of a command -----------------------------------------------------------------------


class _Session:
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
        """Show what takes time, on a terminal."""
        if self.as_json or not self.console.is_terminal:
            yield
        else:
            with self.console.status(f"{text} ..."):
                yield

    def warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Stands in for ``warnings.showwarning``."""
        if issubclass(category, PruningWarning):
            self.warnings.append(str(message))
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
def _session(as_json: bool) -> Iterator[_Session]:
    session = _Session(as_json)
    code = OK
    # A model's own prints must not get into the JSON document.
    quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with warnings.catch_warnings(), quiet:
        warnings.simplefilter("default")
        warnings.showwarning = session.warn
        try:
            yield session
        except GraphPruneError as error:
            code = session.fail(error)
    if code:
        raise typer.Exit(code)


def _model(text: str, weights: Path | None, seed: int) -> Any:
    model = load_model(text, seed)
    if weights is not None:
        load_weights(model, weights)
    return model


def _check_criterion(name: str) -> None:
    """The command line has no data to give."""
    needs = sorted(find(name).needs - WEIGHTS)
    if needs:
        raise InputError(
            f"criterion {name!r} needs {' and '.join(needs)} of data, and the command line takes "
            "none: call graphprune.rebuild(model, ..., data=batches) in Python, or choose one of "
            f"{', '.join(known for known in criteria() if find(known).needs <= WEIGHTS)}"
        )


_EXAMPLES = {"target": "macs=0.5", "ratios": "'layer3.*=0.6'"}


def _pairs(option: str, texts: list[str]) -> list[tuple[str, str]]:
    """``name=value`` texts, taken apart."""
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise InputError(
                f"--{option} is written name=value, such as {_EXAMPLES[option]}; got {text!r}"
            )
        pairs.append((name, value))
    return pairs


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--{option} needs a number after the sign =, got {text!r}") from None


def _check_folders(*paths: Path | None) -> None:
    """A wrong folder is told before anything long is done."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise InputError(f"no folder {str(path.parent)!r} to write {path.name!r} into")
        if path is not None and path.is_dir():
            raise InputError(f"{str(path)!r} is a folder: name a file")


def _write_plan(plan: Plan, path: Path) -> None:
    try:
        plan.to_json(path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from error


def _say_plan(session: _Session, plan: Plan) -> None:
    """What leaves: channels by group, and parts."""
    if plan.groups or not plan.parts:
        session.print(groups_of_plan(plan))
    for line in plan.told_parts():
        session.print(escape(line))


def _say_verified(session: _Session, report: Report | None) -> None:
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
