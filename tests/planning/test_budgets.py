"""Budgets: foreseen costs are the measured ones, targets hold, constraints hold with them."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.strategies import kept_channels, specs
from support.zoo import ZOO
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import graphprune
from graphprune.errors import InputError, PruningWarning
from graphprune.measurement import measure
from graphprune.planning.costs import Costs, cost, peak

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
QUANTITIES = ("macs", "params", "bytes", "memory")
X = torch.zeros(1, 3, 16, 16)


class Residual(nn.Module):
    """Three stages of residual blocks, a grouped convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.inner = nn.ModuleList(nn.Conv2d(32, 48, 3, padding=1) for _ in range(3))
        self.outer = nn.ModuleList(nn.Conv2d(48, 32, 1) for _ in range(3))
        self.grouped = nn.Conv2d(32, 64, 3, padding=1, groups=4)
        self.hidden = nn.Linear(64, 40)
        self.fc = nn.Linear(40, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        for inner, outer in zip(self.inner, self.outer):
            x = x + outer(F.relu(inner(x)))
        x = F.relu(self.grouped(x)).mean((2, 3))
        return self.fc(F.relu(self.hidden(x)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture(scope="module")
def graph(net):
    return graphprune.trace(net, X)


def costs_of(plan):
    return {"macs": plan.after.macs, "params": plan.after.params, "bytes": plan.after.bytes}


def sizes(plan):
    return {group.layers[0]: len(group.kept) for group in plan.groups}


# --- foreseen costs ---------------------------------------------------------------------------


def alike(graph):
    """Whether it is all one to the memory which channel of a group leaves: counts then say it."""

    def peak_without(group, channel):
        rest = tuple(other for other in range(group.size) if other != channel)
        return peak(graph.analysis, graph.analysis.alive({group.name: rest}))

    several = [group for group in graph.groups if group.size > 1]
    return all(len({peak_without(g, channel) for channel in range(g.size)}) == 1 for g in several)


def assert_foreseen(graph, kept, but=()):
    """The polynomials, the shapes of all values, and the shrunk model agree."""
    known = [name for name in QUANTITIES if name not in but]
    counts = np.array([len(kept.get(g.name, range(g.size))) for g in graph.groups], float)
    costs = Costs(graph.analysis, known)
    alive = graph.analysis.alive(kept)
    assert costs.of(counts) == {name: costs.exact(name, alive) for name in known}


@given(specs(), st.data())
@settings(max_examples=15)
def test_polynomials_are_exact_on_drawn_networks(spec, data):
    model, inputs = spec.build(), spec.inputs()
    graph = graphprune.trace(model, inputs)
    assume(graph.groups)
    kept = data.draw(kept_channels(graph))
    assert_foreseen(graph, kept, but=() if alike(graph) else {"memory"})
    plan = graph.plan_of(kept)
    small = measure(graphprune.rebuild(model, plan), inputs, latency=False)
    assert (small.macs, small.parameters, small.bytes) == tuple(
        costs_of(plan)[name] for name in ("macs", "params", "bytes")
    )
    assert small.activation_bytes == peak(graph.analysis, graph.analysis.alive(kept))


@pytest.mark.parametrize("name", sorted(ZOO)[::12])
def test_polynomials_are_exact_on_the_zoo(name):
    entry = ZOO[name]
    graph = graphprune.trace(entry.build(), entry.inputs())
    generator = np.random.default_rng(0)
    for _ in range(2):
        kept = {
            group.name: tuple(range(int(generator.integers(1, group.size + 1))))
            for group in graph.groups
        }
        assert_foreseen(graph, kept)


def test_the_gradient_is_that_of_the_costs(graph):
    costs = Costs(graph.analysis, ("macs", "params"))
    counts = costs.full - 2
    for name in ("macs", "params"):
        slopes = costs.gradient(name, counts)
        for group in range(len(counts)):
            step = np.eye(len(counts))[group]
            # each group occurs at most twice in a product, so that central differences are exact
            change = costs.of(counts + step)[name] - costs.of(counts - step)[name]
            assert slopes[group] == pytest.approx(change / 2)


def test_costs_of_the_whole_model(net, graph):
    costs = Costs(graph.analysis, QUANTITIES)
    found, measured = costs.of(costs.full), measure(net, X, latency=False)
    assert found["macs"] == measured.macs
    assert found["params"] == measured.parameters
    assert found["bytes"] == measured.bytes
    assert found["memory"] == measured.activation_bytes
    assert cost(graph.analysis).macs == measured.macs


# --- targets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", ["macs", "params", "bytes"])
@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_targets_are_met_within_one_percent(net, graph, quantity, scope):
    reached = []
    for share in (0.15, 0.3, 0.5, 0.501, 0.8, 1.0):
        plan = graph.plan(target={quantity: share}, scope=scope)
        before = {
            "macs": plan.before.macs,
            "params": plan.before.params,
            "bytes": plan.before.bytes,
        }
        limit = share * before[quantity]
        assert 0.99 * limit <= costs_of(plan)[quantity] <= limit
        reached.append(costs_of(plan)[quantity])
    assert reached == sorted(reached)
    assert plan.removed == 0, "a target of everything removes nothing"
    small = graphprune.rebuild(net, graph.plan(target={quantity: 0.4}, scope=scope))
    measured, plan = measure(small, X, latency=False), small.graphprune_plan
    assert (measured.macs, measured.parameters) == (plan.after.macs, plan.after.params)
    assert graphprune.verify(net, small, X).difference < 1e-10


@given(specs(), st.sampled_from(["macs", "params", "memory"]), st.data())
@settings(max_examples=15)
def test_targets_hold_on_drawn_networks(spec, quantity, data):
    model, inputs = spec.build(), spec.inputs()
    graph = graphprune.trace(model, inputs)
    assume(graph.groups)
    whole = Costs(graph.analysis, QUANTITIES)
    before = whole.of(whole.full)[quantity]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)
        least = graph.plan(0.9999, criterion="random")  # norms over channels keep two
    smallest = graph.analysis.alive({group.name: group.kept for group in least.groups})
    for share in data.draw(st.lists(st.floats(0.2, 1.0), min_size=1, max_size=3)):
        if whole.exact(quantity, smallest) > share * before:
            with pytest.raises(InputError, match="cannot be met"):
                graph.plan(target={quantity: share}, criterion="random")
            continue
        plan = graph.plan(target={quantity: share}, criterion="random")
        alive = graph.analysis.alive({group.name: group.kept for group in plan.groups})
        assert whole.exact(quantity, alive) <= share * before


def test_several_targets_all_hold(graph):
    plan = graph.plan(target={"macs": 0.6, "params": 0.4, "memory": 0.8})
    alive = graph.analysis.alive({group.name: group.kept for group in plan.groups})
    whole = np.ones_like(alive)
    assert plan.after.macs <= 0.6 * plan.before.macs
    assert 0.99 * 0.4 * plan.before.params <= plan.after.params <= 0.4 * plan.before.params
    assert peak(graph.analysis, alive) <= 0.8 * peak(graph.analysis, whole)


def test_memory_is_met_without_needless_removal(net, graph):
    """What does not count at the peak keeps its channels."""
    plan = graph.plan(target={"memory": 0.75})
    small = measure(graphprune.rebuild(net, plan), X, latency=False)
    assert small.activation_bytes <= 0.75 * measure(net, X, latency=False).activation_bytes
    assert sizes(plan)["hidden"] == 40


def test_costs_foreseen_too_low_are_corrected(graph, monkeypatch):
    right = Costs.of
    monkeypatch.setattr(
        Costs, "of", lambda self, counts: {n: 0.9 * v for n, v in right(self, counts).items()}
    )
    plan = graph.plan(target={"macs": 0.5})
    assert 0.98 * 0.5 * plan.before.macs <= plan.after.macs <= 0.5 * plan.before.macs


def test_absolute_targets_and_texts(graph):
    macs = graph.plan(target={"macs": 0.5}).before.macs
    wanted = graph.plan(target={"macs": 0.5})
    assert graph.plan(target={"macs": macs // 2}).groups == wanted.groups
    assert graph.plan(target={"macs": "50 %"}).groups == wanted.groups
    assert graph.plan(target={"params": "30k"}).after.params <= 30_000
    assert graph.plan(target={"bytes": "0.1 MB"}).after.bytes <= 100_000


def test_plans_are_deterministic(net, graph):
    again = graphprune.trace(copy.deepcopy(net), X)
    for options in ({"scope": "global"}, {"criterion": "random", "seed": 3}, {"round_to": 8}):
        plan = graph.plan(target={"macs": 0.37}, **options)
        assert again.plan(target={"macs": 0.37}, **options) == plan
        assert (
            graphprune.rebuild(net, None, X, target={"macs": 0.37}, **options).graphprune_plan
            == plan
        )


def test_the_plan_says_what_was_asked_for(graph):
    plan = graph.plan(target={"macs": 0.5}, round_to=8, min_kept=0.25)
    said = graphprune.Plan.from_json(plan.to_json()).request
    assert said["target"] == {"macs": 0.5}
    assert (said["round_to"], said["min_kept"]) == (8, {"*": 0.25})


# --- constraints ------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["local", "global"])
def test_bounds_hold(graph, scope):
    for options in ({"target": {"macs": 0.35}, "min_kept": 0.4}, {"ratio": 0.6, "min_kept": 0.7}):
        plan = graph.plan(scope=scope, **options)
        assert all(len(group.kept) >= options["min_kept"] * group.size for group in plan.groups)
    plan = graph.plan(target={"macs": 0.3}, scope=scope, max_kept={"inner.*": 0.5}, min_kept=0.1)
    assert all(sizes(plan)[f"inner.{n}"] <= 24 for n in range(3))
    plan = graph.plan(0.1, scope=scope, max_kept=0.75)
    assert all(len(group.kept) <= 0.75 * group.size for group in plan.groups)


def test_a_ratio_of_channels_that_stay_is_told(graph):
    with pytest.warns(PruningWarning, match="'fc' names no channels that may leave\n  model out"):
        assert graph.plan(ratios={"fc": 0.5}).removed == 0
    with pytest.warns(PruningWarning, match=r"'inner.\*' names no channels that may leave"):
        graph.plan(ratios={"inner.*": 0.5}, keep="inner.*")


def test_patterns_name_masked_layers_by_what_they_write(net):
    """A mask is read with its weight: ``keep`` spares the outputs of a layer, not its inputs."""
    masked = copy.deepcopy(net)
    for layer in (masked.inner[0], masked.outer[0]):
        prune.l1_unstructured(layer, "weight", 0.3)
    graph = graphprune.trace(masked, X)
    group = graph.group_of("inner.0")
    assert (group.size, group.layers) == (48, ("inner.0", "outer.0"))
    whole = [g.layers for g in graph.plan(0.5, keep="inner.0").groups if len(g.kept) == g.size]
    assert whole == [group.layers]


def test_global_pruning_empties_no_layer(graph):
    def lopsided(group, tensors, generator):
        return torch.full((group.size,), 1.0 + 100 * (group.layers[0] == "stem"))

    plan = graph.plan(0.9, scope="global", criterion=lopsided, normalise="none")
    assert min(len(group.kept) for group in plan.groups) == 1


def test_ratios_by_pattern(graph):
    plan = graph.plan(0.25, ratios={"inner.*": 0.5, "inner.2": 0.0})
    found = sizes(plan)
    assert [found[f"inner.{n}"] for n in range(3)] == [24, 24, 48]
    assert found["stem"] == 6
    plan = graph.plan(ratios={"inner.1": 0.5})
    assert plan.removed == 24
    fixed = graph.plan(target={"macs": 0.5}, ratios={"inner.*": 0.5})
    assert [sizes(fixed)[f"inner.{n}"] for n in range(3)] == [24] * 3
    group = graph.group_of("inner.0")
    assert len(graph.plan(ratios={group.name: 0.75}).groups[1].kept) == 12


@pytest.mark.parametrize("round_to", [8, 16])
def test_widths_are_multiples_and_the_budget_holds(net, graph, round_to):
    for options in ({"target": {"macs": 0.5}}, {"ratio": 0.4}):
        plan = graph.plan(**options, round_to=round_to)
        small = graphprune.rebuild(net, plan)
        widths = [c.out_channels for c in (small.stem, *small.inner, *small.outer, small.grouped)]
        assert not any(width % round_to for width in widths)
        if "target" in options:
            assert plan.after.macs <= 0.5 * plan.before.macs
            assert plan.after.macs >= 0.4 * plan.before.macs


class Attention(nn.Module):
    """Eight heads of 32, and a chunked feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(64, 3 * 256), nn.Linear(256, 64)
        self.up, self.down = nn.Linear(64, 2 * 96), nn.Linear(96, 64)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        gate, value = self.up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


def test_widths_inside_heads_and_halves():
    model, x = Attention().eval(), torch.randn(2, 5, 64)
    plan = graphprune.trace(model, x, attention="head_dim").plan(0.4, round_to=8)
    small = graphprune.rebuild(model, plan)
    assert small.qkv.out_features % 64 == 0, "each of 8 heads is a multiple of 8 wide"
    assert small.qkv.out_features < model.qkv.out_features
    assert small.up.out_features == 2 * small.down.in_features
    assert small.down.in_features in (56, 64)
    plan = graphprune.trace(model, x).plan(0.4, round_to=32)
    heads = plan.groups[0]
    assert (heads.size, len(heads.kept)) == (8, 5), "any number of heads of 32 is a multiple of 32"


def test_uniform_widths(graph):
    plan = graph.plan(target={"macs": 0.5}, scope="global", uniform=True, criterion="random")
    assert len({sizes(plan)[f"inner.{n}"] for n in range(3)}) == 1
    assert len({group.kept for group in plan.groups[1:4]}) == 3, "but channels of their own"
    free = graph.plan(target={"macs": 0.5}, scope="global", criterion="random")
    assert len({sizes(free)[f"inner.{n}"] for n in range(3)}) > 1


def test_isomorphic_groups_are_ranked_among_themselves(graph):
    def lopsided(group, tensors, generator):
        score = torch.rand(group.size, generator=generator)
        return score + 10 * (group.layers[0] == "grouped") + (group.layers[0] == "inner.2")

    options = {"criterion": lopsided, "normalise": "none"}
    plan = graph.plan(0.5, scope="isomorphic", **options)
    found = sizes(plan)
    assert sum(found[f"inner.{n}"] for n in range(3)) == 72
    assert found["inner.2"] == 48, "the best of the three loses nothing"
    assert (found["grouped"], found["stem"]) == (8, 4)
    assert sizes(graph.plan(0.5, scope="global", **options))["grouped"] == 16


def test_normalised_by_macs(graph):
    plan = graph.plan(target={"macs": 0.5}, scope="global", normalise="macs")
    assert plan.after.macs <= 0.5 * plan.before.macs


# --- refusals ---------------------------------------------------------------------------------


def test_a_target_out_of_reach_says_what_stands_in_the_way(graph):
    with pytest.raises(
        InputError, match=r"at most .* MACs cannot be met: the nearest is"
    ) as caught:
        graph.plan(target={"macs": 1e-4}, min_kept=0.5, keep="inner.0")
    text = str(caught.value)
    assert "what is left then: inner.0 (" in text
    assert "model output: fc" in text
    assert "without min_kept," in text
    assert "without keep," in text
    assert "without round_to" not in text
    with pytest.raises(InputError, match="parameters cannot be met"):
        graph.plan(target={"params": 12})
    with pytest.raises(InputError, match="peak bytes of activations cannot be met"):
        graph.plan(target={"memory": 100})


def test_a_plan_takes_no_options(net, graph):
    with pytest.raises(InputError, match="a plan was given, which is complete: leave out round_to"):
        graphprune.rebuild(net, graph.plan(0.5), round_to=8)
