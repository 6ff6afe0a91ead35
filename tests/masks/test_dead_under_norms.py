"""Channels that are zero in front of a norm leave, with the same output."""

from dataclasses import replace

import pytest
import torch
from support.norms import BERT, Images, Permuted, Stream, ViT, rows
from support.zeroing import drawn
from torch import nn

import graphprune
from graphprune.errors import PlanError
from graphprune.plan.plan import NormChange

DEAD = [1, 4, 7]
TOKENS, MAPS = torch.randn(2, 5, 4).double(), torch.randn(2, 3, 5, 6).double()


def deadened(model, *layers, channels=DEAD, dim=0):
    """The model with zeroes in the weights and biases of some channels."""
    model, tensors = drawn(model), dict(model.named_parameters())
    with torch.no_grad():
        for layer in layers:
            for name in (layer, f"{layer}.weight", f"{layer}.bias"):
                if name in tensors:
                    last = dim if name.endswith("weight") else -1
                    tensors[name].index_fill_(last, torch.tensor(channels), 0)
    return model


class Readers(nn.Module):
    """Two layers that read a norm: of all rows and of the first one, the last without a bias."""

    def __init__(self, norm, width=12):
        super().__init__()
        self.make, self.norm = nn.Linear(4, width), norm
        self.left, self.right = nn.Linear(width, 4), nn.Linear(width, 4, bias=False)

    def forward(self, x):
        x = self.norm(self.make(x))
        return self.left(x) * self.right(x[:, :1])


class Pointwise(nn.Module):
    """A convolution that reads a norm of the channels of an image."""

    def __init__(self, kernel):
        super().__init__()
        self.make, self.norm = nn.Conv2d(3, 12, 3), Permuted(12)
        self.read = nn.Conv2d(12, 4, kernel, padding=kernel // 2)

    def forward(self, x):
        return self.read(self.norm(self.make(x)))


WRITERS = [f"blocks.{n}.{part}" for n in (0, 1) for part in ("out", "down")]
BEHIND = [f"layers.{n}.{part}" for n in (0, 1) for part in ("out", "down", "norm1", "norm2")]
MODELS = {
    "LayerNorm": (lambda: deadened(Readers(nn.LayerNorm(12)), "make"), TOKENS),
    "no bias": (lambda: deadened(Readers(nn.LayerNorm(12, bias=False)), "make"), TOKENS),
    "no affine": (
        lambda: deadened(Readers(nn.LayerNorm(12, elementwise_affine=False)), "make"),
        TOKENS,
    ),
    "convolution": (lambda: deadened(Pointwise(1), "make"), MAPS),
    "behind an activation": (lambda: deadened(rows(nn.LayerNorm(12)), "0", "1"), TOKENS),
    "GroupNorm": (lambda: deadened(Images(nn.GroupNorm(1, 12)), "make", "norm"), MAPS),
    "ViT": (
        lambda: deadened(ViT(), "patches", "token", *WRITERS),
        torch.randn(2, 3, 8, 8).double(),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_zeroes_in_front_of_norms_leave(name):
    make, x = MODELS[name]
    model = make()
    plan = graphprune.Plan.from_masks(model, x)
    assert plan.removed == len(DEAD)
    assert plan.norms
    assert graphprune.Plan.from_json(plan.to_json()) == plan
    small = graphprune.rebuild(model, plan)
    torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-11)
    assert graphprune.verify(model, small, x).difference <= 1e-10
    whole = graphprune.rebuild(model, plan, inplace=True)
    torch.testing.assert_close(whole(x), small(x))


def test_a_stream_with_norms_behind_needs_zeroes_in_them_too():
    def net():
        model = deadened(BERT(), "norm", *BEHIND)
        with torch.no_grad():
            model.words.weight[:, DEAD] = 0
        return model

    model, ids = net(), torch.randint(0, 20, (2, 5))
    plan = graphprune.Plan.from_masks(model, ids)
    assert plan.removed == len(DEAD)
    torch.testing.assert_close(graphprune.rebuild(model, plan)(ids), model(ids))
    with torch.no_grad():
        model.layers[0].norm1.bias[1] = 0.5  # in the stream, it is no zero any more
    assert graphprune.Plan.from_masks(model, ids).removed == len(DEAD) - 1


def test_groups_lose_equal_columns_of_zeroes():
    layers = "make", "first", "conv", "last"
    x = MAPS
    for channels, removed in ([1, 7], 1), ([1, 7, 8], 1), ([1, 8], 0):
        model = deadened(Stream(), *layers, channels=channels)
        plan = graphprune.Plan.from_masks(model, x)
        assert plan.removed == removed
        torch.testing.assert_close(graphprune.rebuild(model, plan)(x), model(x))


STAYS = {
    "not zero in front": (lambda: deadened(Images(nn.GroupNorm(1, 12)), "norm"), MAPS),
    "an activation behind": (lambda: deadened(rows(nn.LayerNorm(12)), "0"), TOKENS),
    "padding": (lambda: deadened(Pointwise(3), "make"), MAPS),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_seen_behind_a_norm_stays(name):
    make, x = STAYS[name]
    model = make()
    assert graphprune.Plan.from_masks(model, x).removed == 0


def test_where_a_weight_hides_a_channel_one_zero_stands_for_all():
    model = deadened(Readers(nn.LayerNorm(12)), "make")
    with torch.no_grad():
        model.norm.weight[0] = 1e-9
        model.left.weight[:, 1] = model.right.weight[:, 1] = 0
        model.norm.weight[1] = 3  # the one that stands for others is not read itself
    plan = graphprune.Plan.from_masks(model, TOKENS)
    assert plan.removed == len(DEAD) - 1
    small = graphprune.rebuild(model, plan)
    torch.testing.assert_close(small(TOKENS), model(TOKENS), rtol=1e-10, atol=1e-11)
    assert graphprune.verify(model, small, TOKENS).difference <= 1e-10
    with torch.no_grad():
        model.norm.weight[[4, 7]] = 0
        model.norm.bias[[4, 7]] = 0
    plan = graphprune.Plan.from_masks(model, TOKENS)
    assert plan.removed == len(DEAD)  # nobody reads what it would stand for
    torch.testing.assert_close(graphprune.rebuild(model, plan)(TOKENS), model(TOKENS))


def test_nothing_is_folded_where_that_is_not_wanted():
    model = deadened(Readers(nn.LayerNorm(12)), "make")
    plan = graphprune.Plan.from_masks(model, TOKENS, fold="none")
    assert plan.removed == 0
    assert "not constant where" in plan.notes[0]


def test_a_layer_that_reads_before_and_behind_a_norm_keeps_the_zeroes():
    class Twice(Readers):
        def forward(self, x):
            return self.left(self.norm(self.make(x))) + self.left(self.make(x))

    model = deadened(Twice(nn.LayerNorm(12, bias=False)), "make")
    plan = graphprune.Plan.from_masks(model, TOKENS)
    small = graphprune.rebuild(model, plan)
    assert plan.removed == 0
    torch.testing.assert_close(small(TOKENS), model(TOKENS))


def test_masks_of_torch_and_of_users():
    model = drawn(Readers(nn.LayerNorm(12)))
    keep = [index not in DEAD for index in range(12)]
    plan = graphprune.Plan.from_masks(model, TOKENS, masks={"make": keep})
    assert plan.removed == len(DEAD)
    graphprune.verify(model, graphprune.rebuild(model, plan), TOKENS)

    rows_, columns = torch.ones(12, 4), torch.ones(4, 12)
    rows_[DEAD], columns[:, 0] = 0, 0
    torch.nn.utils.prune.custom_from_mask(model.make, "weight", rows_)
    torch.nn.utils.prune.custom_from_mask(model.make, "bias", rows_[:, 0])
    torch.nn.utils.prune.custom_from_mask(model.left, "weight", columns)
    plan = graphprune.Plan.from_masks(model, TOKENS)
    small = graphprune.rebuild(model, plan)
    assert plan.removed == len(DEAD)
    assert small.left.weight_mask[:, 0].all()  # takes up a part of what left
    torch.testing.assert_close(small(TOKENS), model(TOKENS))


def test_from_masks_twice_and_after_exact_only():
    model = deadened(Readers(nn.LayerNorm(12)), "make")
    first = graphprune.rebuild(model, graphprune.Plan.from_masks(model, TOKENS))
    with torch.no_grad():
        first.make.weight[[0, 5]] = first.make.bias[[0, 5], None] = 0
    wanted = first(TOKENS)
    small = graphprune.rebuild(first, graphprune.Plan.from_masks(first, TOKENS))
    assert small.norm.of == 12
    assert small.norm.normalized_shape == (7,)
    torch.testing.assert_close(small(TOKENS), wanted)

    model = drawn(Readers(nn.LayerNorm(12)))
    first = graphprune.rebuild(model, 0.25, TOKENS, exact_only=True)
    with torch.no_grad():
        first.make.weight[[0, 5]] = first.make.bias[[0, 5], None] = 0
    small = graphprune.rebuild(first, graphprune.Plan.from_masks(first, TOKENS))
    torch.testing.assert_close(small(TOKENS), first(TOKENS))


WRONG = {
    "shares": {"shares": (1.0,)},
    "a target twice": {"spread": (0, 0)},
    "out of range": {"spread": (2, 12), "shares": (1.0, 1.0, 1.0)},
    "itself": {"spread": (1,), "shares": (1.0, 1.0)},
}


@pytest.mark.parametrize("what", WRONG)
def test_plans_of_strangers(what):
    model = deadened(Readers(nn.LayerNorm(12)), "make")
    plan = graphprune.Plan.from_masks(model, TOKENS)
    merge = replace(plan.merges[0], **WRONG[what])
    with pytest.raises(PlanError):
        graphprune.rebuild(model, replace(plan, merges=(merge, *plan.merges[1:])))
    with pytest.raises(PlanError):
        graphprune.rebuild(model, replace(plan, norms=(NormChange("left", 12),)))
