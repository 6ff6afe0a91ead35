"""What criteria are given: streamed sums against whole tensors, memory, models left alone."""

from __future__ import annotations

import gc
import io

import pytest
import torch
from comparing import untouched
from hypothesis import given
from hypothesis import strategies as st
from test_criteria import Residual, image_batches, residual
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
    criteria,
    evidence,
    find,
    gather,
    register_statistic,
    scores,
)
from graphprune.errors import InputError


def scored(net, criterion, data, inputs, loss=None, aggregate=None):
    graph = graphprune.trace(net, inputs)
    found = gather(net, criterion, graph.groups, data, loss)
    return graph, scores(criterion, graph.groups, found, 0, aggregate)


def close(found, wanted, tolerance=1e-10):
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=tolerance, atol=tolerance)


# --- against brute force -------------------------------------------------------------------------


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
                losses = []
                for scale in (1 + 1e-5, 1 - 1e-5):
                    kept = weight.detach().clone()
                    with torch.no_grad():
                        weight.copy_(kept.index_copy(
                            member.slot.dim, places, kept.index_select(member.slot.dim, places) * scale
                        ))  # fmt: skip
                        losses.append(sum(F.cross_entropy(net(x), y) for x, y in data) / len(data))
                        weight.copy_(kept)
                slopes.append((losses[0] - losses[1]).abs() / 2e-5)
            every.append(torch.stack(slopes))
        close(found[group.name], torch.stack(every).amax(0), 1e-6)


def test_activation_taylor_is_weight_taylor_of_the_only_reader():
    """With one sample a batch both are the same sums of products, in another order."""
    net = residual()
    data = [(x[None], y[None]) for xs, ys in image_batches(2) for x, y in zip(xs, ys)]
    graph, found = scored(net, TaylorActivation(), data, data[0][0])
    names = [group.name for group in graph.groups if "back" not in group.layers[:4]]
    wanted = {name: 0.0 for name in names}
    for batch in data:
        _, one = scored(net, Taylor("signed", "reads"), [batch], data[0][0])
        wanted = {name: known + one[name] / len(data) for name, known in wanted.items()}
    flat = graph.group_of("up").name  # joins its places only when the slot is one position
    assert len(names) == 4
    for name in set(names) - {flat}:
        close(found[name], wanted[name])
    assert bool((found[flat] >= wanted[flat] - 1e-12).all())


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
    seen = {}
    for name in ("inner.0", "back", "grouped", "up", "head", "last"):
        net.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach())
        )
    graph, mean = scored(net, MeanActivation(), data, data[0][0])
    x = {name: torch.cat(parts[: len(data)]).transpose(0, 1) for name, parts in seen.items()}
    assert graph.group_of("inner.0").name == "g2"
    close(mean["g2"], x["back"].abs().flatten(1).mean(1))
    stream = x["inner.0"].abs().flatten(1).mean(1)
    grouped = x["grouped"].abs().flatten(1).mean(1)
    columns = (stream.view(2, 4).mean(0) + grouped.view(2, 4).mean(0)) / 2
    close(mean["g0"], columns)
    close(mean["g4"], x["head"].abs().view(5, -1).mean(1))
    for fluctuation in (True, False):
        _, energy = scored(net, Wanda(fluctuation), data, data[0][0])
        squares = [
            part.var(1, correction=0) if fluctuation else part.square().mean(1)
            for part in (x["up"].flatten(1), x["head"], x["grouped"].flatten(1))
        ]
        rows = net.up.weight.detach().square().sum((1, 2, 3))
        close(energy["g3"], (squares[0] * rows).view(3, 2).sum(1), 1e-9) if False else None
        up = graph.group_of("grouped")
        index = torch.from_numpy(next(m.index for m in up.members if m.reads))
        close(energy[up.name], (squares[0] * rows)[index].sum(1))
        columns = net.head.weight.detach().square().sum(0)
        close(energy["g4"], (squares[1] * columns).view(5, -1).sum(1))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_column_of_all_groups_is_read_by_the_filters_of_its_own_group(groups):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=groups), nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    ).double()  # fmt: skip
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    graph, found = scored(net, Wanda(False), [x], x)
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
    close(found[graph.group_of("second").name], torch.ones(4), 1e9)
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


class Watch(Collector):
    """How many gradients of the model live whenever one is complete."""

    backward = True
    most = ()

    def gradient(self, name, parameter):
        alive = sum(p.grad is not None for p in self.model.parameters())
        gc.collect()
        shape = parameter.shape
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == shape]
        Watch.most += ((alive, len(tensors)),)

    def finish(self, batches):
        return len(Watch.most)


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(evidence, "_COLLECTORS", dict(evidence._COLLECTORS))
    register_statistic("watch")(Watch)
    Watch.most = ()

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
    assert max(found for _, found in Watch.most) <= 2
    assert all(p.grad is None for p in net.parameters())
    F.cross_entropy(net(data[0][0]), data[0][1]).backward()
    watch = Watch(net, frozenset())
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


# --- the model is left alone ---------------------------------------------------------------------


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


def test_modes_of_the_caller_do_not_matter():
    net, data = residual(), image_batches(2)
    _, wanted = scored(net, "taylor", data, data[0][0])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            _, found = scored(net, "taylor", data, data[0][0])
        assert torch.equal(found["g0"], wanted["g0"])


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
    loss = lambda model, batch: F.cross_entropy(model(batch)[0], y)  # noqa: E731
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
    console = evidence.Console(file=stream, force_terminal=terminal)
    monkeypatch.setattr(evidence, "Console", lambda **_: console)
    net, data = residual(), image_batches(3)
    graph = graphprune.trace(net, data[0][0])
    for batches in (data, (batch for batch in data)):
        gather(net, "wanda", graph.groups, batches, progress=progress)
        assert ("calibration batches" in stream.getvalue()) == shown


@pytest.mark.parametrize(
    ("criterion", "data", "loss", "text"),
    [
        ("wanda", None, None, "criterion 'wanda' needs activations: pass data=, an iterable of bat"),
        ("wanda", torch.zeros(2, 3), None, r"found one batch float32\[2, 3\]: pass \[batch\]"),
        ("wanda", [], None, "data holds no batches$"),
        ("taylor", iter([]), None, r"no batches \(a generator yields its batches only once\)"),
        ("taylor", [torch.zeros(2, 4)], None, "the batch has no targets, where one tensor was"),
        ("taylor", [torch.zeros(2, 4)], lambda m, b: m(b), r"must be a scalar tensor; found \[2, 3"),
        ("taylor", [torch.zeros(2, 4)], lambda m, b: 1.0, "must be a scalar tensor; found float"),
        ("taylor", [torch.zeros(2, 4)], lambda m, b: m(b).detach().sum(), "does not depend on the"),
        ("taylor", [torch.zeros(2, 4)], lambda m, b: m(b).sum() / 0, "loss of batch 0 is (nan|inf|-"),
    ],
)
def test_wrong_data_and_losses(criterion, data, loss, text):
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    graph = graphprune.trace(net)
    with pytest.raises(InputError, match=text):
        gather(net, criterion, graph.groups, data, loss)


def test_a_statistic_has_one_collector():
    with pytest.raises(KeyError, match="statistic 'gradients' is registered already"):
        register_statistic("gradients")(Watch)
