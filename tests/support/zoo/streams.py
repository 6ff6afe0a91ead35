"""Models around one awkward thing on a residual stream of tokens."""

import torch
from torch import nn

TOKENS = (2, 5, 6)  # two sequences of five tokens of six features
WIDTH = 12  # the residual stream
HEADS = 4


class Stream(nn.Module):
    """Linear layer, residual branch with the awkward thing, linear head on the mean.

    The channels of the stream can always be removed.
    """

    def __init__(self, thing, width=WIDTH, norm=None):
        super().__init__()
        self.inp, self.thing, self.head = nn.Linear(6, width), thing, nn.Linear(width, 4)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x):
        x = self.inp(x)
        return self.head((x + self.thing(self.norm(x))).mean(1))


def stream(thing, width=WIDTH, norm=None):
    """The thing on a residual stream, with parameters that are not constant."""
    return varied(Stream(thing, width, norm))


def plain(thing, into=WIDTH, out=None):
    """The thing between two layers, without a residual."""
    return varied(nn.Sequential(nn.Linear(6, into), nn.Tanh(), thing, nn.Linear(out or into, 4)))


def varied(model):
    """Draw parameters that are constant at first (zero biases, scales of one)."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter == parameter.reshape(-1)[0]).all():
            parameter.data.uniform_(0.5, 1.5)
    return model


def words(size=11, batch=2, length=5):
    """Token numbers."""
    return (torch.arange(batch * length).reshape(batch, length) * 7 % size,)
