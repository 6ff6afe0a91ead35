"""What shrunk models gain in real time, beside the peer's at the same MACs.

    python examples/benchmarks/latency.py --models resnet50 mobilenet_v2 --write docs/benchmarks.md

All models of a network run in turns with the original, so that a busy moment of the machine hits
all of them; on one CPU thread, the time is that of the thread. The figure that counts is the
latency kept over the MACs kept: 1 means that every MAC removed saved its share of the time. What is
wanted is with parts.

The allocator is told to keep freed memory, as PyTorch's tuning guide recommends (there by another
allocator): else page faults decide, by what was freed before.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from machine import describe, replace_section
from torch import Tensor, nn

import graphprune
from graphprune.planning.latency import Bench
from graphprune.text import render

TITLE = "Real speed"
MODELS = ("resnet50", "mobilenet_v2", "densenet121", "vit_b_16")
WANTED = {"resnet50": 1.05, "mobilenet_v2": 1.10, "densenet121": 1.10, "vit_b_16": 1.05}
HEADER = ("model", "how", "MACs kept", "latency kept", "latency / MACs", "predicted / measured")


@dataclass(frozen=True)
class Row:
    """One shrunk model of one network; latencies in milliseconds."""

    model: str
    how: str
    macs: float
    before: float
    after: float
    predicted: float | None = None

    @property
    def figure(self) -> float:
        """Latency kept over MACs kept."""
        return self.after / self.before / self.macs

    def cells(self) -> tuple[str, ...]:
        """For a table."""
        wanted = WANTED.get(self.model) if "latency" in self.how else None
        return (
            self.model,
            self.how,
            f"{self.macs:.3f}",
            f"{self.after / self.before:.3f} ({self.before:.1f} -> {self.after:.1f} ms)",
            f"{self.figure:.3f}" + (f" (wanted {wanted})" if wanted else ""),
            "-" if self.predicted is None else f"{self.predicted:.3f}",
        )


def ours(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """A model with a target, made by graphprune."""
    return graphprune.rebuild(model, None, x, **options)


def peer(model: nn.Module, x: Tensor, share: float, round_to: int | None) -> nn.Module:
    """The peer's model whose MACs are nearest to a share of the original's, found by bisection."""
    import torch_pruning

    whole = macs(model, x)
    heads = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    low, high, best = 0.0, 1.0, None
    for _ in range(6):
        ratio = (low + high) / 2
        small = copy.deepcopy(model)
        twins = dict(zip(model.modules(), small.modules()))
        pruner = torch_pruning.pruner.BasePruner(
            small,
            x,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[twins[last]],
            num_heads={twins[head]: head.num_heads for head in heads},
            round_to=round_to,
        )
        pruner.step()
        kept = macs(small, x) / whole
        if best is None or abs(kept - share) < abs(best[0] - share):
            best = kept, small
        low, high = (low, ratio) if kept < share else (ratio, high)
    assert best is not None
    return best[1]


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of one forward pass."""
    return graphprune.measure(model, x, latency=False).macs


def rows_of(
    name: str, bench: Bench, x: Tensor, share: float, seconds: float, beside: bool
) -> list[Row]:
    """Shrink one network in all ways and time the results in turns."""
    model = getattr(torchvision.models, name)(weights=None).eval().to(bench.device)
    makers: dict[str, Callable[[], nn.Module]] = {
        "MACs": lambda: ours(model, x, target={"macs": share}),
        "MACs, round_to=16": lambda: ours(model, x, target={"macs": share}, round_to=16),
        "latency": lambda: ours(model, x, target={"latency": share}, threads=bench.threads),
        "latency, with parts": lambda: ours(
            model,
            x,
            target={"latency": share},
            threads=bench.threads,
            parts=("channels", "blocks", "branches"),
        ),
        "latency, round_to=16": lambda: ours(
            model, x, target={"latency": share}, threads=bench.threads, round_to=16
        ),
    }
    if beside:
        makers["peer, MACs"] = lambda: peer(model, x, share, None)
        makers["peer, MACs, round_to=16"] = lambda: peer(model, x, share, 16)
    small: dict[str, nn.Module] = {}
    for how, make in makers.items():
        start = time.perf_counter()
        try:
            small[how] = make()
        except Exception as error:
            print(f"{name}, {how}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        else:
            print(f"{name}, {how}: made in {time.perf_counter() - start:.0f} s", flush=True)
    times = bench.totals([model, *small.values()], bench.clock, seconds * (1 + len(small)))
    before, *after = [statistics.median(found) for found in times]
    whole = macs(model, x)
    found = []
    for (how, shrunk), latency in zip(small.items(), after):
        plan = getattr(shrunk, "graphprune_plan", None)
        said = plan.request.get("latency") if plan is not None else None
        # the prediction is relative to the original, which was measured beside it
        predicted = said and said["predicted"] / said["before"] / (latency / before)
        found.append(Row(name, how, macs(shrunk, x) / whole, before, latency, predicted))
    return found


def keep_freed_memory() -> None:
    """Neither give memory back to the system nor map large tensors by themselves (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        library.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs or of the latency")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing per model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--write", type=Path, help="Markdown file to put the table into")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    x = torch.randn(arguments.batch, 3, 224, 224, device=arguments.device)
    call = graphprune.trace(nn.Conv2d(3, 4, 1).to(x.device), x).call
    bench = Bench(call, x.device, arguments.threads)
    rows: list[Row] = []
    for name in arguments.models:
        rows += rows_of(name, bench, x, arguments.share, arguments.seconds, not arguments.no_peer)
        print(render("", HEADER, [row.cells() for row in rows if row.model == name]), flush=True)
    if arguments.write:
        table = "\n".join(
            ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
            + ["| " + " | ".join(row.cells()) + " |" for row in rows]
        )
        text = (
            f"## {TITLE}\n\n`python examples/benchmarks/latency.py`: {describe()}; {bench}, batch "
            f"{arguments.batch}, random weights, medians.\n\n{table}"
        )
        replace_section(arguments.write, TITLE, text)
    assert all(row.after < row.before for row in rows)


if __name__ == "__main__":
    main()
