"""Remove, learn from the original, evaluate, and again: rounds that stop where accuracy would."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.training import Distillation, iterate

FASHION = Path("/usr/share/datasets/fashion-mnist")


def load(part: str, count: int) -> tuple[Tensor, Tensor]:
    """Images [count, 1, side, side] and labels; of Fashion-MNIST at half its resolution."""
    if not FASHION.is_dir():
        print("no Fashion-MNIST (apt-get install dataset-fashion-mnist): scikit-learn's digits")
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        rows = slice(None, 1300) if part == "train" else slice(1300, None)
        return images[rows], torch.tensor(digits.target)[rows]
    with gzip.open(FASHION / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(16 + count * 784), np.uint8, offset=16)
    with gzip.open(FASHION / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    return F.avg_pool2d(images, 2), torch.tensor(labels, dtype=torch.int64)


(train_x, train_y), (test_x, test_y) = load("train", 2000), load("t10k", 1000)


def fit(model: nn.Module, loss_of: object, epochs: int, rate: float) -> Iterator[Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(train_x)).split(100):
            optimizer.zero_grad()
            loss = loss_of(model, (train_x[rows], train_y[rows]))
            loss.backward()
            optimizer.step()
            yield loss


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    return float((model(test_x).argmax(1) == test_y).float().mean())


torch.manual_seed(0)
net = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
)
list(fit(net, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), 5, 5e-3))
distil = Distillation(net, temperature=4, alpha=0.7, features=["5"])  # the second norm
floor = accuracy(net.eval()) - 0.1
with tempfile.TemporaryDirectory() as folder:  # a folder that stays resumes after a crash
    outcome = iterate(
        net,
        rounds=3,
        train=lambda model: fit(model, distil, 2, 5e-3),
        evaluate=accuracy,
        sparsity=0.8,
        quantity="macs",
        example_inputs=test_x[:1],
        folder=folder,
        floor=floor,
    )
print(outcome)
assert accuracy(outcome.model.eval()) >= floor
assert outcome.plan.after.macs < 0.6 * outcome.plan.before.macs
