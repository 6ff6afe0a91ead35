"""Which mixtures are found, and which are left alone."""

import pytest
import torch
from support.comparing import untouched
from support.mixtures import Around, Listed, Stacked, built, expert
from torch import nn

import graphprune
from graphprune.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*channels were removed")


def equal(model, plan, inputs):
    with untouched(model):
        small = graphprune.rebuild(model, plan)
        assert graphprune.verify(model, small, inputs).verdict == "equal"
    return small


class Special(Listed):
    """One expert is not like the others, by its number."""

    def __init__(self, experts, place, how):
        super().__init__(experts)
        self.place, self.how = place % experts, how

    def forward(self, x):
        flat = x.reshape(-1, 8)
        gates = self.router(flat).softmax(-1)
        ranked = gates.clone()
        if self.how == "always":
            ranked[:, self.place] = 9
        places = ranked.topk(self.chosen, -1).indices
        out = torch.zeros_like(flat)
        for number, part in enumerate(self.experts):
            rows = torch.where(places == number)[0]
            added = part(flat[rows]) * gates[rows, number, None]
            if self.how == "nothing" and number == self.place:
                added = added * 0
            out = out.index_add(0, rows, added)
        return out.reshape(x.shape)


@pytest.mark.parametrize("how", ["always", "nothing"])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("experts", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 7))])
def test_mixtures_with_a_special_expert_are_left_alone(experts, place, how):
    """Which one it is nobody can tell: every expert leaves in some trial."""
    torch.manual_seed(0)
    model = Around(Special(experts, place, how)).double().eval()
    for inputs in (torch.randn(1, 3, 5).double(), torch.randn(4, 9, 5).double()):
        assert graphprune.trace(model, inputs).experts == ()


class Pair(nn.Module):
    """Two mixtures of which one has something of the other."""

    def __init__(self, what):
        super().__init__()
        self.a, self.b = Listed(), Listed()
        setattr(self.b, what, getattr(self.a, what))

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("what", ["router", "experts"])
def test_what_two_mixtures_share_stays(what):
    torch.manual_seed(0)
    graph = graphprune.trace(Around(Pair(what)).double().eval(), torch.randn(4, 9, 5).double())
    assert graph.experts == ()
    with pytest.raises(InputError, match=r"layers\.0\.a"):
        graph.plan(0.4, parts="experts")


class Twice(Listed):
    def forward(self, x):
        return super().forward(super().forward(x))


class Warm(Listed):
    """Scores have a temperature, which is learned."""

    def __init__(self):
        super().__init__()
        self.warmth = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        flat = x.reshape(-1, 8)
        scores = self.router(flat) * self.warmth.exp()
        gates, places = scores.softmax(-1).topk(self.chosen, -1)
        out = torch.zeros_like(flat)
        for number in range(self.num_experts):
            rows, slot = torch.where(places == number)
            out = out.index_add(0, rows, self.experts[number](flat[rows]) * gates[rows, slot, None])
        return out.reshape(x.shape)


class Outer(Listed):
    def __init__(self):
        super().__init__(4)
        self.experts = nn.ModuleList(Listed(3, 1) for _ in range(4))


class Remembering(Listed):
    """Its number of experts is the number of other things as well."""

    def __init__(self):
        super().__init__(8)
        self.hidden = self.width = 8


@pytest.mark.parametrize("kind", [Twice, Warm, Outer, Remembering])
def test_unusual_mixtures(kind):
    torch.manual_seed(0)
    model, inputs = Around(kind()).double().eval(), torch.randn(4, 9, 5).double()
    graph = graphprune.trace(model, inputs)
    assert len(graph.experts) == 1
    small = equal(model, graph.plan(0.3, parts="experts", criterion="random"), inputs)
    if kind is Remembering:
        layer = small.layers[0]
        assert (layer.hidden, layer.width, layer.num_experts) == (8, 8, 6)


class Alike(nn.Module):
    """Ranks the channels of a layer: each of the five experts belongs to a channel, not to a row.

    What the code computes with fewer is not what it computes without some of the scores.
    """

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 5)
        self.experts = nn.ModuleList(expert() for _ in range(5))

    def forward(self, x):
        weights, places = self.router(x).topk(2)
        weights = weights / len(self.experts)
        return sum(
            (weights * (places == n)).sum(-1, keepdim=True) * part(x)
            for n, part in enumerate(self.experts)
        )


def test_code_that_counts_experts_is_left_alone():
    model = Around(Alike()).double().eval()
    assert graphprune.trace(model, torch.randn(2, 4, 5).double()).experts == ()


def test_mixtures_of_one_size_share_a_trial(monkeypatch):
    from graphprune.parts import mixtures

    tried = []
    monkeypatch.setattr(
        mixtures.Trial, "result", lambda self, numbers: tried.append(1) or mixtures.Result(2, 1, ())
    )
    model = Around(*(Stacked() for _ in range(4))).double().eval()
    assert len(graphprune.trace(model, torch.randn(2, 4, 5).double()).experts) == 4
    assert len(tried) == 1


def test_large_mixtures_are_tried_on_request(monkeypatch):
    from graphprune.parts import mixtures

    monkeypatch.setattr(mixtures, "LARGE", 100)
    model, inputs = built("stacked weights")
    graph = graphprune.trace(model, inputs)
    assert "not tried yet: layers.0, layers.1" in str(graph)
    assert [str(mixture) for mixture in graph.experts] == ["layers.0 (6)", "layers.1 (6)"]


class Reversed(Listed):
    """The experts stand in the order of their scores, the other way round."""

    def forward(self, x):
        flat = x.reshape(-1, 8)
        weights, places = self.router(flat).softmax(-1).topk(self.chosen, -1)
        out = torch.zeros_like(flat)
        for number, part in enumerate(reversed(self.experts)):
            rows, slot = torch.where(places == number)
            out = out.index_add(0, rows, part(flat[rows]) * weights[rows, slot, None])
        return out.reshape(x.shape)


@pytest.mark.parametrize(
    ("experts", "chosen"), [(4, 2), pytest.param(6, 2, marks=pytest.mark.slow), (8, 4)]
)
def test_symmetric_choices_prove_nothing(experts, chosen):
    """Those that leave in trials must not happen to lie like their mirror images."""
    torch.manual_seed(0)
    model = Around(Reversed(experts, chosen)).double().eval()
    assert graphprune.trace(model, torch.randn(4, 9, 5).double()).experts == ()
