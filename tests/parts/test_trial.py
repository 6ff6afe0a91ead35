"""What is tried before parts leave: whether the code around them goes on."""

import pytest
import torch
from support.comparing import untouched
from torch import nn

import graphprune
from graphprune.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")


class Block(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.up, self.norm, self.down = (
            nn.Linear(width, 8),
            nn.BatchNorm1d(8),
            nn.Linear(8, width),
        )

    def forward(self, x):
        return x + self.down(self.norm(self.up(x)).relu())


class Asked(nn.Module):
    """Code that reads a layer inside of some of its blocks."""

    def __init__(self, asked):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.asked = asked

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x) * (1 if number not in self.asked else block.up.weight.shape[0] / 8)
        return x.sum(1)


def equal(model, plan, x):
    with untouched(model):
        small = graphprune.rebuild(model, plan)
        assert graphprune.verify(model, small, x).verdict == "equal"


def test_models_with_buffers_are_tried():
    """Statistics that have no values are no reason to try nothing."""
    torch.manual_seed(0)
    model, x = Asked((0, 2)).eval(), torch.randn(3, 6)
    plan = graphprune.trace(model, x).plan(0.5, parts="blocks")
    assert {part.name for part in plan.parts} == {"blocks.1", "blocks.3"}
    equal(model, plan, x)


def test_why_none_can_leave():
    model, x = Asked(range(4)).eval(), torch.randn(3, 6)
    told = r"blocks\.0, .* can leave alone: the code around does not go on \(AttributeError"
    with pytest.raises(InputError, match=told):
        graphprune.trace(model, x).plan(0.5, parts="blocks")


class Reader(nn.Module):
    """Two layers look at something that is computed beside them, and whose size is asked for."""

    def __init__(self):
        super().__init__()
        self.beside = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.mix = nn.ModuleList(nn.Linear(12, 6) for _ in range(2))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        beside = self.beside(x)
        if beside.shape[1] != 6:
            raise ValueError("six numbers are needed")
        for block, mix in zip(self.blocks, self.mix):
            x = block(x)
            x = x + mix(torch.cat([x, beside], 1))
        return self.head(x)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(3))
def test_what_cannot_leave_together(ratio, seed):
    """Every set is tried: that each of them can leave alone says nothing of all."""
    torch.manual_seed(0)
    model, x = Reader().eval(), torch.randn(3, 6)
    graph = graphprune.trace(model, x)
    assert len(graph.branches) >= 4
    plan = graph.plan(ratio, parts="branches", criterion="random", seed=seed)
    assert plan.parts
    equal(model, plan, x)


class Observer(nn.Module):
    """Sees what comes by while it trains, and hands it on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.largest.copy_(torch.maximum(self.largest, x.detach().max()))
        return x


class Observed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.observer, self.down = nn.Linear(6, 6), Observer(), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.down(self.observer(self.up(x)))


def test_what_only_trains_leaves_with_its_branch():
    torch.manual_seed(0)
    model, x = nn.Sequential(Observed(), Observed(), nn.Linear(6, 2)).eval(), torch.randn(3, 6)
    plan = graphprune.trace(model, x).plan(0.5, parts="branches")
    assert any(stand_in.module.endswith("observer") for stand_in in plan.stand_ins)
    equal(model, plan, x)


class Pyramid(nn.Module):
    """Maps of several sizes, where the code asks a small one for the size of the next."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(3 if n == 0 else 4, 4, 3, 2, 1) for n in range(3))
        self.sides = nn.ModuleList(nn.Conv2d(4, 5, 3, padding=1) for _ in range(3))
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x).relu()
            maps.append(x)
        sides = [side(each) for side, each in zip(self.sides, maps)]
        for low in (1, 0):
            size = sides[low].shape[2:]
            sides[low] = sides[low] + nn.functional.interpolate(sides[low + 1], size=size)
        return self.head(sides[0])


@pytest.mark.parametrize("seed", range(3))
def test_sizes_that_code_asks_for(seed):
    torch.manual_seed(0)
    model, x = Pyramid().eval(), torch.randn(1, 3, 16, 16)
    graph = graphprune.trace(model, x)
    plan = graph.plan(0.6, parts="branches", criterion="random", seed=seed)
    assert plan.parts
    equal(model, plan, x)


class Auxiliary(nn.Module):
    """A second head that runs beside, whose result nobody reads, and whose code wants its shape."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.second, self.head = nn.Linear(6, 4), nn.Linear(6, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        self.second(x.detach()).view(len(x), 2, 2)
        return self.head(x)


def test_what_nobody_needed_before_stays():
    torch.manual_seed(0)
    model, x = Auxiliary().eval(), torch.randn(3, 6)
    plan = graphprune.trace(model, x).plan(0.4, parts="blocks")
    assert {stand_in.module.partition(".")[0] for stand_in in plan.stand_ins} == {"blocks"}
    equal(model, plan, x)


class Lower(nn.Module):
    """A side head on a map that is gone with the branch it belongs to."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(6, 2)
        self.down, self.side, self.up = nn.Linear(6, 3), nn.Linear(3, 2), nn.Linear(3, 6)

    def forward(self, x):
        low = self.down(x)
        self.side(low)
        return self.head(self.block(x + self.up(low)))


def test_what_nobody_needed_leaves_where_its_input_does():
    torch.manual_seed(0)
    model, x = Lower().eval(), torch.randn(3, 6)
    plan = graphprune.trace(model, x).plan(0.9, parts="branches", keep="block")
    assert {stand_in.module for stand_in in plan.stand_ins} == {"down", "side", "up"}
    equal(model, plan, x)
