"""Gradual pruning: masked training is rebuilt training, and everything follows."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparing import assert_close, assert_same_state, untouched
from support.loops import (
    OPTIMIZERS,
    Residual,
    Transformer,
    X,
    Y,
    assert_same_parameters,
    build,
    masked,
    train,
    twin,
)
from support.strategies import specs
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import graphprune
from graphprune.errors import InputError, PlanError, PruningWarning
from graphprune.training import Pruner, cubic, follow, linear, one_shot


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((Residual, name) for name in OPTIMIZERS), *((Transformer, n) for n in list(OPTIMIZERS)[:3])],
)
def test_masked_training_is_rebuilt_training(name, kind):
    make = OPTIMIZERS[name]
    # the stream of a transformer stays whole in the soft phase
    options = {"keep": "embed"} if kind is Transformer else {}
    model, optimizer, pruner = masked(make, build(kind), **options)
    small, small_optimizer = twin(model, optimizer)
    plan = pruner.soft.plan
    graphprune.rebuild(small, plan, inplace=True)
    follow(small_optimizer, small, plan)

    wide_losses, _ = train(model, optimizer, pruner, 10)
    narrow_losses, _ = train(small, small_optimizer, steps=10)
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(
        p.numel() for p in model.parameters()
    )
    torch.testing.assert_close(wide_losses, narrow_losses, rtol=0, atol=1e-8)
    torch.testing.assert_close(model(X), small(X), rtol=0, atol=1e-8)

    assert pruner.finish() is model
    for (name, ours), theirs in zip(model.named_parameters(), small.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8, msg=name)
        for key, value in optimizer.state[ours].items():
            other = small_optimizer.state[theirs][key]
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, other, rtol=0, atol=1e-8, msg=f"{name} {key}")
    again, _ = train(model, optimizer, steps=3)
    torch.testing.assert_close(again, train(small, small_optimizer, steps=3)[0], rtol=0, atol=1e-8)


def test_a_leak_would_be_seen():
    """Without holding the masks, masked training is another training."""
    make = OPTIMIZERS["sgd"]
    model, optimizer, pruner = masked(make)
    other, other_optimizer = twin(model, optimizer)
    train(model, optimizer, pruner, 10)
    train(other, other_optimizer, None, 10)
    assert not torch.allclose(model(X), other(X), rtol=0, atol=1e-4)


@settings(max_examples=12)
@given(spec=specs(most=8), seed=st.integers(0, 9))
def test_masked_training_is_rebuilt_training_for_any_network(spec, seed):
    model = spec.build().train()
    inputs = spec.inputs()
    x = torch.cat([inputs, inputs.flip(0) + 0.5])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    try:
        pruner = Pruner(model, inputs, optimizer, schedule=0.5, criterion="random", seed=seed)
    except InputError:  # no channel can be removed
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)
        pruner.step()
        plan = pruner.soft.plan
        if plan is None:
            return
        small, small_optimizer = twin(model, optimizer)
        graphprune.rebuild(small, plan, inplace=True)
    for _ in range(3):
        outs = []
        for net, opt in ((model, optimizer), (small, small_optimizer)):
            opt.zero_grad()
            found = net(x)
            found = found if isinstance(found, tuple) else (found,)
            sum(out.square().mean() for out in found).backward()
            opt.step()
            outs.append(torch.cat([out.detach().flatten() for out in found]))
        pruner.step()
        assert_close(outs[1], outs[0], 1e-8)


def test_the_soft_phase_is_the_masked_model():
    model, _, pruner = masked(OPTIMIZERS["adam"], steps=7)
    reference = graphprune.mask(model, pruner.soft.plan)
    assert_same_parameters(reference, model)
    for name, mask in pruner.masks.items():
        parameter = model.get_parameter(name)
        assert mask.shape == parameter.shape
        assert not parameter[~mask].any()
        assert parameter.grad is None or not parameter.grad[~mask].any()


def test_making_a_pruner_changes_nothing():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with untouched(model):
        Pruner(model, X[:2], optimizer, schedule=0.5, copies=copy.deepcopy(model))


def test_masked_channels_come_back_with_the_weights_they_had():
    model = build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = Pruner(model, X[:2], optimizer, schedule=lambda step: 0.5 if step < 4 else 0.0)
    train(model, optimizer, None, 2)
    dense = copy.deepcopy(model.state_dict())
    pruner.step()
    masks = pruner.masks
    train(model, optimizer, pruner, 2)
    assert not model.stem.weight[~masks["stem.weight"]].any()
    train(model, optimizer, pruner, 1)
    assert pruner.masks == {}
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        assert torch.equal(parameter[~mask], dense[name][~mask])
        assert not torch.equal(parameter[mask], dense[name][mask])
    train(model, optimizer, pruner, 2)
    assert not torch.equal(model.stem.weight, dense["stem.weight"])


def test_a_channel_that_became_more_important_takes_the_place_of_another():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(4, 2))
    sparsity = iter([0.25, 0.5])
    pruner = Pruner(net, torch.ones(1, 2), schedule=lambda step: next(sparsity))
    pruner.step()
    assert net[0].weight[:, 0].tolist() == [0, 2, 3, 4]
    with torch.no_grad():
        net[0].weight[1:3] = 0.1  # now less important than the masked one was
    pruner.step()
    assert net[0].weight[:, 0].tolist() == [1, 0, 0, 4]


def test_groups_under_a_norm_stay_whole_until_the_finish():
    model = build(Transformer)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    pruner = Pruner(model, X[:2].clone(), optimizer, schedule=0.5)
    train(model, optimizer, pruner, 2)
    assert {"embed", "layers.layers.0.norm1"} <= set(pruner.whole)
    assert "embed.weight" not in pruner.masks
    assert not pruner.masks["layers.layers.0.linear1.weight"].all()
    assert "whole until the finish: embed" in str(pruner)
    pruner.finish()
    assert (model.embed.out_features, model.layers.layers[0].linear1.out_features) == (8, 12)
    assert pruner.plan.removed == 8 + 2 * 12 + 2 * 2
    train(model, optimizer, pruner, 2)
    fresh = graphprune.rebuild(build(Transformer), pruner.plan)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]


class Normalised(nn.Module):
    """Weights that are divided by their norm: zeroed, they are not numbers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.second = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def test_groups_that_zeroes_would_make_not_a_number_stay_whole_until_the_finish():
    model = build(Normalised)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    pruner = Pruner(model, X[:2], optimizer, schedule=0.5)
    assert "second.parametrizations.weight" in pruner.whole
    losses, _ = train(model, optimizer, pruner, 3)
    assert pruner.finish().second.out_channels == 4
    more, _ = train(model, optimizer, pruner, 3)
    assert torch.cat([losses, more]).isfinite().all()


def test_copies_scalers_groups_and_learning_rates_follow():
    """Everything beside the optimizer, against the same training of a small model."""
    runs = []
    for early in (True, False):
        model = build()
        norms = [*model.norm.parameters(), *model.inner_norm.parameters()]
        rest = [p for p in model.parameters() if not any(p is n for n in norms)]
        optimizer = torch.optim.AdamW(
            [{"params": rest, "lr": 1e-2}, {"params": norms, "lr": 1e-3, "weight_decay": 0.0}]
        )
        rate = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        pruner = Pruner(model, X[:2], optimizer, schedule=one_shot(0.5), copies=[ema])
        for step in range(8):
            if step == (3 if early else 7):
                pruner.finish()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), Y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            rate.step()
            ema.update_parameters(model)
            pruner.step()
        assert [g["lr"] for g in optimizer.param_groups] == [1e-2 / 16, 1e-3 / 16]
        assert rate.get_last_lr() == [1e-2 / 16, 1e-3 / 16]
        assert [len(g["params"]) for g in optimizer.param_groups] == [len(rest), len(norms)]
        assert optimizer.param_groups[0]["params"][0] is model.stem.weight
        runs.append((model, ema, scaler.get_scale()))
    (left, left_ema, scale), (right, right_ema, other) = runs
    assert scale == other
    assert int(left_ema.n_averaged) == 8
    for ours, theirs in ((left, right), (left_ema, right_ema)):
        assert sum(p.numel() for p in ours.parameters()) == 335
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8, msg=name)


# --- the end, and what comes after -----------------------------------------------------------


def test_removal_in_the_middle_of_training_by_itself():
    model = build()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    pruner = Pruner(model, X[:2], optimizer, schedule=one_shot(0.5), finish_at=3)
    train(model, optimizer, pruner, 2)
    assert model.stem.out_channels == 8
    train(model, optimizer, pruner, 4)
    assert (model.stem.out_channels, pruner.finished, pruner.steps) == (4, True, 6)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert [update.step for update in pruner.history] == [1, 3]
    assert pruner.history[-1].params == sum(p.numel() for p in model.parameters())
    assert pruner.finish() is model
    assert model.graphprune_plan == pruner.plan
    assert "channels removed (sparsity 50.0%)" in str(pruner)


def test_a_finish_before_the_end_of_the_schedule_says_so():
    model, _, pruner = masked(OPTIMIZERS["sgd"], steps=4)
    with pytest.warns(PruningWarning, match=r"finished at step 4 with a sparsity of 0.481, where"):
        pruner.finish()
    assert model.stem.out_channels == 5


def test_without_an_optimizer_and_without_a_schedule_that_removes():
    model = build()
    pruner = Pruner(model, X[:2], schedule=0.0)
    for _ in range(3):
        pruner.step()
    assert pruner.finish() is model
    assert pruner.plan is None
    assert model.stem.out_channels == 8


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_is_resumed(tmp_path, finished):
    make = OPTIMIZERS["adamw"]
    model, optimizer, pruner = masked(make)
    if finished:
        pruner.finish()
        train(model, optimizer, pruner, 1)
    parts = {"pruner": pruner, "model": model, "optimizer": optimizer}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "run.pt")

    fresh = build()
    fresh_optimizer = make(fresh.parameters())
    again = Pruner(fresh, X[:2], fresh_optimizer, schedule=cubic(0.5, end=6, frequency=2))
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    again.load_state_dict(state["pruner"])
    fresh.load_state_dict(state["model"])
    fresh_optimizer.load_state_dict(state["optimizer"])
    ours, _ = train(model, optimizer, pruner, 4)
    theirs, _ = train(fresh, fresh_optimizer, again, 4)
    assert torch.equal(ours, theirs)
    assert (again.steps, again.sparsity, again.history) == (
        pruner.steps,
        pruner.sparsity,
        pruner.history,
    )
    for name, kept in pruner.soft.aside.items():
        assert torch.equal(kept, again.soft.aside[name])
    assert pruner.finish() is model
    assert again.finish() is fresh
    assert_same_state(model, fresh)


# --- bad input -------------------------------------------------------------------------------


def refused(text, **arguments):
    model = arguments.pop("model", None) or build()
    options = {"example_inputs": X[:2], "schedule": 0.5, **arguments}
    with pytest.raises(InputError) as error:
        Pruner(model, **options)
    assert text in str(error.value), str(error.value)


def test_bad_arguments_are_refused_at_once():
    other = torch.optim.SGD(build().parameters(), 0.1)
    refused("none of the 12 parameters of the SGD is one of Residual", optimizer=other)
    refused("optimizer must be a torch.optim.Optimizer, not str", optimizer="sgd")
    refused("copies[0] is no copy of the model", copies=[nn.Linear(2, 2)])
    refused("copies[0] is no copy of the model", copies=build(Transformer))
    refused("schedule must be a sparsity", schedule="fast")
    refused("nothing would be left", schedule=cubic(1.0, end=5))
    refused("finish_at must be an int of at least 1, got 0", finish_at=0)
    refused("finish_at must be an int of at least 1, got '9'", finish_at="9")
    refused("ratio is what the schedule says", ratio=0.5)
    refused("target is what the schedule says", target={"macs": 0.5})
    refused("unknown option 'critereon'", critereon="l1")
    refused("unknown criterion 'l7'", criterion="l7")
    refused("matches no layer", keep="conv9")
    model = build()
    refused("copies[0] is no copy", model=model, copies=[model])


def test_a_schedule_that_goes_wrong_leaves_the_masks_as_they_are():
    for value, text in ((1.0, "ratio must be in [0, 1)"), (-0.5, "at step 3"), (None, "got None")):
        model = build()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        said = iter([0.5, 0.5, value, 0.25])
        pruner = Pruner(model, X[:2], optimizer, schedule=lambda step, said=said: next(said))
        train(model, optimizer, pruner, 2)
        before = pruner.masks
        aside = dict(pruner.soft.aside)
        with pytest.raises(InputError) as error:
            train(model, optimizer, pruner, 1)
        assert text in str(error.value)
        assert all(torch.equal(mask, before[name]) for name, mask in pruner.masks.items())
        assert all(torch.equal(kept, aside[name]) for name, kept in pruner.soft.aside.items())
        assert_same_parameters(graphprune.mask(model, pruner.soft.plan), model)
        train(model, optimizer, pruner, 1)
        assert pruner.sparsity == 0.25


def test_weights_that_are_not_finite_are_not_scored():
    model = build()
    pruner = Pruner(model, X[:2], schedule=linear(0.5, end=2))
    pruner.step()
    plan = pruner.soft.plan
    kept = {(slot.tensor, slot.dim): slot.kept for slot in plan.slots}["inner.weight", 0]
    with torch.no_grad():
        model.inner.weight[kept[0]] = torch.nan
    with pytest.raises(InputError, match="finite"):
        pruner.step()
    assert pruner.soft.plan is plan


def test_states_of_others_are_refused():
    _, _, pruner = masked(OPTIMIZERS["sgd"])
    state = pruner.state_dict()
    with pytest.raises(InputError, match="no state of a Pruner: aside, finished, history"):
        pruner.load_state_dict({})
    transformer = Pruner(build(Transformer), X[:2], schedule=0.5)
    with pytest.raises(PlanError, match="another architecture"):
        transformer.load_state_dict(state)
    pruner.finish()
    with pytest.raises(InputError, match="has removed its channels, the state is from before"):
        pruner.load_state_dict(state)
