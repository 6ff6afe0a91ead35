"""The smallest model that loses at most so much, and what it loses on images never looked at.

    python examples/benchmarks/smallest.py --write docs/benchmarks.md

Needs the trained weights and the images of ``shared/data`` beside the repository. The images that
no network was trained on (5,000, as JPEG) are halved: a search looks at one half, the other is
looked at once for every model that was found. Models are chosen and repaired with training images.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import machine
import torch
from cifar_resnet import jpeg_available, jpeg_images, trained
from oneshot import answers, interval
from torch import Tensor

import graphprune

TITLE = "The smallest model that loses at most a point"
ALLOWED = (0.03, 0.02, 0.01)  # one search goes on from the one before
CALIBRATION = 512


@dataclass(frozen=True)
class Row:
    """A search: the share of the MACs, the drop and its bound, and the drop on other images."""

    allowed: float
    macs: float
    drop: float
    most: float
    other: tuple[float, float, float]
    evaluations: int
    seconds: float


def rows(depth: int, seed: int, half: int) -> list[Row]:
    """Searches for all drops allowed, on one half of the images."""
    x, y = jpeg_images("test")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    seen, unseen = order[:half], order[half : 2 * half]
    model = trained(depth)
    data = list(jpeg_images("train", CALIBRATION)[0].split(64))

    def right(network: torch.nn.Module, which: Tensor = seen) -> Tensor:
        return answers(network, x[which]) == y[which]

    found, before = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for allowed in ALLOWED:
            start = time.process_time()
            result = graphprune.smallest(
                model, right, data, allowed, evaluations=before + 5, path=Path(folder) / "search"
            )
            spent = time.process_time() - start
            print(result, flush=True)
            new, before = len(result.curve) - before, len(result.curve)
            tried = result.chosen
            if tried is None:
                continue
            lost = right(model, unseen).double() - right(result.model, unseen).double()
            drops = 100 * tried.drop, 100 * (tried.most or 0.0)
            row = Row(allowed, tried.reached, *drops, interval(lost), new, spent)
            print(row, flush=True)
            found.append(row)
    return found


def section(found: dict[tuple[int, int], list[Row]], half: int) -> str:
    """The Markdown of all searches."""
    lines = [
        "| network, split | allowed | MACs kept | lost where the search looked | at most, 95 % | "
        "lost on other images (95 % interval) | evaluations | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (depth, seed), several in found.items():
        for r in several:
            mean, low, high = r.other
            lines.append(
                f"| ResNet-{depth}, {seed} | {100 * r.allowed:.1f} | {100 * r.macs:.1f} % | "
                f"{r.drop:.2f} | {r.most:.2f} | {mean:.2f} ({low:.2f} to {high:.2f}) | "
                f"{r.evaluations} | {r.seconds:.0f} |"
            )
    table = "\n".join(lines)
    kept = [r.other[0] <= r.most for several in found.values() for r in several]
    return f"""## {TITLE}

`graphprune.smallest` on ResNets trained on CIFAR-10, all defaults, in points of the share of right
answers: {half:,} images that the networks were not trained on say which model is good enough, by
the bound of its drop; {half:,} others, which nothing was chosen by, say what it then loses. Chosen
and repaired with {CALIBRATION} training images without labels. Images are JPEG, on which these
networks are right less often than on lossless ones. Each row goes on from the file of the row
before (`path=`); seconds of processor time are those that it added
(`examples/benchmarks/smallest.py`).

{table}

On the other images {sum(kept)} of {len(kept)} models lose at most what the bound says
(rows share images). A drop measured there has chance of its own beside that of the bound, and a
search takes the smallest model that passes: figures to be relied on are those of the other images.
Measured on {machine.describe()}.
"""


def main() -> int:
    """Print the rows, and write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page with the section")
    parser.add_argument("--depths", type=int, nargs="+", default=[20])
    parser.add_argument("--splits", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--half", type=int, default=2500)
    options = parser.parse_args()
    if not jpeg_available():
        print("skipped: the weights and images of shared/data are not here")
        return 0
    found = {
        (depth, seed): rows(depth, seed, options.half)
        for depth in options.depths
        for seed in options.splits
    }
    text = section(found, options.half)
    print(text)
    if options.write:
        machine.replace_section(options.write, TITLE, text)
    assert all(r.most <= 100 * r.allowed for several in found.values() for r in several)
    return 0


if __name__ == "__main__":
    sys.exit(main())
