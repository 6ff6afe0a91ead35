"""Accuracy against MACs in one shot, without training: criteria, calibration, and the peer.

    python examples/benchmarks/oneshot.py --write docs/calibration.md --draw docs/oneshot.svg

Needs the trained weights and the images of ``shared/data`` beside the repository. Nothing is
chosen on the test images: they are looked at once for every row; ``--validation`` looks at training
images that no model is chosen or repaired with instead. ``--defaults`` is the call without any
options, from few images. Other networks are in ``real_weights.py``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
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
BUDGETS = (0.35, 0.5, 0.7, 0.85)
DEFAULTS = {(56, 0.7): 0.3, (56, 0.5): 1.3, (56, 0.35): 2.7, (20, 0.7): 0.5}
PLAIN, RESERVED = 512, 1000  # images for the defaults; the last ones, for a validation
TARGETS = {(56, 0.5): 1.5, (56, 0.7): 0.3, (56, 0.35): 5.0, (20, 0.7): 2.0}
BEST = "reconstruction"
STATES = ("as is", "BatchNorm", "repair")
PEER = "Torch-Pruning"
SELECTION, FEW, MANY = 1024, 256, 4096  # images to choose with, for all rows, for the targets
SWEEPS = 1  # of the joint refit, for the targets
BATCH = 64  # images of a step of the joint refit
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
    x = images("train")[0][:-RESERVED]
    x = shifted(x[torch.randperm(len(x), generator=generator)[:count]], generator)
    half = len(x) // 2
    x = torch.cat([mixed(x[:half], generator), x[half:]])
    return list(x[torch.randperm(len(x), generator=generator)].split(size))


def labelled(count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of training images as they are, with labels."""
    x, y = images("train")
    return list(zip(x[:count].split(128), y[:count].split(128)))


def looked_at(validation: bool) -> tuple[Tensor, Tensor]:
    """The test images; or training images that nothing else sees, to choose a recipe by."""
    if not validation:
        return images("test")
    x, y = images("train")
    return x[-RESERVED:], y[-RESERVED:]


# --- defaults -----------------------------------------------------------------------------------


def interval(values: Tensor, resamples: int = 2000) -> tuple[float, float, float]:
    """The mean in percent, and 95 % of the means of resampled images."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = 100 * values.double()[picks].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return 100 * float(values.double().mean()), low, high


def defaults(depths: list[int], validation: bool) -> str:
    """``criterion="auto"`` and a repair, without any option: points lost, as Markdown."""
    x, y = looked_at(validation)
    data = calibration(PLAIN, BATCH)
    lines = [
        "| network | MACs | lost | 95 % interval | wanted | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for depth, budget in DEFAULTS:
        if depth not in depths:
            continue
        model = trained(depth)
        right, start = answers(model, x) == y, time.process_time()
        plan = graphprune.trace(model, x[:1]).plan(
            criterion="auto", target={"macs": budget}, data=data
        )
        small = graphprune.rebuild(model, plan)
        graphprune.calibrate(small, model, data)
        spent = time.process_time() - start
        lost, low, high = interval(right.double() - (answers(small, x) == y).double())
        lines.append(
            f"| ResNet-{depth} | {100 * plan.after.macs / plan.before.macs:.1f} % | {lost:.1f} | "
            f"{low:.1f} to {high:.1f} | at most {DEFAULTS[depth, budget]} | {spent:.0f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


@torch.inference_mode()
def answers(model: CifarResNet, x: Tensor) -> Tensor:
    """The classes that a network sees."""
    return torch.cat([model(part).argmax(1) for part in x.split(256)])


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
    model, (x, y) = trained(depth), looked_at(False)
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
            data = calibration(count, BATCH) if state == "repair" else plain
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


class Kept:
    """The rows of a file, and those that are added to it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, list[Row]] = {}
        if path is not None and path.exists():
            content = json.loads(path.read_text())
            self.rows = {part: [Row(**row) for row in rows] for part, rows in content.items()}

    def row(
        self, part: str, depth: int, criterion: str, budget: float, make: Callable[..., Row | None]
    ) -> Row | None:
        """A row of a part of the results: as it is in the file, or made now."""
        for row in self.rows.get(part, []):
            if (row.depth, row.criterion, row.budget) == (depth, criterion, budget):
                return row
        made = make(depth, criterion, budget)
        print(made, flush=True)
        if made is not None:
            self.rows.setdefault(part, []).append(made)
        if self.path is not None:
            content = {p: [dataclasses.asdict(r) for r in rows] for p, rows in self.rows.items()}
            self.path.write_text(json.dumps(content, indent=1))
        return made


def all_rows(
    kept: Kept, depths: list[int], budgets: list[float], names: list[str], few: int
) -> Iterator[Row]:
    """Every criterion and the peer."""

    def make(depth: int, name: str, budget: float) -> Row | None:
        if name == PEER:
            return peer(depth, budget, few)
        try:
            return shrink(depth, name, budget, few, STATES)
        except InputError as error:  # a criterion that cannot see enough
            print(f"{name} at {budget}: {str(error).splitlines()[0]}")
            return None

    for depth, name, budget in itertools.product(depths, [*names, PEER], budgets):
        row = kept.row("criteria", depth, name, budget, make)
        if row is not None:
            yield row


def table(rows: list[Row], bases: dict[int, float]) -> str:
    """The results as Markdown: for each network a line for every criterion, by budget."""
    budgets = sorted({row.budget for row in rows})
    lines: list[str] = []
    for depth in sorted({row.depth for row in rows}, reverse=True):
        found: dict[str, dict[float, Row]] = {}
        for row in rows:
            if row.depth == depth:
                found.setdefault(row.criterion, {})[row.budget] = row
        titles = " | ".join(f"{100 * budget:.0f} % of the MACs" for budget in budgets)
        lines += ["", f"| ResNet-{depth}, {bases[depth]:.1f} % | {titles} |"]
        lines.append("|---|" + "---:|" * len(budgets))
        for name in sorted(found, key=lambda name: _rank(found[name])):
            cells = [_cell(found[name].get(budget)) for budget in budgets]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])


def _rank(rows: dict[float, Row]) -> tuple[bool, float]:
    """By the mean after the repair; the peer, which has none, comes last."""
    repaired = [row.accuracies.get("repair") for row in rows.values()]
    return None in repaired, -statistics.mean(value or 0 for value in repaired)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    text = " / ".join(f"{row.accuracies[s]:.1f}" for s in STATES if s in row.accuracies)
    return text if row.budget - row.macs < 0.0025 else f"{text} (at {100 * row.macs:.1f} %)"


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
    depths = sorted({row.depth for row in rows}, reverse=True)
    names = sorted({r.criterion for r in rows}, key=lambda name: (name == PEER, name != BEST, name))
    others = iter(c for c in pyplot.get_cmap("tab20").colors if c[0] < 0.8 or c[1] > 0.4)  # no red
    colours = {n: {PEER: "black", BEST: "red"}.get(n) or next(others) for n in names}
    figure, axes = pyplot.subplots(
        len(depths), len(STATES), figsize=(14, 4.5 * len(depths)), squeeze=False
    )
    for line, depth in zip(axes, depths):
        for axis, state in zip(line, STATES):
            axis.axhline(bases[depth], color="grey", linewidth=0.8, linestyle=":")
            axis.set_title(f"ResNet-{depth}, {state}")
            axis.set_xlabel("MACs kept (%)")
            axis.xaxis.get_major_locator().set_params(integer=True)
            for name in names:
                points = sorted(
                    (100 * row.macs, row.accuracies[state])
                    for row in rows
                    if (row.depth, row.criterion) == (depth, name) and state in row.accuracies
                )
                if points:
                    width = 2.4 if name in (PEER, BEST) else 1.0
                    axis.plot(*zip(*points), marker=".", color=colours[name], linewidth=width)
        line[0].set_ylabel("accuracy (%)")
    marks = [pyplot.Line2D([], [], color=colours[name], label=name) for name in names]
    figure.tight_layout(rect=(0, 0, 0.86, 1))
    figure.legend(handles=marks, loc="center right", fontsize=9, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def section(best: list[Row], rows: list[Row], bases: dict[int, float], threads: int) -> str:
    """The part of the document that this script owns."""
    count = len(images("test")[1])
    return f"""## Measured

One shot, no training, on the {count} lossless test images of the subset of CIFAR-10 (one image is
{100 / count:.2f} points); channels inside the blocks only. `{BEST}`, chosen on {SELECTION} training
images and repaired on {MANY} in batches of {BATCH} (`sweeps={SWEEPS}`, `rows={ROWS}`), which
were shifted and mirrored, half of them mixed with another image; {threads} threads, choosing and
repairing in these seconds:

{targets(best, bases)}

Every criterion, ranked over all layers: accuracy in percent as it comes out / with BatchNorm
re-estimated on {FEW} training images / repaired on as many without sweeps; best mean of the last
first. The peer is Torch-Pruning 1.6.1 with L2, global, its ratio found by bisection.

{table(rows, bases)}

![accuracy against MACs](oneshot.svg)"""


def main() -> int:
    """Run everything; ends in assertions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    parser.add_argument("--draw", type=Path, help="where to draw the curves")
    parser.add_argument("--json", type=Path, help="all rows; those in it are not run again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few images, criteria and budgets")
    parser.add_argument("--defaults", action="store_true", help="only criterion auto, no options")
    parser.add_argument("--validation", action="store_true", help="with --defaults: not on tests")
    parser.add_argument("--targets", action="store_true", help="only the wanted figures")
    options = parser.parse_args()
    if not available():
        print("skipped: no trained weights and images in shared/data beside the repository")
        return 0
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.defaults:
        print(f"{defaults([20] if options.quick else [56, 20], options.validation)}")
        return 0
    global SELECTION, FEW, MANY
    wanted, depths, budgets = list(TARGETS), [56, 20], list(BUDGETS)
    names = [BEST, *(name for name in criteria() if name != BEST)]
    if options.quick:
        SELECTION, FEW, MANY = 128, 128, 256
        wanted, depths, budgets, names = [(20, 0.7)], [20], [0.7], [BEST, "l2"]
    bases = {depth: accuracy(trained(depth), *images("test")) for depth in depths}
    kept = Kept(options.json)

    def repaired(depth: int, criterion: str, budget: float) -> Row:
        return shrink(depth, criterion, budget, MANY, ("repair",), SWEEPS)

    best = [kept.row("wanted", depth, BEST, budget, repaired) for depth, budget in wanted]
    rows: list[Row] = []
    if not options.targets:
        rows = list(all_rows(kept, depths, budgets, names, FEW))
    print(f"{targets(best, bases)}\n\n{table(rows, bases)}\n{machine.describe()}")
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
