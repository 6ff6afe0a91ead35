"""Criteria where it is known which channels must rank last; the list of tests is the registry."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.calibration import image_batches, residual
from torch import nn

import graphprune
from graphprune.criteria import Magnitude, criteria, gather, name_of, scores
from graphprune.errors import PruningWarning


def silence(net, group, channels, side="both"):
    """Zero the parameters of some channels; running statistics become those of zeroes."""
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    with torch.no_grad():
        for member in group.members:
            if side == "both" or (member.reads == (side == "reads")):
                places = torch.from_numpy(member.index[channels].reshape(-1))
                if member.slot.parameter or not member.slot.tensor.endswith("running_var"):
                    tensors[member.slot.tensor].index_fill_(member.slot.dim, places, 0)


@pytest.mark.parametrize("name", [name for name in criteria() if name != "random"])
def test_planted_dead_channels_rank_last(name):
    """In every group that a criterion sees, three channels of which nothing is left."""
    net, data = residual(), image_batches()
    graph = graphprune.trace(net, data[0][0])
    assert len(graph) == 5
    planted = {}
    for group in graph.groups:
        planted[group.name] = torch.randperm(group.size)[: min(3, group.size - 2)].sort().values
        silence(net, group, planted[group.name].numpy())
    evidence = gather(net, name, graph.groups, data)
    with pytest.warns(PruningWarning) if name == "bn_scale" else contextlib.nullcontext():
        found = scores(name, graph.groups, evidence, 0)
    assert len(found) == (3 if name == "bn_scale" else 5)
    for group, values in found.items():
        rest = torch.ones(len(values), dtype=torch.bool)
        rest[planted[group]] = False
        assert values[~rest].max() < 0.9 * values[rest].min(), (group, values)


def test_random_scores_are_a_control():
    """They follow the seed and nothing else."""
    net, data = residual(), image_batches()
    graph = graphprune.trace(net, data[0][0])
    first, again, other = (scores("random", graph.groups, {}, seed) for seed in (0, 0, 1))
    for group in graph.groups:
        assert torch.equal(first[group.name], again[group.name])
        assert not torch.equal(first[group.name], other[group.name])


def redundant(kind):
    """Eight channels of a multilayer perceptron of which channels 2 and 5 are redundant."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    first, last, planted = net[0], net[2], [2, 5]
    with torch.no_grad():
        first.weight.mul_(4)
        first.bias.fill_(3)
        if kind == "unread":  # large, but nobody reads it
            first.weight[planted] *= 50
            last.weight[:, planted] = 0
        elif kind == "never on":  # large weights, but ReLU is always closed
            first.weight[planted] *= 10
            first.bias[planted] = -1e4
        elif kind == "constant":  # on, large and read, but always the same
            first.weight[planted] = 0
            first.bias[planted] = 30
            last.weight[:, planted] *= 10
        elif kind == "twins":  # two channels that are nearly the same and close to the others
            first.weight[planted] = first.weight[[0, 1, 3, 4, 6, 7]].mean(0)
            first.weight[5] += 1e-3
        elif kind == "small":
            first.weight[planted] *= 1e-3
    return net, planted


KINDS = {
    "unread": ["taylor", "taylor_activation", "fisher", "wanda", Magnitude(side="reads")],
    "never on": ["apoz", "mean_activation", "wanda", "taylor_activation", "taylor", "fisher"],
    "constant": ["wanda", "l1", "l2", "lp", "linf", "lamp", "geometric_median"],
    "twins": ["geometric_median"],
    "small": ["l1", "l2", "lp", "linf", "lamp"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "criterion"),
    [(kind, criterion) for kind, known in KINDS.items() for criterion in known],
    ids=lambda value: name_of(value),
)
def test_what_a_criterion_sees(kind, criterion):
    net, planted = redundant(kind)
    x = torch.randn(64, 6, dtype=torch.float64)
    data = [(part, torch.arange(16) % 3) for part in x.split(16)]
    graph = graphprune.trace(net, x)
    evidence = gather(net, criterion, graph.groups, data)
    (found,) = scores(criterion, graph.groups, evidence, 0).values()
    assert found.argsort()[:2].sort().values.tolist() == planted, found
