"""Network slimming: L1 on the scales of batch norms while training, then small scales leave."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.training import Slimming

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1, bias=False),
        *(nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Conv2d(24, 48, 3, padding=1, bias=False),
        *(nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(48, 10),
    )
    for norm in (net[1], net[5]):
        nn.init.constant_(norm.weight, 0.5)  # as in the paper
    return net


def fit(net: nn.Module, strength: float, epochs: int = 12) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    slimming = Slimming(graphprune.trace(net, images[:2]), strength)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            slimming.add_gradients()
            optimizer.step()
        rate.step()


def accuracy(net: nn.Module) -> float:
    with torch.no_grad():
        return float((net.eval()(images[test]).argmax(1) == labels[test]).float().mean())


drops = {}
for strength in (0.0, 0.02):
    net = network()
    fit(net.train(), strength)
    small = graphprune.rebuild(net, 0.3, images[:2], criterion="bn_scale", scope="global")
    scales = torch.cat([net[1].weight, net[5].weight]).detach().abs()
    drops[strength] = accuracy(net) - accuracy(small)
    print(
        f"strength {strength:g}: {(scales < 0.05).sum()} of {len(scales)} scales below 0.05, "
        f"accuracy {accuracy(net):.1%}, with 30 % of the channels gone {accuracy(small):.1%}"
    )

assert drops[0.02] < 0.05, "what slimming drives to zero can leave"
assert drops[0.0] > drops[0.02] + 0.2
