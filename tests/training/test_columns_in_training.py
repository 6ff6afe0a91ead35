"""Blocks that keep channels of their own, in loops: masks, state, rounds, rewinding, penalties."""

import copy

import pytest
import torch
from support.comparing import assert_same_state
from support.free_columns import FREE, made
from support.loops import OPTIMIZERS, assert_same_parameters

import graphprune
from graphprune.errors import InputError
from graphprune.training import (
    Distillation,
    Growing,
    Pruner,
    RewindPoint,
    follow,
    iterate,
    linear,
    lottery,
)

GROUPED = ["grouped", "grouped, transposed", "halved"]
MASKABLE = [*GROUPED, "split"]  # heads are scaled by their width, which zeroes do not change


def double(name):
    model, x, options = made(name)
    return model.double().train(), torch.cat([x, x.flip(-1) + 0.5]).double(), options


def fit(model, optimizer, x, steps=1, after=lambda: None):
    for step in range(steps):
        optimizer.zero_grad()
        model(x + step).square().mean().backward()
        optimizer.step()
        after()


def sliced(wide, name, plan):
    """What stays of a tensor, by the masks of the plan."""
    shape, stays = list(wide.shape), torch.ones(wide.shape, dtype=torch.bool)
    for slot in plan.slots:
        if slot.tensor == name and wide.shape[slot.dim] == slot.size:
            stays &= slot.stays(wide.shape)
            shape[slot.dim] = slot.width
    return wide[stays].reshape(shape)


@pytest.mark.parametrize("name", MASKABLE)
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_masked_training_is_rebuilt_training(name, kind):
    model, x, _ = double(name)
    optimizer = OPTIMIZERS[kind](model.parameters())
    pruner = Pruner(model, x, optimizer, schedule=linear(0.5, end=3), columns="free")
    fit(model, optimizer, x, 4, pruner.step)
    plan = pruner.soft.plan
    assert plan.free_columns
    assert any(slot.blocks > 1 for slot in plan.slots) == (name in GROUPED)
    assert_same_parameters(graphprune.mask(model, plan), model)

    small, small_optimizer = copy.deepcopy((model, optimizer))
    graphprune.rebuild(small, plan, inplace=True)
    follow(small_optimizer, small, plan)
    for _ in range(10):
        fit(model, optimizer, x, 1, pruner.step)
        fit(small, small_optimizer, x)
        torch.testing.assert_close(model(x), small(x), rtol=0, atol=1e-8)
    pruner.finish()
    fit(model, optimizer, x, 3)
    fit(small, small_optimizer, x, 3)
    torch.testing.assert_close(model(x), small(x), rtol=0, atol=1e-8)


def test_masked_channels_of_a_block_come_back():
    model, x, _ = double("grouped")
    dense = copy.deepcopy(model)
    pruner = Pruner(model, x, schedule=lambda step: 0.5 if step == 1 else 0.0, columns="free")
    pruner.step()
    assert not torch.equal(model.b.weight, dense.b.weight)
    pruner.step()
    assert_same_state(model, dense)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), lambda p: torch.optim.Adafactor(p, 1e-2)])
@pytest.mark.parametrize("when", ["before", "after", "apart"])
def test_state_follows(name, make, when):
    model, x, _ = double(name)
    optimizer = make(model.parameters())
    fit(model, optimizer, x, 2)
    wide = {n: optimizer.state[p].copy() for n, p in model.named_parameters()}
    plan = graphprune.trace(model, x).plan(0.5, columns="free")
    if when == "before":
        follow(optimizer, model, plan)
    small = graphprune.rebuild(model, plan, inplace=when != "apart")
    follow(optimizer, model, plan, small=small if when == "apart" else None)
    for tensor, parameter in small.named_parameters():
        for key, value in optimizer.state[parameter].items():
            wanted = wide[tensor][key]
            if isinstance(wanted, torch.Tensor) and wanted.dim():
                wanted = sliced(wanted, tensor, plan)
            assert torch.equal(torch.as_tensor(wanted), torch.as_tensor(value)), (tensor, key)
    fit(small, optimizer, x)
    follow(optimizer, small, plan)  # follows already


def test_state_that_has_no_rows_cannot_be_sliced_block_by_block():
    model, x, _ = double("grouped")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.state[model.b.weight]["mean"] = torch.ones(1, 8, 1, 1)
    plan = graphprune.trace(model, x).plan(0.5, columns="free")
    with pytest.raises(InputError, match=r"'b.weight' .* 'mean' of shape \[1, 8, 1, 1\]"):
        follow(optimizer, model, plan)


@pytest.mark.parametrize("name", FREE)
def test_rounds_compose_and_are_rewound(name, tmp_path):
    model, x, options = double(name)
    untrained = copy.deepcopy(model)

    def train(small):
        fit(small, torch.optim.SGD(small.parameters(), 0.01), x, 2)

    def evaluate(small):
        return -small(x).square().mean()

    def run():
        return iterate(
            model, 3, train, evaluate, sparsity=lambda n: (0.25, 0.5, 0.75)[n],
            example_inputs=x, columns="free", folder=tmp_path, **options,
        )  # fmt: skip

    outcome = run()
    assert outcome.plan.free_columns
    graphprune.verify(model, graphprune.rebuild(model, outcome.plan), x)
    assert_same_state(run().model, outcome.model)  # from the folder
    small = RewindPoint(untrained).rewind_weights(outcome.model)
    assert_same_parameters(small, graphprune.rebuild(untrained, outcome.plan))


@pytest.mark.parametrize("name", MASKABLE)
def test_tickets_and_controls_have_the_same_widths(name):
    model, x, _ = double(name)

    def train(small, step):
        fit(small, torch.optim.SGD(small.parameters(), 0.01), x)

    found = lottery(
        RewindPoint(model), train, lambda small: -small(x).square().mean(), sparsity=0.5,
        rounds=2, example_inputs=x, columns="free",
    )  # fmt: skip
    assert found.ticket.graphprune_plan.free_columns
    shapes = [parameter.shape for parameter in found.ticket.parameters()]
    for control in found.controls.values():
        assert [parameter.shape for parameter in control.parameters()] == shapes


@pytest.mark.parametrize("name", MASKABLE)
def test_growing_presses_what_leaves_and_nothing_else(name):
    model, x, _ = double(name)
    plan = graphprune.trace(model, x).plan(0.5, columns="free")
    Growing(model, plan, strength=1.0).add_gradients()
    masked = graphprune.mask(model, plan)
    for tensor, parameter in model.named_parameters():
        left = masked.get_parameter(tensor)
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.equal(found, parameter - left), tensor


def test_features_are_compared_with_the_channels_of_every_block():
    model, x, _ = double("grouped")
    model.eval()
    small = graphprune.rebuild(model, 0.5, x, columns="free", keep="b")
    kept = {(s.tensor, s.dim): s for s in small.graphprune_plan.slots}["a.weight", 0].kept
    assert kept[:4] != tuple(channel - 8 for channel in kept[4:])
    distil = Distillation(model, alpha=1.0, soft=lambda *_: torch.zeros(()), features=["a"])
    wanted = graphprune.training.distil.relative_error(small.a(x), model.a(x)[:, list(kept)])
    torch.testing.assert_close(distil(small, (x,)), wanted)
