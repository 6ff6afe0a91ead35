"""``criterion="auto"``: what it decides by itself, and what few items tell."""

import pytest
import torch
from torch import nn

import graphprune
from graphprune.criteria import Auto, Reconstruction, gather, scores
from graphprune.criteria.held import RIDGES, Halves

D = torch.float64


class Tail(nn.Module):
    """A narrow layer of which half is worth little, and a wide one before the outputs."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Linear(12, 16), nn.Linear(16, 96)
        self.out = nn.Linear(96, 10)

    def forward(self, x):
        return self.out(torch.tanh(self.wide(torch.tanh(self.narrow(x)))))


def few(count=24):
    return list(torch.randn(count, 12, dtype=D).split(8))


def scored(net, criterion, data):
    graph = graphprune.trace(net, data[0][:1])
    found = scores(criterion, graph.groups, gather(net, criterion, graph.groups, data), 0)
    return {group.layers[0]: found[group.name] for group in graph.groups}


def test_fewer_rows_than_channels_do_not_make_channels_worth_nothing():
    """24 rows explain 96 channels without an error; items not seen tell what they are worth."""
    net = Tail().double()
    plain = scored(net, Reconstruction(ridge=1e-4), few())["wide"]
    held = scored(net, "auto", few())["wide"]
    many = scored(net, Reconstruction(ridge=1e-4), few(4000))["wide"]
    apart = {
        name: float(s.sort().values[:60].mean())
        for name, s in (("plain", plain), ("held", held), ("many", many))
    }
    assert apart["plain"] < 0.1 * apart["many"] < apart["held"]


def test_with_many_rows_the_score_is_the_error_of_the_fit():
    net, data = Tail().double(), few(4000)
    held, plain = (scored(net, c, data)["narrow"] for c in ("auto", Reconstruction(ridge=1e-4)))
    assert torch.equal(held.argsort()[:8], plain.argsort()[:8])
    torch.testing.assert_close(held.cumsum(0)[-1], plain.cumsum(0)[-1], rtol=0.1, atol=0)


def test_the_error_of_each_half_is_that_of_a_refit_from_the_other():
    x = torch.randn(2, 30, 5, dtype=D) @ torch.randn(5, 5, dtype=D)
    weight = torch.randn(3, 5, dtype=D)
    covariances = [torch.cov(half.T, correction=0)[None] for half in x]
    sides = Halves((covariances[0], covariances[1]), weight[None], torch.arange(5)[:, None])
    wanted = 0.0
    for fit, check in ((x[0], x[1]), (x[1], x[0])):
        fit, check = fit - fit.mean(0), check - check.mean(0)
        level = 0.1 * fit.square().mean() * len(fit)
        rest, gone = [0, 2, 3], [1, 4]
        inner = fit[:, rest].T @ fit[:, rest] + level * torch.eye(3, dtype=D)
        change = torch.linalg.solve(inner, fit[:, rest].T @ fit[:, gone] @ weight[:, gone].T)
        left = check[:, gone] @ weight[:, gone].T - check[:, rest] @ change
        wanted += float(left.square().sum() / len(check)) / 2
    assert sides.error(torch.tensor([1, 4]), 0.1) == pytest.approx(wanted, rel=1e-3)


def test_the_ridge_is_small_for_many_rows_and_large_for_few():
    torch.manual_seed(0)
    mix, weight = torch.randn(40, 40, dtype=D) + 8, torch.randn(1, 4, 40, dtype=D)

    def ridge(rows):
        halves = [torch.cov((torch.randn(rows, 40, dtype=D) @ mix).T)[None] for _ in range(2)]
        return Halves((halves[0], halves[1]), weight, torch.arange(40)[:, None]).ridge()

    assert ridge(20_000) == RIDGES[0]
    assert ridge(12) > RIDGES[0]


def test_auto_ranks_all_groups_by_macs_unless_told(monkeypatch):
    monkeypatch.setattr("graphprune.planning.trials.FEW", 1000)  # no variants
    net, data = Tail().double(), few()
    graph = graphprune.trace(net, data[0][:1])
    plan = graph.plan(criterion="auto", target={"macs": 0.6}, data=data)
    assert plan.request["criterion"] == "auto"
    assert (plan.request["scope"], plan.request["normalise"]) == ("global", "macs")
    same = graph.plan(
        criterion=Reconstruction(late=2.0),
        scope="global",
        normalise="macs",
        target={"macs": 0.6},
        data=data,
    )
    assert [g.kept for g in plan.groups] == [g.kept for g in same.groups]
    local = graph.plan(0.25, criterion="auto", scope="local", data=data)
    assert local.request["scope"] == "local"
    assert [len(g.kept) for g in local.groups] == [12, 72]


def test_without_data_auto_says_what_stands_in():
    graph = graphprune.trace(Tail())
    plan = graph.plan(0.25, criterion="auto")
    assert plan.request["criterion"] == "auto: l2, for want of data"
    assert [g.kept for g in plan.groups] == [g.kept for g in graph.plan(0.25).groups]


def test_few_rows_are_one_of_the_variants():
    net, data = Tail().double(), few()
    graph = graphprune.trace(net, data[0][:1])
    evidence = gather(net, "auto", graph.groups, data)
    *_, trust = Auto().variants(graph.groups, evidence)
    narrow, wide = (trust[group.name] for group in graph.groups)
    assert wide < 0.5 * narrow < 0.5
    many = gather(net, "auto", graph.groups, few(4000))
    assert all(factor > 0.9 for factor in Auto().variants(graph.groups, many)[-1].values())
