"""Branches that are concatenated: what stands beside something else, and can leave."""

import pytest
import torch
from support.comparing import untouched
from support.streams import Dense, images
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")


class Listed(nn.Module):
    """Layers that are given the list of all that was computed before."""

    class Layer(nn.Module):
        def __init__(self, width, grow):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, grow, 3, padding=1)

        def forward(self, features):
            return self.conv(F.relu(self.norm(torch.cat(features, 1))))

    def __init__(self, width=4, grow=3, layers=3):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.layers = nn.ModuleList(self.Layer(width + grow * n, grow) for n in range(layers))
        self.head = nn.Linear(width + grow * layers, 2)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class Levels(nn.Module):
    """Of a U-Net: what comes from below stands beside what is there."""

    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.ReLU())
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.out2 = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.out1 = nn.Conv2d(2 * width, 2, 3, padding=1)

    def forward(self, x):
        one = self.first(x)
        two = self.second(F.max_pool2d(one, 2))
        two = self.out2(torch.cat([two, self.up2(self.third(F.max_pool2d(two, 2)))], 1))
        return self.out1(torch.cat([one, self.up1(two)], 1))


class Towers(nn.Module):
    """Of tables: networks side by side in the last dimension."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(3)
        )
        self.head = nn.Linear(9, 2)

    def forward(self, x):
        return self.head(torch.cat([tower(x) for tower in self.towers], -1))


class Kernels(nn.Module):
    """Of texts: convolutions of several widths, the largest of each."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.convs = nn.ModuleList(nn.Conv1d(6, 4, size) for size in (2, 3, 4))
        self.head = nn.Linear(12, 2)

    def forward(self, ids):
        x = self.words(ids).transpose(1, 2)
        return self.head(torch.cat([F.relu(c(x)).max(-1).values for c in self.convs], 1))


def drawn(make):
    torch.manual_seed(0)
    return make()


NETWORKS = {
    "listed": (Listed, lambda: torch.randn(2, 3, 6, 6), [f"layers.{n}" for n in range(3)]),
    "levels": (Levels, lambda: torch.randn(2, 3, 8, 8), ["third", "out2"]),
    "towers": (Towers, lambda: torch.randn(3, 6), [f"towers.{n}" for n in range(3)]),
    "kernels": (Kernels, lambda: torch.randint(20, (2, 7)), [f"convs.{n}" for n in range(3)]),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("criterion", ["l2", "reconstruction", "taylor", "random"])
def test_found_and_gone(name, criterion):
    make, draw, names = NETWORKS[name]
    model, x = drawn(make).eval(), draw()
    graph = graphprune.trace(model, x)
    assert [branch.name for branch in graph.branches] == names
    options = {"loss": lambda model, batch: model(batch[0]).sum()} if criterion == "taylor" else {}
    with untouched(model):
        plan = graph.plan(0.5, parts="branches", criterion=criterion, data=[(x,)], **options)
        small = graphprune.rebuild(model, graphprune.Plan.from_json(plan.to_json()))
        assert graphprune.verify(model, small, x).verdict == "equal"
    assert len(plan.parts) == round(len(names) / 2)
    assert sum(p.numel() for p in small.parameters()) == plan.after.params
    assert plan.after.params <= plan.before.params - sum(part.params for part in plan.parts)


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_to_zeroes_by_hand(name):
    """What leaves is zero where it is read, and nothing reads it otherwise in these networks."""
    make, draw, _ = NETWORKS[name]
    model, x = drawn(make).double().eval(), draw()
    x = x.double() if x.is_floating_point() else x
    plan = graphprune.trace(model, x).plan(0.4, parts="branches")
    small = graphprune.rebuild(model, plan)
    tensors = model.state_dict()
    gone = tuple(f"{stand_in.module}." for stand_in in plan.stand_ins)
    for slot in plan.slots:
        if not slot.tensor.startswith(gone):
            lost = [n for n in range(slot.size) if n not in slot.kept]
            tensors[slot.tensor].index_fill_(slot.dim, torch.tensor(lost), 0.0)
    assert plan.parts
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["joined", "dense"])
def test_channels_leave_before_and_behind(kind):
    model, x = images(kind, kind)
    small = model
    for options in ({"parts": "branches"}, {}, {"parts": "branches"}):
        small = graphprune.rebuild(small, graphprune.trace(small, x).plan(0.4, **options))
        assert graphprune.verify(model, small, x).verdict == "equal"


def test_widths_and_branches_within_one_budget():
    model, x = images("dense", "joined", width=8)
    graph = graphprune.trace(model, x)
    plan = graph.plan(target={"macs": 0.4}, parts=("channels", "branches"))
    assert plan.after.macs <= 0.4 * plan.before.macs
    small = graphprune.rebuild(model, plan)
    assert graphprune.verify(model, small, x).verdict == "equal"


def test_one_way_stays():
    model, x = images("joined")
    graph = graphprune.trace(model, x)
    names = [branch.name for branch in graph.branches]
    assert names == [f"blocks.0.{way}" for way in ("pooled", "narrow", "wide")]
    plan = graph.plan(0.99, parts="branches")
    assert len(plan.parts) == len(names) - 1
    kept = graph.plan(0.9, parts="branches", keep=["blocks.0.wide", "blocks.0.narrow"])
    assert [part.name for part in kept.parts] == ["blocks.0.pooled"]


class Counted(nn.Module):
    """A concatenation of which the mean over channels is taken: what left counts there."""

    def __init__(self, read):
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(5, 4)
        self.head = nn.Linear(8, 2)
        self.read = read

    def forward(self, x):
        joined = torch.cat([self.one(x), self.two(x)], 1)
        return self.head(joined) + (self.two(x) if self.read else joined).sum(1, keepdim=True)


def test_what_is_read_elsewhere():
    """A sum over channels leaves them out; zero channels would make another op fail."""
    x = torch.randn(3, 5)
    model = drawn(lambda: Counted(read=False)).eval()
    plan = graphprune.trace(model, x).plan(0.5, parts="branches")
    assert graphprune.verify(model, graphprune.rebuild(model, plan), x).verdict == "equal"
    assert [b.name for b in graphprune.trace(Counted(read=True).eval(), x).branches] == ["one"]


class Resized(nn.Module):
    """A kernel that takes no tensor without channels stands before the concatenation."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 2, 2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(torch.cat([self.one(x), F.interpolate(self.two(x), scale_factor=2)], 1))


def test_kernels_that_need_channels():
    model, x = drawn(Resized).eval(), torch.randn(1, 3, 4, 4)
    assert [b.name for b in graphprune.trace(model, x).branches] == ["one"]


def test_saved_and_loaded(tmp_path):
    model, x = images("dense", "dense")
    small = graphprune.rebuild(model, graphprune.trace(model, x).plan(0.5, parts="branches"))
    graphprune.save(small, tmp_path / "small")
    torch.testing.assert_close(graphprune.load(tmp_path / "small", model)(x), small(x))


def test_training_goes_on():
    model, x = images("dense")
    small = graphprune.rebuild(model, graphprune.trace(model, x).plan(0.5, parts="branches"))
    small.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_a_layer_alone_in_its_block_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Dense(4, layers=1), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(InputError, match="alone can leave"):
        graphprune.trace(model.eval(), x).plan(0.5, parts="branches")
