"""Peak memory of rebuild, against the sum of the original and the small model.

    python examples/benchmarks/memory.py --model vgg19 --write docs/benchmarks.md

Each way of shrinking runs in a process of its own. A thread samples the resident memory
(/proc/self/statm) every half millisecond, and malloc is told to return what is freed at once
(M_MMAP_THRESHOLD), so that the numbers are tensors and not the allocator's reserves.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import machine
import torch
import torchvision
from isolate import isolated
from torch import nn

import graphprune

MIB = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


class Peak(threading.Thread):
    """Samples the resident memory until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.running = resident(), True

    def run(self) -> None:
        while self.running:
            self.highest = max(self.highest, resident())
            time.sleep(0.0005)

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.join()


def size(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.nbytes for t in model.state_dict().values())


def peak(name: str, way: str, ratio: float) -> dict[str, Any]:
    """Bytes of the model before and after, and the peak above an empty process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ctypes.CDLL(None).mallopt(-3, 64 * 1024)  # M_MMAP_THRESHOLD: give freed blocks back
    warm = torchvision.models.resnet18(weights=None)
    graphprune.rebuild(warm, ratio, torch.randn(1, 3, 64, 64))  # imports and caches
    del warm
    gc.collect()
    empty = resident()
    model = torchvision.models.get_model(name, weights=None, init_weights=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False).normal_().requires_grad_(True)
    original, largest = size(model), max(p.nbytes for p in model.parameters())
    with Peak() as planning:
        plan = graphprune.trace(model, torch.randn(1, 3, 224, 224)).plan(ratio)
    with Peak() as rebuilding:
        small = graphprune.rebuild(model, plan, inplace=way == "inplace=True")
    return {
        "original": original,
        "largest": largest,
        "small": size(small),
        "planning": planning.highest - empty,
        "peak": rebuilding.highest - empty,
    }


def bound(way: str, row: dict[str, int]) -> tuple[str, float]:
    """What the peak should not exceed, in words and bytes."""
    if way == "inplace=True":
        return "original + largest layer", row["original"] + row["largest"]
    return "original + small + 10 %", 1.1 * (row["original"] + row["small"])


def main() -> None:
    """Measure both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vgg19", help="a VGG of torchvision")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    options = parser.parse_args()
    lines = [
        "| way | original | small | largest layer | trace + plan | rebuild | bound | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    good = True
    for way in ("copy", "inplace=True"):
        row = isolated(peak, options.model, way, options.ratio, timeout=300)
        if row["status"] != "ok":
            raise SystemExit(f"{way}: {row['reason']}")
        words, limit = bound(way, row)
        holds = max(row["planning"], row["peak"]) <= limit
        good &= holds
        keys = ("original", "small", "largest", "planning", "peak")
        sizes = [f"{row[key] / MIB:.0f}" for key in keys]
        state = f"{words}: {'holds' if holds else 'exceeded'}"
        lines.append(f"| {way} | " + " | ".join(sizes) + f" | {limit / MIB:.0f} | {state} |")
    table = "\n".join(lines)
    print(table)
    if options.write:
        text = (
            f"## Memory\n\nA random {options.model}, ratio {options.ratio}, in MiB: the "
            "model before and after, its largest parameter, and the\npeak resident memory of "
            "trace + plan and of rebuild, above that of a process without the\nmodel. Each row in "
            "a process of its own, sampled every half millisecond.\n"
            f"`examples/benchmarks/memory.py` prints this.\n\n{table}"
        )
        machine.replace_section(options.write, "Memory", text)
    assert good, "the peak exceeds its bound"


if __name__ == "__main__":
    main()
