"""Places of channels that no number in the code is known to be: a run of the small model shows."""

import warnings

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import InputError


def gate(x, cond, width):
    """The gated unit of WaveGlow and VITS: the width is in a tensor."""
    n = width[0]
    x = x + cond
    return torch.tanh(x[:, :n, :]) * torch.sigmoid(x[:, n:, :])


def halves(x):
    n = x.shape[1] // 2
    return x[:, :n] * torch.sigmoid(x[:, n:])


def eights(x):
    return x[:, :8] * torch.sigmoid(x[:, 8:])


def scripted(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripts are deprecated, and in use
        return torch.jit.script(function)


class Gates(nn.Module):
    """Layers of one width with skips: ``conditions`` are parts of one projection."""

    def __init__(self, function, conditioned, width=16, layers=3):
        super().__init__()
        self.gate, self.width = function, width
        self.start, self.end = nn.Conv1d(6, width, 1), nn.Conv1d(width, 4, 1)
        self.cond = nn.Conv1d(6, 2 * width * layers, 1) if conditioned else None
        self.inner = nn.ModuleList(nn.Conv1d(width, 2 * width, 3, padding=1) for _ in range(layers))
        self.outer = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(layers))

    def forward(self, x):
        cond = None if self.cond is None else self.cond(x)
        x, width = self.start(x), torch.IntTensor([self.width])
        skips = torch.zeros_like(x)
        for i, (inner, outer) in enumerate(zip(self.inner, self.outer)):
            first, h = i * 2 * self.width, inner(x)
            part = torch.zeros_like(h)
            if cond is not None:
                part = cond[:, first : first + 2 * self.width, :]
            h = outer(self.gate(h, part, width))
            x, skips = x + h[:, : self.width, :], skips + h[:, self.width :, :]
        return self.end(x + skips)


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("script", [False, True])
def test_widths_in_tensors_follow_the_attribute_that_they_are_made_of(script, conditioned):
    torch.manual_seed(0)
    function = scripted(gate) if script else gate
    model, x = Gates(function, conditioned).eval(), torch.randn(2, 6, 10)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.width == 8
    assert {layer.out_channels for layer in (*small.inner, *small.outer)} == {16}
    assert graphprune.verify(model, small, x).verdict == "equal"
    assert small(torch.randn(3, 6, 7)).shape == (3, 4, 7)


class Around(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.function, self.second = nn.Linear(6, 16), function, nn.Linear(8, 3)

    def forward(self, x):
        return self.second(self.function(self.first(x)))


def test_places_computed_inside_a_scripted_function_follow_shapes():
    torch.manual_seed(0)
    model, x = Around(scripted(halves)).eval(), torch.randn(4, 6)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.first.out_features == 8
    assert graphprune.verify(model, small, x).verdict == "equal"


def test_places_that_stand_in_a_scripted_function_stay():
    with pytest.raises(InputError, match="size 8 cannot be changed"):
        graphprune.rebuild(Around(scripted(eights)).eval(), 0.5, torch.randn(4, 6))


class Apart(nn.Module):
    """The first channels go one way: how many, a tensor says that nothing changes."""

    def __init__(self, start):
        super().__init__()
        self.start, self.first = start, nn.Linear(6, 24)
        self.one, self.other = nn.Linear(8, 3), nn.Linear(16, 3)

    def forward(self, x):
        x, n = self.first(x), torch.IntTensor([8])[0]
        return self.one(x[:, self.start : n]) + self.other(x[:, n:])


@pytest.mark.parametrize("start", [None, 0])
def test_a_constant_that_is_a_place_stays_although_its_value_is_read(start):
    """A run that fails behind values is no proof, unless they are the same in both models."""
    torch.manual_seed(0)
    model, x = Apart(start).eval(), torch.randn(4, 6)
    small = graphprune.rebuild(model, 0.5, x)
    assert (small.one.in_features, small.other.in_features) == (8, 8)
    assert graphprune.verify(model, small, x).verdict == "equal"
