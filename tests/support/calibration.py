"""A network with every kind of reading layer, and batches to calibrate it on."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.criteria import gather, scores


class Residual(nn.Module):
    """A stream with two writers and several readers, grouped and depthwise convolutions inside."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.inner = nn.Sequential(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU())
        self.back = nn.Conv2d(12, 8, 3)
        self.grouped = nn.Conv2d(8, 6, 3, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 5, 2)
        self.head = nn.Linear(5 * 4 * 4, 7)
        self.last = nn.Linear(7, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x[:, :, 1:-1, 1:-1] + self.back(self.depthwise(self.inner(x))))
        x = F.relu(self.up(F.relu(self.norm(self.grouped(x)))))
        return self.last(F.relu(self.head(F.adaptive_max_pool2d(x, 4).flatten(1))))


def residual():
    torch.manual_seed(3)
    net = Residual().double().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() == 1:  # all channels are on for some input
                parameter.uniform_(0.5, 1.5) if "weight" in name else parameter.uniform_(0.3, 0.6)
    return net


def image_batches(count=3, size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count * size, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (count * size,), generator=generator)
    return [(x, y) for x, y in zip(images.split(size), labels.split(size))]


def scored(net, criterion, data, inputs, loss=None, aggregate=None):
    """The graph on some inputs, and the scores of its groups."""
    graph = graphprune.trace(net, inputs)
    found = gather(net, criterion, graph.groups, data, loss)
    return graph, scores(criterion, graph.groups, found, 0, aggregate)
