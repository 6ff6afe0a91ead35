"""Accuracy without training: half of the MACs leave, and least squares repair what is left."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import graphprune

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]

torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(1, 24, 3, padding=1, bias=False),
    *(nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)),
    nn.Conv2d(24, 48, 3, padding=1, bias=False),
    *(nn.BatchNorm2d(48), nn.ReLU()),
    nn.Conv2d(48, 48, 3, padding=1, bias=False),
    *(nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    nn.Linear(48, 10),
)


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model.eval()(images[test]).argmax(1) == labels[test]).float().mean())


optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
for _ in range(12):
    for rows in train[torch.randperm(len(train))].split(50):
        optimizer.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    rate.step()
net.eval()

batches = list(images[train].split(200))  # no labels
graph = graphprune.trace(net, images[:1])
table: dict[float, list[float]] = {}
print(f"original {accuracy(net):.1%}\n\nMACs    as is  BatchNorm  repair")
for target in (0.5, 0.25):
    plan = graph.plan(
        criterion="reconstruction", data=batches, scope="global", target={"macs": target}
    )
    table[target] = []
    for method in (None, "batchnorm", "repair"):
        small = graphprune.rebuild(net, plan)
        if method is not None:
            graphprune.calibrate(small, net, batches, method=method)
        table[target].append(accuracy(small))
    share = plan.after.macs / plan.before.macs
    print("{:5.1%} {:7.1%} {:10.1%} {:7.1%}".format(share, *table[target]))
    assert share <= target

for as_is, _, repair in table.values():
    assert as_is < repair
    assert repair > accuracy(net) - 0.1
