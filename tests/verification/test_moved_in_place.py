"""Ops that make another tensor of the one they are given: in a user's code, and in torch's."""

import pytest
import torch
from torch import nn

import graphprune

MOVES = {
    "transpose_": lambda h: h.transpose_(1, 2).transpose_(1, 2),
    "swapaxes_": lambda h: h.swapaxes_(0, 1).swapaxes_(0, 1),
    "unsqueeze_": lambda h: h.unsqueeze_(1).squeeze_(1),
    "t_": lambda h: h.sum(1).t_().t_()[:, None],
    "as it is": lambda h: h,
}


class Net(nn.Module):
    """A norm whose statistics change, and behind it a layer that turns its result around."""

    def __init__(self, kind, move):
        super().__init__()
        self.wide, self.norm, self.move = nn.Linear(6, 24), nn.LayerNorm(24), move
        self.layer = kind(24, 20, batch_first=True)
        self.out = nn.Linear(20, 3)

    def forward(self, x):
        h = self.move(self.norm(self.wide(x)).mul(1.0))
        return self.out(self.layer(h)[0].mean(1))


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN], ids=lambda kind: kind.__name__)
def test_it_is_followed_behind_statistics_that_change(kind, move):
    torch.manual_seed(0)
    model, x = Net(kind, MOVES[move]).double().eval(), torch.randn(2, 7, 6, dtype=torch.float64)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.wide.out_features == 12
    report = graphprune.verify(model, small, x)
    assert report.verdict == "equal", report
    assert report.difference < 1e-10
