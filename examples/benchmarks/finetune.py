"""Train, shrink to a budget, fine-tune: against the peer, and against training the small network.

    python examples/benchmarks/finetune.py --write docs/benchmarks.md
    python examples/benchmarks/finetune.py --device cuda --write docs/benchmarks.md
    python examples/benchmarks/finetune.py --quick

On the CPU a small ResNet on Fashion-MNIST (apt-get install dataset-fashion-mnist). On a GPU the
ResNet-56 with published weights on CIFAR-10 as JPEG (``shared/data`` beside the repository), first
adapted to these images. Accuracies are those of the last epoch, on test images that nothing was
chosen by; every way has the same budget, criterion, recipe and number of epochs.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cifar_resnet
import fashion
import machine
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune

BUDGETS = (0.5, 1 / 2.57)
SCRATCH_RATE = 0.1
OURS, PEER, SCRATCH = "graphprune", "Torch-Pruning 1.6.1", "small network from scratch"


@dataclass(frozen=True)
class Setup:
    """What is trained, on what, and for how long."""

    device: str
    count: int | None  # training images
    epochs: int
    fine: int
    rate: float
    fine_rate: float
    batch: int = 128
    criterion: str = "group_norm"  # which the peer calls GroupMagnitudeImportance(p=2)

    @property
    def cifar(self) -> bool:
        return self.device != "cpu"

    @property
    def keep(self) -> tuple[str, ...]:
        """Layers that stay whole in all ways: the peer cannot prune the padded shortcuts."""
        return ("conv1", "layer?.*.conv2") if self.cifar else ()

    def data(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Training and test images with their labels, on the device."""
        source = cifar_resnet.jpeg_images if self.cifar else fashion.images

        def part(name: str) -> tuple[Tensor, Tensor]:
            x, y = source(name, self.count)
            return x.to(self.device), y.to(self.device)

        return part("train"), part("test")

    def fresh(self) -> nn.Module:
        """The untrained network."""
        model = cifar_resnet.resnet(56)() if self.cifar else fashion.SmallResNet()
        return model.to(self.device)

    def start(self) -> nn.Module:
        """What training begins with: published weights, or none."""
        return cifar_resnet.trained(56).to(self.device) if self.cifar else self.fresh()


@dataclass(frozen=True)
class Result:
    """One network of one seed; accuracies in percent, costs as fractions of the original's."""

    seed: int
    way: str
    budget: float
    macs: float
    params: float
    untouched: float
    accuracy: float


def augmented(x: Tensor) -> Tensor:
    """Every second image flipped, on average; each batch moved by up to two pixels."""
    flipped = (torch.rand(len(x), 1, 1, 1) < 0.5).to(x.device)
    x = torch.where(flipped, x.flip(3), x)
    top, left = torch.randint(5, (2,)).tolist()
    height, width = x.shape[2:]
    return F.pad(x, (2, 2, 2, 2))[:, :, top : top + height, left : left + width]


def fit(
    model: nn.Module, data: tuple[Tensor, Tensor], setup: Setup, epochs: int, rate: float
) -> None:
    """The one recipe: SGD with Nesterov momentum, a short warm-up and a cosine to zero."""
    x, y = data
    steps = epochs * -(-len(x) // setup.batch)
    optimizer = torch.optim.SGD(
        model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).to(x.device).split(setup.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(augmented(x[rows])), y[rows]).backward()
            optimizer.step()
            scheduler.step()


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return cifar_resnet.accuracy(model, *data)


def macs(model: nn.Module, x: Tensor) -> int:
    return graphprune.measure(model, x, latency=False).macs


def by_peer(model: nn.Module, x: Tensor, budget: float, setup: Setup) -> nn.Module | None:
    """The largest network within the budget that the peer makes; the ratio is bisected."""
    try:
        import torch_pruning
    except ImportError:
        return None
    before, best = macs(model, x), None
    low, high = 0.0, 0.95
    for _ in range(12):
        ratio = (low + high) / 2
        small = copy.deepcopy(model)
        kept = [m for n, m in small.named_modules() if n and _kept(n, setup)]
        torch_pruning.pruner.BasePruner(
            small,
            x,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[small.linear, *kept],
        ).step()
        if macs(small, x) <= budget * before:
            best, high = small, ratio
        else:
            low = ratio
    return best


def _kept(name: str, setup: Setup) -> bool:
    return any(Path(name).match(pattern) for pattern in setup.keep)


def one_seed(setup: Setup, seed: int) -> list[Result]:
    """Everything for one seed."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    train, test = setup.data()
    x = train[0][:1]
    model = setup.start()
    fit(model, train, setup, setup.epochs, setup.rate)
    base = accuracy(model, test)
    results = [Result(seed, "original", 1.0, 1.0, 1.0, base, base)]
    print(results[0], flush=True)
    before = macs(model, x), sum(p.numel() for p in model.parameters())

    def report(way: str, budget: float, small: nn.Module, epochs: int, rate: float) -> None:
        begin, untouched = time.perf_counter(), accuracy(small, test)
        torch.manual_seed(seed + 1)  # the same order of images for all ways
        fit(small, train, setup, epochs, rate)
        share = macs(small, x) / before[0], sum(p.numel() for p in small.parameters()) / before[1]
        results.append(Result(seed, way, budget, *share, untouched, accuracy(small, test)))
        print(results[-1], f"{time.perf_counter() - begin:.0f} s", flush=True)

    graph = graphprune.trace(model, x)
    for budget in BUDGETS:
        plan = graph.plan(
            target={"macs": budget}, criterion=setup.criterion, scope="local", keep=setup.keep
        )
        report(OURS, budget, graphprune.rebuild(model, plan), setup.fine, setup.fine_rate)
        theirs = by_peer(model, x, budget, setup)
        if theirs is not None:
            report(PEER, budget, theirs, setup.fine, setup.fine_rate)
        torch.manual_seed(seed + 2)
        bare = graphprune.rebuild(setup.fresh(), plan)
        report(SCRATCH, budget, bare, setup.epochs + setup.fine, SCRATCH_RATE)
    return results


def run(setup: Setup, seeds: range, workers: int, path: Path | None) -> list[Result]:
    """All seeds, on the CPU several at a time; those in the file are not run again."""
    results = known(path, setup)
    missing = [seed for seed in seeds if seed not in {r.seed for r in results}]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        for part in pool.map(one_seed, [setup] * len(missing), missing):
            results += part
            if path:
                content = {"setup": asdict(setup), "results": [asdict(r) for r in results]}
                path.write_text(json.dumps(content, indent=1))
    return results


def known(path: Path | None, setup: Setup) -> list[Result]:
    """The results of an earlier run of the same setup."""
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["setup"] != asdict(setup):
        sys.exit(f"{path} holds results of another setup: {content['setup']}")
    return [Result(**result) for result in content["results"]]


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def table(results: list[Result]) -> str:
    """Means and standard deviations over the seeds, as Markdown."""
    lines = [
        "| network | MACs kept | parameters kept | before fine-tuning | after | drop |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    base = {r.seed: r.accuracy for r in results if r.way == "original"}
    for way, budget in dict.fromkeys((r.way, r.budget) for r in results):
        found = [r for r in results if (r.way, r.budget) == (way, budget)]
        label = way if way == "original" else f"{way}, {100 * budget:.0f} %"
        after = spread([r.accuracy for r in found])
        drop = spread([base[r.seed] - r.accuracy for r in found])
        cells = [
            f"{100 * statistics.mean(r.macs for r in found):.1f} %",
            f"{100 * statistics.mean(r.params for r in found):.1f} %",
            "" if way in ("original", SCRATCH) else spread([r.untouched for r in found]),
        ]
        shown = "" if way == "original" else drop
        lines.append(f"| {label} | {' | '.join(cells)} | {after} | {shown} |")
    return "\n".join(lines)


def drop(results: list[Result], way: str, budget: float) -> float | None:
    """The mean drop of one way, in points."""
    base = {r.seed: r.accuracy for r in results if r.way == "original"}
    found = [base[r.seed] - r.accuracy for r in results if (r.way, r.budget) == (way, budget)]
    return statistics.mean(found) if found else None


def gaps(results: list[Result], budget: float) -> list[float]:
    """By how many points graphprune is better than the peer, for each seed."""
    ours, theirs = (
        {r.seed: r.accuracy for r in results if (r.way, r.budget) == (way, budget)}
        for way in (OURS, PEER)
    )
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def compared(results: list[Result]) -> str:
    """The gaps at all budgets."""
    found = {budget: gaps(results, budget) for budget in BUDGETS}
    parts = [f"{spread(gap)} points at {100 * b:.0f} %" for b, gap in found.items() if gap]
    return ", ".join(parts) or "it was not there"


def section(setup: Setup, results: list[Result], seconds: float, seeds: int) -> str:
    """The part of docs/benchmarks.md that this script owns."""
    what = (
        "ResNet-56 (published weights, adapted) on CIFAR-10 stored as JPEG, inner channels"
        if setup.cifar
        else "A ResNet of 78 k parameters on Fashion-MNIST, all channels"
    )
    start = "adapted" if setup.cifar else "trained"
    scratch = ", far fewer than the published weights had" if setup.cifar else ""
    return f"""## {title(setup)}

{what}: {start} for {setup.epochs} epochs, shrunk in one shot
(`{setup.criterion}`, local; the peer by the norm of the coupled group) to the given MACs,
fine-tuned for {setup.fine} epochs. The peer gets the ratio that comes nearest to the budget from
below. "From scratch" is our small network with new weights, trained for
{setup.epochs} + {setup.fine} epochs{scratch}. Test accuracy in percent after the
last epoch, never the best; means and standard deviations over {seeds} seeds; the drop is from the
original of the same seed. One recipe for all: SGD with Nesterov momentum 0.9, weight decay 5e-4,
batches of {setup.batch}, flips and shifts, a warm-up and a cosine from {setup.rate} (fine-tuning
{setup.fine_rate}, from scratch {SCRATCH_RATE}).
`examples/benchmarks/finetune.py` prints this; {seconds / 60:.0f} minutes on {machine.describe()},
{setup.device}.

{table(results)}

Against the peer: {compared(results)}."""


def title(setup: Setup) -> str:
    return f"Shrink and fine-tune, {'CIFAR-10' if setup.cifar else 'Fashion-MNIST'}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, help="of training, or adapting")
    parser.add_argument("--fine", type=int, help="of fine-tuning")
    parser.add_argument("--criterion", default="group_norm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="processes; one per seed on the CPU")
    parser.add_argument("--quick", action="store_true", help="few images: does it run?")
    parser.add_argument("--json", type=Path, help="all numbers; seeds in it are not run again")
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    return parser.parse_args()


def main() -> int:
    """Run everything; ends in assertions."""
    options = arguments()
    gpu = options.device != "cpu"
    if gpu and not cifar_resnet.jpeg_available():
        sys.exit("no trained weights and JPEG images in shared/data beside the repository")
    if not gpu:
        fashion.require()
    usual: dict[str, Any] = (
        {"epochs": 3, "fine": 10, "rate": 0.01, "fine_rate": 0.05, "batch": 256}
        if gpu
        else {"epochs": 4, "fine": 4, "rate": 0.1, "fine_rate": 0.05}
    )
    if options.quick:
        usual |= {"epochs": 1, "fine": 1}
        options.seeds = 1
    usual |= {name: getattr(options, name) for name in ("epochs", "fine") if getattr(options, name)}
    count = 768 if options.quick else None
    setup = Setup(options.device, count, **usual, criterion=options.criterion)
    begin = time.perf_counter()
    workers = options.workers or (1 if gpu else options.seeds)
    results = run(setup, range(options.seeds), workers, options.json)
    text = section(setup, results, time.perf_counter() - begin, options.seeds)
    print(text)
    if options.write:
        machine.replace_section(options.write, title(setup), text)
    assert all(r.macs <= r.budget for r in results)
    if not options.quick:
        base = [r.accuracy for r in results if r.way == "original"]
        assert drop(results, OURS, BUDGETS[0]) <= statistics.stdev(base) + 1e-9, "wanted at 50 %"
        for gap in filter(None, (gaps(results, budget) for budget in BUDGETS)):
            assert statistics.mean(gap) >= -statistics.stdev(base), "worse than the peer"
    return 0


if __name__ == "__main__":
    sys.exit(main())
