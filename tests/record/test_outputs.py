"""Which outputs count: the others may lose channels, and are not compared."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn

import graphprune
from graphprune import testing
from graphprune.errors import InputError, VerificationError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2])


class Pair(NamedTuple):
    logits: torch.Tensor
    rest: tuple


@dataclass
class Fields:
    logits: torch.Tensor
    rest: tuple


WAYS = {
    "dict": lambda logits, *rest: {"logits": logits, "rest": rest},
    "tuple": lambda logits, *rest: (logits, rest),
    "named": lambda logits, *rest: Pair(logits, rest),
    "dataclass": lambda logits, *rest: Fields(logits, rest),
}


class Net(nn.Module):
    """Hands out the values of its hidden layers as well, as detectors and encoders do."""

    def __init__(self, way="dict"):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.c, self.way = nn.Linear(8, 3), way

    def forward(self, x):
        hidden = self.a(x)
        deep = torch.relu(self.b(self.norm(hidden)))
        return WAYS[self.way](self.c(deep), hidden, deep)


def loss(out):
    return nn.functional.cross_entropy(out["logits"], Y)


SPECS = {
    "a key": ("dict", "logits"),
    "several": ("dict", ["logits"]),
    "a place": ("tuple", 0),
    "a field": ("named", "logits"),
    "a place of a named tuple": ("named", 0),
    "an attribute": ("dataclass", "logits"),
    "a function": ("dataclass", lambda out: out.logits),
    "a loss": ("dict", loss),
}


@pytest.mark.parametrize("name", SPECS)
def test_what_does_not_count_may_shrink(name):
    way, outputs = SPECS[name]
    model = Net(way)
    assert not graphprune.trace(model, X).groups
    small = graphprune.rebuild(model, 0.5, X, outputs=outputs)
    assert (small.a.out_features, small.b.out_features) == (4, 4)
    report = graphprune.verify(model, small, X)
    assert report.difference < 1e-10
    plan = graphprune.Plan.from_json(small.graphprune_plan.to_json())
    assert plan.counted(3) == [0]
    again = graphprune.rebuild(small, 0.5, X, outputs=outputs)
    assert (again.a.out_features, again.b.out_features) == (2, 2)
    assert graphprune.verify(model, again, X).difference < 1e-10


def test_random_plans_of_a_graph_whose_outputs_count_in_part(monkeypatch):
    model = Net()
    monkeypatch.setattr(testing, "trace", partial(graphprune.trace, outputs="logits"))
    assert testing.check(model, X, plans=8).tried["verify"] == 8


def test_nested_outputs_and_several():
    small = graphprune.rebuild(Net(), 0.5, X, outputs=["logits", ("rest", 1)])
    assert (small.a.out_features, small.b.out_features) == (4, 8)
    graphprune.verify(Net(), small, X)


def test_what_counts_is_still_compared():
    model = Net()
    small = graphprune.rebuild(model, 0.5, X, outputs="logits")
    with torch.no_grad():
        small.c.bias += 1
    with pytest.raises(VerificationError):
        graphprune.verify(model, small, X)


class Auxiliary(Net):
    """Returns one tensor in eval mode."""

    def forward(self, x):
        out = super().forward(x)
        return out if self.training else out["logits"]


def test_a_train_mode_that_returns_something_else_keeps_all_of_it():
    graph = graphprune.trace(Auxiliary(), X, outputs=lambda out: out.sum())
    assert not graph.groups


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ("logit", "outputs names 'logit', which the output lacks; it has 'logits', 'rest'"),
        (
            [("rest", 5)],
            r"outputs names \('rest', 5\), which the output lacks; it has the places 0",
        ),
        (True, "outputs must be names or places"),
        ([], "outputs must be names or places"),
        (lambda out: 3, "returns nothing made of the outputs"),
        (lambda out: out["x"], "fails on the output: KeyError: 'x'"),
    ],
)
def test_wrong_outputs(outputs, text):
    with pytest.raises(InputError, match=text):
        graphprune.trace(Net(), X, outputs=outputs)
