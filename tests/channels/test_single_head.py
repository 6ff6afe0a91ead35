"""Attention of one head, whose channels leave one by one; its scale is then written."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune

CALLS = {
    "plain": lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "a float of its own": lambda self, q, k, v: F.scaled_dot_product_attention(
        q, k, v, dropout_p=self.drop if self.training else 0.0
    ),
    "its scale is given": lambda self, q, k, v: F.scaled_dot_product_attention(
        q, k, v, dropout_p=self.drop if self.training else 0.0, scale=0.3
    ),
    "by position": lambda self, q, k, v: F.scaled_dot_product_attention(
        q, k, v, None, self.drop if self.training else 0.0
    ),
}


class Modulated(nn.Module):
    """Single-head modulation attention over pixels (iFormer, 2025)."""

    def __init__(self, call):
        super().__init__()
        self.stem, self.out, self.drop = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), 0.0
        self.query, self.key = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.value, self.back, self.call = nn.Conv2d(16, 32, 1), nn.Conv2d(16, 16, 1), call

    def forward(self, x):
        h = self.stem(x)
        value, gate = self.value(h).sigmoid().chunk(2, dim=1)
        read = [each.flatten(2).mT[:, None] for each in (self.query(h), self.key(h), value)]
        read = self.call(self, *read).mT.reshape(*gate.shape)
        return self.out(self.back(read * gate))


@pytest.mark.parametrize("call", CALLS)
def test_its_channels_leave_however_it_is_called(call):
    torch.manual_seed(0)
    model, x = Modulated(CALLS[call]).eval(), torch.randn(1, 3, 6, 6)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.query.out_channels == small.key.out_channels == 4
    assert small.value.out_channels == 16
    assert graphprune.verify(model, small, x).verdict == "equal"
