"""What users test their models with: random plans, a table, the smallest plan that fails."""

import builtins
import sys

import pytest
import torch
import torchvision
from hypothesis import given, settings
from torch import nn

import graphprune
from graphprune import testing
from graphprune.errors import CheckFailed, InputError
from graphprune.testing import STEPS, check, plans


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2),
        nn.Flatten(), nn.Linear(8 * 16, 3),
    )  # fmt: skip


X = torch.zeros(2, 2, 8, 8)


def test_every_step_is_tried_with_every_plan_and_kind():
    model = net().train()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    report = check(model, X, plans=40, seed=1)
    assert {step: report.tried[step] for step in STEPS} == dict.fromkeys(STEPS, 40)
    assert set(report.kinds) == {"of one round", "of two rounds", "with columns of their own"}
    assert report.difference < 1e-10
    assert all(step in str(report) for step in STEPS)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_the_same_seed_tries_the_same_plans(monkeypatch):
    def tried(seed):
        found = []
        monkeypatch.setattr(testing, "verify", lambda model, small, *_, **__: _noted(small, found))
        check(net(), X, plans=5, seed=seed)
        return found

    def _noted(small, found):
        found.append(small.graphprune_plan.to_json())
        return graphprune.verify(net(), small, X, dtype=torch.float32, tolerance=1.0)

    assert tried(0) == tried(0) != tried(1)


def spoilt(model, plan):
    """An engine that is wrong as soon as three channels of a group leave."""
    small = graphprune.rebuild(model, plan)
    if any(group.size - len(group.kept) >= 3 for group in plan.groups):
        with torch.no_grad():
            small[0].weight += 1
    return small


def test_a_wrong_engine_is_caught_with_the_smallest_plan(monkeypatch):
    monkeypatch.setattr(testing, "rebuild", spoilt)
    with pytest.raises(CheckFailed, match="fails at 'verify'") as caught:
        check(net(), X, plans=30)
    error = caught.value
    assert error.step == "verify"
    assert isinstance(error.__cause__, graphprune.errors.VerificationError)
    assert [g.size - len(g.kept) for g in error.plan.groups if len(g.kept) < g.size] == [3]
    assert str(error.plan) in str(error)


def shrunk(model, plan):
    return graphprune.rebuild(model, plan)


BROKEN = {
    "run": ("rebuild", lambda model, plan: nn.Sequential(shrunk(model, plan), nn.Flatten(0))),
    "save and load": ("load", lambda path, model: graphprune.rebuild(model, 0.5, X)),
    "original untouched": ("load", lambda path, model: _touched(path, model)),
}  # fmt: skip


def _touched(path, model):
    small = graphprune.load(path, model)
    with torch.no_grad():
        model[0].bias += 1
    return small


@pytest.mark.parametrize("step", BROKEN)
def test_every_step_can_fail(step, monkeypatch):
    name, wrong = BROKEN[step]
    monkeypatch.setattr(testing, name, wrong)
    with pytest.raises(CheckFailed) as caught:
        check(net(), X, plans=3)
    assert caught.value.step == step


def test_plans_shrink_to_the_one_that_removes_nothing():
    graph = graphprune.trace(net(), X)
    seen = []

    @settings(max_examples=20, database=None, deadline=None, report_multiple_bugs=False)
    @given(plans(graph, rounds=1))
    def fails(plan):
        seen.append(plan.removed)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert seen[-1] == 0


class Odd(nn.Module):
    """Loses any number of channels but an odd one, which its code does not follow."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x):
        left, right = self.a(x).chunk(2, -1)
        return self.b(left * right)


def test_pairs_and_torchvision():
    assert check(Odd(), torch.zeros(2, 4), plans=10).tried["verify"] == 10
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=5)
    report = check(model, torch.zeros(2, 3, 32, 32), plans=2, dtype=torch.float32)
    assert report.tried["original untouched"] == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"plans": 0}, "plans must be a positive int, not 0"),
        ({"plans": True}, "plans must be a positive int, not True"),
        ({"model": nn.Sequential(nn.Linear(4, 2))}, "no channel of this model can be removed"),
    ],
)
def test_wrong_arguments(arguments, text):
    options = {"model": net(), "plans": 3, **arguments}
    inputs = torch.zeros(1, 4) if "model" in arguments else X
    with pytest.raises(InputError, match=text):
        check(options["model"], inputs, plans=options["plans"])


def test_wrong_rounds():
    with pytest.raises(InputError, match="rounds must be a positive int, not 0"):
        plans(graphprune.trace(net(), X), rounds=0)


def test_without_hypothesis(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "hypothesis":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "hypothesis")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "graphprune\[testing\]"'):
        check(net(), X)
