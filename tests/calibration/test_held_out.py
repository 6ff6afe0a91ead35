"""Calibration never makes a model worse: what is not seen decides, and the report says so."""

import copy

import pytest
import torch
from support.residual import D, error, small_of
from torch import nn

import graphprune
from graphprune.calibration import calibrate, refit
from graphprune.calibration.items import Folds, set_apart
from graphprune.calibration.memory import rooms
from graphprune.calibration.replay import Replay
from graphprune.ranks import Ranks
from graphprune.record.batches import Batch


def wide(inputs=6, hidden=200):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 5))


@pytest.mark.parametrize("split", [40, 10, 1])
def test_fewer_items_than_inputs(split):
    """A hundred inputs fitted to forty rows: the rows would be met exactly, and nothing else."""
    x, fresh = torch.randn(40, 6, dtype=D), torch.randn(500, 6, dtype=D)
    net, small = small_of(wide(), x)
    exact, before = copy.deepcopy(small), error(small, net, fresh)
    report = calibrate(small, net, list(x.split(split)))
    assert error(small, net, fresh) < before
    last = report.refits[-1]
    assert last.held < last.before
    assert last.held > 2 * last.after, "what was seen says little"
    held = calibrate(exact, net, list(x.split(split)), ridge=1e-9).refits[-1]
    assert held.note or held.held >= last.held, "the chosen ridge is the better one"


def test_rows_of_an_item_are_not_independent():
    """Four hundred rows, but of eight items that repeat themselves."""
    net = wide()
    few = torch.randn(16, 1, 6, dtype=D)
    x, fresh = few.expand(16, 50, 6).contiguous(), torch.randn(500, 6, dtype=D)
    net, small = small_of(net, x)
    before = error(small, net, fresh)
    calibrate(small, net, [x])
    assert error(small, net, fresh) <= before


def test_noise_is_not_fitted():
    """The original adds what no input of the layer tells."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 40), nn.Linear(40, 5)

        def forward(self, x, noise):
            return self.last(torch.relu(self.first(x))) + noise

    x = torch.randn(48, 6, dtype=D)
    net = Noisy().double().eval()
    small = graphprune.rebuild(net, 0.5, (x, torch.zeros(48, 5, dtype=D)))
    fresh, still = torch.randn(500, 6, dtype=D), torch.zeros(500, 5, dtype=D)

    def gap():
        with torch.no_grad():
            return float((small(fresh, still) - net(fresh, still)).square().mean())

    before = gap()
    calibrate(small, net, [((x, 3 * torch.randn(48, 5, dtype=D)),)])
    assert gap() <= before


@pytest.mark.parametrize("method", ["repair", "bias"])
@pytest.mark.parametrize("good", [0, 1])
def test_what_makes_the_outputs_worse_is_undone(monkeypatch, method, good):
    x = torch.randn(64, 6, dtype=D)
    layers = nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)
    net, small = small_of(nn.Sequential(*layers), x)
    state = copy.deepcopy(small.state_dict())

    def changed():
        return sum(not torch.equal(t, state[n]) for n, t in small.state_dict().items())

    most = good * (2 if method == "repair" else 1)
    monkeypatch.setattr(refit, "distance", lambda *_: 1.0 if changed() <= most else 2.0)
    report = calibrate(small, net, [x], method=method)
    assert len(report.changed) == good
    assert changed() == most
    assert (report.before, report.after) == (1.0, 1.0)
    assert "undone: the outputs had become worse" in str(report)


def test_what_fails_leaves_the_model_as_it_was(monkeypatch):
    x = torch.randn(64, 6, dtype=D)
    net, small = small_of(wide(), x)
    state = copy.deepcopy(small.state_dict())

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Replay, "settle", stopped)
    with pytest.raises(KeyboardInterrupt):
        calibrate(small, net, [x])
    assert all(torch.equal(t, state[name]) for name, t in small.state_dict().items())


def test_the_time_is_bounded():
    x = torch.randn(64, 6, dtype=D)
    net, small = small_of(wide(), x)
    report = calibrate(small, net, [x], seconds=1e-9)
    assert report.changed == ()
    assert {refit.note for refit in report.refits} == {"the time was spent"}


ALONE = Ranks(False)


def batches_of(*sizes):
    return [Batch((torch.randn(size, 3),), {}, ()) for size in sizes]


def test_items_set_apart():
    fit, check, _ = set_apart(batches_of(*[4] * 16), 0.125, ALONE)
    assert (len(fit), len(check)) == (14, 2)
    fit, check, _ = set_apart(batches_of(32), 0.125, ALONE)
    assert [part.args[0].shape[0] for part in (*fit, *check)] == [28, 4]
    assert set_apart(batches_of(8), 0.125, ALONE)[1] == set_apart(batches_of(32), 0, ALONE)[1] == []


def test_rows_of_an_item_are_in_one_part():
    folds = Folds(batches_of(6, 3), [0, 1], 0, ALONE)
    for which, items in enumerate((6, 3)):
        parts = folds.of(which, torch.arange(items * 5), items * 5).reshape(items, 5)
        assert bool((parts == parts[:, :1]).all())
    assert len({*folds.parts[0].tolist()}) > 1


def test_early_layers_see_fewer_batches_where_memory_is_short():
    x = torch.randn(24, 3, 16, 16, dtype=D)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(8, 6, 3)]
    net, small = small_of(nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)), x)
    one, other = copy.deepcopy(small), copy.deepcopy(small)
    before = error(small, net, x)
    parts = [Batch((part,), {}, ()) for part in x.split(4)]
    smaller = Replay(small, parts)
    original = Replay(net, parts, smaller.reference)
    products = ("conv", "linear", "addmm")
    nodes = [str(node.target) for node in smaller.reference]
    ends = [n for n, name in enumerate(nodes) if any(kind in name for kind in products)]
    room = rooms(original, smaller, ends, 3e5)
    assert 1 <= room[0] < room[2] == 6
    for network, memory in ((small, 3e5), (one, 1e12), (other, 4e9)):
        calibrate(network, net, list(x.split(4)), memory=memory)
        assert error(network, net, x) < before
    assert torch.equal(one[0].weight, other[0].weight)
    assert not torch.equal(one[6].weight, small[6].weight)
