"""Experts that leave: which mixtures are found, which experts, and what is made of the rest."""

import functools
import json
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparing import untouched
from support.mixtures import SPELLINGS, Around, Listed, Named, Stacked, built
from support.more_mixtures import KINDS
from torch import nn

import graphprune
from graphprune.errors import InputError, PlanError
from graphprune.parts.score import Evidence
from graphprune.parts.usage import scores
from graphprune.planning.options import Request
from graphprune.ranks import Ranks
from graphprune.record.inputs import Call
from graphprune.verification import scores as held

pytestmark = pytest.mark.filterwarnings("ignore:.*channels were removed")
FEWEST = {"a dictionary, one for each token": 1, "groups": 4, "groups and a correction": 4}


@functools.cache
def traced(name):
    """A model that no test changes, its inputs and its graph, which tries its mixtures once."""
    model, inputs = built(name)
    if name in KINDS:
        model = Around(KINDS[name](), KINDS[name]()).double().eval()
    return model, inputs, graphprune.trace(model, inputs)


def equal(model, plan, inputs):
    with untouched(model):
        small = graphprune.rebuild(model, plan)
        assert graphprune.verify(model, small, inputs).verdict == "equal"
    assert sum(p.numel() for p in small.parameters()) == plan.after.params
    return small


@pytest.mark.parametrize("name", SPELLINGS)
def test_small_equals_masked(name):
    model, inputs, graph = traced(name)
    assert [mixture.least for mixture in graph.experts] == [FEWEST.get(name, 2)] * (
        1 if name == "images" else 2
    )
    plan = graph.plan(0.25, parts="experts", criterion="random")
    assert len(plan.experts) == len(graph.experts)
    assert plan.before.params - plan.after.params == sum(
        mixture.params * len(change.gone) for mixture, change in zip(graph.experts, plan.experts)
    )
    small = equal(model, plan, inputs)
    with torch.no_grad():
        wanted, found = graphprune.mask(model, plan)(inputs), small(inputs)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert not torch.allclose(wanted, model(inputs), atol=1e-3)


def test_the_reference_by_hand():
    """A bias of minus infinity says what it means that an expert is never chosen."""
    model, inputs = built("a list")
    plan = graphprune.trace(model, inputs).plan(0.5, parts="experts", criterion="random")
    small = graphprune.rebuild(model, plan)
    with torch.no_grad():
        before = model(inputs)
        for change in plan.experts:
            model.get_submodule(change.mixture).router.bias[change.gone] = -torch.inf
    assert torch.allclose(small(inputs), model(inputs), atol=1e-12)
    assert not torch.allclose(model(inputs), before, atol=1e-3)


def test_scores_that_are_not_held_are_noticed(monkeypatch):
    model, inputs, graph = traced("stacked weights")
    plan = graph.plan(0.25, parts="experts", criterion="random")
    monkeypatch.setattr(held.Scores, "_filled", lambda self, out, twin, value, given: out)
    with pytest.raises(graphprune.errors.VerificationError):
        graphprune.verify(model, plan, inputs)


PLANS = st.tuples(
    st.sampled_from([name for name in (*SPELLINGS, *KINDS) if name != "images"]),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from([0.3, 0.5]),
)


@given(PLANS)
@settings(max_examples=3, deadline=None)
def test_experts_and_channels_in_either_order(spec):
    experts_and_channels(*spec)


@pytest.mark.slow
@given(PLANS)
@settings(max_examples=60, deadline=None)
def test_experts_and_channels_in_either_order_at_length(spec):
    experts_and_channels(*spec)


def experts_and_channels(name, seed, first, ratio):
    model, inputs, graph = traced(name)
    small = model
    for step in (0, 1):
        graph = graphprune.trace(small, inputs) if step else graph
        options = {"criterion": "random", "seed": seed}
        options |= {"parts": "experts"} if first == (step == 0) else {}
        plan = graph.plan(0.25 if options.get("parts") else ratio, **options)
        small = graphprune.rebuild(small, plan)
    assert graphprune.verify(model, small, inputs).verdict == "equal"
    whole = small.graphprune_plan
    assert graphprune.Plan.from_json(whole.to_json()) == whole
    again = graphprune.rebuild(model, whole)
    assert torch.equal(again(inputs), small(inputs))


@pytest.mark.parametrize("name", ["a list", "a dictionary, one for each token", "groups"])
def test_files_and_second_rounds(name, tmp_path):
    model, inputs, graph = traced(name)
    small = equal(model, graph.plan(0.25, parts="experts"), inputs)
    if name != "groups":
        smaller = graphprune.rebuild(small, 0.25, inputs, parts="experts")
        assert graphprune.verify(model, smaller, inputs).verdict == "equal"
        small = smaller
    path = tmp_path / "small.safetensors"
    graphprune.save(small, path)
    loaded = graphprune.load(path, built(name)[0])
    assert torch.equal(loaded.eval()(inputs), small(inputs))
    assert list(loaded.state_dict()) == list(small.state_dict())


def test_what_stays_takes_the_first_places():
    """A model of the class with fewer experts has the same names."""
    model = Around(Listed(), Named()).double().eval()
    inputs = torch.randn(2, 4, 5).double()
    small = equal(model, graphprune.trace(model, inputs).plan(0.4, parts="experts"), inputs)
    assert list(small.layers[0].experts._modules) == ["0", "1", "2"]
    assert list(small.layers[1].experts._modules) == ["expert_0", "expert_1", "dropout"]
    other = Around(Listed(3), Named(2)).double().eval()
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(inputs), small(inputs))
    assert small.layers[0].num_experts == 3


def test_in_place_and_back(monkeypatch):
    model, inputs = built("a list")
    graph = graphprune.trace(model, inputs)
    plan = graph.plan(0.4, parts="experts")
    wanted = graphprune.rebuild(model, plan)(inputs)
    with monkeypatch.context() as patch:
        patch.setattr("graphprune.execute.shrink.carry", interrupted)
        with untouched(model), pytest.raises(KeyboardInterrupt):
            graphprune.rebuild(model, plan, inplace=True)
    weights = {id(p) for p in model.parameters()}
    small = graphprune.rebuild(model, plan, inplace=True)
    assert small is model
    assert {id(p) for p in model.parameters()} < weights
    assert torch.equal(model(inputs), wanted)


def interrupted(*_):
    raise KeyboardInterrupt


# --- which --------------------------------------------------------------------------------------


def useless():
    """The second of five experts adds almost nothing, and the fourth is never chosen."""
    torch.manual_seed(1)
    layer = Listed()
    with torch.no_grad():
        for parameter in layer.experts[1].parameters():
            parameter.mul_(1e-3)
        layer.router.bias[3] = -50
    return Around(layer).double().eval(), torch.randn(4, 9, 5).double()


def test_what_adds_least_leaves_first():
    model, inputs = useless()
    graph = graphprune.trace(model, inputs)
    data = [inputs]
    plan = graph.plan(0.4, parts="experts", data=data)
    assert plan.experts[0].gone == [1, 3]
    plan = graph.plan(0.4, parts="experts", data=data, criterion="reconstruction")
    assert 3 in plan.experts[0].gone


def test_scores_by_hand():
    """The norm of what an expert adds, weighted by its router, over the tokens that choose it."""
    model, inputs = useless()
    graph = graphprune.trace(model, inputs)
    evidence = Evidence.of(model, Call.of(inputs), [inputs], None, Ranks(False))
    found = scores(model, graph.experts, evidence, Request.of(0.2, {"parts": "experts"}))
    layer = model.layers[0]
    with torch.no_grad():
        flat = model.norms[0](model.first(inputs)).reshape(-1, 8)
        weights, places = layer.router(flat).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        for number, value in enumerate(found["layers.0"]):
            rows, slot = torch.where(places == number)
            norms = (layer.experts[number](flat[rows]) * weights[rows, slot, None]).norm(dim=-1)
            assert value == pytest.approx(float(norms.mean()) if len(rows) else 0.0, rel=1e-9)


def test_of_two_alike_the_one_leaves_that_adds_less():
    model, inputs = useless()
    graph = graphprune.trace(model, inputs)
    experts = model.layers[0].experts
    with torch.no_grad():
        for number, copied in ((2, 1.0), (4, 1.05)):  # 0, 2 and 4 are alike, 4 adds most
            for one, other in zip(experts[0].parameters(), experts[number].parameters()):
                other.copy_(one * copied)
        for parameter in experts[0].parameters():
            parameter.mul_(0.9)
    options = {"parts": "experts", "data": [inputs], "criterion": "geometric_median"}
    evidence = Evidence.of(model, Call.of(inputs), [inputs], None, Ranks(False))
    added = scores(model, graph.experts, evidence, Request.of(0.2, {"parts": "experts"}))[
        "layers.0"
    ]
    first = min((2, 4), key=added.__getitem__)  # nearer to each other than to 0
    assert graph.plan(0.2, **options).experts[0].gone == [first]
    then = min((0, 6 - first), key=added.__getitem__)
    assert graph.plan(0.4, **options).experts[0].gone == sorted([first, then])


@pytest.mark.parametrize("criterion", ["random", "taylor", "reconstruction", "l2"])
@pytest.mark.parametrize(
    "name", [pytest.param("a list", marks=pytest.mark.slow), "stacked weights"]
)
def test_criteria(criterion, name):
    model, inputs = built(name)
    data = [(inputs, torch.randn(3, 12, 3).double())]
    options = {"data": data, "loss": lambda m, batch: (m(batch[0]) - batch[1]).square().mean()}
    plan = graphprune.trace(model, inputs).plan(
        0.4, parts="experts", criterion=criterion, **(options if criterion != "random" else {})
    )
    assert [len(change.gone) for change in plan.experts] == [2, 2]


def test_a_budget_is_met_by_experts_and_channels():
    model, inputs, graph = traced("stacked weights")
    plan = graph.plan(target={"params": 0.7}, parts="experts")
    assert plan.after.params <= 0.7 * plan.before.params
    assert graph.plan(target={"params": 0.7}, parts="experts").experts == plan.experts
    both = graph.plan(target={"params": 0.4}, parts=("channels", "experts"))
    assert both.after.params <= 0.4 * both.before.params
    assert graphprune.verify(model, both, inputs).verdict == "equal"
    with pytest.raises(InputError, match="cannot be met"):
        graph.plan(target={"params": 0.1}, parts="experts")


def test_what_is_kept():
    model, inputs = useless()
    graph = graphprune.trace(model, inputs)
    plan = graph.plan(0.4, parts="experts", data=[inputs], keep="layers.0.experts.3")
    assert 1 in plan.experts[0].gone
    assert 3 in plan.experts[0].kept
    with pytest.raises(InputError, match="all are kept"):
        graph.plan(0.4, parts="experts", keep="layers.0")


@pytest.mark.parametrize("pattern", ["layers.0.experts.{}.*", "layers.0.experts.{}.0.weight"])
def test_layers_within_experts_are_kept(pattern):
    model, inputs = built("a list")
    graph = graphprune.trace(model, inputs)
    gone = graph.plan(0.4, parts="experts").experts[0].gone[0]
    plan = graph.plan(0.4, parts="experts", keep=pattern.format(gone))
    assert gone in plan.experts[0].kept


# --- bad input ----------------------------------------------------------------------------------


def test_as_many_stay_as_are_chosen():
    model, _, graph = traced("a list")
    with untouched(model), pytest.raises(InputError, match=r"2 must.*largest ratio is 0\.6"):
        graph.plan(0.8, parts="experts")


def test_models_without_mixtures():
    graph = graphprune.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert graph.experts == ()
    with pytest.raises(InputError, match="no mixture"):
        graph.plan(0.5, parts="experts")


class Told(Around):
    """Returns the scores of the experts as well."""

    def forward(self, x):
        h = self.first(x)
        return self.last(h + self.layers[0](h)), self.layers[0].router(h)


def test_scores_in_the_output():
    torch.manual_seed(0)
    model, inputs = Told(Listed()).double().eval(), torch.randn(2, 4, 5).double()
    with pytest.raises(InputError, match="outputs="):
        graphprune.trace(model, inputs).plan(0.2, parts="experts")
    graph = graphprune.trace(model, inputs, outputs=0)
    plan = graph.plan(0.2, parts="experts")
    assert graphprune.verify(model, plan, inputs).verdict == "equal"


def test_plans_of_strangers():
    model, _, graph = traced("a list")
    plan = graph.plan(0.4, parts="experts")
    change = plan.experts[0]
    container = change.containers[0]
    for wrong in (
        replace(change, mixture="nowhere"),
        replace(change, routers=()),
        replace(change, routers=("first.weight",)),
        replace(change, kept=(0,)),
        replace(change, kept=()),
        replace(change, kept=(0, 1, 9)),
        replace(change, slices=(*change.slices, ("last.weight", 0))),
        replace(change, added=("first.bias",)),
        replace(change, containers=(replace(container, name="first"),)),
        replace(change, containers=(replace(container, keys=("0", "1", "2", "3", "x")),)),
    ):
        crafted = replace(plan, experts=(wrong, *plan.experts[1:]))
        with untouched(model), pytest.raises(PlanError):
            graphprune.rebuild(model, crafted)


def test_the_plan_tells():
    graph = traced("stacked weights")[2]
    assert "layers.0 (6), layers.1 (6)" in str(graph)
    plan = graph.plan(0.3, parts="experts", criterion="random", seed=3)
    text = json.loads(plan.to_json())["plan"]["experts"][0]
    assert text["mixture"] == "layers.0"
    assert f"layers.0: {','.join(map(str, plan.experts[0].gone))}" in str(plan).replace("-", ",")


def test_a_collapse_is_told():
    model, inputs = built("a list")
    with torch.no_grad():
        for layer in model.layers:
            for parameter in layer.experts.parameters():
                parameter.mul_(4)
    graph = graphprune.trace(model, inputs)
    with pytest.warns(graphprune.errors.PruningWarning, match="of their variance"):
        graph.plan(0.6, parts="experts", criterion="random", data=[inputs])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph.plan(0.6, parts="experts", criterion="random")


def test_sensitivity_of_mixtures():
    model, inputs = useless()
    graph = graphprune.trace(model, inputs)
    wanted = model(inputs).detach()
    found = graph.sensitivity(
        model,
        lambda small: -(small(inputs) - wanted).square().mean().item(),
        (0.2, 0.6, 0.9),
        parts=("channels", "experts"),
        data=[inputs],
    )
    (curve,) = (curve for curve in found.curves if curve.kind == "experts")
    assert (curve.key, curve.ratios) == ("layers.0", (0.2, 0.6))
    assert 0 <= curve.drops[0] < curve.drops[1]
    assert {c.kind for c in found.curves} == {"channels", "experts"}
    assert "layers.0" not in found.allocation(1.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": "typo"}, "matches no layer"),
        ({"criterion": "bogus"}, "unknown criterion"),
        ({"criterion": lambda group, tensors, generator: None}, "scores channels"),
        ({"ratios": {"layers.0": 0.5}}, "ratios says something of channels"),
        ({"min_kept": 0.9}, "min_kept"),
        ({"round_to": 4}, "round_to"),
        ({"uniform": True}, "uniform"),
        ({"exact_only": True}, "exact_only"),
    ],
)
@pytest.mark.parametrize("parts", ["experts", "branches"])
def test_what_says_nothing_of_parts_is_refused(options, match, parts):
    model, _, graph = traced("a list")
    with untouched(model), pytest.raises(InputError, match=match):
        graph.plan(0.4, parts=parts, **options)


def test_less_than_one_expert():
    graph = traced("a list")[2]
    with pytest.warns(graphprune.errors.PruningWarning, match="no expert leaves"):
        graph.plan(0.01, parts="experts")


@pytest.mark.parametrize("name", ["a list", "stacked weights"])
def test_what_differs_is_not_the_router(name):
    """It has fewer scores, as it should; an expert has other numbers when others have left."""
    model, inputs = built(name)
    small = graphprune.rebuild(model, 0.4, inputs, parts="experts", criterion="random")
    with torch.no_grad():
        small.norms[1].bias += 1
    with pytest.raises(graphprune.errors.VerificationError, match=r"differs is 'norms\.1'"):
        graphprune.verify(model, small, inputs)


class Padded(Around):
    """Rows of padding are zero, and so are all of their scores."""

    def forward(self, x):
        mask = x[..., :1] > 0
        h = self.first(x) * mask
        for norm, layer in zip(self.norms, self.layers):
            h = h + layer(norm(h))
        return self.last(h)


def test_equal_scores_decide_nothing():
    """Which of several experts with equal scores is chosen may change with their number.

    Outputs are equal, as all experts make zero of zero; gradients are not.
    """
    torch.manual_seed(0)
    model, inputs = Padded(Stacked()).double().eval(), torch.randn(3, 12, 5).double()
    with torch.no_grad():
        model.layers[0].bias.zero_()
    plan = graphprune.trace(model, inputs).plan(0.34, parts="experts", criterion="random")
    report = graphprune.verify(model, plan, inputs)
    assert report.verdict == "equal"
    undecided = [check for check in report.checks if not check.decided]
    assert undecided
    assert all("equal scores" in check.note for check in undecided)
