"""Penalties: their values by hand, equal gradients both ways, and channels that do go to zero."""

import math

import pytest
import torch
from support.loops import X, Y, build
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import InputError, PlanError
from graphprune.training import GroupLasso, Growing, Growth, Slimming, SparseLearning

MAKERS = {
    "slimming": lambda model: Slimming(graphprune.trace(model, X[:2]), 0.3),
    "group lasso": lambda model: GroupLasso(graphprune.trace(model, X[:2]), 0.3),
    "sparse learning": lambda model: SparseLearning(graphprune.trace(model, X[:2]), 0.3),
    "growing": lambda model: Growing(model, graphprune.trace(model, X[:2]).plan(0.5), Growth(0.3)),
}


def mlp():
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)
    net = nn.Sequential(*layers).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    return net, graphprune.trace(net, torch.ones(2, 3, dtype=torch.float64))


def channel_squares(net):
    """The squared norms of all that leaves with a channel, without biases."""
    first, norm, last = (net[i].weight.detach() for i in (0, 1, 3))
    return [
        float(sum(part.square().sum() for part in (first[c], norm[c], last[:, c])))
        for c in range(4)
    ]


def test_the_penalties_are_their_formulas():
    net, graph = mlp()
    squares = channel_squares(net)
    assert float(Slimming(graph, 0.1).loss().detach()) == pytest.approx(0.1 * 6.5)
    wanted = 0.1 * sum(math.sqrt(square) for square in squares)
    assert float(GroupLasso(graph, 0.1).loss().detach()) == pytest.approx(wanted, rel=1e-12)
    low, high = min(squares), max(squares)
    weights = [2 ** (4 * (high - square) / (high - low)) for square in squares]
    wanted = 0.1 * sum(w * square for w, square in zip(weights, squares)) / 2
    assert float(SparseLearning(graph, 0.1).loss().detach()) == pytest.approx(wanted, rel=1e-12)
    plan = graph.plan_of({graph.groups[0].name: [1, 3]})
    biases = sum(
        float(part.detach()[c].square()) for part in (net[0].bias, net[1].bias) for c in (0, 2)
    )
    wanted = 0.1 * (squares[0] + squares[2] + biases) / 2
    assert float(Growing(net, plan, 0.1).loss().detach()) == pytest.approx(wanted, rel=1e-12)


def test_sparse_learning_presses_weak_channels_harder():
    net, graph = mlp()
    SparseLearning(graph, 1.0, alpha=4).add_gradients()
    squares = channel_squares(net)
    pressed = (net[0].weight.grad / net[0].weight.detach()).mean(1)
    assert float(pressed[squares.index(min(squares))]) == pytest.approx(16)
    assert float(pressed[squares.index(max(squares))]) == pytest.approx(1)


@pytest.mark.parametrize("name", MAKERS)
def test_both_ways_give_the_same_gradients(name):
    grads = []
    for way in ("loss", "add", "scaled"):
        model = build()
        penalty = MAKERS[name](model)
        task = F.cross_entropy(model(X), Y)
        if way == "loss":
            (task + penalty.loss()).backward()
        elif way == "add":
            task.backward()
            with torch.no_grad():
                penalty.add_gradients()
        else:  # as a gradient scaler leaves them
            (128 * task).backward()
            penalty.add_gradients(128)
            for parameter in model.parameters():
                parameter.grad /= 128
        grads.append([p.grad for p in model.parameters()])
    bare = build()
    F.cross_entropy(bare(X), Y).backward()
    assert any(not torch.allclose(p.grad, g) for p, g in zip(bare.parameters(), grads[0]))
    for others in grads[1:]:
        for one, other in zip(grads[0], others):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_frozen_parameters_and_missing_gradients(name):
    model = build()
    penalty = MAKERS[name](model)
    model.stem.requires_grad_(False)
    penalty.add_gradients()
    assert model.stem.weight.grad is None
    assert model.inner_norm.weight.grad.abs().sum() > 0
    model.requires_grad_(False)
    penalty.add_gradients()


def test_a_channel_at_zero_has_no_gradient_that_is_not_a_number():
    net, graph = mlp()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    for penalty in (Slimming(graph, 1), GroupLasso(graph, 1), SparseLearning(graph, 1)):
        penalty.add_gradients()
        assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def trained(make, steps=150):
    """A model trained with a penalty, for how long it takes."""
    model = build()
    penalty = make(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        penalty.add_gradients()
        optimizer.step()
        penalty.step()
    return model


def test_slimming_drives_scales_to_zero():
    model = trained(lambda model: Slimming(graphprune.trace(model, X[:2]), 0.02))
    scales = torch.cat([model.norm.weight, model.inner_norm.weight]).detach().abs()
    assert int((scales < 0.01).sum()) >= 5
    assert float(scales.max()) > 0.1


def test_group_lasso_drives_whole_channels_to_zero():
    model = trained(lambda model: GroupLasso(graphprune.trace(model, X[:2]), 0.02))
    squares = model.inner.weight.square().sum((1, 2, 3)) + model.back.weight.square().sum((0, 2, 3))
    norms = (squares + model.inner_norm.weight.square()).detach().sqrt()
    assert int((norms < 0.02).sum()) >= 3
    assert float(norms.max()) > 0.1


def test_growing_leaves_nothing_of_the_channels_that_are_to_leave():
    model = build()
    plan = graphprune.trace(model, X[:2]).plan(0.5)
    grown = trained(lambda m: Growing(m, plan, Growth(delta=0.05, every=5, ceiling=1.0)))
    small = graphprune.rebuild(grown, plan).eval()
    torch.testing.assert_close(small(X), grown.eval()(X), rtol=0, atol=0.02)
    plain = trained(lambda m: Growing(m, plan, 0.0)).eval()
    assert (graphprune.rebuild(plain, plan)(X) - plain(X)).abs().max() > 0.5
    assert [Growth(0.1, 2, 0.35)(step) for step in range(8)] == pytest.approx(
        [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.35, 0.35]
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda graph: Slimming(graph, -1.0), "strength must be a number of at least 0"),
        (lambda graph: GroupLasso(graph, math.nan), "got nan at step 0"),
        (lambda graph: GroupLasso(graph, "much"), "got 'much'"),
        (lambda graph: GroupLasso(graph, lambda step: -0.5), "got -0.5 at step 0"),
        (lambda graph: Growth(0.0), "a strength grows by delta > 0"),
        (lambda graph: Growth(0.5, 1, 0.1), "ceiling 0.1"),
        (lambda graph: Growing(graph.model, graph.plan_of({})), "the plan removes no channel"),
    ],
)
def test_bad_arguments_are_refused(make, text):
    with pytest.raises(InputError) as error:
        make(mlp()[1])
    assert text in str(error.value)


def test_models_without_what_is_penalised_are_refused():
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(InputError, match="no batch norm scales a channel that can be removed"):
        Slimming(graphprune.trace(plain), 0.1)
    with pytest.raises(InputError, match="no channel of this model can be removed"):
        GroupLasso(graphprune.trace(nn.Sequential(nn.Linear(3, 4))), 0.1)
    with pytest.raises(PlanError, match="another architecture"):
        Growing(plain, mlp()[1].plan(0.5))


def test_a_penalty_of_a_model_that_has_shrunk_says_so():
    net, graph = mlp()
    penalty = GroupLasso(graph, 0.1)
    graphprune.rebuild(net, graph.plan(0.5), inplace=True)
    for use in (penalty.loss, penalty.add_gradients):
        with pytest.raises(InputError, match=r"'0.weight' has changed its shape: after channels"):
            use()
