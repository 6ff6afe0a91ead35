"""Plans by which parts leave: how many, which, within a budget, and what they make."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparing import untouched
from support.streams import CONVOLUTIONS, TOKENS, images, texts
from torch import nn

import graphprune
from graphprune.errors import InputError, PlanError
from graphprune.plan.changes import Cut, StandIn
from graphprune.planning.options import Request
from graphprune.training import Pruner, iterate

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
KINDS = {"images": (images, sorted(CONVOLUTIONS)), "texts": (texts, sorted(TOKENS))}


def left(model):
    return sum(parameter.numel() for parameter in model.parameters())


def equal(model, plan, inputs):
    with untouched(model):
        small = graphprune.rebuild(model, plan)
        report = graphprune.verify(model, small, inputs)
    assert report.verdict == "equal"
    assert left(small) == plan.after.params
    return small


BLOCKLESS = ("projected", "behind", "joined", "dense")


@pytest.mark.parametrize(
    ("make", "kind", "parts"),
    [
        (make, kind, parts)
        for make, kinds in KINDS.values()
        for kind in kinds
        for parts in ("branches", "blocks")
        if parts == "branches" or kind not in BLOCKLESS
    ],
)
def test_small_equals_masked(make, kind, parts):
    model, inputs = make(kind, kind, kind)
    graph = graphprune.trace(model, inputs)
    plan = graph.plan(0.4, parts=parts)
    assert plan.parts
    small = equal(model, plan, inputs)
    gone = sum(part.params for part in plan.parts)
    assert left(small) <= left(model) - gone


SPECS = st.sampled_from(sorted(KINDS)).flatmap(
    lambda name: st.tuples(
        st.just(name), st.lists(st.sampled_from(KINDS[name][1]), min_size=2, max_size=4)
    )
)


def parts_and_channels(spec, data):
    name, kinds = spec
    model, inputs = KINDS[name][0](*kinds)
    parts = data.draw(st.sampled_from(["blocks", "branches"]))
    options = {"parts": parts, "criterion": "random", "seed": data.draw(st.integers(0, 99))}
    ratio = data.draw(st.sampled_from([0.3, 0.5, 0.8]))
    first_parts = data.draw(st.booleans())
    small = model
    for step in (0, 1):
        graph = graphprune.trace(small, inputs)
        if first_parts == (step == 0):
            if len(graph.finder.single_blocks if parts == "blocks" else graph.branches) < 2:
                continue
            plan = graph.plan(ratio, **options)
        else:
            plan = graph.plan(0.3)
        small = graphprune.rebuild(small, graphprune.Plan.from_json(plan.to_json()))
    plan = getattr(small, "graphprune_plan", None)
    if plan is not None:
        assert graphprune.verify(model, small, inputs).verdict == "equal"
        again = graphprune.rebuild(model, plan)
        assert all(
            torch.equal(tensor, small.state_dict()[name])
            for name, tensor in again.state_dict().items()
        )


@given(SPECS, st.data())
@settings(max_examples=4)
def test_random_parts_of_random_networks(spec, data):
    """Any set of parts, before or after channels, through JSON."""
    parts_and_channels(spec, data)


@pytest.mark.slow
@given(SPECS, st.data())
@settings(max_examples=150)
def test_random_parts_of_random_networks_at_length(spec, data):
    parts_and_channels(spec, data)


def test_of_a_ratio_that_fraction_leaves():
    model, x = images("inverted", "inverted", "inverted", "inverted")
    graph = graphprune.trace(model, x)
    for ratio, count in ((0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (0.99, 3)):
        assert len(graph.plan(ratio, parts="blocks").parts) == count


def test_channels_and_blocks_at_once():
    model, x = images("inverted", "inverted", "inverted", width=8)
    plan = graphprune.trace(model, x).plan(0.5, parts=("channels", "blocks"))
    assert plan.parts
    assert plan.removed
    equal(model, plan, x)


def test_in_place_the_model_loses_its_parts_and_keeps_its_objects():
    model, x = images("basic", "basic")
    plan = graphprune.trace(model, x).plan(0.5, parts="blocks")
    wanted = graphprune.rebuild(model, plan)(x)
    stem = model.stem.weight
    small = graphprune.rebuild(model, plan, inplace=True)
    assert small is model
    assert model.stem.weight is stem
    assert torch.equal(model(x), wanted)


def test_an_error_in_place_gives_all_modules_back(monkeypatch):
    model, x = images("basic", "basic")
    plan = graphprune.trace(model, x).plan(0.5, parts="blocks")
    monkeypatch.setattr("graphprune.execute.shrink.recompute_masked", lambda model: 1 / 0)
    with untouched(model), pytest.raises(PlanError):
        graphprune.rebuild(model, plan, inplace=True)


def test_files_hold_what_is_left(tmp_path):
    model, ids = texts("before", "behind")
    small = graphprune.rebuild(model, 0.5, ids, parts=("channels", "branches"))
    path = graphprune.save(small, tmp_path / "small.safetensors")
    loaded = graphprune.load(path, texts("before", "behind", seed=1)[0])
    assert torch.equal(loaded(ids), small(ids))
    assert loaded.graphprune_plan == small.graphprune_plan


def test_a_small_model_trains_copies_and_is_cut_again():
    model, x = images("basic", "inverted", "basic")
    small = graphprune.rebuild(model, 0.4, x, parts="blocks")
    copied = copy.deepcopy(small)
    assert torch.equal(copied(x), small(x))
    copied.train()(x).sum().backward()
    assert all(p.grad is not None for p in copied.parameters())
    smaller = graphprune.rebuild(small, 0.5, x, parts="blocks")
    assert len(smaller.graphprune_plan.parts) == 2
    assert graphprune.verify(model, smaller, x).verdict == "equal"


def test_code_around_reads_the_attributes_of_what_left():
    class Layer(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind, self.layer = kind, nn.Linear(6, 6)

        def forward(self, x, *, masks):
            return x + self.layer(x) * masks[self.kind]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer(kind) for kind in ("full", "near", "full"))
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            masks = {"full": 1.0, "near": 0.5}
            for layer in self.layers:
                x = layer(x, masks={layer.kind: masks[layer.kind]})
            return self.head(x)

    model, x = Model().eval(), torch.randn(3, 6)
    small = equal(model, graphprune.trace(model, x).plan(0.3, parts="blocks"), x)
    assert [layer.kind for layer in small.layers] == ["full", "near", "full"]


def test_what_stands_in_takes_arguments_by_place_and_by_name():
    model, x = images("inverted", "inverted")
    small = graphprune.rebuild(model, 0.5, x, parts="blocks")
    gone = small.get_submodule(small.graphprune_plan.parts[0].name)
    stream = torch.randn(1, 4, 3, 3)
    assert gone(stream) is stream
    assert gone(x=stream) is stream
    assert "Inverted" in repr(gone)


# --- which ---------------------------------------------------------------------------------------


def weak(model, number):
    """Let a block add next to nothing."""
    with torch.no_grad():
        for parameter in model.blocks[number].parameters():
            parameter.mul_(1e-3)
    return model


@pytest.mark.parametrize("criterion", ["l2", "reconstruction"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_changes_least_leaves_first(criterion, number):
    model, x = images("inverted", "inverted", "inverted")
    plan = graphprune.trace(weak(model, number), x).plan(0.3, parts="blocks", criterion=criterion)
    assert [part.name for part in plan.parts] == [f"blocks.{number}"]


def test_the_loss_tells_which_part_matters_by_its_gradient():
    model, x = images("inverted", "inverted", "inverted")
    data = [(x, torch.tensor([0, 1]))]
    graph = graphprune.trace(weak(model, 1), x)
    plan = graph.plan(0.3, parts="blocks", criterion="taylor", data=data)
    assert [part.name for part in plan.parts] == ["blocks.1"]
    assert all(p.grad is None for p in model.parameters())


def test_random_orders_follow_the_seed():
    model, x = images(*["inverted"] * 6)
    graph = graphprune.trace(model, x)

    def names(seed):
        plan = graph.plan(0.5, parts="blocks", criterion="random", seed=seed)
        return [part.name for part in plan.parts]

    assert names(1) == names(1)
    assert len({tuple(names(seed)) for seed in range(6)}) > 1


def test_what_is_kept_stays():
    model, x = images("inverted", "inverted", "inverted")
    graph = graphprune.trace(weak(model, 0), x)
    for pattern in ("blocks.0", "blocks.0.conv.*", "*.0.conv.2"):
        plan = graph.plan(0.3, parts="blocks", keep=pattern)
        assert [part.name for part in plan.parts] != ["blocks.0"]


def test_where_something_else_stays_all_that_may_leaves():
    model, x = images("inverted", "inverted", "inverted")
    plan = graphprune.trace(model, x).plan(0.9, parts="blocks", keep="blocks.1")
    assert {part.name for part in plan.parts} == {"blocks.0", "blocks.2"}
    equal(model, plan, x)


# --- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", ["macs", "params", "bytes"])
def test_a_budget_is_met_by_blocks_alone(quantity):
    model, x = images(*["inverted"] * 5)
    graph = graphprune.trace(model, x)
    plan = graph.plan(target={quantity: 0.7}, parts="blocks")
    before, after = getattr(plan.before, quantity), getattr(plan.after, quantity)
    assert after <= 0.7 * before
    fewer = graph.plan((len(plan.parts) - 1) / 5, parts="blocks", criterion="l2")
    assert getattr(fewer.after, quantity) > 0.7 * before


def test_a_budget_is_met_by_blocks_and_channels_together():
    model, x = images(*["inverted"] * 4, width=8)
    data = [torch.randn(4, 3, 8, 8)]
    plan = graphprune.trace(model, x).plan(
        target={"macs": 0.4}, parts=("channels", "blocks"), data=data
    )
    assert plan.after.macs <= 0.4 * plan.before.macs
    assert "error of the outputs" in plan.notes[-1]
    equal(model, plan, x)


def test_a_latency_is_met_by_blocks():
    model, x = images(*["inverted"] * 4)
    plan = graphprune.trace(model, x).plan(target={"latency": 1e6}, parts="blocks")
    assert not plan.parts


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "options", "says"),
    [
        (("inverted",), {"parts": "blocks"}, "must stay"),
        (("projected", "projected"), {"parts": "blocks"}, "no blocks"),
        (("inverted", "inverted"), {"parts": "blocks", "keep": "blocks.*"}, "all are kept"),
        (("inverted", "inverted"), {"parts": "layers"}, "channels, branches, blocks"),
        (("inverted", "inverted"), {"parts": ()}, "channels, branches, blocks"),
        (("inverted", "inverted"), {"parts": 3}, "channels, branches, blocks"),
    ],
)
def test_what_cannot_leave_is_said(kinds, options, says):
    model, x = images(*kinds)
    with untouched(model), pytest.raises(InputError, match=says):
        graphprune.rebuild(model, 0.5, x, **options)


def test_a_budget_out_of_reach_is_said():
    model, x = images("inverted", "inverted")
    with pytest.raises(InputError, match="cannot be met"):
        graphprune.trace(model, x).plan(target={"macs": 0.01}, parts="blocks")


def changed(plan, **fields):
    """A plan with other content, under a right digest."""
    body = json.loads(plan.to_json())["plan"]
    body.update(fields)
    return graphprune.Plan.from_json(_signed(body))


def _signed(body):
    import hashlib

    text = json.dumps(body, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"format": "graphprune-plan", "version": 3, "digest": digest, "plan": body})


@pytest.mark.parametrize(
    "fields",
    [
        {"stand_ins": [{"module": "", "gives": ["args.0"], "holder": ""}]},
        {"stand_ins": [{"module": "nothing", "gives": ["args.0"], "holder": ""}]},
        {"stand_ins": [{"module": "head", "gives": ["__class__"], "holder": ""}]},
        {"stand_ins": [{"module": "head", "gives": [], "holder": ""}]},
        {"stand_ins": [{"module": "head", "gives": ["args.0"], "holder": "set"}]},
        {"stand_ins": [{"module": "head", "gives": ["args.0"], "holder": ""}], "cuts": []},
        {"cuts": [{"module": "nothing", "place": 0, "side": 0}]},
        {"cuts": [{"module": "blocks.0", "place": -1, "side": 0}]},
        {"cuts": [{"module": "blocks.0", "place": 0, "side": 2}]},
    ],
)
def test_plans_of_strangers_change_nothing_else(fields):
    model, x = images("inverted", "inverted")
    plan = graphprune.trace(model, x).plan(0.5, parts="blocks")
    with untouched(model), pytest.raises(PlanError):
        graphprune.rebuild(model, changed(plan, **fields))


def test_both_operands_of_a_sum_do_not_leave():
    model, ids = texts("parallel", "parallel")
    graph = graphprune.trace(model, ids)
    first, second = (
        graphprune.Plan(graph.plan(0.0).architecture, (), (), cuts=(Cut("layers.0", 0, side),))
        for side in (0, 1)
    )
    with pytest.raises(PlanError, match="both operands"):
        first.then(second)


def test_a_wrong_stand_in_is_told_apart():
    """Verification holds operands at zero by itself: a part that adds something is found."""
    model, x = images("inverted", "inverted")
    plan = graphprune.trace(model, x).plan(0.5, parts="blocks")
    small = graphprune.rebuild(model, plan)
    name = plan.parts[0].name
    parent, _, leaf = name.rpartition(".")
    small.get_submodule(parent)._modules[leaf] = nn.ReLU()
    with pytest.raises(graphprune.errors.VerificationError):
        graphprune.verify(model, small, x)
    assert StandIn(name, ("args.0",)) in plan.stand_ins


@pytest.mark.parametrize("parts", ["blocks", "branches"])
def test_sensitivity_of_parts(parts):
    """Each alone leaves; as ratios, the drops say in which order they do."""
    model, inputs = images("basic", "inverted", "basic")
    graph = graphprune.trace(model, inputs)
    wanted = model(inputs).detach()
    with untouched(model):
        found = graph.sensitivity(
            model, lambda small: -(small(inputs) - wanted).square().mean().item(), parts=parts
        )
    known = graph.finder.single_blocks if parts == "blocks" else graph.branches
    assert [curve.key for curve in found.curves] == [part.name for part in known]
    assert all(curve.ratios == (1.0,) and curve.drops[0] > 0 for curve in found.curves)
    assert found.allocation(1.0) == {}
    least = min(found.curves, key=lambda curve: curve.drops[-1])
    plan = graph.plan(1 / len(known), parts=parts, ratios=found)
    assert [part.name for part in plan.parts] == [least.key]
    assert least.key in str(found)


def test_parts_are_drawn(tmp_path):
    """A bar beside the layers of every block; none where no block can leave."""
    model, inputs = images("basic", "inverted")
    text = graphprune.trace(model, inputs).draw(tmp_path / "blocks.svg").read_text()
    assert "<!-- can leave -->" in text
    plain = graphprune.trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))
    assert "<!-- can leave -->" not in plain.draw(tmp_path / "plain.svg").read_text()


class Half(nn.Module):
    """A sum with a factor hands on half of what it gets, whatever the branch adds."""

    def __init__(self, code):
        super().__init__()
        self.layer, self.code = nn.Linear(8, 8), code

    def forward(self, x):
        return self.code(self.layer(x).relu(), x)


FACTORS = {
    "of the stream": lambda f, x: torch.add(f, x, alpha=0.5),
    "as a method": lambda f, x: f.add(x, alpha=2),
    "in place": lambda f, x: f.add_(x, alpha=0.5),
    "of the branch": lambda f, x: torch.add(x, f, alpha=0.5),
}


@pytest.mark.parametrize("code", FACTORS.values(), ids=FACTORS)
def test_sums_with_a_factor(code):
    torch.manual_seed(0)
    blocks = [Half(code) for _ in range(3)]
    model, inputs = nn.Sequential(nn.Linear(5, 8), *blocks, nn.Linear(8, 3)), torch.randn(4, 5)
    graph = graphprune.trace(model.eval(), inputs)
    if graph.blocks:
        equal(model, graph.plan(0.4, parts="blocks"), inputs)


class Loop(nn.Module):
    """Sums in the code of the model itself."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))

    def forward(self, x):
        h = self.first(x)
        for layer in self.layers:
            h = h + layer(h)
        return self.last(h)


def test_sums_in_the_outermost_module():
    torch.manual_seed(0)
    model, inputs = Loop().eval(), torch.randn(4, 5)
    plan = graphprune.trace(model, inputs).plan(0.5, parts="branches")
    small = equal(model, plan, inputs)
    assert torch.allclose(graphprune.mask(model, plan)(inputs), small(inputs), atol=1e-6)


class Dropped(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training, whole rows of a branch are zero."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x):
        f = self.layer(x)
        if self.training:
            f = f * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.7) / 0.7
        return x + f


def test_what_left_takes_no_random_numbers_from_the_others():
    torch.manual_seed(0)
    blocks = [Dropped() for _ in range(4)]
    model, inputs = nn.Sequential(nn.Linear(5, 8), *blocks, nn.Linear(8, 3)), torch.randn(7, 5)
    plan = graphprune.trace(model.eval(), inputs).plan(0.9, parts="blocks", keep=["3", "4"])
    assert {part.name for part in plan.parts} == {"1", "2"}
    equal(model, plan, inputs)


def test_schedules_are_of_channels():
    model, inputs = images("basic", "basic")
    with pytest.raises(InputError, match="let them leave first"):
        Pruner(model, inputs, schedule=0.5, parts="blocks")
    with pytest.raises(InputError, match="let them leave first"):
        iterate(model, 2, lambda *_: None, lambda _: 0.0, example_inputs=inputs, parts="blocks")


def test_what_is_left_of_a_latency_is_a_fraction(monkeypatch):
    """Milliseconds mean other things a minute later: widths get what the parts have left."""
    model, inputs = images("basic", "basic", "basic")
    graph = graphprune.trace(model, inputs)
    request = Request.of(None, {"target": {"latency": 0.5}, "parts": ("channels", "blocks")})
    chooser = graph._chooser(request)
    monkeypatch.setattr(chooser, "_timed", lambda *models: [[8.0], [6.0]][: len(models)])
    assert chooser.limits == {"latency": 4.0}
    left = chooser._left(chooser.at(1))
    assert (left["latency"].amount, left["latency"].fraction) == (pytest.approx(4 / 6), True)
    assert chooser._left(chooser.at(0))["latency"].amount == pytest.approx(0.5)
