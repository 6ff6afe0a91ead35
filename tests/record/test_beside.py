"""Experts that no token of the example inputs chooses: their channels are followed all the same."""

import warnings

import pytest
import torch
from support.comparing import untouched
from support.mixtures import Around, Listed, Named, built, expert
from torch import nn

import graphprune
from graphprune.record.beside import passed_by

ONE = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(0)).double()
MANY = torch.randn(8, 20, 5, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("kind", [Listed, Named])
def test_channels_of_experts_that_do_not_run_leave_as_well(kind):
    torch.manual_seed(0)
    model = Around(kind(), kind()).double().eval()
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = graphprune.trace(model, ONE).plan(target={"params": 0.7})
        small = graphprune.rebuild(model, plan)
    assert not any("stay" in note for note in plan.notes)
    with torch.no_grad():
        wanted, found = graphprune.mask(model, plan)(MANY), small(MANY)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert graphprune.verify(model, small, MANY).verdict == "equal"
    parts = [part for part in small.layers[0].modules() if isinstance(part, nn.Sequential)]
    assert {part[0].in_features for part in parts} == {small.first.out_features}


def test_what_does_not_run_costs_nothing():
    model, _ = built("a list")
    cost = graphprune.trace(model, ONE).cost
    layer = model.layers[0]
    chosen = 2 * sum(p.numel() for p in layer.experts[0].parameters() if p.dim() == 2)
    routers = layer.router.weight.numel()
    ends = model.first.weight.numel() + model.last.weight.numel()
    assert cost.macs == ends + 2 * (chosen + routers)


def test_parts_are_those_that_run():
    model, _ = built("a list")
    names = [part.name for part in graphprune.trace(model, ONE).branches]
    assert names == ["layers.0", "layers.1"]


class Stages(nn.Module):
    """Reads three of five layers, whatever the values are."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.stages = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x):
        h = self.first(x)
        for stage in self.stages[:3]:
            h = stage(h).relu()
        return self.last(h)


def test_code_that_looks_at_no_values_runs_as_it_is():
    model = Stages().double().eval()
    graph = graphprune.trace(model, ONE)
    assert graph.analysis.records[0].device == "meta"
    assert not graph.analysis.records[0].beside
    with pytest.warns(graphprune.errors.PruningWarning, match=r"stages\.3, stages\.4"):
        graph.plan(0.5)


class Moody(nn.Module):
    """Cannot run on what the other one is given."""

    def __init__(self, good):
        super().__init__()
        self.layer, self.good = nn.Linear(8, 8), good

    def forward(self, x):
        if not self.good:
            raise ValueError("not today")
        return self.layer(x)


class Choosing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.ways = nn.ModuleList([Moody(True), Moody(False)])

    def forward(self, x):
        h = self.first(x)
        return self.last(self.ways[int(x.sum() > 1e6)](h))


def test_what_cannot_run_is_told_as_before():
    model = Choosing().double().eval()
    graph = graphprune.trace(model, ONE)
    assert not graph.analysis.records[0].beside
    with pytest.warns(graphprune.errors.PruningWarning, match=r"ways\.1\.layer"):
        graph.plan(0.5)


def test_of_one_kind_are_modules_with_the_same_parameters():
    parts = [expert(), expert(), expert(), expert(hidden=7), nn.GELU(), nn.Linear(8, 8)]
    model = nn.ModuleDict({"all": nn.ModuleList(parts)})
    (found,) = passed_by(model, {"", "all.0", "all.0.0", "all.1", "all.5"})
    assert (found.ran, found.others) == (("all.0", "all.1"), ("all.2",))
    assert passed_by(model, {"", "all.0", "all.0.0", "all.5"}) == ()
    assert passed_by(model, {"", "all.0", "all.1", "all.2.0"}) == ()


class Apart(nn.Module):
    """Two streams of one width; readers of one list read one or the other."""

    def __init__(self, reads):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(5, 8)
        self.readers = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
        self.out, self.reads = nn.Linear(8, 6), reads

    def forward(self, x):
        a, b = self.a(x).relu(), self.b(x).relu()
        out = self.readers[0](a) + (self.readers[1](b) if self.reads == "ab" else 0)
        return self.out(b) + (self.readers[2](b) if x.sum() > 1e3 else out)


@pytest.mark.parametrize("reads", ["a", "ab"])
def test_one_that_ran_tells_nothing_and_two_must_agree(reads):
    """What was passed by may read another stream of the same width: it stays, and is told."""
    torch.manual_seed(0)
    model = Apart(reads).double().eval()
    graph = graphprune.trace(model, ONE)
    assert not graph.analysis.records[0].beside
    with pytest.warns(graphprune.errors.PruningWarning, match=r"readers\.2"):
        graph.plan(0.5)


def test_a_plan_tells_what_was_passed_by():
    model, _ = built("a list")
    plan = graphprune.trace(model, ONE).plan(0.3)
    assert any("pass layers.0.experts." in note for note in plan.notes)


class Exits(nn.Module):
    """Returns what the first layer says that is sure enough."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.exits = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, x):
        h = self.first(x)
        for layer, leave in zip(self.layers, self.exits):
            h = h + layer(h).relu()
            y = leave(h)
            if h.abs().mean() < 0.35:
                break
        return y


def test_what_runs_and_is_not_read_may_be_read_when_values_differ():
    torch.manual_seed(0)
    model, hard = Exits().double().eval(), 3 * MANY
    small = graphprune.rebuild(model, 0.5, hard)
    for inputs in (hard, MANY / 100):
        assert small(inputs).shape == model(inputs).shape
        assert graphprune.verify(model, small, inputs).verdict == "equal"
    assert small.first.out_features == 4


class Aside(nn.Module):
    """Reads values, and computes what it neither reads nor could return."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.out = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        h = self.first(x).relu()
        self.last(h)
        return self.out(h) * (2 if x.mean() > 1e3 else 1)


def test_what_runs_unread_and_is_like_no_output_lets_channels_leave():
    torch.manual_seed(0)
    model = Aside().double().eval()
    small = graphprune.rebuild(model, 0.5, MANY)
    assert small.first.out_features == 4
    assert small.last.normalized_shape == (4,)
    assert graphprune.verify(model, small, MANY).verdict == "equal"
