"""The command line: ``graphprune demo | shrink | inspect | verify``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphprune.api import rebuild
from graphprune.checkpoint import load, save
from graphprune.errors import GraphPruneError, InputError, PruningWarning, VerificationError
from graphprune.graph import ChannelGraph, trace
from graphprune.loading import load_model, load_weights, parse_inputs
from graphprune.measure import Measurement, measure
from graphprune.plan import Plan, shorten
from graphprune.verify import Report
from graphprune.verify import verify as compare

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
Seed = Annotated[int, typer.Option("--seed", help="For random weights and random criteria.")]
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
    from graphprune.demo import run

    with _session(as_json) as session:
        session.finish(dataclasses.asdict(run(epochs, out, session.console)))


@app.command()
def shrink(
    model: Model,
    ratio: Annotated[float, typer.Option(help="Fraction of the channels to remove, in [0, 1).")],
    criterion: Annotated[str, typer.Option(help="How channels are scored.")] = "l2",
    scope: Annotated[str, typer.Option(help="local: of every group; global: over all.")] = "local",
    keep: Annotated[list[str], typer.Option(help="Layers that keep all channels (glob).")] = [],  # noqa: B006
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Write the small model (safetensors).")] = None,
    plan: Annotated[Path | None, typer.Option(help="Write the plan (JSON).")] = None,
    inputs: Inputs = [],  # noqa: B006
    seed: Seed = 0,
    attention: Attention = "heads",
    as_json: Json = False,
    verify: Annotated[bool, typer.Option(help="Compare with the masked original.")] = True,
) -> None:
    """Remove channels from a model and save what is left."""
    with _session(as_json) as session:
        _check_folders(out, plan)
        original = _model(model, weights, seed)
        example = parse_inputs(inputs, original)
        with session.status("analysing"):
            small = rebuild(
                original,
                ratio,
                example,
                criterion=criterion,
                scope=scope,
                keep=keep,
                seed=seed,
                attention=attention,
            )
        applied: Plan = small.graphprune_plan  # type: ignore[assignment]
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
        session.print(_groups_of_plan(applied))
        session.print(_costs(before, after))
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
                "verified": _report(report),
                "out": None if out is None else str(out),
                "plan": json.loads(applied.to_json()),
            }
        )


@app.command()
def inspect(
    model: Model,
    inputs: Inputs = [],  # noqa: B006
    draw: Annotated[Path | None, typer.Option(help="Write a picture: .svg, .png, .pdf.")] = None,
    attention: Attention = "heads",
    as_json: Json = False,
) -> None:
    """Show which channels of which layers live and die together."""
    with _session(as_json) as session:
        _check_folders(draw)
        original = _model(model, None, 0)
        example = parse_inputs(inputs, original)
        with session.status("analysing"):
            graph = trace(original, example, attention=attention)
        cost = measure(original, graph.call, latency=False)
        session.print(_groups_of_graph(graph))
        session.print(_cost(cost))
        if draw is not None:
            graph.draw(draw)
            session.print(f"picture written to [bold]{escape(str(draw))}[/]")
        session.finish(
            {
                "model": model,
                "cost": dataclasses.asdict(cost),
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
            }
        )


@app.command()
def verify(
    model: Model,
    small: Annotated[Path, typer.Argument(help="What shrink --out wrote.", show_default=False)],
    weights: Weights = None,
    inputs: Inputs = [],  # noqa: B006
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
        session.print(_checks(report))
        _say_verified(session, report)
        session.finish({"model": model, "small": str(small), "verified": _report(report)})


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

    def print(self, what: Any) -> None:
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

    def finish(self, document: dict[str, Any]) -> None:
        """Print the JSON document when it was asked for."""
        if self.as_json:
            content = {"ok": "error" not in document, **document, "warnings": self.warnings}
            print(json.dumps(content, indent=2), file=self.stdout)

    def fail(self, error: Exception) -> int:
        """Tell a person or a script what went wrong; the exit code."""
        self.errors.print(f"error: {error}", markup=False, style="red")
        self.finish({"error": {"type": type(error).__name__, "message": str(error)}})
        return DIFFERS if isinstance(error, VerificationError) else MISTAKE


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


# --- tables -----------------------------------------------------------------------------------


def _table(title: str, *columns: str, wide: int | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for position, column in enumerate(columns):
        numbers = position > 0 and wide != position and column not in ("kind", "inputs")
        table.add_column(
            column,
            justify="right" if numbers else "left",
            overflow="fold",
            no_wrap=wide is not None and position not in (wide, wide + 1),
        )
    return table


def _groups_of_plan(plan: Plan) -> Table:
    table = _table("channels kept", "group", "channels", "kind", "layers", wide=3)
    for group in plan.groups:
        kind = "exact" if group.exact else "renormalising"
        kept = f"{group.size} -> {len(group.kept)}"
        table.add_row(group.name, kept, kind, escape(shorten(group.layers, 3)))
    return table


def _groups_of_graph(graph: ChannelGraph) -> Table:
    channels = sum(group.size for group in graph)
    title = f"{type(graph.model).__name__}: {len(graph)} groups, {channels:,} removable channels"
    table = _table(title, "group", "channels", "kind", "layers", wide=3)
    for group in graph.analysis.all_groups:
        layers = escape(shorten(group.layers, 3))
        note = f"{layers}\n[dim]{escape(group.note)}[/]" if group.note else layers
        style = "dim" if group.frozen else ""
        table.add_row(group.name, str(group.size), group.kind, note, style=style)
    return table


def _costs(before: Measurement, after: Measurement) -> Table:
    title = f"cost on {escape(after.inputs)}, {after.device}"
    table = _table(title, "", "original", "small", "share")
    for row in before.compare(after).rows():
        table.add_row(*row)
    return table


def _cost(cost: Measurement) -> Table:
    table = _table(f"cost on {escape(cost.inputs)}", "", "original")
    for name, text, _ in cost.rows():
        table.add_row(name, text)
    return table


def _checks(report: Report) -> Table:
    title = f"largest relative differences, tolerance {report.tolerance:.0e}"
    table = _table(title, "compared", "inputs", "difference", wide=0)
    for check in report.checks:
        table.add_row(escape(check.name), escape(check.inputs), f"{check.difference:.1e}")
    return table


def _say_verified(session: _Session, report: Report | None) -> None:
    if report is None:
        session.print("[yellow]not verified[/]")
        return
    reference = "" if report.exact else " (statistics over the kept channels)"
    session.print(
        f"[green]verified[/]: the small model equals the masked original{reference}, largest "
        f"relative difference {report.difference:.1e}"
    )


def _report(report: Report | None) -> dict[str, Any] | None:
    if report is None:
        return None
    return {**dataclasses.asdict(report), "difference": report.difference}
