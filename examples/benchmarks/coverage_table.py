"""How the rows of coverage.py are shown: one line each, a summary, and docs/coverage.md."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from typing import Any

import torch
import torchvision

Row = dict[str, Any]
LIMIT = 0.45  # the share of parameters a classifier may keep at ratio 0.5
STAGES = ("trace", "plan", "rebuild")
HEADER = (
    f"{'model':<30} {'groups':>6} {'params':>7} {'MACs':>7} {'float64':>8} {'float32':>8} "
    f"{'trace':>6} {'plan':>6} {'rebld':>6} {'verify':>6}  peer / status"
)


def share(pair: Sequence[int] | None) -> str:
    """What is kept, in percent."""
    return f"{100 * pair[1] / pair[0]:.1f} %" if pair else "-"


def _gap(row: Row, name: str) -> str:
    return f"{row[name]:.0e}" if row.get(name) is not None else "-"


def _peer(row: Row) -> str:
    kept = f"{100 * row['peer_kept']:.1f} %" if row.get("peer_kept") is not None else ""
    state = row.get("peer", "not run")
    return kept if state == "runs" else " ".join(filter(None, (kept, state)))


def _verification(row: Row) -> float:
    return sum(row.get("seconds", {}).get(name, 0.0) for name in ("verify64", "verify32"))


def line(row: Row) -> str:
    """One line for the terminal."""
    seconds = row.get("seconds", {})
    stages = " ".join(f"{seconds.get(name, float('nan')):6.2f}" for name in STAGES)
    state = row["status"] if row["status"] == "ok" else f"{row['status']}: {row['reason'][:150]}"
    return (
        f"{row['name']:<30} {row.get('groups', '-'):>6} {share(row.get('params')):>7} "
        f"{share(row.get('macs')):>7} {_gap(row, 'verify64'):>8} {_gap(row, 'verify32'):>8} "
        f"{stages} {_verification(row):6.1f}  {_peer(row)} / {state}"
    )


def summary(rows: Sequence[Row]) -> str:
    """How many of the models pass, here and with the peer."""
    good = sum(row["status"] == "ok" for row in rows)
    tried = [row["peer"] for row in rows if "peer" in row]
    text = f"{good} of {len(rows)} models shrunk and verified"
    runs = sum(state == "runs" for state in tried)
    return f"{text}; the peer's result runs for {runs} of {len(tried)}" if tried else text


def document(suite: str, names: Sequence[str], rows: Sequence[Row]) -> str:
    """The whole of docs/coverage.md."""
    settings = sorted({(row["ratio"], row["scope"]) for row in rows}, key=_local_half_first)
    order = {name: number for number, name in enumerate(names)}
    parts = [_intro(suite)]
    for ratio, scope in settings:
        chosen = [row for row in rows if (row["ratio"], row["scope"]) == (ratio, scope)]
        chosen.sort(key=lambda row: order[row["name"]])
        parts.append(f"## Ratio {ratio}, {scope}\n\n{summary(chosen)}.\n\n{_table(chosen)}")
        if ratio == 0.5:
            parts.append(_large(chosen))
        parts += [_fewer(chosen), _failures(chosen)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _local_half_first(setting: tuple[float, str]) -> tuple[bool, str, float]:
    return setting != (0.5, "local"), setting[1], setting[0]


def _intro(suite: str) -> str:
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    return f"""# What graphprune shrinks: {suite}

Written by `examples/benchmarks/coverage.py --suite {suite}` (Python {platform.python_version()},
{versions}, one thread).

Every model starts from random weights with random BatchNorm statistics and affine parameters. It
is traced and planned, rebuilt, and compared with the masked original by `graphprune.verify`:
outputs in eval mode at another batch size and another resolution, and outputs, gradients and
buffers in train mode, auxiliary heads included.

- *params*, *MACs*: what is kept. MACs are those of the input in the table.
- *float64*: the largest relative difference found in all these checks; the limit is 1e-10.
- *float32*: the same for outputs in eval mode; the limit is 1e-5. Gradients are compared in float64
  only: rounding flips ReLU and max-pooling, so that even one and the same model has gradients that
  differ by several percent between float32 and float64.
- *renorm.*: models with LayerNorm or GroupNorm over removed channels; there the reference takes
  the statistics over the kept channels.
- *trace*, *plan*, *rebuild*: seconds, first call in a fresh process.
- *peer*: parameters kept by Torch-Pruning 1.6.1 (`BasePruner`, `GroupMagnitudeImportance(p=2)`,
  same ratio, output layers ignored), and whether its result runs in eval and in train mode. It is
  not checked against a reference."""


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| model | input | groups | params | MACs | float64 | float32 "
        "| trace | plan | rebuild | peer |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        seconds = [f"{row.get('seconds', {}).get(name, 0):.2f}" for name in STAGES]
        kind = "" if row.get("exact", True) else " (renorm.)"
        side = "x".join(map(str, row["input"][2:]))
        failed = "" if row["status"] == "ok" else f" **{row['status']}**"
        cells = [
            f"{row['name']}{kind}{failed}",
            side,
            str(row.get("groups", "-")),
            share(row.get("params")),
            share(row.get("macs")),
            _gap(row, "verify64"),
            _gap(row, "verify32"),
            *seconds,
            _peer(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _large(rows: Sequence[Row]) -> str:
    large = [
        row
        for row in rows
        if row["kind"] == "classification"
        and row.get("params")
        and row["params"][1] > LIMIT * row["params"][0]
    ]
    if not large:
        return f"Every classifier keeps at most {100 * LIMIT:.0f} % of its parameters."
    lines = [f"Classifiers that keep more than {100 * LIMIT:.0f} % of their parameters:\n"]
    for row in large:
        text = f"- {row['name']}: {share(row['params'])}."
        if "head" in row:
            text += (
                f" {100 * row['head']:.0f} % of its parameters are in the output layer, which "
                "loses inputs but no outputs."
            )
        frozen = (re.sub(r"\(/.*/", "(", reason) for reason in row["frozen"])
        lines.append(f"{text} Frozen: {'; '.join(frozen)}.")
    return "\n".join(lines)


def _fewer(rows: Sequence[Row]) -> str:
    """Which models were verified by less than all checks."""
    lines, outputs = [], []
    for row in rows:
        checks = row.get("checks") or ["output, another resolution, train"]
        if checks == ["output"]:
            outputs.append(row["name"])
        elif not any("resolution" in check for check in checks):
            lines.append(f"- {row['name']}: no other resolution")
    if outputs:
        lines.append(f"- outputs in eval mode only, for their size: {', '.join(outputs)}")
    return "\n".join(["Verified by fewer checks:\n", *lines]) if lines else ""


def _failures(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row["status"] != "ok"]
    lines = [f"- {row['name']}: {row['status']}: {_first(row['reason'])}" for row in failed]
    return "\n".join(["Not passed:\n", *lines]) if failed else ""


def _first(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
