"""Random numbers in a forward, and parts of it that run once more in the backward."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import graphprune
from graphprune.errors import VerificationError


class Base(nn.Module):
    """What leaves changes the statistics of a norm."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def tail(self, h):
        return self.b(self.norm(h))


def verdict(model, x=None):
    torch.manual_seed(0)
    x = torch.randn(4, 6) if x is None else x
    small = graphprune.rebuild(model.eval(), 0.5, x)
    assert small.a.out_features == 8
    return small, graphprune.verify(model, small, x)


FILLED = {
    "exponential": lambda h: torch.empty_like(h).exponential_(),
    "geometric": lambda h: torch.empty_like(h).geometric_(0.5),
    "cauchy": lambda h: torch.empty_like(h).cauchy_(),
    "log normal": lambda h: torch.empty_like(h).log_normal_(),
    "whole numbers": lambda h: torch.empty_like(h).random_(1, 7),
    "like": lambda h: torch.randint_like(h, 3) + torch.poisson(torch.ones_like(h)),
    "around": lambda h: torch.normal(h.detach(), 1.0) + torch.normal(0.0, 1.0, tuple(h.shape)),
    "shares": lambda h: torch.empty_like(h).bernoulli_(h.detach().sigmoid()),
}


@pytest.mark.parametrize("name", FILLED)
def test_numbers_drawn_in_shapes_that_shrink(name):
    class Noisy(Base):
        def forward(self, x):
            h = self.a(x)
            return self.tail(h * (1 + FILLED[name](h)))

    _, report = verdict(Noisy())
    assert report.verdict == "equal"
    assert all(check.decided for check in report.checks)


class Scaled(Base):
    """A number that is drawn after as many as there are channels."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        h = self.a(x)
        return self.tail(torch.sigmoid(h)) * torch.tensor(self.draw(h.shape[1]))


def test_numbers_of_numpy_and_random_are_the_same_where_as_many_are_drawn():
    for draw in (lambda width: float(np.random.rand()), lambda width: random.random()):
        assert verdict(Scaled(draw))[1].verdict == "equal"


@pytest.mark.parametrize(
    "draw",
    [
        lambda width: [np.random.rand(width), np.random.rand()][1],
        lambda width: [[random.random() for _ in range(width)], random.random()][1],
    ],
)
@pytest.mark.filterwarnings("ignore:verify could not decide")
def test_other_amounts_of_numbers_are_not_decided(draw):
    _, report = verdict(Scaled(draw))
    assert report.verdict == "not decided"
    assert "numpy, or of random" in report.reason


class Checkpointed(Base):
    def __init__(self, reentrant, noise=0.0):
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.reentrant, self.noise = reentrant, noise

    def inner(self, x):
        h = torch.sigmoid(self.a(x))
        h = h * (1 + self.noise * torch.rand_like(h)) if self.noise else h
        return self.tail(F.dropout(h, 0.5, self.training))

    def forward(self, x):
        return checkpoint(self.inner, self.stem(x), use_reentrant=self.reentrant)


class Nested(Checkpointed):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_checkpointed_parts_run_once_more_as_they_ran_before(reentrant, noise):
    _, report = verdict(Checkpointed(reentrant, noise))
    assert report.verdict == "equal"
    assert all(check.decided for check in report.checks)
    assert sum(check.name.startswith("gradients") for check in report.checks) == 2


def test_checkpointed_parts_in_checkpointed_parts():
    _, report = verdict(Nested(True))
    assert all(check.decided for check in report.checks)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_wrong_weight_in_a_checkpointed_part_is_found(reentrant):
    model = Checkpointed(reentrant)
    small, _ = verdict(model)
    with torch.no_grad():
        small.b.weight[:, [0, 1]] = small.b.weight[:, [1, 0]]
    with pytest.raises(VerificationError):
        graphprune.verify(model, small, torch.randn(4, 6))


def test_a_group_norm_without_places_keeps_two_channels_of_a_group():
    """Of one alone, the result would be the bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GroupNorm(2, 16), nn.Linear(16, 3)).eval()
    x = torch.randn(4, 6)
    small = graphprune.rebuild(model, 0.9, x)
    assert small[1].num_channels == 4
    assert float(small(x).detach().std(0).min()) > 1e-3
    image = nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(2, 16), nn.Conv2d(16, 3, 1)).eval()
    assert graphprune.rebuild(image, 0.9, torch.randn(2, 3, 4, 4))[1].num_channels == 2
