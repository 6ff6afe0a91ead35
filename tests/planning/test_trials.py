"""Variants of a plan are tried on repaired small models, and the best one is taken."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import graphprune
from graphprune.criteria.reconstruction import Reconstruction
from graphprune.criteria.registry import _REGISTRY
from graphprune.errors import InputError
from graphprune.planning.trials import First


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 24), nn.Linear(24, 24)
        self.out = nn.Linear(24, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


def data(count=64):
    return list(torch.randn(count, 6).split(16))


def entries(others):
    """The registry, with ``auto`` that tries some other criteria."""
    return {**_REGISTRY, "auto": replace(_REGISTRY["auto"], others=others)}


def planned(monkeypatch, errors, others=()):
    """A plan by ``auto`` whose trials have these errors; and the plans that were tried."""
    tried = []

    def error(self, plan, ranks):
        tried.append([len(group.kept) for group in plan.groups])
        return errors[len(tried) - 1]

    monkeypatch.setattr("graphprune.planning.trials.Trials._error", error)
    monkeypatch.setattr("graphprune.criteria.held.Halves.seen", lambda self: (1.0, 1.0))
    monkeypatch.setattr("graphprune.criteria.registry._REGISTRY", entries(others))
    batches = data()
    graph = graphprune.trace(Net(), batches[0][:1])
    plan = graph.plan(criterion="auto", target={"macs": 0.5}, data=batches)
    return [len(group.kept) for group in plan.groups], tried


@pytest.mark.parametrize(("errors", "wanted"), [((0.5, 0.4), 1), ((0.5, 0.6), 0), ((0.5, None), 0)])
def test_the_variant_with_the_smaller_error_is_taken(monkeypatch, errors, wanted):
    monkeypatch.setattr("graphprune.criteria.reconstruction.LATER", 9.0)
    kept, tried = planned(monkeypatch, errors)
    assert len(tried) == 2
    assert tried[0] != tried[1]
    assert kept == tried[wanted]


@pytest.mark.parametrize(("errors", "wanted"), [((0.5, 0.4), 1), ((0.5, 0.6), 0)])
def test_other_criteria_are_tried_on_the_same_statistics(monkeypatch, errors, wanted):
    monkeypatch.setattr("graphprune.criteria.reconstruction.LATER", 0.0)
    kept, tried = planned(monkeypatch, errors, (Reconstruction(ridge=1.0, late=30.0),))
    assert len(tried) == 2
    assert kept == tried[wanted]


def test_plans_that_are_equal_are_not_tried(monkeypatch):
    monkeypatch.setattr("graphprune.criteria.reconstruction.LATER", 0.0)
    assert planned(monkeypatch, ())[1] == []


def test_data_are_gone_through_once_and_the_model_stays():
    net, batches = Net(), data()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    graph = graphprune.trace(net, batches[0][:1])
    plan = graph.plan(criterion="auto", target={"macs": 0.5}, data=iter(batches))
    again = graph.plan(criterion="auto", target={"macs": 0.5}, data=batches)
    assert [g.kept for g in plan.groups] == [g.kept for g in again.groups]
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_few_items_are_kept():
    first = First(data(640))
    assert len(list(first)) == 40
    assert len(first.kept) == 6
    with pytest.raises(TypeError, match="not known"):
        len(First(iter(data())))


@pytest.mark.parametrize("wrong", [5, torch.randn(16, 6)], ids=["number", "one batch"])
def test_data_that_are_no_batches_are_told(wrong):
    graph = graphprune.trace(Net(), torch.randn(1, 6))
    with pytest.raises(InputError, match="data must be an iterable of batches"):
        graph.plan(criterion="auto", target={"macs": 0.5}, data=wrong)
