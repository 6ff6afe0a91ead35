"""Collecting evidence: the model is left alone, the progress bar, wrong data and losses."""

from __future__ import annotations

import io

import pytest
import rich.console
import torch
from support.calibration import Residual, image_batches, residual, scored
from support.comparing import untouched
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.criteria import (
    Collector,
    criteria,
    find,
    gather,
    register_statistic,
    scores,
)
from graphprune.errors import InputError


class Counting(Residual):
    """Counts its calls in a buffer, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x + 0 * torch.rand(()))


@pytest.mark.parametrize("name", criteria())
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_alone(name, fails):
    torch.manual_seed(0)
    net, data = Counting().double().train(), image_batches(2)
    net.inner.eval()
    net.back.weight.requires_grad_(False)
    net.head.weight.grad = gradient = torch.ones_like(net.head.weight)
    stepped = []
    net.last.weight.register_post_accumulate_grad_hook(stepped.append)
    graph = graphprune.trace(net, data[0][0])
    if fails:
        data = [*data, (torch.zeros(1, 5, 8, 8).double(), torch.zeros(1).long())]
    state = torch.get_rng_state()
    with untouched(net):
        if fails and find(name).needs != {"weights"}:
            with pytest.raises(InputError, match=r"does not run on a batch \(float64\[1, 5, 8, 8"):
                gather(net, name, graph.groups, data)
        else:
            gather(net, name, graph.groups, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["back.weight"]
    assert [n for n, p in net.named_parameters() if p.grad is not None] == ["head.weight"]
    assert net.head.weight.grad is gradient
    assert bool((gradient == 1).all())
    assert not stepped
    (net(image_batches(1)[0][0])).sum().backward()
    assert len(stepped) == 1, "hooks of the user are back"


def test_parameters_of_the_loss_are_left_alone():
    net, data = residual(), image_batches(1)
    head = nn.Linear(3, 1).double()
    graph = graphprune.trace(net, data[0][0])
    gather(net, "taylor", graph.groups, data, lambda model, batch: head(model(batch[0])).sum())
    assert head.weight.grad is None


def test_modes_of_the_caller_do_not_matter():
    net, data = residual(), image_batches(2)
    graph, wanted = scored(net, "taylor", data, data[0][0])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = gather(net, "taylor", graph.groups, data)
        assert torch.equal(scores("taylor", graph.groups, found, 0)["g0"], wanted["g0"])


def test_recurrent_layers_in_eval_mode():
    """On a GPU cudnn would refuse to differentiate them there."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.head = nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            assert not torch.backends.cudnn.enabled
            return self.head(self.recurrent(x)[0][:, -1])

    net, x = Last(), torch.randn(2, 5, 3)
    enabled = torch.backends.cudnn.enabled
    with torch.backends.cudnn.flags(enabled=False):
        graph = graphprune.trace(net, x)
    gather(net, "taylor", graph.groups, [(x, torch.tensor([0, 1]))])
    assert torch.backends.cudnn.enabled == enabled


def test_frozen_backbones_and_tied_weights():
    net, data = residual(), image_batches(2)
    _, wanted = scored(net, "taylor", data, data[0][0])
    _, found = scored(net.requires_grad_(False), "taylor", data, data[0][0])
    assert torch.equal(found["g2"], wanted["g2"])
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    tied[2].weight = tied[0].weight
    x = torch.randn(3, 4)
    graph = graphprune.trace(tied, x)
    gather(tied, "taylor", graph.groups, [(x, torch.arange(3))])


def test_weights_that_the_loss_does_not_reach():
    """The branch is not judged, so it stays whole."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
            self.side = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

        def forward(self, x):
            return self.main(x), self.side(x)

    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])

    def loss(model, batch):
        return F.cross_entropy(model(batch)[0], y)

    with pytest.warns(graphprune.errors.PruningWarning, match="no gradient of the loss reaches"):
        plan = graphprune.trace(Branches(), x).plan(0.5, criterion="taylor", data=[x], loss=loss)
    assert [len(group.kept) for group in plan.groups] == [3, 6]


# --- progress, wrong data ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(True, True, True), (True, False, False), (None, True, False), (False, True, False)],
)
def test_progress_bar(monkeypatch, progress, terminal, shown):
    stream = io.StringIO()
    console = rich.console.Console(file=stream, force_terminal=terminal)
    monkeypatch.setattr(rich.console, "Console", lambda **_: console)
    net, data = residual(), image_batches(3)
    graph = graphprune.trace(net, data[0][0])
    for batches in (data, (batch for batch in data)):
        gather(net, "wanda", graph.groups, batches, progress=progress)
        assert ("calibration batches" in stream.getvalue()) == bool(stream.getvalue()) == shown


@pytest.mark.parametrize(
    ("criterion", "data", "loss", "text"),
    [
        (
            "wanda",
            None,
            None,
            "criterion 'wanda' needs activations: pass data=, an iterable of bat",
        ),
        ("wanda", torch.zeros(2, 3), None, r"found one batch float32\[2, 3\]: pass \[batch\]"),
        ("wanda", [], None, "data holds no batches$"),
        ("taylor", iter([]), None, r"no batches \(a generator yields its batches only once\)"),
        ("taylor", [torch.zeros(2, 4)], None, "the batch has no targets, where one tensor was"),
        (
            "taylor",
            [torch.zeros(2, 4)],
            lambda m, b: m(b),
            r"must be a scalar tensor; found \[2, 3",
        ),
        ("taylor", [torch.zeros(2, 4)], lambda m, b: 1.0, "must be a scalar tensor; found float"),
        ("taylor", [torch.zeros(2, 4)], lambda m, b: m(b).detach().sum(), "does not depend on the"),
        (
            "taylor",
            [torch.zeros(2, 4)],
            lambda m, b: m(b).sum() / 0,
            "loss of batch 0 is (nan|inf|-)",
        ),
    ],
)
def test_wrong_data_and_losses(criterion, data, loss, text):
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    graph = graphprune.trace(net)
    with pytest.raises(InputError, match=text):
        gather(net, criterion, graph.groups, data, loss)


def test_a_statistic_has_one_collector():
    with pytest.raises(KeyError, match="statistic 'gradients' is registered already"):
        register_statistic("gradients")(Collector)
