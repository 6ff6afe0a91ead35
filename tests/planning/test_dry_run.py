"""The small model is run before it is handed out: what would break freezes, or is refused."""

from dataclasses import replace

import pytest
import torch
from support.strategies import Spec
from support.zoo import ZOO
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import InputError, PlanError, RewriteError
from graphprune.planning import make, settle

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")


class Windows(nn.Module):
    """Overlapping windows over channels, of a size that the code gives."""

    def __init__(self, size=4, step=2):
        super().__init__()
        self.size, self.step = size, step
        self.stem, self.wide = nn.Linear(3, 6), nn.Linear(6, 12)
        self.head = nn.Linear(size * ((12 - size) // step + 1), 2)

    def forward(self, x):
        return self.head(self.wide(self.stem(x).relu()).unfold(1, self.size, self.step).flatten(1))


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5, 0.8])
@pytest.mark.parametrize(("size", "step"), [(4, 2), (3, 3), (6, 1)])
def test_windows_over_channels_never_break_a_model(ratio, size, step):
    model, x = Windows(size, step).double().eval(), torch.randn(4, 3, dtype=torch.float64)
    small = graphprune.rebuild(model, ratio, x)
    assert small(x).shape == (4, 2)
    assert graphprune.verify(model, small, x).difference < 1e-10
    assert small.stem.out_features == 6 - int(6 * ratio), "what the windows do not touch leaves"


@pytest.mark.parametrize(("hidden", "projected"), [(4, 3), (6, 4), (8, 3)])
def test_an_lstm_is_not_cut_to_the_size_of_its_projection(hidden, projected):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(3, 8), nn.Linear(projected, 2)
            self.rnn = nn.LSTM(8, hidden, proj_size=projected, batch_first=True)

        def forward(self, x):
            return self.head(self.rnn(self.stem(x))[0])

    x = torch.randn(2, 5, 3)
    for ratio in (0.3, 0.5, 0.7):
        small = graphprune.rebuild(Net().eval(), ratio, x)
        assert small(x).shape == (2, 5, 2)
        assert small.rnn.hidden_size != small.rnn.proj_size, "torch takes that for no projection"


def test_examples_without_elements_are_refused():
    """Torch takes shortcuts for them: of a BatchNorm, say, one weight is read."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 2))
    with pytest.raises(InputError, match=r"hold no elements .*0, 3, 2, 2.* at least one"):
        graphprune.rebuild(net.eval(), 0.5, torch.randn(0, 3, 2, 2))


class TwoStreams(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(3, 8)
        self.norm, self.head = norm, nn.Linear(8, 2)

    def forward(self, x, y):
        return self.head(self.first(x).relu()), self.head(self.norm(self.second(y)).relu())


def test_one_of_two_examples_without_elements():
    inputs = torch.randn(2, 3), torch.randn(0, 3)
    with pytest.raises(InputError, match="some of the example inputs hold no elements"):
        graphprune.rebuild(TwoStreams(nn.BatchNorm1d(8)).eval(), 0.5, inputs)
    small = graphprune.rebuild(TwoStreams(nn.Identity()).eval(), 0.5, inputs)
    assert small(torch.randn(3, 3), torch.randn(4, 3))[1].shape == (4, 2)


class PerSample(nn.Module):
    """A convolution whose kernels come from the input: its number of groups counts the batch."""

    def __init__(self, count):
        super().__init__()
        self.count = count
        self.stem, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.kernels, self.head = nn.Linear(6, 54), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        y = self.inner(self.stem(x).relu())
        kernels = self.kernels(y.mean((2, 3))).reshape(self.count(y), 1, 3, 3)
        z = F.conv2d(y.flatten(0, 1).unsqueeze(0), kernels, padding=1, groups=self.count(y))
        return self.head(z.view_as(y))


COUNTS = {
    "len": lambda y: len(y) * 6,
    "shape": lambda y: 6 * y.shape[0],
    "int": lambda y: int(y.shape[0]) * 6,
    "item": lambda y: torch.tensor(y.shape[0]).item() * 6,
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_small_models_take_other_batch_sizes(name, batch):
    model, x = PerSample(COUNTS[name]).double().eval(), torch.randn(3, 3, 8, 8).double()
    small = graphprune.rebuild(model, 0.5, x[:batch])
    assert small.stem.out_channels == 4
    for size in (1, 2, 3):
        assert small(x[:size]).shape == (size, 3, 8, 8)


def test_a_small_model_that_would_fail_is_not_handed_out(monkeypatch):
    """The sizes of a convolution are settled wrongly on purpose: the run shows it."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 2, 1))
    x = torch.randn(1, 3, 4, 4)
    graph = graphprune.trace(net, x)
    right = make.assemble

    def wrong(*args, **kwargs):
        plan = right(*args, **kwargs)
        return replace(plan, slots=plan.slots[1:]) if plan.slots else plan

    monkeypatch.setattr(make, "assemble", wrong)
    with pytest.raises(graphprune.errors.GraphPruneError):
        graph.plan(0.5)


def test_models_that_read_values_run_with_their_weights():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = self.stem(x).relu()
            return self.head(y if float(y.sum()) > -1 else -y)

    x = torch.randn(2, 3)
    settled = graphprune.trace(Reads().eval(), x).settled
    assert settled.analysis.records[0].device == "cpu"
    assert graphprune.rebuild(Reads().eval(), 0.5, x).stem.out_features == 4


def test_what_is_found_later_makes_another_analysis():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    analysis = graphprune.trace(net, torch.randn(1, 3)).analysis
    slot = next(slot for slot in analysis.slots if slot.tensor == "0.weight" and slot.dim == 0)
    ids = torch.arange(slot.start, slot.start + 2)
    reason = settle.Reason("for a test")
    derived = analysis.derived(frozen=((ids, reason),))
    tied = analysis.derived(ties=((ids[:1], ids[1:]),))
    assert [group.size for group in analysis.groups] == [8]
    assert [group.size for group in derived.groups] == [6]
    assert {group.reason for group in derived.all_groups} >= {reason}
    assert sum(len(group.units) for group in tied.groups) == 7


class Parts(nn.Module):
    def __init__(self, sections, dim):
        super().__init__()
        self.stem, self.wide, self.head = nn.Linear(4, 6), nn.Linear(6, 16), nn.Linear(16, 2)
        self.sections, self.dim = sections, dim

    def forward(self, x):
        wide = self.wide(self.stem(x).relu())
        first, second, *rest = torch.tensor_split(wide, self.sections, dim=self.dim)
        parts = (first.relu(), second.tanh(), *(part.sigmoid() for part in rest))
        return self.head(torch.cat(parts, self.dim))


SECTIONS = [2, 3, 4, 5, 7, [5], (4, 9), [-5], (3, -4), torch.tensor([4, 9]), torch.tensor(3)]


@pytest.mark.parametrize("sections", SECTIONS, ids=str)
def test_tensor_split_in_every_form(sections):
    """Its parts say nothing about channels when they are counted from the size of the small one."""
    torch.manual_seed(0)
    model, x = Parts(sections, -1).double().eval(), torch.randn(5, 4, dtype=torch.float64)
    for ratio in (0.3, 0.5):
        small = graphprune.rebuild(model, ratio, x)
        assert graphprune.verify(model, small, x).difference < 1e-10
        assert small.stem.out_features < 6


class Guarded(nn.Module):
    """Looks at a size of its own before anything that it measures was computed."""

    def __init__(self):
        super().__init__()
        self.width = 8
        self.inp, self.other, self.head = nn.Linear(3, 8), nn.Linear(3, 12), nn.Linear(20, 2)

    def forward(self, x):
        if self.width != 8:
            raise ValueError("another width")
        x = x.sin()
        wide = self.inp(x).reshape(-1, self.width)
        return self.head(torch.cat([wide, self.other(x)], 1))


def test_what_looks_at_a_size_too_early_freezes_what_comes_next():
    model, x = Guarded().eval(), torch.randn(4, 3)
    plan = graphprune.trace(model, x).plan(0.5)
    assert [(group.size, len(group.kept)) for group in plan.groups] == [(12, 6)]
    assert graphprune.rebuild(model, plan)(x).shape == (4, 2)


class PartByRatio(nn.Module):
    """A plain int that may come from two sizes cuts channels that a grouped layer makes."""

    def __init__(self):
        super().__init__()
        self.four, self.ratio = 4, 0.5
        self.make = nn.Conv2d(3, 4, 1)
        self.up = nn.ConvTranspose2d(4, 8, 3, padding=1, groups=4)
        self.part, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.up(self.make(x).relu())
        for _ in range(int(self.four)):
            x = torch.tanh(x)
        first = int(x.shape[1] * self.ratio)
        return self.head(torch.cat([self.part(x[:, :first]), x[:, first:]], 1))


def test_what_is_said_to_be_removable_can_be_removed():
    graph = graphprune.trace(PartByRatio().eval(), torch.randn(2, 3, 6, 6))
    assert "part" in {layer for group in graph.groups for layer in group.layers}
    for group in graph.groups:
        graph.plan_of({group.name: [0]})


class Selecting(nn.Module):
    """Keeps the rows that score well, and copies them into a table of as many rows."""

    def __init__(self):
        super().__init__()
        self.stem, self.score, self.head = nn.Linear(4, 16), nn.Linear(16, 1), nn.Linear(16, 3)

    def forward(self, x):
        y = self.stem(x).relu()
        chosen = torch.where(self.score(y)[:, 0] > 0)[0]
        table = torch.zeros(len(chosen), y.shape[1], dtype=y.dtype)
        table[torch.arange(len(chosen))] = y[chosen]
        return self.head(table)


def test_how_many_rows_values_choose_is_another_matter():
    torch.manual_seed(0)
    model, x = Selecting().double().eval(), torch.randn(40, 4, dtype=torch.float64)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.stem.out_features == 8
    assert len(small(x)) != len(model(x)), "or this shows nothing"
    assert graphprune.verify(model, small, x).difference < 1e-10


def test_rows_of_a_table_are_as_many_as_asked_for():
    """Places chosen by whole numbers hide nothing of what is run behind them."""
    entry = ZOO["window_attention"]
    model, x = entry.build(), entry.inputs()
    small = model
    for ratio, seed in ((0.4, 0), (0.5, 1)):
        plan = graphprune.trace(small, x).plan(ratio, criterion="random", seed=seed)
        small = graphprune.rebuild(small, plan)
    assert graphprune.verify(model, small, x).difference < 1e-10
    assert small.thing.inner.attention.qkv.out_features == 18, "two of four heads of three"


class Literal(nn.Module):
    """A number in the code that follows, beside channels that have nothing to do with it."""

    def __init__(self):
        super().__init__()
        self.inp, self.other, self.head = nn.Linear(3, 8), nn.Linear(3, 12), nn.Linear(20, 2)

    def forward(self, x):
        return self.head(torch.cat([self.inp(x).reshape(-1, 8), self.other(x)], 1))


@pytest.mark.parametrize("error", [RewriteError, PlanError])
def test_code_that_cannot_be_changed_freezes_what_it_is_about(error, monkeypatch):
    model, x = Literal().eval(), torch.randn(4, 3)
    assert [group.size for group in graphprune.trace(model, x).groups] == [8, 12]

    def refuse(model, changes):
        if changes:
            raise error("the source is not to be had")

    monkeypatch.setattr("graphprune.execute.shrink.rewrite_forward", refuse)
    small = graphprune.rebuild(model, 0.5, x)
    assert (small.inp.out_features, small.other.out_features) == (8, 6)
    assert small(x).shape == (4, 2)


TWO_RATIOS = Spec(  # found by chance: two values of one width, cut at numbers computed from it
    steps=(
        ("Conv", (3, 3, 1, 1, "batch", "relu")), ("Experts", (3, 5, 2)), ("Split", (1, 2, 7)),
        ("Pool", ("max",)), ("ByRatio", (7, 0.5)), ("Add", (4, 7, 7)), ("Scale", (7,)),
        ("ByRatio", (7, 0.5)),
    ),
    heads=((8, False),),
    seed=0,
)  # fmt: skip


def test_a_number_is_computed_from_the_size_of_what_it_cuts():
    model, x = TWO_RATIOS.build(), TWO_RATIOS.inputs()
    graph = graphprune.trace(model, x)
    assert any("steps.7.conv" in group.layers for group in graph.groups)
    for group in graph.groups:
        graph.plan_of({group.name: [0]})
    assert graphprune.verify(model, graphprune.rebuild(model, 0.4, x), x).difference < 1e-10


class Routed(nn.Module):
    """Each row goes to the expert that its router prefers: to another one in the small model."""

    def __init__(self):
        super().__init__()
        self.stem, self.router, self.out = nn.Linear(5, 16), nn.Linear(16, 6), nn.Linear(16, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(6)
        )

    def forward(self, x):
        h = self.stem(x)
        chosen = self.router(h).argmax(-1).tolist()
        out = torch.cat([self.experts[n](row[None]) for n, row in zip(chosen, h)])
        return self.out(h + out)


@pytest.mark.parametrize("seed", range(4))
def test_values_that_take_another_way_in_the_small_model_freeze_nothing(seed):
    torch.manual_seed(seed)
    model, x = Routed().double().eval(), torch.randn(3, 5, dtype=torch.float64)
    graph = graphprune.trace(model, x)
    assert not [group.note for group in graph.frozen if "does not follow" in str(group.note)]
    small = graphprune.rebuild(model, graph.plan(0.5))
    assert small.stem.out_features == 8
    assert graphprune.verify(model, small, x).verdict == "equal"
