"""Ops that leave channels apart lose them, and those that do not keep them: whole small models."""

import pytest
import torch
import torchvision
from support.zoo import randomise
from torch import nn
from torch.nn import functional as F

import graphprune

WIDTH = 12


class Around(nn.Module):
    """An op between a layer that makes channels and one that reads them."""

    def __init__(self, op, read=WIDTH, maps=False):
        super().__init__()
        self.make = nn.Conv2d(3, WIDTH, 1) if maps else nn.Linear(3, WIDTH)
        self.read, self.op = nn.Linear(read, 2), op

    def forward(self, x):
        return self.read(self.op(self.make(x)))


def first(result):
    return result[0]


MAPS = {  # of [batch, channels, height, width] to [batch, channels]
    "median": lambda y: first(y.flatten(2).median(2)),
    "median of all places": lambda y: torch.stack([p.flatten(1).median(1)[0] for p in y]),
    "nanmedian": lambda y: first(y.flatten(2).nanmedian(2)),
    "kthvalue": lambda y: first(y.flatten(2).kthvalue(3, 2)),
    "mode": lambda y: first(y.flatten(2).mode(2)),
    "aminmax": lambda y: sum(y.flatten(2).aminmax(dim=2)),
    "cummax": lambda y: first(y.cummax(2)).mean((2, 3)),
    "cummin": lambda y: first(y.cummin(3)).mean((2, 3)),
    "logcumsumexp": lambda y: y.logcumsumexp(2).mean((2, 3)),
    "rot90": lambda y: y.rot90(1, (2, 3))[..., 0, 1],
    "tril": lambda y: y.tril().mean((2, 3)),
    "triu": lambda y: y.triu(1).mean((2, 3)),
    "fractional pool": lambda y: F.max_pool2d(y, 3, 1, 1).mean((2, 3)),
    "unfold over places": lambda y: y.unfold(2, 2, 1).mean((2, 3, 4)),
}

TOKENS = {  # of [batch, tokens, channels] to [batch, tokens, read], and what reads it
    "one of two": (lambda y: y[..., ::2].sigmoid() * y[..., 1::2], WIDTH // 2),
    "one of three": (lambda y: y[..., 2::3] + y[..., ::3], WIDTH // 3),
    "average pool along tokens": (lambda y: F.avg_pool2d(y[:, None], (2, 1), (2, 1))[:, 0], WIDTH),
    "maximum pool along tokens": (lambda y: F.max_pool2d(y[:, None], (2, 1), (1, 1))[:, 0], WIDTH),
    "windows side by side": (lambda y: y.unfold(2, 3, 3).mean(-1), WIDTH // 3),
    "square of a channel": (lambda y: torch.einsum("btc,bsc->bts", y, y) @ y, WIDTH),
    "triangular system": (
        lambda y: torch.linalg.solve_triangular(
            (y @ y.mT / 50).tril(-1), y, upper=False, unitriangular=True
        ),
        WIDTH,
    ),
}


def pruned(model, x):
    """The group of the channels, after a small model was made and verified."""
    model = randomise(model).eval()
    small = graphprune.rebuild(model, 0.5, x)
    assert graphprune.verify(model, small, x).difference <= 1e-10
    return small


@pytest.mark.parametrize("name", MAPS)
def test_maps_lose_channels(name):
    small = pruned(Around(MAPS[name], maps=True), torch.randn(2, 3, 6, 6))
    assert small.make.out_channels == WIDTH // 2


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_lose_channels(name):
    op, read = TOKENS[name]
    small = pruned(Around(op, read), torch.randn(2, 4, 3))
    assert small.make.out_features == WIDTH // 2
    assert small.read.in_features == read // 2


KEPT = {
    "half of a matrix": (lambda y: y.tril(), WIDTH),
    "overlapping windows": (lambda y: y.unfold(2, 4, 2).flatten(2), 20),
    "strides that end within a block": (lambda y: y[..., 1:8:3], 3),
    "pool over channels": (lambda y: F.avg_pool2d(y[:, None], (1, 2))[:, 0], WIDTH // 2),
    "pool with padding along channels": (
        lambda y: F.max_pool2d(y[:, None], (2, 1), (1, 1), (0, 0))[:, 0].cummax(2)[0], WIDTH,
    ),
    "running maximum over channels": (lambda y: y.cummax(2)[0], WIDTH),
    "rank among channels": (lambda y: y.kthvalue(3, 2, keepdim=True)[0].expand_as(y), WIDTH),
    "system whose unknowns are channels": (
        lambda y: torch.linalg.solve_triangular(
            torch.eye(WIDTH).to(y), y.mT, upper=True
        ).mT,
        WIDTH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_channels_that_depend_on_each_other_stay(name):
    op, read = KEPT[name]
    graph = graphprune.trace(randomise(Around(op, read)).eval(), torch.randn(2, 4, 3))
    assert graph.group_of("make").frozen


class Deformable(nn.Module):
    def __init__(self, mask, offset_groups=1):
        super().__init__()
        self.make = nn.Conv2d(3, 8, 3, padding=1)
        self.offset = nn.Conv2d(8, 18 * offset_groups, 3, padding=1)
        self.mask = nn.Conv2d(8, 9 * offset_groups, 3, padding=1) if mask else None
        self.deform = torchvision.ops.DeformConv2d(8, 6, 3, padding=1)
        self.read = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        y = self.make(x).relu()
        mask = None if self.mask is None else self.mask(y).sigmoid()
        return self.read(self.deform(y, self.offset(y), mask).relu())


@pytest.mark.filterwarnings("ignore:7 of .. channels were removed")
@pytest.mark.parametrize("mask", [False, True])
def test_deformable_convolutions_lose_channels_on_both_sides(mask):
    small = pruned(Deformable(mask), torch.randn(1, 3, 7, 7))
    assert (small.make.out_channels, small.deform.out_channels) == (4, 3)
    assert small.offset.out_channels == 18


def test_channels_read_at_places_of_their_own_stay():
    graph = graphprune.trace(Deformable(True, offset_groups=2).eval(), torch.randn(1, 3, 7, 7))
    assert graph.group_of("make").frozen
    assert not graph.group_of("deform").frozen


def test_multiply_accumulates_of_ops_that_were_forgotten():
    x = torch.randn(2, 3, 4)
    lstm = nn.LSTM(4, 5)
    assert graphprune.measure(lstm, x, latency=False).macs == 2 * 3 * 4 * 5 * (4 + 5)

    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, x):
            return self.lstm(x * 2 if x.sum().item() > 1e9 else x)

    assert graphprune.measure(Reading(), x, latency=False).macs == 2 * 3 * 4 * 5 * (4 + 5)
    pair = torch.randn(3, 4), torch.randn(3, 6)
    bilinear = nn.Bilinear(4, 6, 5)
    assert graphprune.measure(bilinear, pair, latency=False).macs == 3 * 4 * 6 * 5


def test_an_op_whose_cost_nobody_declared_is_named():
    class Distances(nn.Module):
        def forward(self, x):
            return x.renorm(2, 0, 1.0)

    measured = graphprune.measure(Distances(), torch.randn(3, 4), latency=False)
    assert measured.left_out == ("aten.renorm.default",)
    assert "without aten.renorm.default" in str(measured)
    known = graphprune.measure(nn.Linear(4, 2), torch.randn(3, 4), latency=False)
    assert known.left_out == ()
    assert "without" not in str(known)
