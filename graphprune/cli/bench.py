"""The command ``bench``: models and files, measured in turns in the engines that run them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from torch import nn

from graphprune.cli.loading import load_model, parse_inputs
from graphprune.cli.options import Inputs, Json, Seed
from graphprune.cli.printing import new_table
from graphprune.cli.session import session
from graphprune.deploy.timing import HEADER, Bench, cells
from graphprune.deploy.timing import bench as measure
from graphprune.errors import InputError
from graphprune.execute.checkpoint import load

_LEFT_OUT = ("engine", "runs", "threads")
_FILES = (".onnx", ".pt2")


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Files (.onnx in ONNX Runtime, .pt2), or models as elsewhere, in PyTorch; "
            "MODEL=small.safetensors is what shrink wrote. The first is what others are compared "
            "with.",
            show_default=False,
        ),
    ],
    threads: Annotated[
        str, typer.Option(help="CPU threads: numbers, and all for all cores; 1,all for both.")
    ] = "1",
    seconds: Annotated[float, typer.Option(help="For each model and number of threads.")] = 3.0,
    engine: Annotated[
        str, typer.Option(help="What runs .onnx: onnxruntime, or openvino.")
    ] = "onnxruntime",
    inputs: Inputs = [],
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure latency and throughput of several models and files, in turns."""
    with session(as_json) as run:
        found = {text: _model(text, seed) for text in models}
        modules = [model for model in found.values() if isinstance(model, nn.Module)]
        example = parse_inputs(inputs, modules[0] if modules else nn.Module())
        with run.status("measuring"):
            timed = measure(
                found, example, threads=_threads(threads), seconds=seconds, engine=engine
            )
        run.print(timings(timed))
        run.finish(dataclasses.asdict(timed))


def timings(timed: Bench) -> Table:
    """A table for people; engines stand below the names of the models."""
    threads = {row.threads for row in timed.rows}
    title = escape(f"{timed.inputs} on {timed.machine}; {timed.load}")
    if len(threads) == 1:
        title += f"; threads: {threads.pop()}"
    wanted = [name for name in HEADER if name not in _LEFT_OUT]
    if not any(row.bytes for row in timed.rows):
        wanted.remove("file")
    shown = new_table(title, *wanted, *(["threads"] if threads else []), wide=0)
    for row in timed.rows:
        texts = dict(zip(HEADER, map(escape, cells(row))))
        name = f"{texts['model']}\n[dim]{texts['engine']}[/]"
        others = [texts[column] for column in wanted[1:]]
        shown.add_row(name, *others, *([texts["threads"]] if threads else []))
    return shown


def _model(text: str, seed: int) -> nn.Module | Path:
    if text.lower().endswith(_FILES) and not text.startswith("onnx:"):
        return Path(text)
    name, equals, small = text.partition("=")
    model = load_model(name, seed)
    return load(Path(small), model) if equals else model


def _threads(text: str) -> list[int | None]:
    found: list[int | None] = []
    for part in text.split(","):
        word = part.strip()
        if word != "all" and not word.isdigit():
            raise InputError(f"--threads is written 1, all or 1,all; got {text!r}")
        found.append(None if word == "all" else int(word))
    return found
