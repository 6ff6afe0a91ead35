"""Seconds to shrink a model, against Torch-Pruning 1.6.1 on the same machine.

    python examples/benchmarks/speed.py --models resnet18 'densenet*' --write docs/benchmarks.md

One thread, medians, both in one process (per model) one after the other on fresh copies. Ours
is trace + plan + rebuild, which makes a new model; the peer's is building its pruner (with its
dependency graph) and one step, which prunes in place.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import peer
import torch
from isolate import isolated
from suites import Case, cases
from torch import nn

import graphprune

Row = dict[str, Any]
STAGES = ("trace", "plan", "rebuild")
DEPTHS = (25, 50, 100, 200, 400, 800)
WIDTHS = (7, 7, 7, 7, 8, 6)
HEADER = f"{'model':<30} " + " ".join(
    f"{title:>{width}}" for title, width in zip((*STAGES, "ours", "peer", "times"), WIDTHS)
)


def ours(model: nn.Module, x: torch.Tensor, ratio: float) -> dict[str, float]:
    """Seconds of each stage."""
    marks = [time.perf_counter()]
    graph = graphprune.trace(model, x)
    marks.append(time.perf_counter())
    plan = graph.plan(ratio)
    marks.append(time.perf_counter())
    graphprune.rebuild(model, plan)
    marks.append(time.perf_counter())
    return {name: b - a for name, a, b in zip(STAGES, marks, marks[1:])}


def time_ours(case: Case, runs: int) -> Row:
    """Medians of the stages, after one run that fills caches."""
    _quiet()
    model, x = case.model(), case.full()
    ours(model, x, 0.5)
    taken = [ours(model, x, 0.5) for _ in range(runs)]
    row = {name: statistics.median(t[name] for t in taken) for name in STAGES}
    return {**row, "ours": statistics.median(sum(t.values()) for t in taken)}


def time_both(case: Case, runs: int, limit: float) -> Row:
    """Ours, then the peer; a peer that takes more than ``limit`` seconds in all is run once."""
    row = time_ours(case, runs)
    model, x = case.model(), case.full()
    start, taken = time.perf_counter(), []
    for number in range(runs + 1):
        fresh = copy.deepcopy(model)
        seconds = peer.shrink(fresh, x, case, 0.5, "local")
        taken += [seconds] if number or time.perf_counter() - start > limit / runs else []
        if time.perf_counter() - start + 1.5 * seconds > limit:
            break
    return {**row, "peer": statistics.median(taken or [seconds])}


def timed(case: Case, options: argparse.Namespace) -> Row:
    """One row; when the peer fails or is too slow, ours alone is timed again."""
    row = isolated(time_both, case, options.runs, options.limit, timeout=options.limit + 60)
    if row["status"] == "ok":
        return {"name": case.name, **row}
    note = f"> {options.limit:.0f} s" if row["status"] == "timeout" else "fails"
    alone = isolated(time_ours, case, options.runs, timeout=options.limit + 60)
    if alone["status"] != "ok":
        return {"name": case.name, **alone}
    bound = {"at_least": options.limit} if row["status"] == "timeout" else {}
    return {"name": case.name, **alone, "note": note, **bound}


class Chain(nn.Sequential):
    """``depth`` convolutions of 16 channels with BatchNorm and ReLU."""

    def __init__(self, depth: int) -> None:
        layers: list[nn.Module] = []
        for number in range(depth):
            width = 16 if number else 3
            layers += [nn.Conv2d(width, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def depth_growth(runs: int) -> Row:
    """Median seconds of a chain of convolutions, by depth."""
    _quiet()
    x = torch.randn(1, 3, 32, 32)
    ours(Chain(DEPTHS[0]), x, 0.5)
    found = {}
    for depth in DEPTHS:
        model = Chain(depth)
        found[depth] = statistics.median(sum(ours(model, x, 0.5).values()) for _ in range(runs))
    return {"depths": found}


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def ratio_of(row: Row) -> float | None:
    """How many times faster ours is; a lower bound when the peer ran out of time."""
    other = row.get("peer", row.get("at_least"))
    return other / row["ours"] if other is not None and "ours" in row else None


def cells(row: Row) -> list[str]:
    """The numbers of one row as text."""
    if row["status"] != "ok":
        return ["-"] * 4 + [row["status"], "-"]
    numbers = [f"{row[name]:.3f}" for name in (*STAGES, "ours")]
    times = ratio_of(row)
    bound = ">" if "at_least" in row else ""
    other = f"{row['peer']:.3f}" if "peer" in row else row["note"]
    return [*numbers, other, f"{bound}{times:.1f}" if times is not None else "-"]


def line(row: Row) -> str:
    """One line for the terminal."""
    body = " ".join(f"{cell:>{width}}" for cell, width in zip(cells(row), WIDTHS))
    return f"{row['name']:<30} {body}" + (f"  {row['reason']}" if row["status"] != "ok" else "")


def summary(rows: Sequence[Row]) -> str:
    """Geometric mean, worst and best."""
    times = {row["name"]: t for row in rows if (t := ratio_of(row)) is not None}
    if not times:
        return "no model was run by both"
    mean = math.exp(statistics.fmean(math.log(t) for t in times.values()))
    worst, best = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
    return (
        f"{len(times)} models run by both: {mean:.1f} times as fast as the peer in the geometric "
        f"mean, {times[worst]:.1f} times on the worst ({worst}), {times[best]:.0f} times on the "
        f"best ({best})"
    )


def growth_text(depths: dict[int, float]) -> str:
    """Seconds and milliseconds per layer, as a Markdown table."""
    lines = ["| layers | seconds | ms per layer |", "|---:|---:|---:|"]
    lines += [f"| {d} | {s:.3f} | {1000 * s / d:.2f} |" for d, s in depths.items()]
    return "\n".join(lines)


def section(rows: Sequence[Row], depths: dict[int, float] | None, runs: int) -> str:
    """The part of docs/benchmarks.md that this script owns."""
    lines = [
        "## Speed\n",
        f"Seconds on {machine.describe()}, one thread, medians of {runs} runs after one that warms",
        "up, 224 px inputs (299 for Inception). *ours* is trace + plan + rebuild and makes a new",
        "model; *peer* is Torch-Pruning 1.6.1: building `BasePruner` with",
        "`GroupMagnitudeImportance(p=2)` and one `step`, in place. Ratio 0.5.",
        "`examples/benchmarks/speed.py` prints this.\n",
        f"{summary(rows)}.\n",
        "| model | trace | plan | rebuild | ours | peer | times |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *("| " + " | ".join([row["name"], *cells(row)]) + " |" for row in rows),
    ]
    if depths:
        lines += [
            "\nA chain of n convolutions with BatchNorm and ReLU (ours, all stages):\n",
            growth_text(depths),
        ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="torchvision")
    parser.add_argument("--models", nargs="+", default=["*"], help="glob patterns of names")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120, help="seconds for the peer per model")
    parser.add_argument("--no-depth", action="store_true", help="leave out the growth with depth")
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    return parser.parse_args()


def main() -> None:
    """Time the chosen models, print the table, write it."""
    options = parse()
    print(f"{machine.describe()}; load {os.getloadavg()[0]:.1f}\n{HEADER}", flush=True)
    rows = []
    for case in cases(options.suite, options.models):
        if case.kind == "CIFAR":
            continue
        rows.append(timed(case, options))
        print(line(rows[-1]), flush=True)
    print(summary(rows))
    depths = None
    if not options.no_depth:
        depths = isolated(depth_growth, options.runs, timeout=600).get("depths")
        print(growth_text(depths or {}))
    if options.write:
        machine.replace_section(options.write, "Speed", section(rows, depths, options.runs))


if __name__ == "__main__":
    main()
