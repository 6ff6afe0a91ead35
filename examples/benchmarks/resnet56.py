"""A trained ResNet-56 on real CIFAR-10 images: shrunk, verified, evaluated.

    python examples/benchmarks/resnet56.py --write docs/benchmarks.md

Needs the trained weights and the images of ``shared/data`` beside the repository.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import machine
import torch
from cifar_resnet import CifarResNet, accuracy, available, images, reestimate, trained

import graphprune

SIZE = 2048  # training images for the new BatchNorm statistics
SCOPES = ("local", "global")
STREAMS = ("conv1", "layer?.*.conv2")  # the layers that write the residual streams


@dataclass(frozen=True)
class Result:
    """One way of shrinking; accuracies in percent."""

    label: str
    params: float
    macs: float
    difference: float
    before: float
    after: float


def shrink(
    model: CifarResNet, label: str, ratio: float, scope: str, keep: tuple[str, ...]
) -> Result:
    """Shrink, verify in float64, evaluate as it is and with new BatchNorm statistics."""
    x, y = images("test")
    example = x[:1]
    plan = graphprune.trace(model, example).plan(ratio, scope=scope, keep=keep)
    small = graphprune.rebuild(model, plan)
    report = graphprune.verify(model, small, example)
    before = accuracy(small, x, y)
    reestimate(small, images("train")[0][:SIZE])
    return Result(
        f"{label}, {scope} {ratio}",
        plan.after.params / plan.before.params,
        plan.after.macs / plan.before.macs,
        report.difference,
        before,
        accuracy(small, x, y),
    )


def peer_outcome(model: CifarResNet, ratio: float) -> str:
    """What Torch-Pruning makes of the residual streams."""
    try:
        import torch_pruning
    except ImportError:
        return "not installed"
    victim = copy.deepcopy(model)
    example = torch.randn(1, 3, 32, 32)
    try:
        torch_pruning.pruner.BasePruner(
            victim,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[victim.linear],
        ).step()
        victim(example)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "runs"


def table(base: float, results: list[Result]) -> str:
    """The results as Markdown."""
    lines = [
        "| shrunk | parameters kept | MACs kept | float64 difference | accuracy, untouched "
        "| accuracy, BatchNorm re-estimated |",
        "|---|---:|---:|---:|---:|---:|",
        f"| original | 100 % | 100 % | | {base:.1f} % | |",
    ]
    for r in results:
        lines.append(
            f"| {r.label} | {100 * r.params:.1f} % | {100 * r.macs:.1f} % | {r.difference:.0e} "
            f"| {r.before:.1f} % | {r.after:.1f} % |"
        )
    return "\n".join(lines)


def section(shown: str, count: int, peer: str) -> str:
    """The part of docs/benchmarks.md that this script owns."""
    return f"""## A trained network on real images

ResNet-56 (He et al., 2015) trained on CIFAR-10, on the {count} lossless test images of the subset,
one shot, L2, without fine-tuning: as it comes out, and with BatchNorm statistics re-estimated on
{SIZE:,} training images. "with streams" removes channels of the residual streams as well, through
the padded shortcuts that have no parameters; "inner" keeps them
(`keep={list(STREAMS)}`).
Each result equals its masked original to the difference shown (outputs, gradients and buffers,
float64). `examples/benchmarks/resnet56.py` prints this.

{shown}

Removing half of the stream channels in one shot costs nearly all accuracy, unlike half of the inner
channels: without fine-tuning, `keep` the streams.

Torch-Pruning 1.6.1 with the residual streams, ratio 0.5, when the result is run:
`{peer}`."""


def main() -> int:
    """Run everything; ends in assertions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    options = parser.parse_args()
    if not available():
        print("skipped: no trained weights and images in shared/data beside the repository")
        return 0
    torch.set_num_threads(1)
    model = trained(56)
    x, y = images("test")
    base = accuracy(model, x, y)
    settings = [("with streams", ratio, scope, ()) for ratio in (0.3, 0.5) for scope in SCOPES]
    settings += [("inner", ratio, scope, STREAMS) for ratio in (0.3, 0.5) for scope in SCOPES]
    results = []
    for setting in settings:
        results.append(shrink(model, *setting))
        print(results[-1], flush=True)
    peer = peer_outcome(model, 0.5)
    shown = table(base, results)
    print(f"{shown}\npeer with streams: {peer}")
    if options.write:
        title = "A trained network on real images"
        machine.replace_section(options.write, title, section(shown, len(x), peer))
    by_label = {result.label: result for result in results}
    assert base > 90
    assert all(result.difference <= 1e-10 for result in results)
    assert by_label["with streams, local 0.5"].params < 0.27
    assert by_label["inner, local 0.3"].after > 85
    assert peer in ("not installed",) or "RuntimeError" in peer
    return 0


if __name__ == "__main__":
    sys.exit(main())
