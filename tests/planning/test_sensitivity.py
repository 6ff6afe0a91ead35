"""The drop of an evaluation by groups, and plans made from it."""

import numpy as np
import pytest
import torch
from support.comparing import untouched
from torch import nn

import graphprune
from graphprune.errors import InputError
from graphprune.planning.sensitivity import Curve, Sensitivity

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Planted(nn.Module):
    """Two hidden layers: the second half of the first one is never read."""

    def __init__(self) -> None:
        super().__init__()
        self.dull, self.read = nn.Linear(6, 16), nn.Linear(16, 12)
        self.keen, self.out = nn.Linear(12, 12), nn.Linear(12, 3)
        with torch.no_grad():
            self.read.weight[:, 8:] = 0
            self.dull.weight[8:] *= 1e-3  # so that their scores are the lowest

    def forward(self, x):
        return self.out(torch.tanh(self.keen(torch.tanh(self.read(torch.tanh(self.dull(x)))))))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Planted().double().eval()


@pytest.fixture(scope="module")
def measured(net):
    x = X.double()
    with torch.no_grad():
        wanted = net(x)
    graph = graphprune.trace(net, x)
    seen = []

    def evaluate(model):
        with torch.no_grad():
            seen.append(sum(p.numel() for p in model.parameters()))
            return 1 - float((model(x) - wanted).abs().mean())

    with untouched(net):
        found = graph.sensitivity(net, evaluate, (0.5, 0.25))
    assert seen[0] == sum(p.numel() for p in net.parameters())
    assert len(seen) == 1 + 2 * len(graph.groups), "the whole model, and one for each fraction"
    return graph, found


def test_drops_by_hand(measured):
    _, found = measured
    assert found.base == 1
    drops = {curve.key: curve for curve in found.curves}
    assert list(drops) == ["dull", "read", "keen"]
    assert drops["dull"].ratios == (0.25, 0.5)
    assert drops["dull"].drops == pytest.approx((0, 0), abs=1e-12)
    assert drops["keen"].drops[1] > 0.01


def test_it_prints_and_plots(measured, tmp_path):
    _, found = measured
    lines = str(found).splitlines()
    assert lines[0] == "drop of the evaluation from 1"
    assert lines[1].split() == ["group", "of", "channels", "-25%", "-50%", "layers"]
    assert lines[3].startswith("dull")
    for suffix in ("svg", "png"):
        path = found.plot(tmp_path / f"drops.{suffix}")
        assert path.stat().st_size > 1000
    with pytest.raises(InputError, match="cannot draw"):
        found.plot(tmp_path / "drops.nothing")


def test_it_is_an_allocation(net, measured):
    graph, found = measured
    ratios = found.allocation(1e-6)
    assert ratios == {"dull": 0.5, "read": 0.0, "keen": 0.0}
    plan = graph.plan(ratios=ratios)
    assert plan.removed == 8
    small = graphprune.rebuild(net, plan)
    assert torch.allclose(small(X.double()), net(X.double()))
    with pytest.raises(InputError, match="max_drop must be at least 0, got -1"):
        found.allocation(-1)


def test_groups_that_were_not_measured_come_last(measured):
    graph, found = measured
    some = type(found)(found.base, tuple(c for c in found.curves if c.key == "dull"))
    sizes = {group.layers[0]: group.size for group in graph.groups}
    left = {}
    for target in (0.7, 0.2):
        plan = graph.plan(target={"params": target}, ratios=some)
        left[target] = {group.layers[0]: len(group.kept) for group in plan.groups}
        assert 0.9 * target <= plan.after.params / plan.before.params <= target
    assert left[0.7]["dull"] < sizes["dull"]
    assert left[0.2]["dull"] == 1, "all of it leaves first"
    assert left[0.2]["read"] < sizes["read"]
    assert left[0.2]["keen"] < sizes["keen"]
    plan = graph.plan(0.5, ratios=type(found)(found.base, ()))
    assert plan.removed == sum(sizes.values()) // 2, "as an even ratio where nothing was measured"


def test_a_budget_takes_first_what_costs_least(measured):
    graph, found = measured
    plan = graph.plan(target={"params": 0.7}, ratios=found)
    assert plan.after.params <= 0.7 * plan.before.params
    kept = {group.layers[0]: len(group.kept) for group in plan.groups}
    even = {group.layers[0]: len(group.kept) for group in graph.plan(target={"params": 0.7}).groups}
    assert kept["dull"] < even["dull"], "what costs nothing leaves first"
    assert kept["read"] + kept["keen"] > even["read"] + even["keen"]
    assert min(kept["read"], kept["keen"]) >= 10
    plan = graph.plan(0.3, ratios=found)
    assert plan.removed == 12, "a ratio is that of all channels, whatever drops are measured in"
    assert len(plan.groups[0].kept) < min(len(group.kept) for group in plan.groups[1:])
    with pytest.raises(InputError, match="says where channels leave first, not how many"):
        graph.plan(ratios=found)


def test_curves_between_and_beyond_what_was_measured():
    curve = Curve("a", ("a",), 10, (0.2, 0.4), (1.0, 0.5), (("a.weight", 0),))
    assert curve.at(np.array([0.0, 0.1, 0.2, 0.3, 0.4])).tolist() == [0, 0.5, 1, 1, 1]
    assert curve.at(np.array([0.6]))[0] == pytest.approx(1.5), "never flat where it is unknown"
    found = Sensitivity(90.0, (curve,))
    assert found.allocation(0.5) == {"a": 0.1}
    assert found.allocation(100) == {"a": 0.4}, "nothing was measured beyond"
    level = found.levels([("a.weight", 0)], 10)
    assert (np.diff(level) > 0).all()
    assert level[-1] == np.inf
    assert found.levels([("b.weight", 0)], 10) is None


class Bare(nn.Module):
    """All parameters in one module; of the second group four channels are read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(6, 16)), nn.Parameter(torch.randn(16, 16))
        self.three = nn.Parameter(torch.randn(16, 3))
        with torch.no_grad():
            self.three[4:] = 0
            self.two[:, 4:] *= 1e-3

    def forward(self, x):
        return torch.tanh(torch.tanh(x @ self.one) @ self.two) @ self.three


def test_groups_of_the_same_layers_are_told_apart():
    torch.manual_seed(0)
    net, x = nn.Sequential(Bare()).double(), X.double()
    graph = graphprune.trace(net, x)
    assert [(group.layers, group.size) for group in graph.groups] == [(("0",), 16)] * 2
    found = graph.sensitivity(net, lambda model: -float((model(x) - net(x)).detach().abs().mean()))
    plan = graph.plan(target={"params": 0.75}, ratios=found)
    first, second = (len(group.kept) for group in plan.groups)
    assert first == 16
    assert 4 <= second < 16


@pytest.mark.parametrize(
    ("fractions", "value", "message"),
    [
        ((), 1.0, r"fractions must be different numbers in \(0, 1\), got \[\]"),
        ((0.5, 0.5), 1.0, "fractions must be different"),
        ((0.0,), 1.0, "fractions must be different"),
        ((1.5,), 1.0, r"each of fractions must be in \[0, 1\)"),
        ((0.5,), float("nan"), "must return a finite number, .* got nan"),
        ((0.5,), None, "must return a finite number, .* got None"),
    ],
)
def test_what_is_refused(net, measured, fractions, value, message):
    graph, _ = measured
    with pytest.raises(InputError, match=message):
        graph.sensitivity(net, lambda model: value, fractions)


def test_another_model_is_refused(measured):
    graph, _ = measured
    with pytest.raises(InputError, match="not of the architecture that was traced"):
        graph.sensitivity(nn.Linear(3, 4), lambda model: 1.0, (0.5,))
