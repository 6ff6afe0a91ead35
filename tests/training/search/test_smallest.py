"""The smallest model that loses at most so much."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparing import assert_same_state, untouched
from torch import nn

import graphprune
from graphprune.errors import CheckpointError, InputError, PruningWarning


def net():
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def share(model):
    """Of the hidden channels: what is lost is known."""
    return model[0].out_features / 40


def right(model):
    """As many of 1,000 answers are wrong as channels are gone."""
    wrong = 40 - model[0].out_features
    return torch.cat([torch.zeros(wrong), torch.ones(1000 - wrong)]) > 0


def data():
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(32, 6, generator=generator)]


def search(max_drop=0.3, evaluate=share, **options):
    return graphprune.smallest(net(), evaluate, data(), max_drop, criterion="l2", **options)


@pytest.mark.parametrize("max_drop", [0.1, 0.35, 0.6])
def test_the_budget_is_found_where_the_drop_is_known(max_drop):
    found = search(max_drop)
    assert len(found.curve) <= 8
    assert max_drop - 0.03 < found.chosen.drop <= max_drop + 1e-12
    assert found.model[0].out_features == round(40 * (1 - found.chosen.drop))
    assert found.chosen.reached == found.plan.after.macs / found.plan.before.macs
    assert [t.budget for t in found.curve] == sorted((t.budget for t in found.curve), reverse=True)
    assert "no bound: evaluate returned one number" in str(found)


@pytest.mark.parametrize("max_drop", [0.006, 0.02, 0.025])
@pytest.mark.parametrize("scale", [1, 100])
def test_no_model_whose_bound_is_above_is_ever_taken(max_drop, scale):
    found = search(max_drop * scale, lambda model: scale * right(model).float())
    assert found.chosen.drop < found.chosen.most <= max_drop * scale
    worse = [t for t in found.curve if t.reached < found.chosen.reached]
    assert all(t.most > max_drop * scale for t in worse)
    assert found.examples == 1000


@settings(max_examples=12, deadline=None)
@given(
    drops=st.lists(st.integers(0, 200), min_size=40, max_size=40),
    max_drop=st.sampled_from([0.0, 0.02, 0.1]),
    evaluations=st.integers(1, 6),
    sure=st.booleans(),
)
def test_whatever_the_evaluation_says(drops, max_drop, evaluations, sure):
    """It may be as little monotone as it likes."""

    def scores(model):
        width = model[0].out_features
        wrong = 0 if width == 40 else drops[width]
        return torch.cat([torch.zeros(wrong), torch.full((1000 - wrong,), 0.9)]).double()

    if sure and max_drop == 0:
        max_drop = 0.005
    found = search(max_drop, scores, evaluations=evaluations, sure=sure)
    assert len(found.curve) <= evaluations
    good = [t for t in found.curve if t.loss(sure) <= max_drop]
    if found.chosen is None:
        assert not good
    else:
        assert found.chosen.loss(sure) <= max_drop
        assert found.chosen.reached == min(t.reached for t in good)
        lost = scores(net()).mean() - scores(found.model).mean()
        assert found.chosen.drop == pytest.approx(float(lost), abs=1e-12)


def test_the_text_can_be_read():
    found = search(0.02, right)
    tried = found.chosen
    lines = str(found).splitlines()
    assert lines[0] == (
        f"{100 * tried.reached:.1f} % of the MACs: loses {100 * tried.drop:.2f} points of 100.00 % "
        f"(at most {100 * tried.most:.2f} with 95 %, from 1,000 examples)"
    )
    assert sum(line.endswith("chosen") for line in lines) == 1
    told = json.loads(found.to_json())
    assert told == found.to_dict()
    assert told["chosen"] in told["curve"]
    assert told["examples"] == 1000


def test_the_drop_alone_counts_if_so_wished():
    one, sure = search(0.02, right, sure=False), search(0.02, right)
    assert one.chosen.drop <= 0.02 < one.chosen.most
    assert sure.chosen.reached > one.chosen.reached


def test_everything_may_be_lost_and_nothing():
    with pytest.warns(PruningWarning, match="in the unit of evaluate, which is 1"):
        assert search(1.0).chosen.budget == 0.2
    whole = net()
    kept = graphprune.smallest(whole, share, data(), 0.0, criterion="l2", evaluations=3)
    assert kept.chosen is None
    assert kept.plan is None
    assert kept.model is whole
    assert "the original stays" in str(kept)
    assert kept.sentence(kept.nearest) in str(kept)
    with pytest.raises(InputError, match="no budget that was tried loses at most 0"):
        graphprune.rebuild(whole, max_drop=0.0, evaluate=share, criterion="l2")


@pytest.mark.parametrize("target", ["params", {"params": 0.5}, {"params": 200}, {"bytes": "50%"}])
def test_a_target_says_what_gets_small_and_how_small_is_enough(target):
    found = search(0.9, target=target)
    floor = {"params": 0.2} if isinstance(target, str) else target
    ((name, amount),) = floor.items()
    whole = sum(p.numel() for p in net().parameters())
    least = {200: 200 / whole, "50%": 0.5}.get(amount, amount)
    assert found.quantity == name
    assert min(t.budget for t in found.curve) == pytest.approx(least, abs=1e-4)
    assert found.chosen.reached <= least + 1e-4


def test_memory_can_be_made_small():
    found = search(0.5, target="memory", evaluations=3)
    assert found.chosen.reached <= found.chosen.budget


@pytest.mark.slow
def test_latency_can_be_made_small():
    found = search(0.99, target={"latency": 0.9}, evaluations=1)
    assert found.quantity == "latency"


def test_a_budget_that_cannot_be_met_is_no_end():
    found = search(0.5, min_kept=0.8)
    assert found.chosen.drop == pytest.approx(0.2)
    with pytest.raises(InputError, match="MACs cannot be met"):
        search(0.5, keep="*")


def test_rebuild_returns_the_model():
    options = {"evaluate": right, "data": data(), "criterion": "l2", "target": {"macs": 0.4}}
    small = graphprune.rebuild(net(), max_drop=0.02, **options)
    found = search(0.02, right, target={"macs": 0.4})
    assert_same_state(small, found.model)
    assert small.graphprune_plan.after == found.plan.after


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_drop": 0.1}, "without evaluate"),
        ({"evaluate": share}, "without max_drop"),
        ({"max_drop": 0.1, "evaluate": share, "ratio": 0.5}, "both a ratio"),
        ({"max_drop": 0.1, "evaluate": share, "inplace": True}, "leave inplace out"),
        ({"max_drop": 0.1, "evaluate": share, "criterium": "l2"}, "did you mean 'criterion'"),
    ],
)
def test_rebuild_is_asked_for_one_thing(options, text):
    with pytest.raises(InputError, match=text):
        graphprune.rebuild(net(), **options)


def test_a_plan_says_where_the_search_is():
    with pytest.raises(InputError, match="searches the budget, and so does rebuild"):
        graphprune.trace(net()).plan(0.5, max_drop=1.0)


def test_nothing_of_the_user_is_touched():
    model = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Dropout(), nn.Linear(40, 3))
    model.train()
    x, seen = torch.randn(64, 6), []

    def evaluate(candidate):
        seen.append((candidate.training, torch.is_grad_enabled(), float(torch.rand(1))))
        candidate.train()  # as careless as can be
        return float(candidate(x).square().mean()) + random.random() + np.random.rand()

    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with untouched(model):
        found = graphprune.smallest(model, evaluate, data(), 0.4, evaluations=2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert len(set(seen)) == 1
    assert not seen[0][0]
    assert not seen[0][1]
    assert all(module.training for module in found.model.modules())


# --- a search that was cut off ------------------------------------------------------------------


class Counted:
    """An evaluation that fails after some calls."""

    def __init__(self, calls=100):
        self.calls, self.left = 0, calls

    def __call__(self, model):
        if self.calls >= self.left:
            raise KeyboardInterrupt
        self.calls += 1
        return right(model)


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_search_that_was_cut_off_ends_as_one_that_was_not(tmp_path, calls):
    whole, path = search(0.02, right), tmp_path / "deep" / "search.json"
    with pytest.raises(KeyboardInterrupt) as caught:
        search(0.02, Counted(calls), path=path)
    assert "search.json" in caught.value.__notes__[-1]
    again = Counted()
    found = search(0.02, again, path=path)
    assert again.calls == len(whole.curve) + 1 - calls
    assert found.to_dict() == whole.to_dict()
    assert_same_state(found.model, whole.model)
    done = search(0.02, Counted(0), path=path)
    assert_same_state(done.model, whole.model)


def test_more_can_be_asked_for_later(tmp_path):
    path = tmp_path / "search.json"
    first = search(0.02, right, path=path, evaluations=2)
    more = Counted()
    found = search(0.03, more, path=path, evaluations=6)
    assert more.calls <= 4
    assert {t.budget for t in first.curve} <= {t.budget for t in found.curve}
    assert found.chosen.most <= 0.03


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"confidence": 0.9}, "confidence: 0.95, now 0.9"),
        ({"target": "params"}, "target: 'macs', now 'params'"),
        ({"round_to": 4}, "options"),
        ({"calibration": False}, "calibration"),
    ],
)
def test_a_file_of_another_search_is_refused(tmp_path, change, text):
    path = tmp_path / "search.json"
    search(0.02, right, path=path, evaluations=1)
    with pytest.raises(InputError, match=text):
        search(0.02, right, path=path, **change)


def test_other_models_and_data_are_refused(tmp_path):
    path, model = tmp_path / "search.json", net()
    search(0.02, right, path=path, evaluations=1)
    with pytest.raises(InputError, match="other data; a DataLoader that shuffles"):
        graphprune.smallest(model, right, [data()[0] + 1], 0.02, criterion="l2", path=path)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with pytest.raises(InputError, match="other weights"):
        graphprune.smallest(model, right, data(), 0.02, criterion="l2", path=path)


@pytest.mark.parametrize("text", ["", "{}", '{"format": "graphprune-search"}', "[1]"])
def test_a_damaged_file_is_told(tmp_path, text):
    path = tmp_path / "search.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="damaged or no state"):
        search(path=path)
    assert path.read_text() == text


# --- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_drop": -1}, "max_drop must be a finite number"),
        ({"max_drop": True}, "max_drop must be"),
        ({"max_drop": float("nan")}, "max_drop must be"),
        ({"max_drop": "1 %"}, "max_drop must be"),
        ({"target": "speed"}, "unknown target"),
        ({"target": {"macs": 0.5, "params": 0.5}}, "names macs, params: name one"),
        ({"target": {"params": 10_000}}, "nothing to do"),
        ({"target": {"latency": "1 ms"}}, "fraction of the original"),
        ({"evaluations": 0}, "evaluations"),
        ({"sure": 1}, "sure"),
        ({"confidence": 1}, "confidence"),
        ({"calibration": "repair"}, "calibration must be"),
        ({"evaluate": 5}, "must be a function of a model"),
        ({"ratio": 0.5}, "the search finds the ratio: leave it out"),
        ({"criterium": "l2"}, "did you mean"),
    ],
)
def test_wrong_arguments(options, text):
    with pytest.raises(InputError, match=text):
        search(**options)


def test_calibration_needs_data():
    with pytest.raises(InputError, match="needs data"):
        graphprune.smallest(net(), share, None, 0.1, calibration={"method": "bias"})
    assert graphprune.smallest(net(), share, None, 0.3).chosen.drop <= 0.3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 2), r"got Tensor float32\[2, 2\] for the original"),
        (torch.zeros(0), "must return a number"),
        (float("nan"), "finite numbers; got nan for the original"),
        (torch.tensor([1.0, float("inf")]), "got inf for 1 of 2 examples, the original"),
        ("x", "got str"),
        (None, "got NoneType"),
        (True, "got bool"),
        (1j, "must return a number"),
    ],
)
def test_evaluations_are_checked(value, text):
    with pytest.raises(InputError, match=text):
        search(evaluate=lambda model: value)


def test_evaluations_of_small_models_are_checked():
    with pytest.raises(InputError, match="same examples, in the same order"):
        search(evaluate=lambda m: torch.arange(m[0].out_features + 1))
    with pytest.raises(InputError, match=r"got nan for the model of 60 % of the macs"):
        search(evaluate=lambda m: 1.0 if m[0].out_features == 40 else float("nan"))
    with pytest.raises(ZeroDivisionError) as caught:
        search(evaluate=lambda m: 1 / (m[0].out_features == 40))
    assert "raised by evaluate, on the model of 60 % of the macs" in caught.value.__notes__


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_scores_may_be_any_row_of_numbers(kind):
    found = search(0.02, lambda model: kind(right(model).tolist()))
    assert found.to_dict() == search(0.02, right).to_dict()


def test_units_and_numbers_of_examples_that_make_no_sense_are_told():
    with pytest.raises(InputError, match=r"any model would do; 1 point of 100 is 0\.01"):
        search(1.0, right)
    with pytest.raises(InputError, match="Pass 2,703 examples or more, or sure=False"):
        search(0.001, right)
    assert search(0.001, right, sure=False).chosen.drop == pytest.approx(0.001)


def test_the_curve_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for evaluate in (right, share):
        text = search(0.02, evaluate).plot(tmp_path / "curve.svg").read_text()
        assert "</svg>" in text


class TwoOutputs(nn.Module):
    """Returns its features beside the answer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 64), nn.Linear(64, 32), nn.Linear(32, 3)

    def forward(self, x):
        features = self.second(self.first(x).relu()).relu()
        return {"y": self.last(features), "features": features}


def test_a_file_of_other_outputs_is_refused(tmp_path):
    net, x, data = TwoOutputs().eval(), torch.randn(300, 8), [torch.randn(64, 8)]
    labels = net(x)["y"].argmax(1)
    asked = {"max_drop": 0.3, "evaluations": 2, "path": tmp_path / "search.json"}

    def right(model):
        return model(x)["y"].argmax(1) == labels

    found = graphprune.smallest(net, right, data, outputs="y", **asked)
    assert found.model.second.out_features < 32
    with pytest.raises(InputError, match="outputs"):
        graphprune.smallest(net, right, data, outputs=["y", "features"], **asked)


def test_an_original_that_is_never_right_can_lose_nothing():
    net, x = TwoOutputs().eval(), torch.randn(50, 8)
    zeros = torch.zeros(50, dtype=torch.bool)
    found = graphprune.smallest(net, lambda _: zeros, [x], 0.1, evaluations=2, outputs="y")
    assert found.chosen is not None
    assert found.chosen.drop == 0


@pytest.mark.parametrize("name", ["foo", "data", "small"])
def test_an_option_that_no_calibration_has(name):
    net, x = TwoOutputs().eval(), torch.randn(50, 8)
    with pytest.raises(InputError, match=f"calibration has no option '{name}'; those of"):
        graphprune.smallest(net, lambda _: 1.0, [x], 0.1, calibration={name: 1})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("base",), None),
        (("base",), []),
        (("base",), ["a"]),
        (("tried",), {}),
        (("settings",), []),
        (("tried", 0), 3),
        (("tried", 0, "budget"), "x"),
        (("tried", 0, "reached"), None),
        (("tried", 0, "drop"), float("inf")),
        (("tried", 0, "most"), []),
        (("tried", 0, "most"), 1e308),
        (("tried", 0, "plan"), None),
    ],
)
def test_a_file_with_other_types_is_told(tmp_path, place, value):
    net, x, path = TwoOutputs().eval(), torch.randn(50, 8), tmp_path / "search.json"

    def search():
        asked = {"evaluations": 1, "outputs": "y", "path": path}
        return graphprune.smallest(net, lambda _: torch.ones(50), [x], 0.5, sure=False, **asked)

    search()
    content = json.loads(path.read_text())
    *way, last = place
    inner = content
    for key in way:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="damaged or no state of a search"):
        search()


@pytest.mark.parametrize("method", ["plan", "calibrate", "smallest"])
def test_single_items_are_no_batches(method):
    net, x = TwoOutputs().eval(), torch.randn(50, 8)
    graph = graphprune.trace(net, x, outputs="y")
    small = graphprune.rebuild(net, graph.plan(0.5))
    asked = {"example_inputs": x, "outputs": "y"}
    ways = {
        "plan": lambda: graph.plan(0.5, criterion="wanda", data=list(x)),
        "calibrate": lambda: graphprune.calibrate(small, net, list(x)),
        "smallest": lambda: graphprune.smallest(net, lambda _: 1.0, list(x), 0.1, **asked),
    }
    with pytest.raises(InputError, match=r"batch 0 of data is \(float32\[8\]\).*single items"):
        ways[method]()
