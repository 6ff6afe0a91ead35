"""What ``verify`` costs, in passes of the model: it should be no more than ten of them.

    python examples/benchmarks/verification.py --write docs/benchmarks.md

One thread, the time of the processor, medians. *passes* is five forward and backward passes of the
original in train mode on the same inputs, in float64, in which ``verify`` computes, and in float32;
*times* is how many times as long ``verify`` takes.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
import torchvision
from suites import Case, call, cases, cast, tensors
from torch import nn

import graphprune

MODELS = {  # suite: names
    "torchvision": ("resnet18", "mobilenet_v3_small"),
    "transformers": ("BERT", "GPT-2", "ViT", "Swin", "DETR"),
    "transformers_vision": ("ConditionalDetr",),
    "diffusers": ("UNet2DModel", "UNet2DConditionModel", "AutoencoderKL"),
}
PASSES = 5


def full_size() -> list[Case]:
    """Models as they are used, with random weights."""
    import transformers

    bert = transformers.BertConfig()
    detr = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(out_features=["stage4"]),
    )

    def words(batch: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(bert.vocab_size, (batch, 64))}

    def image(side: int) -> Callable[[int], torch.Tensor]:
        return lambda batch: torch.randn(batch, 3, side, side)

    def found(batch: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": image(256)(batch)}

    built = {
        "BERT-base": (lambda: transformers.BertForSequenceClassification(bert), words),
        "ViT-B/16": (torchvision.models.vit_b_16, image(224)),
        "DETR-R50": (lambda: transformers.DetrForObjectDetection(detr), found),
        "resnet50": (torchvision.models.resnet50, image(224)),
    }
    return [Case(name, "full size", build, draw, 0) for name, (build, draw) in built.items()]


def passes(model: nn.Module, inputs: Any, dtype: torch.dtype) -> float:
    """Seconds of five forward and backward passes."""
    model, inputs = model.to(dtype).train(), cast(inputs, dtype)
    start = time.process_time()
    for _ in range(PASSES):
        outputs = [t for t in tensors(call(model, inputs)) if t.requires_grad]
        torch.autograd.backward([output.sum() for output in outputs])
        model.zero_grad()
    return time.process_time() - start


def timed(case: Case, runs: int) -> dict[str, Any]:
    """Medians of the times of one model, after one run that warms up."""
    inputs = case.draw(2)
    small = graphprune.rebuild(case.model(), 0.5, inputs)
    found: dict[str, list[float]] = {"verify": [], "float64": [], "float32": []}
    for _ in range(runs + 1):
        model = case.model()
        start = time.process_time()
        report = graphprune.verify(model, small, inputs)
        found["verify"].append(time.process_time() - start)
        for name in ("float64", "float32"):
            found[name].append(passes(case.model(), inputs, getattr(torch, name)))
    kind = "zeroes" if not small.graphprune_plan.evaluated else "followed"
    row = {name: statistics.median(seconds[1:]) for name, seconds in found.items()}
    return {"name": case.name, "kind": kind, "verdict": report.verdict, **row}


def cells(row: dict[str, Any]) -> list[str]:
    """One row as text."""
    numbers = [f"{row[name]:.2f}" for name in ("verify", "float64", "float32")]
    ratios = [f"{row['verify'] / row[name]:.1f}" for name in ("float64", "float32")]
    return [row["name"], row["kind"], row["verdict"], *numbers, *ratios]


def section(rows: list[dict[str, Any]]) -> str:
    """The part of docs/benchmarks.md that this script owns."""
    lines = [
        "## Verification\n",
        f"Processor seconds on {machine.describe()}, one thread, medians. *passes* are five",
        "forward and backward passes of the original in train mode, batch size 2. *reference*:",
        "whether zeroed parameters say what the masked model computes, or channels are followed",
        "while it runs. The last four are of the usual size; others are small, so that the time",
        "goes into Python. `examples/benchmarks/verification.py` prints this.\n",
        "| model | reference | verdict | verify | passes, float64 | float32 | times | times |",
        "|---|---|---|---:|---:|---:|---:|---:|",
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines)


def main() -> None:
    """Time the chosen models, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["*"], help="glob patterns of names")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{machine.describe()}; load {os.getloadavg()[0]:.1f}", flush=True)
    rows = []
    small = [c for suite, names in MODELS.items() for c in cases(suite) if c.name in names]
    for case in (*small, *full_size()):
        if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.models):
            rows.append(timed(case, options.runs))
            print("  ".join(cells(rows[-1])), flush=True)
    if options.write:
        machine.replace_section(options.write, "Verification", section(rows))


if __name__ == "__main__":
    main()
