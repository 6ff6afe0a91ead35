"""Layers that are moved together: closer than least squares alone, and what must stay."""

import copy
import importlib
import re

import pytest
import torch
from support.residual import KEEP, D, Residual, conv, error, settled, small_of
from torch import nn

import graphprune
from graphprune.calibration import calibrate
from graphprune.errors import InputError

joint = importlib.import_module("graphprune.calibration.joint")


def mlp_block():
    return nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 5)), torch.randn(48, 4), {}


def norm_block():
    net = settled(Residual(conv, nn.BatchNorm2d, nn.ReLU, inplace=True))
    return net, torch.randn(24, 4, 5, 5), {"keep": KEEP}


def hidden_norm():
    net = nn.Sequential(conv(4, 12), nn.BatchNorm2d(12), nn.ReLU(inplace=True), conv(12, 4))
    return settled(net), torch.randn(24, 4, 5, 5), {"keep": ("3",)}


def grouped():
    first, last = nn.Conv2d(4, 12, 1), nn.Conv2d(12, 6, 3, groups=2)
    return nn.Sequential(first, nn.SiLU(), last), torch.randn(24, 4, 5, 5), {"keep": ("2",)}


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
    return layer, torch.randn(24, 6, 8), {"keep": ["self_attn", "linear2", "norm1", "norm2"]}


def flat():
    net = nn.Sequential(nn.Conv2d(4, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 6))
    return net, torch.randn(200, 4, 5, 5), {}


BLOCKS = (mlp_block, norm_block, hidden_norm, grouped, transformer, flat)


@pytest.mark.parametrize("make", BLOCKS)
def test_layers_moved_together_come_closer(make):
    net, x, options = make()
    x = x.double()
    net, alone = small_of(net, x, **options)
    together = copy.deepcopy(alone)
    state = copy.deepcopy(net.state_dict())
    data = list(x.split(40))
    first, second = (
        calibrate(small, net, data, sweeps=sweeps) for small, sweeps in ((alone, 0), (together, 40))
    )
    assert error(together, net, x) < 0.97 * error(alone, net, x)
    assert [r.layer for r in first.refits] == [r.layer for r in second.refits]
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in together.parameters())


def test_the_report_holds_the_error_after_the_joint_refit():
    net, x, options = hidden_norm()
    net, small = small_of(net, x.double(), **options)
    data = list(x.double().split(5))  # the last batch is smaller
    (last,) = calibrate(small, net, data, sweeps=3, held_out=0).refits[-1:]
    variance = float(net(x.double()).var((0, 2, 3), correction=0).mean().detach())
    assert last.after == pytest.approx(error(small, net, x.double()) / variance, rel=1e-6)


def test_what_is_moved_together():
    """Weights, biases and norms in front of a layer that lost inputs; running statistics stay."""
    net, x, options = hidden_norm()
    net, alone = small_of(net, x.double(), **options)
    together = copy.deepcopy(alone)
    calibrate(alone, net, [x.double()])
    calibrate(together, net, [x.double()], sweeps=5)
    before = alone.state_dict()
    moved = {n for n, t in together.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"0.weight", "1.weight", "1.bias", "3.weight"}


def test_no_sweeps_is_least_squares_alone():
    net, x, options = norm_block()
    net, small = small_of(net, x.double(), **options)
    same, moved = copy.deepcopy(small), copy.deepcopy(small)
    calibrate(small, net, [x.double()], rows=100)
    calibrate(same, net, [x.double()], rows=100, sweeps=0)
    calibrate(moved, net, [x.double()], rows=100, sweeps=1)
    state, other = small.state_dict(), moved.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in same.state_dict().items())
    assert not torch.equal(other["a.weight"], state["a.weight"])


def test_a_joint_refit_is_deterministic():
    net, x, _ = mlp_block()
    net, small = small_of(net, x.double())
    made = [copy.deepcopy(small) for _ in range(3)]
    for one, seed in zip(made, (0, 0, 1)):
        calibrate(one, net, list(x.double().split(12)), sweeps=2, seed=seed)
    assert torch.equal(made[0][0].weight, made[1][0].weight)
    assert not torch.equal(made[0][0].weight, made[2][0].weight)


def test_what_does_not_help_is_put_back(monkeypatch):
    net, x, _ = mlp_block()
    net, alone = small_of(net, x.double())
    calibrate(alone, net, [x.double()])
    together = graphprune.rebuild(net, alone.graphprune_plan)
    for rate in (1e3, float("inf")):
        monkeypatch.setattr(joint, "RATE", rate)
        calibrate(together, net, [x.double()] * 2, sweeps=1)
        assert torch.equal(together[0].weight, alone[0].weight)
        together = graphprune.rebuild(net, alone.graphprune_plan)


class Tied(nn.Module):
    """A weight that runs twice makes the inputs of the last layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) * torch.sigmoid(self.first(x + 1)))


class Elsewhere(Tied):
    """The inputs of the last layer are outputs as well."""

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(x), x.mean(1)


class Cut(Tied):
    """An op without a derivative."""

    def forward(self, x):
        return self.last((torch.tanh(self.first(x)) > 0).to(x.dtype))


@pytest.mark.parametrize("make", [Tied, Elsewhere, Cut])
def test_what_cannot_be_moved_together_is_left_alone(make):
    x = torch.randn(40, 4, dtype=D)
    net, alone = small_of(make(), x)
    together = copy.deepcopy(alone)
    calibrate(alone, net, [x], ridge=1e-3)
    report = calibrate(together, net, [x], ridge=1e-3, sweeps=20)
    state = alone.state_dict()
    assert alone.first.out_features < 12
    assert report.changed == ("last",)
    assert all(torch.equal(t, state[name]) for name, t in together.state_dict().items())


class SharedNorm(Tied):
    """One norm behind two layers."""

    def __init__(self):
        super().__init__()
        self.other, self.norm = nn.Linear(4, 12), nn.BatchNorm1d(12)

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x))) + self.norm(self.other(x)).relu()
        return self.last(x)


def test_a_norm_that_runs_twice_is_not_moved():
    x = torch.randn(40, 4, dtype=D)
    net, alone = small_of(SharedNorm(), x)
    together = copy.deepcopy(alone)
    calibrate(alone, net, [x])
    calibrate(together, net, [x], sweeps=5)
    assert not torch.equal(together.first.weight, alone.first.weight)
    assert torch.equal(together.norm.weight, alone.norm.weight)
    assert torch.equal(together.norm.bias, alone.norm.bias)


def test_half_precision_is_not_moved_together():
    net, x, _ = mlp_block()
    net = net.bfloat16()
    alone = graphprune.rebuild(net, 0.5, x[:1].bfloat16())
    together = copy.deepcopy(alone)
    calibrate(alone, net, [x.bfloat16()])
    calibrate(together, net, [x.bfloat16()], sweeps=5)
    assert torch.equal(alone[0].weight, together[0].weight)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sweeps": -1}, "sweeps must be an int of at least 0, such as 1; got -1"),
        ({"sweeps": 1.0}, "sweeps must be an int of at least 0, such as 1; got 1.0"),
        ({"sweeps": True}, "sweeps must be an int of at least 0, such as 1; got True"),
        ({"sweeps": 2, "method": "bias"}, 'sweeps=2 goes with method="repair" alone'),
    ],
)
def test_wrong_arguments(options, text):
    net, x, _ = mlp_block()
    small = graphprune.rebuild(net, 0.5)
    with pytest.raises(InputError, match=re.escape(text)):
        calibrate(small, net, [x], **options)
