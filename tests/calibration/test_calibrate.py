"""Accuracy without training: what a refit must reach, exactly, and what it must leave alone."""

import copy
import re

import pytest
import torch
from support.residual import KEEP, D, Residual, conv, error, linear, settled, small_of
from torch import nn

import graphprune
from graphprune.calibration import calibrate, repair
from graphprune.errors import InputError, PlanError

# --- exact cases --------------------------------------------------------------------------------


def test_duplicate_channels_are_taken_over_exactly():
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias):
            tensor[3:] = 2 * tensor[:3]  # ReLU keeps the factor
    x = torch.randn(50, 5, dtype=D)
    graph = graphprune.trace(net, x[:1])
    small = graphprune.rebuild(net, graph.plan_of({"g0": (0, 1, 5)}))
    before = error(small, net, x)
    report = calibrate(small, net, [x], ridge=1e-12, held_out=0)
    assert error(small, net, x) < 1e-18 < before
    assert report.changed == ("2",)
    assert torch.allclose(small[2].weight[:, :2], net[2].weight[:, :2] + 2 * net[2].weight[:, 3:5])


def test_the_refit_is_the_ridge_regression():
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(40, 5, dtype=D)
    net, small = small_of(net, x)
    start = copy.deepcopy(small)
    calibrate(small, net, [x[:25], x[25:]], ridge=0.1, held_out=0)
    with torch.no_grad():
        hidden = torch.tanh(start[0](x))
        gap = net(x) - start(x)
        centred, wanted = hidden - hidden.mean(0), gap - gap.mean(0)
        moment = centred.T @ centred / len(x)
        level = 0.1 * moment.diagonal().mean() * torch.eye(4, dtype=D)
        change = torch.linalg.solve(moment + level, centred.T @ wanted / len(x)).T
    assert torch.allclose(small[2].weight, start[2].weight + change, atol=1e-12)
    shift = gap.mean(0) - change @ hidden.mean(0)
    assert torch.allclose(small[2].bias, start[2].bias + shift, atol=1e-12)


def test_errors_that_a_shortcut_carries_are_made_up_for():
    x = torch.randn(60, 4, dtype=D)
    net, small = small_of(Residual(linear), x, keep=KEEP)
    report = calibrate(small, net, [x], ridge=1e-13, held_out=0)
    (first,) = [refit for refit in report.refits if refit.layer == "b"]
    assert first.after > 1e-4  # three of six channels cannot carry everything
    assert error(small, net, x) < 1e-14  # all is linear: the second block gives the rest back


@pytest.mark.parametrize("inplace", [False, True])
def test_behind_a_norm_in_place_and_with_a_convolution(inplace):
    x = torch.randn(40, 4, 5, 5, dtype=D)
    net = settled(Residual(conv, nn.BatchNorm2d, nn.ReLU, inplace))
    net, small = small_of(net, x, keep=KEEP)
    before = error(small, net, x)
    report = calibrate(small, net, list(x.split(16)), ridge=1e-9, held_out=0)
    assert error(small, net, x) < 0.6 * before
    last = report.refits[-1]
    variance = float(net(x).var((0, 2, 3), correction=0).mean().detach())
    assert last.layer == "d"
    assert last.after == pytest.approx(error(small, net, x) / variance, rel=1e-6)


# --- every kind of layer ------------------------------------------------------------------------

LAYERS = {
    "strided": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(8, 6, 3, padding=2, dilation=2),
    "no bias": lambda: nn.Conv2d(8, 6, 3, bias=False),
    "same": lambda: nn.Conv2d(8, 6, (3, 1), padding="same"),
    "grouped": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 16, 3, groups=8, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1),
    "pointwise": lambda: nn.Sequential(nn.Conv2d(8, 6, 1), nn.Flatten()),
    "flat": lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 49, 5)),
    "last": lambda: nn.Sequential(nn.Conv2d(8, 8, 1, groups=8), nn.Flatten(2), nn.Linear(49, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_is_left_to_gain_in_any_layer(kind):
    """Without ridge the gradient of the squared error vanishes: the refit is the best one."""
    x = torch.randn(400 if kind in ("flat", "last") else 40, 3, 7, 7, dtype=D)
    first = nn.Conv2d(3, 8, 3, padding=1)
    net, small = small_of(nn.Sequential(first, nn.Conv2d(8, 8, 1), nn.ReLU(), LAYERS[kind]()), x)
    out = net(x).detach()
    same = small(x).shape == out.shape
    before = error(small, net, x) if same else 0.0
    report = calibrate(small, net, [x], ridge=1e-12, held_out=0)
    assert report.changed, report
    last = report.refits[-1].layer
    weight = small.get_parameter(f"{last}.weight")
    gap = small(x) - (out if same else kept_outputs(small, out))
    (gradient,) = torch.autograd.grad(gap.square().mean(), weight)
    assert float(gradient.abs().max()) < 1e-8
    if same:
        assert float(gap.detach().square().mean()) < before


def kept_outputs(small, out):
    (kept,) = {s.kept for s in small.graphprune_plan.slots if s.size == out.shape[1]}
    return out[:, list(kept)]


class Flipped(nn.Module):
    """Weights stored as [in, out], as in GPT-2."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 8))
        self.down = nn.Parameter(torch.randn(8, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return torch.addmm(self.bias, torch.relu(x @ self.up), self.down)


def test_weights_stored_the_other_way_round():
    x = torch.randn(40, 5, dtype=D)
    net, small = small_of(Flipped(), x)
    before = error(small, net, x)
    calibrate(small, net, [x], ridge=1e-12, held_out=0)
    loss = (small(x) - net(x).detach()).square().mean()
    assert float(loss.detach()) < before
    for gradient in torch.autograd.grad(loss, [small.down, small.bias]):
        assert float(gradient.abs().max()) < 1e-9


def test_a_transformer_layer():
    x = torch.randn(16, 6, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    small = graphprune.rebuild(layer, 0.5, x[:1], keep=["self_attn", "linear2", "norm1", "norm2"])
    before = error(small, layer, x)
    report = calibrate(small, layer, list(x.split(8)))
    assert "linear2" in report.changed
    assert error(small, layer, x) < 0.9 * before


@pytest.mark.parametrize("ridge", [1e-3, None])
@pytest.mark.parametrize(
    "last", [nn.Linear(16, 3), nn.Conv1d(16, 3, 3), nn.Conv1d(16, 3, 1, bias=False)]
)
def test_wide_layers_are_refitted_from_products_of_rows(monkeypatch, last, ridge):
    """The same regression, solved the other way round."""
    spatial = isinstance(last, nn.Conv1d)
    x = torch.randn(40, 6, 9, dtype=D) if spatial else torch.randn(200, 6, dtype=D)
    first = nn.Conv1d(6, 16, 3) if spatial else nn.Linear(6, 16)
    net, small = small_of(nn.Sequential(first, nn.Tanh(), last), x, criterion="random")
    other, start = copy.deepcopy(small), error(small, net, x)
    plain = calibrate(other, net, list(x.split(20)), ridge=ridge)
    monkeypatch.setattr(repair, "WIDEST", 3)
    monkeypatch.setattr(repair, "BLOCK", 4)
    wide = calibrate(small, net, list(x.split(20)), ridge=ridge)
    assert error(small, net, x) < 0.9 * start
    torch.testing.assert_close(small[2].weight, other[2].weight)
    for one, two in zip(plain.refits[1:], wide.refits[1:]):
        assert one.ridge == two.ridge
        assert (one.after, one.held) == pytest.approx((two.after, two.held))


# --- the other methods --------------------------------------------------------------------------


def test_bias_correction_matches_the_means():
    x = torch.randn(30, 5, dtype=D)
    net, small = small_of(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), x)
    weight = small[2].weight.detach().clone()
    calibrate(small, net, [x], method="bias")
    assert torch.allclose(small(x).mean(0), net(x).mean(0), atol=1e-12)
    assert torch.equal(small[2].weight, weight)


def test_batchnorm_statistics_are_those_of_the_data():
    x = torch.randn(40, 3, 6, 6, dtype=D)
    norm = nn.BatchNorm2d(8, momentum=1.0)
    layers = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1), norm, nn.Dropout(0.5), nn.Conv2d(8, 2, 1)
    net = nn.Sequential(*layers).double()
    net(x)  # its statistics are those of the data
    net, small = small_of(net, x, keep=["1"])
    small[2].running_mean.add_(3)  # whatever made them wrong
    report = calibrate(small, net, list(x.split(20)), method="batchnorm")
    with torch.no_grad():
        read = [small[:2](part) for part in x.split(20)]
    assert report.changed == ("2",)
    assert report.after < report.before
    assert torch.allclose(small[2].running_mean, torch.cat(read).mean((0, 2, 3)))
    variance = torch.stack([part.var((0, 2, 3)) for part in read]).mean(0)
    assert torch.allclose(small[2].running_var, variance)
    assert small[2].momentum == 1.0
    assert not any(module.training for module in small.modules())
    assert int(small[2].num_batches_tracked) == int(net[2].num_batches_tracked)


def test_a_repaired_model_can_be_trained_on():
    """BatchNorm gets the statistics of what it reads: train and eval mode agree."""
    x = torch.randn(20, 4, 6, 6, dtype=D)
    net = settled(Residual(conv, nn.BatchNorm2d, nn.ReLU))
    net, small = small_of(net, x, keep=KEEP)
    calibrate(small, net, [x])
    with torch.no_grad():
        eval_mode = small(x)
        train_mode = small.train()(x)
    gap = (eval_mode - train_mode).square().mean() / eval_mode.var()
    assert float(gap) < 1e-5  # running variances are unbiased


# --- what stays as it is ------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Linear(4, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.twice(torch.relu(self.twice(x)))))


def test_a_weight_used_twice_is_left_alone():
    x = torch.randn(30, 4, dtype=D)
    net, small = small_of(Shared(), x)
    weight = small.twice.weight.detach().clone()
    report = calibrate(small, net, [x])
    assert torch.equal(small.twice.weight, weight)
    assert report.changed == ("last",)


def test_only_the_small_model_changes_and_only_its_weights():
    x = torch.randn(12, 4, 5, 5)
    net = settled(Residual(conv, nn.BatchNorm2d, nn.ReLU)).train()
    net.c.eval()
    small = graphprune.rebuild(net, 0.5, x[:1], keep=KEEP)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    shapes = {name: t.shape for name, t in small.state_dict().items()}
    random = torch.get_rng_state()
    calibrate(small, net, [x])
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    assert {name: t.shape for name, t in small.state_dict().items()} == shapes
    assert torch.equal(torch.get_rng_state(), random)
    for model in (net, small):
        assert [m.training for m in model.modules()] == [m.training for m in net.modules()]
        assert not net.c.training
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())


def test_nothing_to_repair_changes_nothing():
    x = torch.randn(10, 4, dtype=D)
    net, small = small_of(Shared(), x, ratio=0.0)
    before = {name: t.clone() for name, t in small.state_dict().items()}
    report = calibrate(small, net, [x])
    assert report.changed == ()
    notes = {refit.layer: refit.note for refit in report.refits}
    assert notes.pop("twice") == "its weight is used elsewhere, too"
    assert set(notes.values()) == {"equal already"}
    assert all(torch.equal(t, before[name]) for name, t in small.state_dict().items())


def test_sampled_places_and_batches_of_two_shapes_are_deterministic():
    x = torch.randn(7, 4, 6, 6)
    net = settled(Residual(conv, nn.BatchNorm2d, nn.ReLU)).eval()
    made = []
    for seed in (0, 0, 1):
        small = graphprune.rebuild(net, 0.5, x[:1], keep=KEEP)
        calibrate(small, net, list(x.split(4)), rows=100, seed=seed)
        made.append(small(x))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_half_precision():
    x = torch.randn(64, 6).bfloat16()
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).bfloat16()
    small = graphprune.rebuild(net, 0.5, x[:1])
    before = error(small, net, x)
    calibrate(small, net, [x])
    assert small[2].weight.dtype == torch.bfloat16
    assert error(small, net, x) < before


# --- wrong arguments ----------------------------------------------------------------------------


class Peeking(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(x * 2 if float(x.sum()) > 0 else x)


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"method": "magic"}, InputError, "unknown method 'magic'; choose one of repair, bias"),
        ({"ridge": -1}, InputError, "ridge must be a number of at least 0"),
        ({"rows": 0}, InputError, "rows must be a positive int"),
        ({"data": []}, InputError, "no batches"),
        ({"data": torch.zeros(2, 4)}, InputError, "pass [batch]"),
        ({"data": [torch.zeros(2, 5)]}, InputError, "does not run on a batch float32[2, 5]"),
        ({"small": mlp()}, InputError, "small must be a model made by rebuild"),
        ({"model": nn.Linear(4, 2)}, PlanError, "another architecture"),
        ({"method": "batchnorm"}, InputError, "no BatchNorm with running statistics"),
    ],
)
def test_wrong_arguments(change, kind, text):
    net = mlp()
    given = {"small": graphprune.rebuild(net, 0.5), "model": net, "data": [torch.randn(9, 4)]}
    given |= change
    with pytest.raises(kind, match=re.escape(text)) as info:
        calibrate(**given)
    assert isinstance(info.value, graphprune.errors.GraphPruneError)


def test_a_forward_that_reads_values():
    """Each batch takes its own branch, and is repaired as that."""
    x = torch.randn(64, 4, dtype=D)
    data = [x[:32].abs(), -x[32:].abs()]  # twice as much, and not
    net, small = small_of(Peeking(), data[0])
    before = [error(small, net, part) for part in data]
    report = calibrate(small, net, data)
    assert report.changed == ("b",)
    assert all(error(small, net, part) < worst for part, worst in zip(data, before))


def test_the_report_names_every_layer():
    x = torch.randn(30, 4, dtype=D)
    net, small = small_of(mlp(), x)
    text = str(calibrate(small, net, [x]))
    assert 'method "repair": 1 of 2 layers changed' in text
    assert "equal already" in text
