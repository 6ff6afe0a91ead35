"""The reconstruction criterion against a refit by hand, and on planted redundancy."""

import pytest
import torch
from torch import nn

import graphprune
from graphprune.criteria import Reconstruction, gather, scores
from graphprune.criteria.reconstruction import Surgeon, eliminate

D = torch.float64


def scored(net, data, criterion="reconstruction", loss=None):
    graph = graphprune.trace(net, data[0][:1])
    evidence = gather(net, criterion, graph.groups, data, loss)
    return graph, scores(criterion, graph.groups, evidence, 0)


def refitted_error(hidden, weight, kept):
    """The squared error of the outputs after the best refit on the kept channels."""
    hidden = hidden - hidden.mean(0)
    wanted = hidden @ weight.T
    rest = hidden[:, kept]
    fitted = rest @ torch.linalg.lstsq(rest, wanted).solution
    return float((fitted - wanted).square().sum() / len(hidden))


def test_the_first_to_leave_is_the_one_whose_loss_a_refit_forgives():
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(64, 3, dtype=D)

    def loss(model, batch):  # gradients (1, 1) and (1, -1): the metric of the plain error
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=D).repeat(32, 1)
        return (model(batch) * signs).sum()

    graph, found = scored(net, [x], Reconstruction(ridge=0.0), loss)
    with torch.no_grad():
        hidden = torch.tanh(net[0](x))
    errors = [
        refitted_error(hidden, net[2].weight.detach(), [k for k in range(5) if k != channel])
        for channel in range(5)
    ]
    score = found[graph.groups[0].name]
    cheapest = int(torch.tensor(errors).argmin())
    assert int(score.argmin()) == cheapest
    assert float(score.min()) == pytest.approx(64 * errors[cheapest], rel=1e-5)


def test_all_removals_together_cost_what_a_refit_on_the_last_channel_leaves():
    torch.manual_seed(3)
    hidden = torch.randn(200, 6, dtype=D) @ torch.randn(6, 6, dtype=D)
    weight = torch.randn(4, 6, dtype=D)
    covariance = torch.cov(hidden.T, correction=0)
    surgeon = Surgeon(covariance[None], weight[None], torch.arange(6)[:, None], 0.0)
    found = eliminate([surgeon], 6)
    last = int(found.argmax())
    total = float(found.sum() - found[last])
    assert total == pytest.approx(refitted_error(hidden, weight, [last]), rel=1e-5)


def test_a_channel_that_others_can_replace_is_worth_nothing():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
    with torch.no_grad():
        net[0].weight[4] = 3 * net[0].weight[1]  # large, and redundant
        net[0].bias[4] = 3 * net[0].bias[1]
    graph, found = scored(net, [torch.randn(8, 3, 9, 9, dtype=D) for _ in range(2)])
    ranked = found[graph.groups[0].name].argsort()
    assert int(ranked[0]) in (1, 4)
    kept = (
        graph.plan(0.17, criterion="reconstruction", data=[torch.randn(8, 3, 9, 9, dtype=D)])
        .groups[0]
        .kept
    )
    assert len(kept) == 5
    assert not {1, 4} <= set(kept)


@pytest.mark.parametrize("groups", [1, 2])
def test_wide_layers_and_grouped_ones(groups, monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=groups)).double()
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias):
            tensor[4:] = tensor[:4] * 2
    data = [torch.randn(8, 3, 7, 7, dtype=D)]
    if groups == 1:
        monkeypatch.setattr("graphprune.criteria.reconstruction.WIDEST", 20)
    graph, found = scored(net, data)
    score = found[graph.groups[0].name]
    assert bool(score.isfinite().all())
    if groups == 1:  # channels alone: half of them are redundant
        first = score.argsort()[:4].tolist()
        assert len({channel % 4 for channel in first}) == 4


def test_a_flattened_map_gives_a_channel_several_columns(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 4)).double()
    data = [torch.randn(40, 3, 7, 7, dtype=D)]
    with torch.no_grad():
        net[0].weight[2] = 0
        net[0].bias[2] = 1  # a constant, which a bias takes over
    for widest in (10_000, 20):
        monkeypatch.setattr("graphprune.criteria.reconstruction.WIDEST", widest)
        graph, found = scored(net, data)
        assert int(found[graph.groups[0].name].argmin()) == 2


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.loud, self.soft = nn.Linear(8, 16), nn.Linear(8, 16)
        self.loud_out, self.soft_out = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        loud, soft = torch.relu(self.loud(x)), torch.relu(self.soft(x))
        return self.loud_out(loud) + 1e-3 * self.soft_out(soft)


def test_scores_of_different_groups_share_a_budget():
    """What hardly reaches the output leaves first."""
    data = [torch.randn(100, 8, dtype=D)]
    plan = graphprune.trace(Branches().double(), data[0][:1]).plan(
        criterion="reconstruction",
        data=data,
        scope="global",
        normalise="macs",
        target={"macs": 0.55},
    )
    loud, soft = (len(group.kept) for group in plan.groups)
    assert (loud, soft) == (16, 1)
    assert plan.after.macs <= 0.55 * plan.before.macs


def test_the_model_and_the_random_state_are_untouched():
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    state, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    data = [torch.randn(6, 3)]
    torch.set_rng_state(random)
    first = scored(net, data)[1]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    again = scored(net, data, Reconstruction())[1]
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_errors_of_late_layers_count_more():
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
    data = [torch.randn(64, 3, dtype=D)]
    graph, plain = scored(net.double(), data, Reconstruction(late=0.0))
    found = scored(net, data, Reconstruction(late=2.0))[1]
    first, second = (group.name for group in graph.groups)
    assert torch.allclose(found[first], plain[first])
    assert torch.allclose(found[second], plain[second] * torch.e**2)
