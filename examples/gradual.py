"""Gradual pruning in a plain training loop: masked while training, removed, and trained on."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from graphprune.training import Pruner, cubic

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]

net = nn.Sequential(
    nn.Conv2d(1, 24, 3, padding=1, bias=False),
    *(nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)),
    nn.Conv2d(24, 48, 3, padding=1, bias=False),
    *(nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    nn.Linear(48, 10),
)


def accuracy(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        hits = (model(images[test]).argmax(1) == labels[test]).float().mean()
    model.train()
    return float(hits)


epochs, batch = 12, 100
steps = epochs * len(train) // batch
optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))

schedule = cubic(0.5, begin=steps // 4, end=steps // 2, frequency=5)
pruner = Pruner(
    net, images[:2], optimizer, schedule=schedule, copies=average, finish_at=2 * steps // 3
)
print(schedule)
before = sum(p.numel() for p in net.parameters())

for epoch in range(epochs):
    for rows in train[torch.randperm(len(train))].split(batch):
        optimizer.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
        rate.step()
        average.update_parameters(net)
        pruner.step()  # the one line that is new
    widths = f"{net[0].out_channels} and {net[4].out_channels} channels"
    print(f"epoch {epoch:2}: sparsity {pruner.sparsity:5.1%}, {widths}, {accuracy(net):.1%}")

torch.optim.swa_utils.update_bn([images[train]], average)
after = sum(p.numel() for p in net.parameters())
print(f"{before:,} -> {after:,} parameters, moving average {accuracy(average):.1%}")
assert (net[0].out_channels, net[4].out_channels) == (12, 24)
assert after < 0.3 * before
assert min(accuracy(net), accuracy(average)) > 0.5
