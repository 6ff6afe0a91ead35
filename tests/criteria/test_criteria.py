"""Criteria: each on a case worked out by hand; the registry, aggregation, unseen groups.

The list of tests is the registry: a criterion without a case fails here.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from support.calibration import image_batches, residual
from torch import nn
from torch.nn.utils import parametrize, prune

import graphprune
from graphprune.criteria import (
    AGGREGATES,
    NORMALISATIONS,
    Apoz,
    BatchNormScale,
    Fisher,
    GeometricMedian,
    Lamp,
    Magnitude,
    Taylor,
    Wanda,
    comparable,
    criteria,
    find,
    gather,
    name_of,
    register_criterion,
    registry,
    scores,
)
from graphprune.errors import InputError, PruningWarning

ROOT = Path(__file__).parents[2]

# --- by hand -----------------------------------------------------------------------------------
# Three hidden channels: W1 = [[3, 4], [0, 0], [-1, 2]], W2 = [[1, 5, -2]], ReLU between. On the
# inputs (1, 0) and (0, 1) channel 0 is 3 and 4, channel 1 is 0 and 0, channel 2 is 0 and 2. The
# outputs are 3 and 4 - 4 = 0, the loss is the sum of the outputs, so the gradients of W2 are the
# sums of the channels, (7, 0, 2), and those of W1 are W2 where the ReLU is open: row 0 is
# (1, 1), row 2 is (0, -2); row 1 is (0, 0), as ReLU is closed at 0.

W1 = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1.0, 2.0]], dtype=torch.float64)
W2 = torch.tensor([[1.0, 5.0, -2.0]], dtype=torch.float64)
GAMMA = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
INPUTS = torch.eye(2, dtype=torch.float64)


def by_hand(norm=False):
    scale = [nn.BatchNorm1d(3, eps=0.0)] if norm else []
    net = nn.Sequential(nn.Linear(2, 3, bias=False), *scale, nn.ReLU(), nn.Linear(3, 1, bias=False))
    net = net.double().eval()
    with torch.no_grad():
        net[0].weight.copy_(W1)
        net[-1].weight.copy_(W2)
        if norm:
            net[1].weight.copy_(GAMMA)
    return net


# products of weight and gradient: W1 * G1 is (3, 4), (0, 0), (0, -4), sums 7, 0, -4;
# W2 * G2 is 7, 0, -4
root5 = math.sqrt(5)
near = math.sqrt(16 + 4)  # from (3, 4) to (-1, 2)
HAND = {
    "l1": [7, 0, 3],
    "l2": [5, 0, root5],
    "lp": [(27 + 64) ** (1 / 3), 0, 9 ** (1 / 3)],
    "linf": [4, 0, 2],
    "bn_scale": [0.5, 2, 1],
    "geometric_median": [5 + near, 5 + root5, root5 + near],
    "lamp": [1, 0, 5 / 30],  # squared norms 25, 0, 5, each over those at least as large
    "group_norm": [math.sqrt(25 + 1), 5, 3],
    "random": torch.rand(3, generator=torch.Generator().manual_seed(7), dtype=torch.float64),
    "taylor": [49 + 49, 0, 16 + 16],
    "taylor_activation": [3 + 4, 0, 0 + 4],  # activation times W2, both samples in one batch
    "fisher": [(9 + 16 + 49) / 2, 0, (16 + 16) / 2],
    "mean_activation": [3.5, 0, 1],
    "apoz": [1, 0, 0.5],
    "wanda": [0.25 * 1, 0, 1 * 4],  # variances 0.25, 0, 1
    "reconstruction": [4 * 1 * 1, 0, 2 * 4],  # samples x variance x squared weight; last: doubled
}
HAND["auto"] = HAND["reconstruction"]
# for reconstruction the channels are uncorrelated: 1 or 3, and 1 or 3
APART = torch.cartesian_prod(*[torch.tensor([1.0, 3.0])] * 2).double() @ W1[[0, 2]].inverse().T
DATA = dict.fromkeys(("auto", "reconstruction"), ([APART], 1e-3))  # a ridge is added to the moments
OPTIONS = [
    (Magnitude(0.5), [(3**0.5 + 2) ** 2, 0, (1 + 2**0.5) ** 2]),
    (Magnitude(2, side="reads"), [1, 5, 2]),
    (Magnitude(1, side="both"), [8, 5, 5]),
    (Lamp(side="reads"), [1 / 30, 25 / 25, 4 / 29]),
    (GeometricMedian(side="reads"), [4 + 3, 4 + 7, 3 + 7]),
    (Taylor("signed"), [14, 0, 8]),
    (Taylor("absolute"), [14, 0, 8]),
    (Taylor("squared", side="writes"), [49, 0, 16]),
    (Fisher(side="reads"), [49 / 2, 0, 8]),
    (Wanda(fluctuation=False), [12.5 * 1, 0, 2 * 4]),
]


def score(net, criterion, data=None, loss=None, seed=7, **options):
    graph = graphprune.trace(net, INPUTS)
    evidence = gather(net, criterion, graph.groups, data, loss)
    (found,) = scores(criterion, graph.groups, evidence, seed, **options).values()
    return found


def total(model, batch):
    return model(batch).sum()


@pytest.mark.parametrize("name", criteria())
def test_a_case_by_hand(name):
    assert name in HAND, f"give {name} a case worked out by hand"
    wanted = torch.as_tensor(HAND[name], dtype=torch.float64)
    data, tolerance = DATA.get(name, ([INPUTS], 1e-12))
    found = score(by_hand(norm=name == "bn_scale"), name, data, total)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(("criterion", "wanted"), OPTIONS, ids=lambda value: name_of(value))
def test_options_by_hand(criterion, wanted):
    found = score(by_hand(), criterion, [INPUTS], total)
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_forms_of_taylor_differ_over_batches():
    """One sample a batch: W1 * G1 sums to 3 and 4 for channel 0, the same as W2 * G2."""
    data = list(INPUTS.split(1))
    for form, wanted in (("squared", 12.5), ("signed", 3.5), ("absolute", 3.5)):
        assert float(score(by_hand(), Taylor(form, "reads"), data, total)[0]) == wanted

    def turned(model, batch):
        return model(batch).sum() * (1 if batch[0, 0] else -1)

    for form, wanted in (("squared", 12.5), ("signed", 0.5), ("absolute", 3.5)):
        assert float(score(by_hand(), Taylor(form, "reads"), data, turned)[0]) == wanted


def test_biases_are_no_weights_of_a_group():
    net = residual()
    graph = graphprune.trace(net, image_batches(1)[0][0])
    before = scores("group_norm", graph.groups, dict(net.named_parameters()), 0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(3 if name.endswith("bias") else 1)
    after = scores("group_norm", graph.groups, dict(net.named_parameters()), 0)
    assert all(torch.equal(before[name], after[name]) for name in before)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, weight):
        return weight * self.factor


@pytest.mark.parametrize("name", [name for name in criteria() if find(name).needs == {"weights"}])
@pytest.mark.parametrize("kind", ["mask", "parametrization"])
def test_weights_count_as_layers_use_them(name, kind):
    """Filters that are masked to zero, half masked, or computed from a parameter."""
    plain, other = by_hand(norm=True), by_hand(norm=True)
    factors = {
        0: torch.tensor([[1, 0], [1, 1], [0, 0]]),
        1: torch.tensor([1, 0, 1]),
        3: torch.tensor([[1, 1, 0]]),
    }
    for place, factor in factors.items():
        with torch.no_grad():
            plain[place].weight.mul_(factor)
        if kind == "mask":
            prune.custom_from_mask(other[place], "weight", factor)
        elif place != 1:
            parametrize.register_parametrization(other[place], "weight", Times(factor))
        else:
            with torch.no_grad():
                other[place].weight.mul_(factor)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    assert torch.equal(score(other, name), score(plain, name))
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    if name != "random":
        assert not torch.equal(score(plain, name), score(by_hand(norm=True), name))


# --- aggregation, normalisation ----------------------------------------------------------------

SLOTS = torch.tensor([[1.0, 2.0, 6.0], [3.0, 0.0, 8.0]], dtype=torch.float64)
AGGREGATED = {
    "sum": [4, 2, 14],
    "mean": [2, 1, 7],
    "max": [3, 2, 8],
    "product": [3, 0, 48],
    "norm": [math.sqrt(10), 2, 10],
    "root": [1, 2, 6],
}
NORMALISED = {  # of 4, 2, 6 with 5 MACs a channel
    "none": [4, 2, 6],
    "mean": [1, 0.5, 1.5],
    "max": [4 / 6, 2 / 6, 1],
    "standard": [0, -math.sqrt(1.5), math.sqrt(1.5)],
    "macs": [0.8, 0.4, 1.2],
}


@pytest.mark.parametrize("name", AGGREGATES)
def test_aggregation_over_slots(name):
    found = score(by_hand(), lambda *_: SLOTS, aggregate=name)
    torch.testing.assert_close(found, torch.tensor(AGGREGATED[name], dtype=torch.float64))


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisation(name):
    graph = graphprune.trace(by_hand(), INPUTS)

    def fixed(*_):
        return torch.tensor([4.0, 2.0, 6.0])

    costs = {group.name: 5.0 for group in graph.groups}
    (found,) = scores(fixed, graph.groups, {}, 0, normalise=name, costs=costs).values()
    torch.testing.assert_close(found, torch.tensor(NORMALISED[name], dtype=torch.float64))
    (flat,) = scores(lambda *_: torch.zeros(3), graph.groups, {}, 0, None, name, costs).values()
    assert torch.equal(flat, torch.zeros(3, dtype=torch.float64)), "no division by zero"


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_negative_scores_keep_their_order(name):
    """A criterion may count downwards; a mean below zero must not turn its order round."""

    def falling(group, *_):
        return -1.0 - torch.arange(group.size)

    plan = graphprune.trace(by_hand(), INPUTS).plan(
        0.4, criterion=falling, scope="global", normalise=name
    )
    assert plan.groups[0].kept == (0, 1)


def test_aggregation_is_that_of_the_criterion_unless_said():
    """The norm of two slots is the norm of both together, not the sum of their norms."""
    torch.testing.assert_close(
        score(by_hand(), Magnitude(2, "both")), torch.tensor([26.0, 25.0, 9.0]).double().sqrt()
    )
    assert score(by_hand(), Magnitude(2, "both"), aggregate="sum")[0] == 6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"aggregate": "median"}, "unknown aggregate 'median'; choose one of sum, mean, max, prod"),
        ({"normalise": "softmax"}, "unknown normalise 'softmax'; choose one of none, mean, max"),
        ({"normalise": "macs"}, "needs the MACs of a channel of every group: pass costs="),
    ],
)
def test_unknown_names_say_the_known_ones(options, text):
    with pytest.raises(InputError, match=re.escape(text)):
        score(by_hand(), "l2", **options)


# --- the registry, callables, groups that cannot be seen ----------------------------------------


@pytest.mark.parametrize("name", criteria())
def test_a_criterion_names_its_paper_and_its_scores(name):
    function = find(name).function
    text = (function if hasattr(function, "__name__") else type(function)).__doc__
    assert name in text or name == "random", f"the docstring of {name} does not name it"
    assert re.search(r"(19|20)\d\d", text) or name == "random", f"{name} has no paper"


def test_the_page_lists_the_registry():
    page = (ROOT / "docs" / "criteria.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|([^|]*)\|", page, re.MULTILINE)
    assert sorted(name for name, _ in listed) == list(criteria())
    for name, needs in listed:
        shown = {word for word in re.findall(r"\w+", needs) if word != "and"}
        assert shown == find(name).needs, name
    assert set(re.findall(r"^- `\"(\w+)\"`:", page, re.MULTILINE)) == {*AGGREGATES, *NORMALISATIONS}


def test_a_registered_criterion_gets_what_it_needs(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register_criterion("energy", needs=("weights", "activations"))
    def energy(group, tensors, generator):
        assert tensors["0.weight"] is net[0].weight
        assert tensors.batches == 1
        return tensors.statistics["activations"]["2.weight", 1][0].mean

    net = by_hand()
    assert score(net, "energy", [INPUTS]).tolist() == [3.5, 0, 1]
    plan = graphprune.trace(net, INPUTS).plan(0.4, criterion="energy", data=[INPUTS])
    assert plan.groups[0].kept == (0, 2)
    with pytest.raises(InputError, match="'energy' needs activations: pass data="):
        graphprune.trace(net, INPUTS).plan(0.4, criterion="energy")


def test_a_callable_may_say_what_it_needs():
    def steep(group, tensors, generator):
        return tensors.statistics["gradients"]["2.weight", 1].signed

    steep.needs = "gradients"
    assert score(by_hand(), steep, [INPUTS], total).tolist() == [7, 0, -4]
    with pytest.raises(InputError, match="'steep' needs gradients: pass data="):
        score(by_hand(), steep)
    steep.needs = {"curvature"}
    with pytest.raises(InputError, match="needs 'curvature', which nothing collects; needs: weig"):
        score(by_hand(), steep, [INPUTS])


@pytest.mark.parametrize(
    ("criterion", "text"),
    [
        (Wanda, r"criterion is the class Wanda: pass an instance, Wanda\(...\)"),
        (3, "criterion must be a name or a callable, not int"),
        (lambda *_: torch.zeros(2, 2, 3), r"returned shape \(2, 2, 3\)"),
        (lambda *_: torch.zeros(0, 3), r"\[channels\] or \[slots, channels\]"),
        (lambda *_: torch.zeros(3) / 0, "not finite for group g"),
    ],
)
def test_wrong_criteria(criterion, text):
    with pytest.raises(InputError, match=text):
        score(by_hand(), criterion)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Magnitude(0), "order must be positive, not 0"),
        (lambda: Magnitude(side="left"), "side must be one of writes, reads, both, not 'left'"),
        (lambda: Taylor("third"), "form must be squared, signed or absolute, not 'third'"),
    ],
)
def test_wrong_options(make, text):
    with pytest.raises(InputError, match=text):
        make()


def test_groups_that_a_criterion_cannot_see_stay_whole():
    net, data = residual(), image_batches()
    with pytest.warns(PruningWarning) as caught:
        plan = graphprune.trace(net, data[0][0]).plan(0.5, criterion="bn_scale", scope="global")
    text = str(caught[0].message)
    assert text.startswith("criterion 'bn_scale' cannot see 2 groups (left whole):\n  no batch")
    assert caught[0].filename == __file__
    assert "(head, last)" in text
    whole = [group for group in plan.groups if len(group.kept) == group.size]
    assert {group.layers[0] for group in whole} >= {"up", "head"}
    assert plan.removed


@pytest.mark.parametrize(
    ("criterion", "layers", "text"),
    [
        (BatchNormScale(), [nn.Linear(2, 4), nn.ReLU()], "no batch norm scales its channels"),
        (Apoz(), [nn.Linear(2, 4), nn.GELU()], "none of its activations is ever zero"),
    ],
)
def test_a_criterion_that_sees_nothing(criterion, layers, text):
    net = nn.Sequential(*layers, nn.Linear(4, 2)).double()
    with pytest.raises(
        InputError, match=f"cannot see any group; choose another one:\n  {text}: g0"
    ):
        score(net, criterion, [INPUTS])


def test_scales_of_different_groups():
    assert comparable("taylor")
    assert not comparable("l2")
    assert not comparable(lambda *_: None)
