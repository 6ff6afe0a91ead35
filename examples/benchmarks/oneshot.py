"""Accuracy against MACs in one shot, without training: criteria, calibration, and the peer.

    python examples/benchmarks/oneshot.py --write docs/calibration.md --draw docs/oneshot.svg

Needs the trained weights and the images of ``shared/data`` beside the repository. Nothing is
chosen on the test images: they are looked at once for every row.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import machine
import matplotlib as mpl
import torch
from cifar_resnet import MEAN, STD, CifarResNet, accuracy, available, images, reestimate, trained
from matplotlib import pyplot
from torch import Tensor
from torch.nn import functional as F

import graphprune
from graphprune.criteria import criteria
from graphprune.errors import InputError

STREAMS = ("conv1", "layer?.*.conv2")  # the layers that write the residual streams
BUDGETS = (0.5, 0.7)
TARGETS = {(56, 0.5): 1.5, (56, 0.7): 0.3, (56, 0.35): 5.0, (20, 0.7): 2.0}
BEST = "reconstruction"
STATES = ("as is", "BatchNorm", "repair")
PEER = "Torch-Pruning"
SELECTION, FEW, MANY = 1024, 256, 4096  # images to choose with, for all rows, for the targets
SWEEPS = 1  # of the joint refit, for the targets
ROWS = 1 << 15  # places that the least squares look at


@dataclass(frozen=True)
class Row:
    """One small model: accuracies in percent by state, seconds for all of it."""

    depth: int
    criterion: str
    budget: float
    macs: float
    accuracies: dict[str, float]
    seconds: float


# --- calibration images -------------------------------------------------------------------------


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by up to four pixels over black, and mirrored: as the networks were trained."""
    black = -(torch.tensor(MEAN) / torch.tensor(STD)).view(1, 3, 1, 1)
    wide = F.pad(x - black, (4, 4, 4, 4)) + black
    places = torch.randint(0, 9, (len(x), 2), generator=generator).tolist()
    moved = [image[:, a : a + 32, b : b + 32] for image, (a, b) in zip(wide, places)]
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), torch.stack(moved).flip(3), torch.stack(moved))


def mixed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image with up to half of another one: a network is less sure of them."""
    share = 0.5 + 0.5 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return share * x + (1 - share) * x[torch.randperm(len(x), generator=generator)]


def calibration(count: int, size: int = 128, seed: int = 0) -> list[Tensor]:
    """Batches of training images, shifted, half of them mixed."""
    generator = torch.Generator().manual_seed(seed)
    x = images("train")[0]
    x = shifted(x[torch.randperm(len(x), generator=generator)[:count]], generator)
    half = len(x) // 2
    x = torch.cat([mixed(x[:half], generator), x[half:]])
    return list(x[torch.randperm(len(x), generator=generator)].split(size))


def labelled(count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of training images as they are, with labels."""
    x, y = images("train")
    return list(zip(x[:count].split(128), y[:count].split(128)))


# --- graphprune ---------------------------------------------------------------------------------


def plan_of(model: CifarResNet, criterion: str, budget: float) -> graphprune.Plan:
    """Channels inside the blocks by a criterion, ranked over all layers, to a budget of MACs."""
    best = criterion == BEST
    data = calibration(SELECTION) if best else labelled(SELECTION)
    graph = graphprune.trace(model, data[0][:1] if best else data[0][0][:1])
    return graph.plan(
        criterion=criterion,
        scope="global",
        normalise="macs" if best else None,
        target={"macs": budget},
        keep=STREAMS,
        data=data,
    )


def shrink(
    depth: int, criterion: str, budget: float, count: int, states: tuple[str, ...], sweeps: int = 0
) -> Row:
    """One small model in all states."""
    model, (x, y) = trained(depth), images("test")
    start = time.perf_counter()
    plan = plan_of(model, criterion, budget)
    found: dict[str, float] = {}
    spent = time.perf_counter() - start
    for state in states:
        start = time.perf_counter()
        small = graphprune.rebuild(model, plan)
        if state != "as is":
            method = {"BatchNorm": "batchnorm", "repair": "repair"}[state]
            plain = [batch for batch, _ in labelled(count)]
            data = calibration(count, 64) if state == "repair" else plain
            joint = sweeps if state == "repair" else 0
            graphprune.calibrate(small, model, data, method=method, rows=ROWS, sweeps=joint)
        spent += time.perf_counter() - start
        found[state] = accuracy(small, x, y)
    share = plan.after.macs / plan.before.macs
    return Row(depth, criterion, budget, share, found, spent)


# --- the peer -----------------------------------------------------------------------------------


def peer_model(depth: int, ratio: float) -> tuple[CifarResNet, float]:
    """Torch-Pruning on the channels inside the blocks: the small model, its share of the MACs."""
    import torch_pruning

    model = trained(depth)
    example = torch.zeros(1, 3, 32, 32)
    before = graphprune.measure(model, example, latency=False).macs
    stay = [model.conv1, model.linear]
    stay += [b.conv2 for layer in (model.layer1, model.layer2, model.layer3) for b in layer]
    torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=True,
        max_pruning_ratio=0.9,
        ignored_layers=stay,
    ).step()
    return model, graphprune.measure(model, example, latency=False).macs / before


def peer(depth: int, budget: float, count: int) -> Row | None:
    """The peer at the same MACs: its ratio is found by bisection."""
    if importlib.util.find_spec("torch_pruning") is None:
        return None
    (x, y), start = images("test"), time.perf_counter()
    low, high = 0.0, 0.95
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if peer_model(depth, middle)[1] > budget else (low, middle)
    model, share = peer_model(depth, high)
    again = copy.deepcopy(model)
    reestimate(again, images("train")[0][:count])
    seconds = time.perf_counter() - start
    found = {"as is": accuracy(model, x, y), "BatchNorm": accuracy(again, x, y)}
    return Row(depth, PEER, budget, share, found, seconds)


# --- results ------------------------------------------------------------------------------------


def all_rows(depths: list[int], budgets: list[float], names: list[str], few: int) -> Iterator[Row]:
    """Every criterion and the peer."""
    for depth in depths:
        for name in names:
            for budget in budgets:
                try:
                    yield shrink(depth, name, budget, few, STATES)
                except InputError as error:  # a criterion that cannot see enough
                    print(f"{name} at {budget}: {str(error).splitlines()[0]}")
        for budget in budgets:
            row = peer(depth, budget, few)
            if row is not None:
                yield row


def table(rows: list[Row], bases: dict[int, float]) -> str:
    """The results as Markdown."""
    lines = ["| network | criterion | MACs | " + " | ".join(STATES) + " |",
             "|---|---|---:|---:|---:|---:|"]  # fmt: skip
    for row in sorted(rows, key=lambda r: (-r.depth, -r.budget, -max(r.accuracies.values()))):
        cells = [f"{row.accuracies[s]:.1f} %" if s in row.accuracies else "" for s in STATES]
        lines.append(
            f"| ResNet-{row.depth} ({bases[row.depth]:.1f} %) | {row.criterion} | "
            f"{100 * row.macs:.1f} % | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def targets(rows: list[Row], bases: dict[int, float]) -> str:
    """What was wanted and what came out."""
    lines = [
        "| network | MACs | accuracy | lost | wanted | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lost = bases[row.depth] - row.accuracies["repair"]
        wanted = TARGETS[row.depth, row.budget]
        lines.append(
            f"| ResNet-{row.depth} | {100 * row.macs:.1f} % | {row.accuracies['repair']:.1f} % | "
            f"{lost:.1f} | at most {wanted} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], bases: dict[int, float], path: Path) -> None:
    """Accuracy against MACs: one panel for each network and state."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "oneshot"
    depths = sorted({row.depth for row in rows})
    figure, axes = pyplot.subplots(
        len(depths), len(STATES), figsize=(13, 4 * len(depths)), sharey=True, squeeze=False
    )
    for line, depth in zip(axes, depths):
        for axis, state in zip(line, STATES):
            axis.axhline(bases[depth], color="black", linewidth=0.8, linestyle=":")
            axis.set_title(f"ResNet-{depth}, {state}")
            axis.set_xlabel("MACs kept (%)")
            for name in dict.fromkeys(row.criterion for row in rows):
                points = sorted(
                    (100 * row.macs, row.accuracies[state])
                    for row in rows
                    if (row.depth, row.criterion) == (depth, name) and state in row.accuracies
                )
                colour = {PEER: "black", BEST: "tab:red"}.get(name)
                style = {"marker": ".", "label": name, "linewidth": 2.4 if colour else 1.0}
                if points:
                    axis.plot(*zip(*points), color=colour, **style)
        line[0].set_ylabel("accuracy (%)")
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def section(best: list[Row], rows: list[Row], bases: dict[int, float], threads: int) -> str:
    """The part of the document that this script owns."""
    count = len(images("test")[1])
    return f"""## Measured

One shot, no training, on the {count} lossless test images of the subset of CIFAR-10 (one image is
{100 / count:.2f} points); channels inside the blocks only. `{BEST}`, chosen on {SELECTION} training
images and repaired on {MANY} (`sweeps={SWEEPS}`, `rows={ROWS}`), which were shifted and mirrored,
half of them mixed with another image; {threads} threads, choosing and repairing in these seconds:

{targets(best, bases)}

Every criterion, ranked over all layers, as it comes out, with BatchNorm re-estimated on {FEW}
training images, and repaired on as many without sweeps; the peer is Torch-Pruning 1.6.1 with L2,
global, its ratio found by bisection.

{table(rows, bases)}

![accuracy against MACs](oneshot.svg)"""


def main() -> int:
    """Run everything; ends in assertions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    parser.add_argument("--draw", type=Path, help="where to draw the curves")
    parser.add_argument("--json", type=Path, help="where to keep the rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few images, criteria and budgets")
    parser.add_argument("--targets", action="store_true", help="only the wanted figures")
    options = parser.parse_args()
    if not available():
        print("skipped: no trained weights and images in shared/data beside the repository")
        return 0
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    global SELECTION, FEW, MANY
    wanted, depths, budgets = list(TARGETS), [56, 20], list(BUDGETS)
    names = [BEST, *(name for name in criteria() if name != BEST)]
    if options.quick:
        SELECTION, FEW, MANY = 128, 128, 256
        wanted, depths, budgets, names = [(20, 0.7)], [20], [0.7], [BEST, "l2"]
    bases = {depth: accuracy(trained(depth), *images("test")) for depth in depths}
    best = []
    for depth, budget in wanted:
        best.append(shrink(depth, BEST, budget, MANY, ("repair",), SWEEPS))
        print(best[-1], flush=True)
    rows: list[Row] = []
    for row in () if options.targets else all_rows(depths, budgets, names, FEW):
        rows.append(row)
        print(row, flush=True)
    print(f"{targets(best, bases)}\n\n{table(rows, bases)}\n{machine.describe()}")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in (*best, *rows)]))
    if options.draw and rows:
        draw(rows, bases, options.draw)
    if options.write and rows:
        text = section(best, rows, bases, options.threads)
        machine.replace_section(options.write, "Measured", text)
    assert all(row.macs <= row.budget for row in (*best, *rows))
    assert all(bases[row.depth] - row.accuracies["repair"] < 10 for row in best)
    for row in rows:
        if row.criterion == BEST and row.budget <= 0.7:
            assert row.accuracies["repair"] > row.accuracies["as is"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
