"""``verify`` is able to fail: a rewrite with one mistake is caught, and the place is named."""

import pytest
import torch
from support.zoo import randomise
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import VerificationError

X = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    """A residual stream, an inner width, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.back, self.head = nn.Conv2d(10, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = F.silu(self.norm(self.stem(x)))
        x = x + self.back(F.silu(self.inner_norm(self.inner(x))))
        return self.head(F.silu(x).mean((2, 3)))


@pytest.fixture
def pair():
    """The original and a correct small model."""
    model = randomise(Net()).eval()
    small = graphprune.rebuild(model, 0.5, X)
    assert graphprune.verify(model, small, X).difference < 1e-10
    return model, small


def kept(small, tensor, dim=0):
    return next(s for s in small.graphprune_plan.slots if (s.tensor, s.dim) == (tensor, dim))


def caught(pair, place):
    model, small = pair
    with pytest.raises(VerificationError, match="differ") as error:
        graphprune.verify(model, small, X)
    assert f"'{place}" in str(error.value), str(error.value)


@torch.no_grad()
def test_one_wrong_index_of_a_writer(pair):
    model, small = pair
    slot = kept(small, "inner.weight")
    wrong = next(i for i in range(slot.size) if i not in slot.kept)
    into = list(kept(small, "inner.weight", 1).kept)
    small.inner.weight[1] = model.inner.weight[wrong][into]
    caught(pair, "inner'")


@torch.no_grad()
def test_one_wrong_index_of_a_reader(pair):
    model, small = pair
    slot = kept(small, "head.weight", 1)
    wrong = next(i for i in range(slot.size) if i not in slot.kept)
    small.head.weight[:, 0] = model.head.weight[:, wrong]
    caught(pair, "head'")


@torch.no_grad()
def test_two_channels_swapped_in_one_consumer(pair):
    weight = pair[1].back.weight
    weight[:, [0, 1]] = weight[:, [1, 0]]
    caught(pair, "back'")


@torch.no_grad()
@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_one_stale_running_statistic(pair, buffer):
    model, small = pair
    slot = kept(small, f"inner_norm.{buffer}")
    wrong = next(i for i in range(slot.size) if i not in slot.kept)
    getattr(small.inner_norm, buffer)[2] = getattr(model.inner_norm, buffer)[wrong]
    caught(pair, "inner_norm'")


@torch.no_grad()
@pytest.mark.parametrize("layer", ["stem", "inner", "back", "head"])
def test_one_wrong_bias(pair, layer):
    getattr(pair[1], layer).bias[0] += 1e-6
    caught(pair, f"{layer}'")


@torch.no_grad()
def test_one_wrong_affine_weight(pair):
    pair[1].norm.weight[3] *= 1 + 1e-6
    caught(pair, "norm'")


def test_another_momentum(pair):
    """Only a step in train mode shows it: the buffer is named."""
    pair[1].norm.momentum = 0.2
    caught(pair, "norm.running_mean'")


def test_a_detached_branch(pair):
    """Outputs agree, gradients do not: the parameter is named."""
    small = pair[1]
    small.inner.register_forward_hook(lambda module, args, out: out.detach())
    caught(pair, "inner.")


def test_another_output_shape(pair):
    model, small = pair
    small.head = nn.Linear(4, 3)
    with pytest.raises(VerificationError, match=r"output shapes \[\[2, 3\]\]"):
        graphprune.verify(model, small, X)


def test_a_model_that_does_not_run(pair):
    model, small = pair
    small.head = nn.Linear(5, 4)
    with pytest.raises(VerificationError, match="RuntimeError: "):
        graphprune.verify(model, small, X)


def test_lower_precision_catches_too(pair):
    model, small = pair
    with torch.no_grad():
        small.back.bias[0] += 0.1
    with pytest.raises(VerificationError, match="'back' "):
        graphprune.verify(model, small, X, dtype=torch.float32)
