"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphprune.planning.options import short

MODEL_HELP = (
    "torchvision:NAME, timm:NAME, hf:FOLDER, onnx:FILE, path/to/file.py:factory, package:factory"
)
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=MODEL_HELP,
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
    str,
    typer.Option(
        "--attention",
        help="heads: whole heads go; queries: of each key; head_dim: all get narrower.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help=short("seed"))]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
ReportFile = Annotated[
    Path | None, typer.Option("--report", help="Write what was done for people to read (HTML).")
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        help="Search the smallest model that loses at most this, in the unit of --evaluate.",
    ),
]
Evaluate = Annotated[
    str | None,
    typer.Option(
        "--evaluate",
        help="file.py:function of a model, for --max-drop: a number, or one for every example.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="For --max-drop: batches to choose and repair with, other examples than those of "
        "--evaluate: .npz, .npy, .safetensors, or file.py:batches.",
    ),
]
SearchFile = Annotated[
    Path | None,
    typer.Option("--search", help="For --max-drop: a file (JSON) by which a search goes on."),
]
