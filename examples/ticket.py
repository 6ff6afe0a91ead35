"""Lottery tickets on scikit-learn's digits: of filters and of single weights, with controls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.training import RewindPoint, lottery

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train_rows, test_rows = order[:1400], order[1400:]
EARLY, END = 30, 150  # steps: where weights are rewound to, and how long is trained


def train(model: nn.Module, step: int, end: int = END) -> Iterator[Tensor]:
    """From a step to the end, with the learning rates of these steps."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rates = torch.linspace(3e-3, 3e-4, END)
    for number in range(step, end):
        optimizer.param_groups[0]["lr"] = float(rates[number])
        rows = train_rows[torch.randperm(len(train_rows))[:100]]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        yield loss


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    return float((model(images[test_rows]).argmax(1) == labels[test_rows]).float().mean())


torch.manual_seed(0)
net = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
)
for _ in train(net, 0, EARLY):
    pass
point = RewindPoint(net, step=EARLY)  # early in training, as the paper does

setup = {"rounds": 2, "example_inputs": images[:1]}
filters = lottery(point, train, accuracy, sparsity=0.75, kind="filters", **setup)
print(f"three of four filters gone\n{filters}\n")
weights = lottery(point, train, accuracy, sparsity=0.85, kind="weights", **setup)
print(f"85 % of all weights gone\n{weights}")

assert filters.ticket[0].out_channels == 4
assert weights.accuracy["ticket"] > weights.accuracy["random mask"]
assert weights.accuracy["ticket"] > weights.accuracy["whole"] - 0.2
