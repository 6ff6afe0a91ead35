"""Small models and the training loop of a user, for tests of what happens in loops."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from graphprune.training import Pruner, cubic

X = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(16) % 3

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
    "sgd for each": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
}


class Residual(nn.Module):
    """A convolutional network with a residual stream and a gate."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(12)
        self.back = nn.Conv2d(12, 8, 1)
        self.gate = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.back(self.inner_norm(self.inner(x)).sigmoid())
        x = x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """A stream that layer norms read, and two layers of torch's own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layers(self.embed(x.squeeze(1))).mean(1))


def build(kind=Residual):
    torch.manual_seed(3)
    return kind().double()


def train(model, optimizer, pruner=None, steps=1, clip=0.05, after=lambda: None):
    """The user's own loop; the last loss stays alive while channels leave."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        after()
        if pruner is not None:
            pruner.step()
        losses.append(loss.detach())
    return torch.stack(losses), loss


def twin(model, optimizer):
    """A copy of a model and its optimizer, state included."""
    return copy.deepcopy((model, optimizer))


def masked(make, model=None, steps=6, **options):
    """A model in the soft phase, after some training."""
    model = build() if model is None else model
    optimizer = make(model.parameters())
    pruner = Pruner(model, X[:2], optimizer, schedule=cubic(0.5, end=6, frequency=2), **options)
    train(model, optimizer, pruner, steps)
    return model, optimizer, pruner


def assert_same_parameters(left, right):
    """Bitwise equality of all parameters, by name."""
    for (name, ours), theirs in zip(left.named_parameters(), right.parameters()):
        assert torch.equal(ours, theirs), name
