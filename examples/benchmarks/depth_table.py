"""How the rows of depth.py are shown: one line each, a summary by suite, and docs/depth.md."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coverage_shares import versions

Row = dict[str, Any]
HEADER = (
    "| model | blocks | branches | that leave | parameters kept | small against masked |\n"
    "|---|---:|---:|---|---:|---|"
)
_MIXED = "its streams are mixed by weights (lerp, attention over layers), not by sums"
_PROJECTED = "a projection in every block, and the sum is written into what is added to it"
_ONE = "one block could leave, and one must stay"
_FIRST = "two layers, of which the first one stays for the cache"
_NONE = "no sums and no concatenations"
_SHUFFLED = "halves of the stream stand beside each other and are shuffled"
WHY = {  # there is nothing of which one in three could leave; by patterns of names
    "Mamba": _FIRST,
    "Mamba2": _FIRST,
    "FalconMamba": _FIRST,
    "ResNet": _ONE,
    "Unet tu-resnet10t": _ONE,
    "resnet10t": _ONE,
    "yolov3-tiny": "no residual sums, and a single concatenation",
    "RegNet": _PROJECTED,
    "resnest14d": _PROJECTED,
    "MobileNetV1": _NONE,
    "alexnet": _NONE,
    "ssd300_vgg16": "what it concatenates are its outputs",
    "*vgg*": _NONE,
    "CRNN": _NONE,
    "LSTM language model": _NONE,
    "bidirectional GRU tagger": _NONE,
    "seq2seq with attention": "one branch could leave, and one must stay",
    "shufflenet_v2_*": _SHUFFLED,
    "rexnet_100": "its shortcuts cover some of the channels",
    "normalized_vit": _MIXED,
    "simple_vit_attn_residual": _MIXED,
    "simple_vit_orthog_residual_update": _MIXED,
    "simple_vit_with_hyper_connections": _MIXED,
}
INTRO = """# Whole parts leave: coverage

Written by `examples/benchmarks/depth.py --write docs/depth.md`, which runs the suites of
[coverage](coverage.md), whose models start from random weights. In every model one of three blocks
leaves, or of its branches where it has fewer than two blocks, and the small model is compared with
the masked original by `graphprune.verify`: outputs in eval mode at other batch sizes and
resolutions, outputs, gradients and buffers in train mode, in float64, at 1e-10.

- *blocks*: those that are no mere chains of smaller ones; *branches*: what is added to a stream or
  concatenated, and can leave.
- *not decided*: the outputs are the same for all inputs, with these parts and without, so that
  there is nothing to compare.
"""


def line(row: Row) -> str:
    """A row of the table."""
    name = row["name"]
    if row["status"] != "ok":
        told = row["reason"].splitlines()[0][:150].replace("|", "/")
        return f"| {name} | - | - | - | - | {told} |"
    counts = f"| {name} | {row['blocks']} | {row['branches']} "
    if "verdict" not in row:
        return f"{counts}| - | - | {reason(row)} |"
    share = 100 * row["params"][1] / row["params"][0]
    kind = row["kind"] if row["removed"] != 1 else {"blocks": "block"}.get(row["kind"], "branch")
    ending = f"{row['verdict']} ({row['difference']:.0e})"
    return f"{counts}| {row['removed']} {kind} | {share:.1f} % | {ending} |"


def reason(row: Row) -> str:
    """Why nothing leaves."""
    told = (why for name, why in WHY.items() if fnmatch.fnmatchcase(row["name"], name))
    known: str = next(told, row.get("why", "fewer than two that can leave"))
    return known.replace("|", "/")


def missed(row: Row) -> str:
    """Why a model was not measured."""
    told: str = row["reason"].splitlines()[0]
    return "not measured: more memory than there was" if "-9" in told else f"not measured: {told}"


def summary(rows: Mapping[str, Sequence[Row]]) -> str:
    """How many models of each suite lose parts, and how they compare."""
    lines = [
        "| suite | models | blocks leave | branches leave | equal | not decided | none leaves |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for suite, found in [*rows.items(), ("all", [row for part in rows.values() for row in part])]:
        kinds = [row.get("kind") if "verdict" in row else None for row in found]
        verdicts = [row.get("verdict") for row in found]
        counts = (
            len(found), kinds.count("blocks"), kinds.count("branches"), verdicts.count("equal"),
            verdicts.count("not decided"), kinds.count(None),
        )  # fmt: skip
        lines.append(f"| {suite} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def page(rows: Mapping[str, Sequence[Row]]) -> str:
    """All that docs/depth.md says."""
    none = [
        f"- {suite}, {row['name']}: {reason(row) if row['status'] == 'ok' else missed(row)}"
        for suite, found in rows.items()
        for row in found
        if "verdict" not in row
    ]
    told = ", ".join(f"{name} {number}" for name, number in versions().items())
    parts = [INTRO, f"With {told}.\n", summary(rows), "\n## Where none leaves\n", "\n".join(none)]
    for suite, found in rows.items():
        parts += [f"\n## {suite}\n", HEADER, "\n".join(map(line, found))]
    return "\n".join(parts) + "\n"


def write(path: Path, rows: Mapping[str, Sequence[Row]]) -> None:
    """Write the page."""
    path.write_text(page(rows), encoding="utf-8")
