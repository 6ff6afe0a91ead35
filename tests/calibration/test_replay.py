"""Recorded graphs run op by op, for several batches at once."""

import torch
from torch import nn

from graphprune.calibration.replay import Replay
from graphprune.record.batches import Batch


class Scaled(nn.Linear):
    def forward(self, x, by):
        return super().forward(x) * by


def test_batches_of_one_shape_may_differ_in_numbers():
    net, x = Scaled(4, 2), torch.randn(3, 4)
    replay = Replay(net, [Batch((x, by), {}, ()) for by in (1.0, 3.0)])
    last = len(replay.reference) - 2
    for which, by in enumerate((1.0, 3.0)):
        assert replay.advance(which, last)
        assert torch.equal(replay.value(which, last), net(x, by))
