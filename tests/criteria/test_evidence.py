"""What criteria are given: sums against brute force, streamed against whole, memory."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.calibration import image_batches, residual, scored
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import graphprune
from graphprune.criteria import (
    Collector,
    Fisher,
    MeanActivation,
    Taylor,
    TaylorActivation,
    Wanda,
    evidence,
    gather,
    gradients,
    register_statistic,
    scores,
)


def close(found, wanted, tolerance=1e-10):
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=tolerance, atol=tolerance)


# --- against brute force -------------------------------------------------------------------------


@torch.no_grad()
def loss_scaled(net, data, weight, dim, places, scale):
    """The mean loss with some slices of a weight scaled."""
    kept = weight.clone()
    weight.copy_(kept.index_copy(dim, places, kept.index_select(dim, places) * scale))
    loss = sum(F.cross_entropy(net(x), y) for x, y in data) / len(data)
    weight.copy_(kept)
    return loss


@pytest.mark.parametrize("side", ["reads", "writes"])
def test_signed_taylor_is_the_derivative_by_the_scale_of_a_channel(side):
    """Grouped, depthwise and transposed convolutions and flattened maps included."""
    net, data = residual(), image_batches(2)
    graph, found = scored(net, Taylor("signed", side), data, data[0][0], aggregate="max")
    weights = dict(net.named_parameters())
    for group in graph.groups:
        every = []
        for member in group.members:
            if not member.slot.weight or member.reads != (side == "reads"):
                continue
            weight, slopes = weights[member.slot.tensor], []
            for places in torch.from_numpy(member.index):
                high, low = (
                    loss_scaled(net, data, weight, member.slot.dim, places, scale)
                    for scale in (1 + 1e-5, 1 - 1e-5)
                )
                slopes.append((high - low).abs() / 2e-5)
            every.append(torch.stack(slopes))
        close(found[group.name], torch.stack(every).amax(0), 1e-6)


@pytest.mark.parametrize("side", ["reads", "writes", "both"])
def test_positions_of_a_channel_are_joined_before_the_square(side):
    """Filters of a column of groups, and places of a flattened map, leave together."""
    net, data = residual(), image_batches(1)
    graph, signed = scored(net, Taylor("signed", side), data, data[0][0], aggregate="root")
    _, squared = scored(net, Taylor("squared", side), data, data[0][0], aggregate="root")
    assert any(m.index.shape[1] > 1 for group in graph.groups for m in group.members)
    for name, values in signed.items():
        close(squared[name], values.square())


def test_activation_taylor_is_weight_taylor_of_the_only_reader():
    """With one sample a batch both are the same sums of products, in another order."""
    net = residual()
    data = [(x[None], y[None]) for xs, ys in image_batches(2) for x, y in zip(xs, ys)]
    graph, found = scored(net, TaylorActivation(), data, data[0][0])
    names = [group.name for group in graph.groups if sum(m.reads for m in group.members) == 1]
    wanted = {name: 0.0 for name in names}
    for batch in data:
        _, one = scored(net, Taylor("signed", "reads"), [batch], data[0][0])
        wanted = {name: known + one[name] / len(data) for name, known in wanted.items()}
    assert names == ["g2", "g3", "g4", "g5"]
    for name in names:
        close(found[name], wanted[name])


def test_fisher_of_single_samples():
    net, data = residual(), image_batches(2, 1)
    _, found = scored(net, Fisher("writes"), data, data[0][0])
    wanted = torch.zeros(12, dtype=torch.float64)
    for x, y in data:
        for weight in (net.inner[0].weight, net.depthwise[0].weight):
            (slope,) = torch.autograd.grad(F.cross_entropy(net(x), y), weight)
            wanted += (weight * slope).detach().square().sum((1, 2, 3)) / 2 / len(data)
    close(found["g2"], wanted)


def test_inputs_of_every_reader():
    """Means and variances per channel of what each layer is given, from hooks on the modules."""
    net, data = residual(), image_batches(3)
    graph = graphprune.trace(net, data[0][0])
    seen = {}
    for name in ("inner.0", "back", "grouped", "up", "head", "last"):
        net.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach())
        )
    evidence = gather(net, "wanda", graph.groups, data)
    mean = scores(MeanActivation(), graph.groups, evidence, 0)
    x = {name: torch.cat(parts[-len(data) :]).transpose(0, 1) for name, parts in seen.items()}
    assert graph.group_of("inner.0").name == "g2"
    close(mean["g2"], x["back"].abs().flatten(1).mean(1))
    stream = x["inner.0"].abs().flatten(1).mean(1)
    grouped = x["grouped"].abs().flatten(1).mean(1)
    columns = (stream.view(2, 4).mean(0) + grouped.view(2, 4).mean(0)) / 2
    close(mean["g0"], columns)
    close(mean["g4"], x["head"].abs().reshape(5, -1).mean(1))
    for fluctuation in (True, False):
        energy = scores(Wanda(fluctuation), graph.groups, evidence, 0)
        squares = [
            part.var(1, correction=0) if fluctuation else part.square().mean(1)
            for part in (x["up"].flatten(1), x["head"])
        ]
        rows = net.up.weight.detach().square().sum((1, 2, 3))
        up = graph.group_of("grouped")
        index = torch.from_numpy(next(m.index for m in up.members if m.reads))
        close(energy[up.name], (squares[0] * rows)[index].sum(1))
        columns = net.head.weight.detach().square().sum(0)
        close(energy["g4"], (squares[1] * columns).view(5, -1).sum(1))


@pytest.mark.parametrize("groups", [1, 2])
def test_column_of_all_groups_is_read_by_the_filters_of_its_own_group(groups):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=groups), nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    ).double()  # fmt: skip
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    _, found = scored(net, Wanda(False), [x], x)
    first = net[1](net[0](x)).detach().square().transpose(0, 1).flatten(1).mean(1)
    blocks = net[2].weight.detach().square().sum((2, 3)).view(groups, 8 // groups, -1).sum(1)
    close(found["g0"][: 8 // groups], (first.view(groups, -1) * blocks).sum(0))


def test_weights_kept_in_other_ways():
    """``x @ weight``, packed attention, weight norm and masks of torch.nn.utils.prune."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.randn(4, 6))
            self.second = parametrizations.weight_norm(nn.Linear(6, 4))
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.last = nn.Linear(4, 2)
            self.third = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            x = self.second(F.relu(x @ self.first))
            return self.last(self.attention(x, x, x)[0] @ self.third)

    torch.manual_seed(0)
    net = Product().double().eval()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    graph, found = scored(net, Wanda(False), [x], x)
    inner = F.relu(x @ net.first).detach().square().flatten(0, 1).mean(0)
    group = next(g for g in graph.groups if any(m.slot.tensor == "first" for m in g.members))
    close(found[group.name], inner * net.second.weight.detach().square().sum(0))
    stream = net.second(F.relu(x @ net.first)).detach().square().flatten(0, 1).mean(0)
    packed = net.attention.in_proj_weight.detach().square().sum(0)
    close(found[graph.group_of("second").name], stream * packed)


# --- streaming -----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.sampled_from([0.0, 1e6]))
def test_statistics_do_not_depend_on_the_batches(sizes, offset):
    """Uneven batches, and values far from 0, where sums of squares would cancel."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    net[1] = Shifted(offset)
    x = torch.randn(sum(sizes), 3, dtype=torch.float64)
    graph = graphprune.trace(net, x)
    for criterion in ("wanda", "mean_activation"):
        streamed, whole = (
            scores(criterion, graph.groups, gather(net, criterion, graph.groups, data), 0)
            for data in (x.split(sizes), [x])
        )
        close(streamed["g0"], whole["g0"], 1e-7 if offset else 1e-10)


class Shifted(nn.Module):
    def __init__(self, offset):
        super().__init__()
        self.offset = offset

    def forward(self, x):
        return torch.tanh(x) + self.offset


def test_large_weights_are_reduced_in_blocks(monkeypatch):
    net, data = residual(), image_batches(2)
    for criterion in (Taylor("signed"), Taylor("absolute"), Fisher()):
        monkeypatch.setattr(gradients, "BLOCK", 1 << 18)
        _, whole = scored(net, criterion, data, data[0][0])
        monkeypatch.setattr(gradients, "BLOCK", 100)
        _, parts = scored(net, criterion, data, data[0][0])
        for name, values in whole.items():
            close(parts[name], values)


class Watch(Collector):
    """How many gradients of the model live whenever one is complete."""

    backward = True
    most = ()
    seen = ()

    def gradient(self, name, parameter):
        alive = sum(p.grad is not None for p in self.model.parameters())
        Watch.seen += (weakref.ref(parameter.grad),)
        Watch.most += ((alive, sum(reference() is not None for reference in Watch.seen)),)

    def finish(self, batches):
        return len(Watch.most)


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(evidence, "_COLLECTORS", dict(evidence._COLLECTORS))
    register_statistic("watch")(Watch)
    Watch.most = Watch.seen = ()

    def watch(group, tensors, generator):
        return torch.ones(group.size)

    watch.needs = {"watch", "gradients"}
    return watch


def test_gradients_never_live_all_at_once(watched):
    """Of twenty layers at most one gradient is alive, where a plain backward keeps all."""
    layers = [layer for _ in range(20) for layer in (nn.Linear(31, 31), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(31, 3))
    data = [(torch.randn(4, 31), torch.tensor([0, 1, 2, 0]))] * 2
    graph = graphprune.trace(net, data[0][0])
    gather(net, watched, graph.groups, data)
    assert len(Watch.most) == 2 * 42
    assert max(alive for alive, _ in Watch.most) == 1
    assert max(found for _, found in Watch.most) == 1
    assert all(p.grad is None for p in net.parameters())
    F.cross_entropy(net(data[0][0]), data[0][1]).backward()
    watch = Watch(net, {})
    watch.gradient("", net[0].weight)
    assert Watch.most[-1][0] == 42, "the counter counts"


def test_activations_are_freed_after_their_batch():
    """Hooks on activations keep no graph alive, without the garbage collector too."""
    net, data = residual(), image_batches(3)
    graph = graphprune.trace(net, data[0][0])
    before = []

    def loss(model, batch):
        before.append(sum(type(t) is torch.Tensor for t in gc.get_objects()))
        return F.cross_entropy(model(batch[0]), batch[1])

    gc.collect()
    gc.disable()
    try:
        gather(net, "taylor_activation", graph.groups, data, loss)
    finally:
        gc.enable()
    assert before[2] == before[1] <= before[0] + 20


@pytest.mark.parametrize("width", [6, 1])
@pytest.mark.parametrize(
    "name", ["l1", "l2", "lp", "linf", "geometric_median", "lamp", "group_norm"]
)
def test_a_computed_weight_counts_once_as_the_layer_uses_it(name, width):
    """Under weight normalisation as for the same function without it; its norms are in it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    normed = copy.deepcopy(net)
    parametrizations.weight_norm(normed[0])
    x = torch.randn(4, width, dtype=torch.float64)
    found = []
    for model in (net, normed):
        graph = graphprune.trace(model, x[:1])
        groups = list(graph.groups)
        found.append(scores(name, groups, gather(model, name, groups), 0)[groups[0].name])
    torch.testing.assert_close(*found)
