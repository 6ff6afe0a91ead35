"""How the settings of the repair change what is left of ResNet-56: on held-out training images.

    python examples/benchmarks/refit.py --budget 0.7 --images 2048 4096 --sweeps 0 1

Prints the divergence of the small network's outputs from the original's (nats, on 1,000 training
images that nothing is chosen or fitted by) for every combination of settings. Needs the trained
weights and images of ``shared/data`` beside the repository.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings

import oneshot
import torch
from cifar_resnet import available, images, trained
from torch import Tensor, nn

import graphprune

HELD = 1000


def divergence(small: nn.Module, model: nn.Module, x: Tensor) -> float:
    """The mean divergence of the outputs of a small model from the original's."""
    with torch.inference_mode():
        wanted = torch.cat([model(part).log_softmax(1) for part in x.split(250)])
        found = torch.cat([small.eval()(part).log_softmax(1) for part in x.split(250)])
    return float((wanted.exp() * (wanted - found)).sum(1).mean())


def main() -> int:
    """Print one line for every combination of settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=0.5, help="of the MACs")
    parser.add_argument("--depth", type=int, default=56, choices=(20, 56))
    parser.add_argument("--images", type=int, nargs="+", default=[2048])
    parser.add_argument("--sweeps", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", type=int, nargs="+", default=[1 << 15])
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    options = parser.parse_args()
    if not available():
        print("skipped: no trained weights and images in shared/data beside the repository")
        return 0
    warnings.simplefilter("ignore")
    model, (x, y) = trained(options.depth), images("train")
    oneshot.images = lambda part: (x[:-HELD], y[:-HELD])  # all that follows sees no others
    plan = oneshot.plan_of(model, oneshot.BEST, options.budget)
    settings = options.images, options.batch, options.rows, options.sweeps
    for count, batch, rows, sweeps in itertools.product(*settings):
        small, start = graphprune.rebuild(model, plan), time.perf_counter()
        data = oneshot.calibration(count, batch)
        graphprune.calibrate(small, model, data, rows=rows, sweeps=sweeps)
        print(
            f"{sum(map(len, data))} images in batches of {batch}, rows={rows}, sweeps={sweeps}: "
            f"divergence {divergence(small, model, x[-HELD:]):.4f}, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
