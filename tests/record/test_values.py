"""Tensors that a forward makes of numbers and of other tensors."""

import pytest
import torch
from torch import nn

import graphprune


class Grid(nn.Module):
    """Features, scaled by the size of the image as a tensor of numbers."""

    def __init__(self, make):
        super().__init__()
        self.conv, self.head, self.make = nn.Conv2d(3, 8, 1), nn.Linear(8, 2), make

    def forward(self, x):
        y = self.conv(x)
        return self.head((y * self.make(y)).mean((2, 3)))


MAKERS = {
    "tensor": lambda y: torch.tensor([*y.shape[2:]], device=y.device).sum(),
    "as_tensor": lambda y: torch.as_tensor(y.shape[2:], dtype=y.dtype, device=y.device).mean(),
    "new_tensor": lambda y: y.new_tensor([[y.shape[2], 2.0]]).amax(),
    "from a tensor": lambda y: torch.as_tensor(y, device=y.device),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_tensors_of_numbers_are_constants(make):
    model, x = Grid(make).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    graph = graphprune.trace(model, x)
    assert [group.size for group in graph.groups] == [8]
    assert graphprune.verify(model, graph.plan(0.5), x).difference <= 1e-10
