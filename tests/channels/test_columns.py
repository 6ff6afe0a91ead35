"""Blocks that keep channels of their own: groups of convolutions, parts of a split, heads."""

import random

import pytest
import torch
from support.free_columns import FREE, IMAGE, Gated, Grouped, made
from torch import nn

import graphprune
from graphprune.channels.blocks import blocks, fine_labels
from graphprune.criteria.registry import Unseen
from graphprune.errors import InputError
from graphprune.execute.shrink import cut
from graphprune.plan.changes import SlotPlan


@pytest.mark.parametrize("name", FREE)
def test_the_result_equals_its_masked_original(name):
    model, x, options = made(name)
    graph = graphprune.trace(model, x, **options)
    aligned, plan = graph.plan(0.5), graph.plan(0.5, columns="free")
    assert plan.free_columns
    assert plan.after == aligned.after
    assert set(plan.slots) != set(aligned.slots)
    graphprune.verify(model, graphprune.rebuild(model, plan), x)
    assert graphprune.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", FREE)
def test_it_can_be_shrunk_again(name):
    model, x, options = made(name)
    small = graphprune.rebuild(model, 0.25, x, columns="free", **options)
    smaller = graphprune.rebuild(small, 0.5, x, columns="free", **options)
    graphprune.verify(model, smaller, x)
    smallest = graphprune.rebuild(smaller, 0.5, x, **options)
    graphprune.verify(model, smallest, x)


def test_every_group_of_a_convolution_keeps_its_largest_filters():
    model, x, _ = made("grouped")
    with torch.no_grad():  # other columns matter in each group
        model.a.weight[:8] *= torch.tensor([9, 1, 9, 1, 9, 1, 9, 1.0]).reshape(-1, 1, 1, 1)
        model.a.weight[8:] *= torch.tensor([1, 9, 1, 9, 1, 9, 1, 9.0]).reshape(-1, 1, 1, 1)
        model.n.weight.fill_(1.0)
    plan = graphprune.trace(model, x).plan(0.5, columns="free", keep="b")
    slots = {(slot.tensor, slot.dim): slot for slot in plan.slots}
    assert slots["a.weight", 0].kept == (0, 2, 4, 6, 9, 11, 13, 15)
    assert slots["b.weight", 1].by_block == ((0, 2, 4, 6), (1, 3, 5, 7))
    small = graphprune.rebuild(model, plan)
    assert torch.equal(small.b.weight[0], model.b.weight[0, [0, 2, 4, 6]])
    assert torch.equal(small.b.weight[16], model.b.weight[16, [1, 3, 5, 7]])


def test_more_of_the_norm_stays_than_with_equal_columns():
    model, x, _ = made("grouped")

    def norm(small):
        return float(small.a.weight.detach().norm())

    free = graphprune.rebuild(model, 0.5, x, columns="free")
    aligned = graphprune.rebuild(model, 0.5, x)
    assert norm(free) > norm(aligned)


def test_columns_that_an_op_ties_stay_equal():
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(IMAGE)
    graph = graphprune.trace(model, x)
    labels = fine_labels(graph.analysis)
    assert all(blocks(graph.analysis, group, labels) is None for group in graph.groups)
    plan = graph.plan(0.5, columns="free")
    assert not plan.free_columns
    assert plan.slots == graph.plan(0.5).slots


def test_a_checkpoint_of_free_columns(tmp_path):
    model, x, _ = made("grouped")
    small = graphprune.rebuild(model, 0.5, x, columns="free")
    graphprune.save(small, tmp_path / "small.safetensors")
    back = graphprune.load(tmp_path / "small.safetensors", Grouped())
    assert torch.equal(back.eval()(x), small(x))


def test_an_unknown_choice_of_columns():
    model, x, _ = made("grouped")
    with pytest.raises(InputError, match="columns must be one of aligned, free, not 'some'"):
        graphprune.rebuild(model, 0.5, x, columns="some")


def shrunk_at_random(draw, count, shape):
    """A cut of a weight [count * height, width]: columns of each block, rows, or whole blocks."""
    (height, width), every = shape, range(count)
    kind = draw.choice(["columns", "rows", "blocks"])
    if kind == "columns":
        number = draw.randint(1, width)
        kept = [column for _ in every for column in sorted(draw.sample(range(width), number))]
        return SlotPlan("w", 1, width, tuple(kept), count), count, (height, number)
    left, number = (every, draw.randint(1, height)) if kind == "rows" else (every, height)
    if kind == "blocks":
        left = sorted(draw.sample(every, draw.randint(1, count)))
    kept = [n * height + row for n in left for row in sorted(draw.sample(range(height), number))]
    return SlotPlan("w", 0, count * height, tuple(kept)), len(left), (number, width)


def index_of(slot):
    index = torch.tensor(slot.kept)
    return index if slot.blocks == 1 else index.reshape(slot.blocks, -1)


def assert_composes(draw, count):
    shape, weight = (4, 6), torch.arange(count * 24).reshape(count * 4, 6)
    small, whole = weight, {}
    for _ in range(4):
        slot, count, shape = shrunk_at_random(draw, count, shape)
        small = cut(small, {slot.dim: index_of(slot)})
        if slot.blocks > 1 and 0 in whole:
            slot = slot.before(whole[0])
        whole[slot.dim] = whole[slot.dim].then(slot) if slot.dim in whole else slot
        assert torch.equal(cut(weight, {dim: index_of(s) for dim, s in whole.items()}), small)


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_any_order_of_cuts_composes(count):
    draw = random.Random(count)
    for _ in range(100):
        assert_composes(draw, count)


class Ranked:
    """The last channels are best by the largest of all slots, the first ones by their sum."""

    aggregate = "max"

    def __call__(self, group, tensors, generator):
        rank = torch.arange(group.size, dtype=torch.float64)
        return torch.stack([rank, -3 * rank])


def wholes_only(group, tensors, generator):
    if all(member.index.shape[1] == 1 for member in group.members):
        raise Unseen("a part of a group")
    return torch.arange(group.size, dtype=torch.float64)


@pytest.mark.parametrize("criterion", [Ranked(), wholes_only])
def test_parts_are_scored_as_the_criterion_says(criterion):
    graph = graphprune.trace(Grouped().eval(), torch.randn(1, 3, 6, 6))
    aligned = graph.plan(0.5, criterion=criterion)
    free = graph.plan(0.5, criterion=criterion, columns="free")
    assert [set(slot.kept) for slot in free.slots] == [set(slot.kept) for slot in aligned.slots]


def between(width, groups, out):
    return nn.Sequential(
        nn.Conv2d(3, width, 1),
        nn.ReLU(),
        nn.Conv2d(width, out, 3, groups=groups),
        nn.Conv2d(out, 4, 1),
    ).double()


@pytest.mark.parametrize(("width", "groups", "out"), [(16, 8, 32), (16, 4, 16), (8, 4, 8)])
def test_a_grouped_convolution_is_cut_the_way_that_leaves_fewest_weights(width, groups, out):
    """Whole groups would leave twice as many weights of it, at the same widths."""
    model, x = between(width, groups, out), torch.randn(1, 3, 5, 5, dtype=torch.float64)
    small = graphprune.rebuild(model, 0.5, x)
    graphprune.verify(model, small, x)
    assert (small[0].out_channels, small[2].out_channels) == (width // 2, out // 2)
    assert small[2].groups == groups
    assert small[2].weight.numel() == model[2].weight.numel() // 4


@pytest.mark.parametrize(("width", "groups", "out"), [(8, 8, 8), (8, 8, 16), (8, 4, 4)])
def test_where_columns_cannot_leave_whole_groups_do(width, groups, out):
    model, x = between(width, groups, out), torch.randn(1, 3, 5, 5, dtype=torch.float64)
    small = graphprune.rebuild(model, 0.5, x)
    graphprune.verify(model, small, x)
    assert small[0].out_channels == width // 2
    assert small[2].groups == groups // 2
