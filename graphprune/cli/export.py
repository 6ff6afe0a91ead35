"""The command ``export``: a model, or what ``shrink --out`` wrote, as a file for an engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from torch import nn

from graphprune.cli.certified import command_of, placed, said_of_masked
from graphprune.cli.int8 import add_int8, check_int8, int8_data
from graphprune.cli.loading import load_model, load_weights, parse_inputs
from graphprune.cli.options import Inputs, Json, Model, Seed, Weights
from graphprune.cli.places import check_apart
from graphprune.cli.session import Session, check_folders, session
from graphprune.deploy.certificate import MASKED, Certificate
from graphprune.deploy.exporting import Exported
from graphprune.deploy.exporting import export as write
from graphprune.errors import InputError
from graphprune.execute.checkpoint import load

Small = Annotated[
    Path | None,
    typer.Argument(help="What shrink --out wrote; MODEL itself when absent.", show_default=False),
]


def export(
    model: Model,
    small: Small = None,
    *,
    out: Annotated[
        Path, typer.Option(help="The file: .onnx, or .pt2 of torch.export.", show_default=False)
    ],
    dynamic: Annotated[
        list[str],
        typer.Option(
            help="A size left open: batch=0 (in every input), words=input_ids.1 (of one); none: "
            "all are fixed. Without it, the batch is open."
        ),
    ] = [],
    outputs: Annotated[
        list[str], typer.Option("--output", help="An output that stays, by name; all of them.")
    ] = [],
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators.")] = None,
    external_data: Annotated[
        bool | None,
        typer.Option(
            "--external-data/--no-external-data",
            help="Weights in a second file; by itself beyond 1.9 GB.",
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option(help="Of a .pt2: machine code for this CPU, by AOTInductor.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="What runs ONNX to compare: onnxruntime, or openvino.")
    ] = "onnxruntime",
    int8: Annotated[
        str | None,
        typer.Option(help="Write FILE.int8.onnx as well: static (with --data), or dynamic."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Inputs that show the ranges of values: .npz, .npy or .safetensors, by name; "
            "labels for accuracy."
        ),
    ] = None,
    certificate: Annotated[
        bool, typer.Option(help="Write FILE.certificate.json, which verify checks again.")
    ] = True,
    weights: Weights = None,
    inputs: Inputs = [],
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write a model as ONNX or torch.export, compared in the engine before it gets its name."""
    with session(as_json) as run:
        check_folders(out)
        check_apart({"--out": out}, model, weights, small, data)
        check_int8(int8, out, data)
        original = load_model(model, seed)
        if weights is not None:
            load_weights(original, weights)
        if small is None:
            run.say_random(model, weights)
        chosen: nn.Module = original if small is None else load(small, original)
        options: dict[str, Any] = {
            "example_inputs": parse_inputs(inputs, original),
            "dynamic": open_sizes(dynamic),
            "outputs": outputs or None,
            "opset": opset,
            "external_data": external_data,
            "compiled": compiled,
            "seed": seed,
        }
        with run.status("exporting"):
            made = write(
                chosen,
                out,
                **options,
                engine=engine,
                original=None if small is None else original,
                certificate=certificate,
                command=placed(command_of(model, small, weights, inputs, seed), out),
            )
        say_exported(run, made)
        found = None
        if int8 is not None:
            before = None if small is None else original
            found = add_int8(run, made, int8, data, before, options)
        run.finish({"model": model, **exported_data(made), **int8_data(found)})


def open_sizes(texts: list[str]) -> Any:
    """What ``--dynamic`` says, as the function takes it.

    Raises:
        InputError: a text is none of the forms.
    """
    if not texts:
        return "batch"
    if texts == ["none"]:
        return None
    found: dict[str, int | dict[str, int]] = {}
    for text in texts:
        name, _, place = text.partition("=")
        where, dot, dim = place.rpartition(".")
        if not name or not dim.removeprefix("-").isdigit() or (dot and not where):
            raise InputError(
                f"--dynamic is written batch=0, or words=input_ids.1, or none; got {text!r}"
            )
        known = found.setdefault(name, {} if dot else int(dim))
        if isinstance(known, int) != (not dot):
            raise InputError(f"--dynamic names {name!r} for every input and for one: choose")
        if isinstance(known, dict):
            known[where] = int(dim)
    return found


def say_exported(run: Session, made: Exported) -> None:
    """What was written, for people."""
    run.print(escape(str(made)))
    if made.verdict == "equal":
        run.print("[green]equal[/] in the engine that runs it")
    else:
        run.print(f"[yellow]{made.verdict}[/]")
    run.print(f"written to [bold]{escape(str(made.path))}[/]")
    if made.certificate is not None:
        for one in Certificate.read(made.certificate).compared:
            if one.what == MASKED:
                run.print(said_of_masked(one))
        run.print(f"certificate written to [bold]{escape(str(made.certificate))}[/]")


def exported_data(made: Exported) -> dict[str, Any]:
    """What was written, as plain data."""
    return {
        **dataclasses.asdict(made),
        "path": str(made.path),
        "certificate": None if made.certificate is None else str(made.certificate),
        "verdict": made.verdict,
        "difference": None if made.agreement is None else made.agreement.difference,
    }
