"""Accuracy without training where weights are sparse, masked or computed from others."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import graphprune
from graphprune.calibration import calibrate, sums
from graphprune.training import make_permanent, sparsify, sparsity_of

D = torch.float64
X = torch.randn(200, 6, dtype=D, generator=torch.Generator().manual_seed(3))


def mlp():
    torch.manual_seed(0)
    layers = nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    return nn.Sequential(*layers).double().eval()


def error(small, net, x=X):
    with torch.no_grad():
        return float((small(x) - net(x)).square().mean())


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_sparse_model_stays_sparse(pattern, sweeps):
    net = mlp()
    small = graphprune.rebuild(net, 0.25, X[:1])
    sparsify(small, **({"pattern": pattern} if pattern else {"sparsity": 0.6}))
    make_permanent(small)
    zeroes = {name: tensor == 0 for name, tensor in small.named_parameters() if tensor.dim() > 1}
    before, fraction = error(small, net), sparsity_of(small).fraction
    calibrate(small, net, list(X.split(50)), sweeps=sweeps)
    assert sparsity_of(small).fraction == fraction > 0.3
    assert all(torch.equal(small.get_parameter(name) == 0, zero) for name, zero in zeroes.items())
    assert error(small, net) < 0.5 * before


@pytest.mark.parametrize("bias", [True, False])
def test_among_sparse_weights_it_is_the_best(bias):
    """At the refitted last layer, the error has no slope along any weight that is not zero."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5, bias=bias)).double()
    small = graphprune.rebuild(net, 0.25, X[:1])
    sparsify(small, 0.5)
    make_permanent(small)
    free = small[2].weight != 0
    assert 0.3 < float(free.double().mean()) < 0.7
    calibrate(small, net, [X], ridge=0.0, held_out=0)
    gap = (small(X) - net(X).detach()).square().sum()
    gradients = torch.autograd.grad(gap, [small[2].weight, *([small[2].bias] if bias else [])])
    assert float(gradients[0][free].abs().max()) < 1e-6 * float(gap.detach())
    assert not bias or float(gradients[1].abs().max()) < 1e-6 * float(gap.detach())


@pytest.mark.parametrize("masked", ["small", "both"])
def test_masked_weights_are_refitted_under_their_masks(masked):
    """The result is that of the same zeroes without masks; what is masked stays as it was."""
    pairs = []
    for permanent in (True, False):
        net = mlp()
        if masked == "both":
            prune.custom_from_mask(net[2], "weight", torch.arange(256.0).reshape(16, 16) % 3 > 0)
        if permanent and masked == "both":
            make_permanent(net)
        small = graphprune.rebuild(net, 0.25, X[:1])
        if masked == "small":
            sparsify(small, 0.5)
        if permanent and masked == "small":
            make_permanent(small)
        pairs.append((small, net))
    (plain, plain_net), (small, net) = pairs
    wanted = calibrate(plain, plain_net, [X], held_out=0)
    before, original = copy.deepcopy(small.state_dict()), copy.deepcopy(net.state_dict())
    report = calibrate(small, net, [X], held_out=0)
    assert prune.is_pruned(small)
    assert report.changed == wanted.changed
    assert "2" in report.changed
    assert torch.allclose(small[2].weight, plain[2].weight, rtol=1e-9)
    assert torch.allclose(small(X), plain(X), rtol=1e-9)
    mask = small[2].weight_mask
    assert torch.equal(small[2].weight_orig[mask == 0], before["2.weight_orig"][mask == 0])
    assert not torch.equal(small[2].weight_orig[mask == 1], before["2.weight_orig"][mask == 1])
    assert all(torch.equal(net.state_dict()[name], t) for name, t in original.items())


def test_a_small_model_without_the_masks_of_its_original():
    net = mlp()
    prune.random_unstructured(net[2], "weight", 0.3)
    small = graphprune.rebuild(net, 0.25, X[:1])
    make_permanent(small)
    before = error(small, net)
    assert calibrate(small, net, [X]).changed == ("2", "4")
    assert error(small, net) < before


class Twice(nn.Module):
    """A weight with two masks, or one that is also read without its mask."""

    def __init__(self, raw):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("one", (torch.rand(16, 16) < 0.7).float())
        self.register_buffer("two", (torch.rand(16, 16) < 0.7).float())
        self.raw = raw

    def forward(self, x):
        x = self.first(x).relu()
        weight = self.weight * self.one
        if self.raw:
            return self.last(F.linear(x, weight) + F.linear(x, self.weight))
        return self.last(F.linear(x, weight * self.two).relu())


@pytest.mark.parametrize("raw", [True, False])
def test_masks_of_other_kinds_are_left_alone(raw):
    torch.manual_seed(0)
    net = Twice(raw).double().eval()
    small = graphprune.rebuild(net, 0.25, X[:1])
    before, weight = error(small, net), small.weight.detach().clone()
    report = calibrate(small, net, [X], held_out=0)
    assert torch.equal(small.weight, weight)
    assert report.changed == ("last",)
    assert error(small, net) < before


def test_masked_biases_are_left_alone():
    net = mlp()
    for layer in (net[2], net[4]):
        prune.l1_unstructured(layer, "bias", 0.5)
    small = graphprune.rebuild(net, 0.25, X[:1])
    before, biases = error(small, net), [small[n].bias_orig.detach().clone() for n in (2, 4)]
    report = calibrate(small, net, [X], held_out=0)
    assert all(torch.equal(small[n].bias_orig, b) for n, b in zip((2, 4), biases))
    assert error(small, net) < 0.5 * before
    shown = report.refits[-1].after * float(net(X).var(0, correction=0).mean().detach())
    assert error(small, net) == pytest.approx(shown, rel=1e-3), "the report tells what is there"


def test_computed_weights_are_in_the_report():
    net = mlp()
    parametrizations.weight_norm(net[2])
    small = graphprune.rebuild(net, 0.25, X[:1])
    report = calibrate(small, net, [X], held_out=0)
    notes = {refit.layer: refit.note for refit in report.refits}
    assert notes == {"0": "equal already", "2": "its weight is computed", "4": ""}
    assert "its weight is computed" in str(report)


@pytest.mark.parametrize("columns", ["aligned", "free"])
def test_grouped_transposed_convolutions(columns):
    torch.manual_seed(2)
    layers = (
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )
    net = nn.Sequential(*layers).double().eval()
    x = torch.randn(8, 3, 8, 8, dtype=D)
    small = graphprune.rebuild(net, 0.3, x[:1], columns=columns)
    before = error(small, net, x)
    report = calibrate(small, net, [x], ridge=0.0, held_out=0)
    assert report.changed == ("2", "4")
    assert error(small, net, x) < before
    kept = next(s.kept for s in small.graphprune_plan.slots if (s.tensor, s.dim) == ("2.weight", 1))
    each = torch.tensor(kept).reshape(-1, small[2].out_channels // 2) % 4
    wanted = net[:3](x).detach().unflatten(1, (2, 4))
    wanted = torch.cat([wanted[:, group, each[group % len(each)]] for group in (0, 1)], 1)
    gap = (small[:3](x) - wanted).square().sum()
    (slope,) = torch.autograd.grad(gap, [small[2].weight])
    assert float(slope.abs().max()) < 1e-6 * float(gap.detach())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("largest", [-1, 1 << 25])
def test_rows_with_zeroes_by_hand(monkeypatch, share, largest):
    """Few zeroes of a row are corrected for, many are left to gradients: both are exact."""
    monkeypatch.setattr(sums, "_LARGEST", largest)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(3, 40, 12, generator=generator).double()
    matrix = inputs.mT @ inputs / 40
    wanted = torch.randn(3, 7, 12, generator=generator).double()
    free = torch.rand(3, 7, 12, generator=generator) >= share
    free[1, 2:] = True  # rows without any
    found = sums._solve_where(matrix, wanted, free)
    for group in range(3):
        for row in range(7):
            places = free[group, row].nonzero()[:, 0]
            part = matrix[group][places][:, places]
            alone = torch.zeros(12).double()
            alone[places] = torch.linalg.solve(part, wanted[group, row, places])
            torch.testing.assert_close(found[group, row], alone, rtol=1e-6, atol=1e-6)
