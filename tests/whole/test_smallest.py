"""The smallest model that loses at most so much."""

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import InputError
from graphprune.search import _guess, _limit


def net():
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))


def share(model):
    """Of the hidden channels: what is lost is known."""
    return model[0].out_features / 40


def data():
    return [torch.randn(32, 6)]


@pytest.mark.parametrize("max_drop", [0.1, 0.35, 0.6])
def test_the_budget_is_found_where_the_drop_is_known(max_drop):
    found = graphprune.smallest(net(), share, data(), max_drop, evaluations=9, criterion="l2")
    assert found.chosen.drop <= max_drop + 1e-12
    assert found.chosen.drop > max_drop - 0.06
    assert found.model[0].out_features == round(40 * (1 - found.chosen.drop))
    assert [t.budget for t in found.curve] == sorted((t.budget for t in found.curve), reverse=True)
    assert "chosen" in str(found)


def test_everything_may_be_lost_and_nothing():
    whole = net()
    assert graphprune.smallest(whole, share, data(), 1.0, criterion="l2").chosen.budget == 0.2
    kept = graphprune.smallest(whole, share, data(), 0.0, criterion="l2", evaluations=2)
    assert kept.chosen is None
    assert kept.model is whole
    assert "the original stays" in str(kept)


def test_items_tell_how_sure_the_drop_is():
    def right(model):
        wrong = 40 - model[0].out_features
        return torch.cat([torch.zeros(wrong), torch.ones(1000 - wrong)])

    one = graphprune.smallest(net(), right, data(), 0.02, criterion="l2")
    sure = graphprune.smallest(net(), right, data(), 0.02, criterion="l2", sure=True)
    assert one.items == 1000
    assert one.chosen.drop <= 0.02 < one.chosen.most
    assert sure.chosen.most <= 0.02
    assert sure.chosen.reached > one.chosen.reached
    assert "with 95 %, from 1,000 items" in str(one)


def test_the_limit_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    draws = torch.rand(4000, 300, generator=generator) < 0.1
    covered = [_limit(draw.double(), 0.95) >= 0.1 for draw in draws]
    assert 0.91 <= sum(covered) / len(covered) <= 0.97
    assert _limit(torch.zeros(300).double(), 0.95) == pytest.approx(0.01, rel=0.01)


def test_a_guess_lies_on_the_line_and_inside():
    assert _guess(0.2, 1.0, 0.8, 0.0, 0.4) == 0.6
    assert _guess(0.2, 1.0, 0.8, 0.0, 0.0) == pytest.approx(0.84)
    assert _guess(0.2, 1.0, 0.1, 0.1, 0.05) == 0.6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_drop": -1}, "max_drop"),
        ({"quantity": "latency"}, "macs, params, bytes"),
        ({"least": 1.0}, "least"),
        ({"evaluations": 0}, "evaluations"),
        ({"confidence": 1}, "confidence"),
        ({"target": {"macs": 0.5}}, "leave it out"),
    ],
)
def test_wrong_arguments(options, text):
    with pytest.raises(InputError, match=text):
        graphprune.smallest(net(), share, data(), **{"max_drop": 0.1, **options})


@pytest.mark.parametrize("value", [torch.zeros(2, 2), float("nan")])
def test_evaluations_are_checked(value):
    with pytest.raises(InputError, match="evaluate must return"):
        graphprune.smallest(net(), lambda model: value, data(), 0.1)


def test_evaluations_must_be_of_the_same_items():
    with pytest.raises(InputError, match="same items"):
        graphprune.smallest(
            net(), lambda m: torch.ones(m[0].out_features), data(), 0.1, criterion="l2"
        )


def test_rebuild_says_where_the_search_is():
    with pytest.raises(InputError, match="smallest"):
        graphprune.rebuild(net(), max_drop=1.0)


@pytest.mark.parametrize(
    ("evaluate", "text"), [(5, "must be a function of a model"), (lambda model: "x", "got str")]
)
def test_evaluations_that_are_none_are_told(evaluate, text):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(InputError, match=text):
        graphprune.smallest(net, evaluate, [torch.randn(8, 4)], 0.1)
