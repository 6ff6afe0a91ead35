"""The command line: ``graphprune demo | shrink | trim-vocabulary | inspect | verify | check``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.markup import escape

from graphprune.api import trace
from graphprune.cli.bench import bench
from graphprune.cli.certified import certify, check_again, command_of
from graphprune.cli.export import export, exported_data
from graphprune.cli.ids import chosen_ids, load_tokenizer
from graphprune.cli.loading import load_model, load_weights, parse_inputs
from graphprune.cli.measuring import measured
from graphprune.cli.options import (
    MODEL_HELP,
    Attention,
    Data,
    Evaluate,
    Inputs,
    Json,
    MaxDrop,
    Model,
    ReportFile,
    SearchFile,
    Seed,
    Weights,
)
from graphprune.cli.places import check_places
from graphprune.cli.printing import (
    checks,
    cost,
    costs,
    groups_of_graph,
    groups_of_plan,
    report_data,
)
from graphprune.cli.reporting import write_report
from graphprune.cli.searching import Asked
from graphprune.cli.session import (
    Session,
    say_verified,
    say_written,
    session,
    write_plan,
)
from graphprune.cli.to_folder import finish, goes_to_folder, shrink_to_folder
from graphprune.cli.to_onnx import goes_to_onnx, write_onnx
from graphprune.criteria import criteria, find
from graphprune.criteria.registry import WEIGHTS
from graphprune.errors import InputError
from graphprune.execute.checkpoint import load, save
from graphprune.measurement import measure
from graphprune.plan.plan import Plan, plan_of
from graphprune.planning.options import Options, short
from graphprune.testing import check as try_plans
from graphprune.verification.report import verify as compare
from graphprune.version import __version__
from graphprune.vocabulary.tokenizer import trim_tokenizer
from graphprune.vocabulary.trim import trim_vocabulary

app = typer.Typer(
    name="graphprune",
    help="Make PyTorch models genuinely smaller, and prove that nothing else changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(export)
app.command()(bench)


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training.")] = 15,
    out: Annotated[Path, typer.Option(help="Folder for the small model and the report.")] = Path(
        "graphprune-demo"
    ),
    open_report: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the report, from a terminal.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Train, shrink, verify, calibrate and fine-tune a small ResNet on digits (half a minute)."""
    from graphprune.cli.demo import run as demonstrate
    from graphprune.cli.demo import show

    with session(as_json) as run:
        found = demonstrate(epochs, out, run.console)
        if open_report and not as_json:
            show(found.report, run.console)
        run.finish(dataclasses.asdict(found))


@app.command()
def shrink(
    model: Model,
    ratio: Annotated[
        float | None, typer.Option(help="Fraction of the channels (or parts) to remove, in [0, 1).")
    ] = None,
    target: Annotated[
        list[str],
        typer.Option(help=short("target")),
    ] = [],
    criterion: Annotated[str | None, typer.Option(help=short("criterion"))] = None,
    scope: Annotated[
        str | None,
        typer.Option(help=short("scope")),
    ] = None,
    keep: Annotated[list[str], typer.Option(help=short("keep"))] = [],
    ratios: Annotated[list[str], typer.Option(help=short("ratios"))] = [],
    max_drop: MaxDrop = None,
    evaluate: Evaluate = None,
    data: Data = None,
    search: SearchFile = None,
    min_kept: Annotated[float, typer.Option(help=short("min_kept"))] = 0.0,
    max_kept: Annotated[float, typer.Option(help=short("max_kept"))] = 1.0,
    round_to: Annotated[int | None, typer.Option(help=short("round_to"))] = None,
    uniform: Annotated[bool, typer.Option(help=short("uniform"))] = False,
    parts: Annotated[str, typer.Option(help=short("parts"))] = "channels",
    threads: Annotated[int | None, typer.Option(help=short("threads"))] = None,
    runtime: Annotated[
        str, typer.Option(help="What a latency is met in: pytorch, onnxruntime, openvino.")
    ] = "pytorch",
    weights: Weights = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the small model: .safetensors, or .onnx, which is run in ONNX Runtime; of "
            "hf:FOLDER, where it has no suffix, a folder, without loading the model."
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Write the plan (JSON).")] = None,
    report: ReportFile = None,
    certificate: Annotated[
        Path | None,
        typer.Option(help="Write what was verified, with digests (JSON); verify checks it again."),
    ] = None,
    inputs: Inputs = [],
    seed: Seed = 0,
    attention: Attention = "heads",
    as_json: Json = False,
    verify: Annotated[bool, typer.Option(help="Compare with the masked original.")] = True,
) -> None:
    """Remove channels, branches, blocks or experts from a model and save what is left."""
    with session(as_json) as run:
        folder = goes_to_folder(model, out)
        to_onnx = goes_to_onnx(out, {"--certificate": certificate})
        outs = {"plan": plan, "report": report, "certificate": certificate}
        check_places(model, weights, out=out, **outs)
        if data is None:
            _check_criterion(criterion or "l2")
        options: Options = {
            "criterion": criterion or "l2",
            "keep": keep,
            "seed": seed,
            "round_to": round_to,
            "uniform": uniform,
            "parts": [part.strip() for part in parts.split(",")],
            "threads": threads,
            "ratios": {name: _number("ratios", text) for name, text in _pairs("ratios", ratios)},
        }
        given = {
            "scope": scope,
            "target": dict(_pairs("target", target)) or None,
            "min_kept": min_kept or None,
            "max_kept": max_kept if max_kept < 1 else None,
        }
        options.update(cast(Options, {k: v for k, v in given.items() if v is not None}))
        wanted = Asked(max_drop, evaluate, data, search, (ratio, runtime, certificate, folder))
        if folder is not None:
            others = {"--report": report, "--certificate": certificate, "--weights": weights}
            asked = model, folder, ratio, inputs, attention, options, plan, others
            written = shrink_to_folder(run, *asked)
            _say_plan(run, written)
            finish(run, model, folder, written)
            return
        original = _model(model, weights, seed)
        random = run.say_random(model, weights)
        example = parse_inputs(inputs, original)
        if criterion is None and wanted.given:
            options["criterion"] = "auto"
        small, searched = wanted.small(run, original, example, attention, options)
        applied = plan_of(small)
        assert applied is not None  # rebuild leaves it there
        verified = None
        if verify:
            with run.status("verifying"):
                verified = compare(original, wanted.to_verify(original, small), example, seed=seed)
        with run.status("measuring"):
            before, after = measured(original, small, example, threads)
        file = write_onnx(run, small, out, example, seed) if to_onnx and out is not None else None
        if plan is not None:
            write_plan(applied, plan)
        if out is not None and file is None:
            save(small, out)
        made = command_of(model, out, weights, inputs, seed)
        certify(certificate, original, small, verified, out, made)
        write_report(
            run, report, applied, original, example, small, verified, random, (before, after)
        )
        _say_plan(run, applied)
        run.print(costs(before, after))
        for note in applied.notes:
            run.print(escape(note))
        say_verified(run, verified)
        if file is not None:
            run.print(escape(str(file)))
        for title, path in (
            ("small model", out), ("plan", plan), ("report", report), ("certificate", certificate),
        ):  # fmt: skip
            if path is not None:
                say_written(run, title, path)
        if out is None:
            run.print("[dim]nothing was saved: pass --out small.safetensors[/]")
        run.finish(
            {
                "model": model,
                "random_weights": random,
                "before": dataclasses.asdict(before),
                "after": dataclasses.asdict(after),
                "verified": report_data(verified),
                "search": searched,
                "out": None if out is None else str(out),
                "exported": None if file is None else exported_data(file),
                "report": None if report is None else str(report),
                "certificate": None if certificate is None else str(certificate),
                "plan": json.loads(applied.to_json()),
            }
        )


@app.command("trim-vocabulary")
def trim(
    model: Model,
    ids: Annotated[
        str | None, typer.Option(help="Ids that stay: 0-99,512, or a file that holds them.")
    ] = None,
    text: Annotated[
        list[Path], typer.Option(help="Texts by whose tokens ids are counted, one a line.")
    ] = [],
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json of the library tokenizers.")
    ] = None,
    min_count: Annotated[int, typer.Option(help="How often an id must occur in --text.")] = 1,
    top: Annotated[int | None, typer.Option(help="How many ids of --text stay at most.")] = None,
    share: Annotated[
        float | None, typer.Option(help="Part of the tokens of --text that stay, in (0, 1].")
    ] = None,
    embedding: Annotated[str | None, typer.Option(help="The table, where it is not clear.")] = None,
    output: Annotated[
        str | None, typer.Option(help="The layer of the logits, where it is not clear.")
    ] = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Write the small model (safetensors).")] = None,
    plan: Annotated[Path | None, typer.Option(help="Write the plan (JSON).")] = None,
    tokenizer_out: Annotated[
        Path | None, typer.Option(help="Write the trimmed tokenizer (tokenizer.json).")
    ] = None,
    report: ReportFile = None,
    inputs: Inputs = [],
    seed: Seed = 0,
    as_json: Json = False,
    verify: Annotated[bool, typer.Option(help="Compare with the original.")] = True,
) -> None:
    """Keep some ids of a vocabulary: rows of tables and of output layers leave."""
    with session(as_json) as run:
        outs = {"plan": plan, "tokenizer_out": tokenizer_out, "report": report}
        check_places(model, weights, tokenizer, *text, out=out, **outs)
        if tokenizer_out is not None and tokenizer is None:
            raise InputError("--tokenizer-out needs --tokenizer, which is trimmed")
        known = None if tokenizer is None else load_tokenizer(tokenizer)
        kept = chosen_ids(ids, text, known, min_count, top, share)
        original = _model(model, weights, seed)
        random = run.say_random(model, weights)
        example = parse_inputs(inputs, original)
        with run.status("analysing"):
            small = trim_vocabulary(
                original, kept, example, embedding=embedding, output=output, tokenizer=known
            )
        applied = plan_of(small)
        assert applied is not None  # it was made by one
        trimmed = None if tokenizer_out is None else trim_tokenizer(known, small)
        verified = None
        if verify:
            with run.status("verifying"):
                verified = compare(original, small, example, seed=seed)
        if plan is not None:
            write_plan(applied, plan)
        if out is not None:
            save(small, out)
        if trimmed is not None:
            trimmed.save(str(tokenizer_out))
        write_report(run, report, applied, original, example, small, verified, random)
        run.print(escape(str(applied)))
        say_verified(run, verified)
        for title, path in (
            ("small model", out), ("plan", plan), ("tokenizer", tokenizer_out), ("report", report),
        ):  # fmt: skip
            if path is not None:
                say_written(run, title, path)
        if out is None:
            run.print("[dim]nothing was saved: pass --out small.safetensors[/]")
        run.finish(
            {
                "model": model,
                "random_weights": random,
                "ids": [vocabulary.kept for vocabulary in applied.vocabularies],
                "before": dataclasses.asdict(applied.before),
                "after": dataclasses.asdict(applied.after),
                "verified": report_data(verified),
                "out": None if out is None else str(out),
                "report": None if report is None else str(report),
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
    """Show which channels live and die together, and which parts can leave."""
    with session(as_json) as run:
        check_places(model, draw=draw)
        original = _model(model, None, 0)
        example = parse_inputs(inputs, original)
        with run.status("analysing"):
            graph = trace(original, example, attention=attention)
        measured = measure(original, graph.call, latency=False)
        run.print(groups_of_graph(graph))
        for line in graph.told_parts():
            run.print(escape(line))
        run.print(cost(measured))
        if draw is not None:
            graph.draw(draw)
            run.print(f"picture written to [bold]{escape(str(draw))}[/]")
        run.finish(
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
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)
    ] = None,
    small: Annotated[
        Path | None, typer.Argument(help="What shrink --out wrote.", show_default=False)
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(help="Check again what a certificate says; it knows MODEL and the rest."),
    ] = None,
    weights: Weights = None,
    inputs: Inputs = [],
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Check that a saved small model equals the masked original (not after fine-tuning)."""
    with session(as_json) as run:
        if certificate is not None:
            check_again(run, certificate, model, small, weights, inputs)
            return
        if model is None or small is None:
            raise InputError("verify needs MODEL and what shrink --out wrote, or --certificate")
        original = _model(model, weights, seed)
        example = parse_inputs(inputs, original)
        loaded = load(small, original)
        with run.status("verifying"):
            report = compare(original, loaded, example, seed=seed)
        run.print(checks(report))
        say_verified(run, report)
        run.finish({"model": model, "small": str(small), "verified": report_data(report)})


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
    with session(as_json) as run:
        original = _model(model, weights, seed)
        example = parse_inputs(inputs, original)
        report = try_plans(
            original, example, plans, seed, attention=attention, progress=not as_json
        )
        run.print(escape(str(report)))
        run.finish({**vars(report), "model": model})


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


def _say_plan(run: Session, plan: Plan) -> None:
    """What leaves: channels by group, and parts."""
    if plan.groups or not plan.parts:
        run.print(groups_of_plan(plan))
    for line in plan.told_parts():
        run.print(escape(line))
