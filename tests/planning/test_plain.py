"""``exact_only``: sums of what zeroed parameters do not zero stay whole, all others may shrink."""

import pytest
import torch
from hypothesis import assume, given, settings
from support.comparing import call
from support.strategies import specs
from support.zeroing import drawn, zeroed
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import graphprune
from graphprune.errors import PruningWarning

WIDTH = 12


class Between(nn.Module):
    """Two layers and what happens between them; ``layer`` is at the hands of that."""

    def __init__(self, between, layer=None):
        super().__init__()
        self.first, self.layer = nn.Linear(5, WIDTH), layer
        self.second, self.between = nn.Linear(WIDTH, 3), between

    def forward(self, x):
        h = self.first(x)
        return self.second(self.between(self, h))


def scaled(number):
    """A function that scales by one number for each item."""
    return lambda net, h: h * number(net, h)


WHOLE = {
    "a half each": scaled(lambda net, h: h.sigmoid().sum(-1, keepdim=True)),
    "one each": scaled(lambda net, h: (h + 1).sum(-1, keepdim=True)),
    "signs": scaled(lambda net, h: (h <= 0).sum(-1, keepdim=True)),
    "entropy": scaled(lambda net, h: (h.softmax(-1) * h.log_softmax(-1)).sum(-1, keepdim=True)),
    "a softmax of shares": lambda net, h: h.softmax(-1).softmax(-1),
    "less its mean": scaled(lambda net, h: (h - h.mean(-1, True)).abs().sum(-1, keepdim=True)),
    "two norms": lambda net, h: F.layer_norm(F.layer_norm(h, h.shape[-1:]), h.shape[-1:]),
    "a product": scaled(lambda net, h: torch.einsum("bc,bc->b", h.sigmoid(), h.sigmoid())[:, None]),
    "a vector's length": scaled(lambda net, h: (h - 0.5).norm(dim=-1, keepdim=True)),
    "a table": scaled(lambda net, h: (h + torch.ones(h.shape[-1:])).sum(-1, keepdim=True)),
}
FREE = {
    "magnitudes": (scaled(lambda net, h: h.abs().sum(-1, keepdim=True)), None),
    "positives": (scaled(lambda net, h: (h > 0).sum(-1, keepdim=True)), None),
    "bent": (scaled(lambda net, h: F.gelu(h).square().mean(-1, keepdim=True)), None),
    "one of two": (scaled(lambda net, h: (h * h.sigmoid()).sum(-1, keepdim=True)), None),
    "a product": (scaled(lambda net, h: torch.einsum("bc,bc->b", h, h.exp())[:, None]), None),
    "behind a norm": (scaled(lambda net, h: net.layer(h).sum(-1, True)), nn.LayerNorm(WIDTH)),
    "behind statistics": (
        scaled(lambda net, h: net.layer(h).relu().mean(-1, True)),
        nn.BatchNorm1d(WIDTH),
    ),
    "a chosen row": (
        scaled(lambda net, h: (h + net.layer.weight[2]).sum(-1, True)),
        nn.Embedding(4, WIDTH),
    ),
    "joined": (scaled(lambda net, h: torch.cat([h, h * 2], -1).square().sum(-1, True)), None),
    "padded": (scaled(lambda net, h: F.pad(h[:, None], (0, 0, 1, 1)).sum((1, 2))[:, None]), None),
}


def shrunk(between, layer=None):
    model = drawn(Between(between, layer))
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = graphprune.trace(model, x).plan(0.5, exact_only=True)
    return model, plan, x


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
def test_what_adds_up_without_its_parameters_stays_whole(name):
    """Other units may leave, such as those between two products."""
    model, plan, x = shrunk(WHOLE[name])
    small = graphprune.rebuild(model, plan)
    assert small.first.out_features == WIDTH
    torch.testing.assert_close(small(x), zeroed(model, plan)(x), rtol=1e-9, atol=1e-9)


def test_without_exact_only_the_reference_masks_what_is_read():
    """The same sum is one over the kept channels, and ``verify`` says so of it."""
    model = drawn(Between(WHOLE["a half each"]))
    x = torch.randn(4, 5, dtype=torch.float64)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.first.out_features == WIDTH // 2
    assert graphprune.verify(model, small, x)
    assert not torch.allclose(small(x), zeroed(model, small.graphprune_plan)(x))


@pytest.mark.parametrize("name", FREE)
def test_zeroes_may_leave_where_they_are_summed_up(name):
    model, plan, x = shrunk(*FREE[name])
    small = graphprune.rebuild(model, plan)
    assert small.first.out_features == WIDTH // 2
    torch.testing.assert_close(small(x), zeroed(model, plan)(x), rtol=1e-9, atol=1e-9)
    assert graphprune.verify(model, small, x)


def test_a_state_of_zeroes_counts_as_zero():
    """The products of two recurrent layers, whose first states are zero."""

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = (nn.LSTM(5, 8, batch_first=True) for _ in range(2))

        def forward(self, x):
            return (self.left(x)[0] @ self.right(x)[0].transpose(1, 2)).softmax(-1)

    model = drawn(Scores())
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    plan = graphprune.trace(model, x).plan(0.5, exact_only=True)
    small = graphprune.rebuild(model, plan)
    assert small.left.hidden_size == small.right.hidden_size == 4
    torch.testing.assert_close(small(x), zeroed(model, plan)(x), rtol=1e-9, atol=1e-9)


def equals_zeroes(spec):
    model, inputs = spec.build(), spec.inputs()
    graph = graphprune.trace(model, inputs)
    assume(graph.groups)
    plan = graph.plan(0.5, exact_only=True, criterion="random", seed=spec.seed)
    results = (
        call(other, inputs) for other in (graphprune.rebuild(model, plan), zeroed(model, plan))
    )
    for mine, other in zip(*map(pytree.tree_leaves, results)):
        if not other.isnan().any():  # 0 / 0, as of the norm of zeroed rows
            torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)


@given(specs())
@settings(max_examples=8)
@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
def test_drawn_networks_equal_those_with_zeroes(spec):
    equals_zeroes(spec)


@pytest.mark.slow
@given(specs())
@settings(max_examples=500)
@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
def test_drawn_networks_equal_those_with_zeroes_at_length(spec):
    equals_zeroes(spec)


def test_it_is_said_that_something_stays():
    with pytest.warns(PruningWarning, match="exact_only"):
        shrunk(WHOLE["a half each"])
