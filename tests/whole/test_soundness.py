"""Spellings that once gave a wrong small model: each is either followed or frozen, never wrong."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune


class Net(nn.Module):
    """Two convolutions with something awkward between them."""

    def __init__(self, function, **layers):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.head, self.index, self.function = nn.Linear(8, 5), 5, function
        self.more = nn.ModuleDict(layers)

    def forward(self, x):
        return self.head(self.second(self.function(self, self.first(x))).mean((2, 3)))


def set_by_index(net, y):
    y = y.clone()
    y[:, 3] = 0.5
    return y


def sampled(net, y):
    grid = torch.tanh(net.more["flow"](y)).permute(0, 2, 3, 1)
    return F.grid_sample(y, grid, align_corners=False)


def tokens(net, y):
    return net.more["norm"](y.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (8, 8))


def nothing(net, y):
    """A layer that no sample of the example inputs reaches."""
    rows = y[y.sum((1, 2, 3)) > 1e6]
    return y + net.more["own"](rows.flip(2)).sum(0)


CASES = {
    "slice of one channel": (lambda net, y: y * y[:, 5:6], {}),
    "channel by index": (lambda net, y: y + y[:, 5][:, None], {}),
    "narrow": (lambda net, y: y * y.narrow(1, 5, 1), {}),
    "slice from the end": (lambda net, y: y * y[:, -2:-1], {}),
    "channel by attribute": (lambda net, y: y * y[:, net.index : net.index + 1], {}),
    "channel set by index": (set_by_index, {}),
    "square root of a width": (lambda net, y: y / math.sqrt(y.shape[1]), {}),
    "remainder of a width": (lambda net, y: y * 2 if not y.shape[1] % 16 else y, {}),
    "sampling grid": (sampled, {"flow": lambda: nn.Conv2d(16, 2, 1)}),
    "mean over everything": (lambda net, y: y - y.mean(), {}),
    "function of a weight": (
        lambda net, y: F.conv2d(torch.sigmoid(y), net.more["own"].weight.exp()),
        {"own": lambda: nn.Conv2d(16, 16, 1)},
    ),
    "mask as index": (lambda net, y: y * y[y > 0].sum(), {}),
    "mean by number of elements": (
        lambda net, y: y + y.flatten(1).sum(1)[:, None, None, None] / (y.numel() / y.shape[0]),
        {},
    ),
    "batch norm over positions": (tokens, {"norm": lambda: nn.BatchNorm1d(64)}),
    "pointwise inside vmap": (lambda net, y: y + torch.vmap(torch.sin, 1, 1)(y), {}),
    "layer inside vmap": (
        lambda net, y: torch.vmap(net.more["own"])(y.transpose(1, 3)).transpose(1, 3),
        {"own": lambda: nn.Linear(16, 16)},
    ),
    "width that a layer remembers": (
        lambda net, y: y / math.sqrt(net.first.out_channels) + 1 / net.second.in_channels,
        {},
    ),
    "nothing selected": (nothing, {"own": lambda: nn.Conv2d(16, 16, 1)}),
    "smallest magnitude": (lambda net, y: y * y.norm(p=-math.inf, dim=1, keepdim=True), {}),
}


@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
@pytest.mark.parametrize("name", CASES)
def test_small_equals_masked(name):
    torch.manual_seed(0)
    function, layers = CASES[name]
    model = Net(function, **{key: make() for key, make in layers.items()}).eval()
    x = torch.randn(2, 3, 8, 8)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.second.out_channels == 4
    assert graphprune.verify(model, small, x).difference <= 1e-10


def test_an_index_moves_with_its_channel():
    """The one channel that is named stays, and is found at its new place."""
    torch.manual_seed(0)
    model, x = Net(CASES["slice of one channel"][0]).eval(), torch.randn(2, 3, 8, 8)
    graph = graphprune.trace(model, x)
    group = graph.group_of("first")
    plan = graph.plan_of({group.name: range(group.size - 4, group.size)})
    kept = next(slot.kept for slot in plan.slots if slot.tensor == "first.weight")
    assert 5 in kept
    assert kept.index(5) != 5
    small = graphprune.rebuild(model, plan)
    with torch.no_grad():
        gone = [channel for channel in range(16) if channel not in kept]
        model.second.weight[:, gone] = 0  # a reference made by hand
    assert torch.allclose(small(x), model(x), atol=1e-6)


def test_inside_inference_mode_all_is_as_outside():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    wanted = graphprune.rebuild(model, 0.5, x)
    with torch.inference_mode():
        small = graphprune.rebuild(model, 0.5, x)
        graphprune.verify(model, small, x)
    assert small.graphprune_plan.slots == wanted.graphprune_plan.slots
    small(x).sum().backward()


@pytest.mark.parametrize("keep", ["0", ()])
def test_the_reference_of_a_weight_normalised_layer_is_finite(keep):
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(8, 3, 1))
    x = torch.randn(2, 1, 8, 8)
    plan = graphprune.trace(model, x).plan(0.5, keep=keep)
    assert graphprune.mask(model, plan)(x).isfinite().all()
    graphprune.verify(model, graphprune.rebuild(model, plan), x)
