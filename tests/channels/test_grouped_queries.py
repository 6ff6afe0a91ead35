"""Which heads leave where several queries share one key: groups, queries, or columns of all."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import InputError

SPELLINGS = ("expand", "interleave", "enable_gqa", "broadcast", "einsum")
KEYS, QUERIES, WIDTH = 2, 4, 6


class Grouped(nn.Module):
    """Attention with four queries for each of two keys, in several spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling, self.keys, self.queries, self.width = spelling, KEYS, QUERIES, WIDTH
        self.q, self.o = nn.Linear(8, KEYS * QUERIES * WIDTH), nn.Linear(KEYS * QUERIES * WIDTH, 8)
        self.k, self.v = nn.Linear(8, KEYS * WIDTH), nn.Linear(8, KEYS * WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        heads = batch, length, -1, self.width
        k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.k, self.v))
        if self.spelling in ("broadcast", "einsum"):
            q = self.q(x).view(batch, length, self.keys, self.queries, self.width)
            if self.spelling == "einsum":
                scores = torch.einsum("bngrw,bgmw->bgrnm", q, k).div(2.4).softmax(-1)
                y = torch.einsum("bgrnm,bgmw->bngrw", scores, v)
            else:
                scores = q.permute(0, 2, 3, 1, 4) @ k[:, :, None].transpose(-1, -2) / 2.4
                y = (scores.softmax(-1) @ v[:, :, None]).permute(0, 3, 1, 2, 4)
            return self.o(y.reshape(batch, length, -1))
        q = self.q(x).view(batch, length, self.keys * self.queries, self.width).transpose(1, 2)
        if self.spelling == "interleave":
            k, v = (each.repeat_interleave(self.queries, 1) for each in (k, v))
        elif self.spelling == "expand":
            shape = batch, self.keys * self.queries, length, self.width
            k, v = (
                each[:, :, None].expand(-1, -1, self.queries, -1, -1).reshape(shape)
                for each in (k, v)
            )
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.spelling == "enable_gqa")
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))


@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")  # keys and values stay
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("attention", "sizes"),
    [("heads", (24, 6, 6)), ("queries", (24, 12, 12)), ("head_dim", (24, 6, 6))],
)
def test_half_leaves(spelling, attention, sizes):
    model, x = Grouped(spelling).eval(), torch.randn(2, 5, 8)
    small = graphprune.rebuild(model, 0.5, x, attention=attention)
    assert tuple(layer.out_features for layer in (small.q, small.k, small.v)) == sizes
    assert graphprune.verify(model, small, x).verdict == "equal"


def test_queries_of_one_key_leave_evenly():
    """What stays of each group of queries is the same, as code repeats keys evenly."""
    model, x = Grouped("expand").eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        for key, query in ((0, 3), (1, 0), (1, 3)):  # the smallest ones
            first = (key * QUERIES + query) * WIDTH
            model.q.weight[first : first + WIDTH] *= 0.01
    small = graphprune.rebuild(model, 0.25, x, attention="queries")
    heads = model.q.weight.unflatten(0, (KEYS * QUERIES, WIDTH))
    assert torch.equal(small.q.weight.unflatten(0, (-1, WIDTH)), heads[[0, 1, 2, 4, 5, 6]])


class Once(Grouped):
    """Code that copies keys only where several queries ask for them."""

    def repeated(self, x, times):
        if times == 1:
            return x
        return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)

    def forward(self, x):
        heads = *x.shape[:2], -1, self.width
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (self.repeated(each, self.queries) for each in (k, v))
        scores = (q @ k.transpose(-1, -2) / 2.4).softmax(-1)
        return self.o((scores @ v).transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
@pytest.mark.parametrize(("ratio", "queries"), [(0.5, 2), (0.75, 2)])
def test_code_that_takes_another_way_for_a_single_one_keeps_two(ratio, queries):
    model, x = Once("expand").eval(), torch.randn(2, 5, 8)
    small = graphprune.rebuild(model, ratio, x, attention="queries", scope="local")
    assert (small.queries, small.keys) == (queries, KEYS)
    assert graphprune.verify(model, small, x).verdict == "equal"


def test_a_single_one_asked_for_by_hand_is_told():
    model, x = Once("expand").eval(), torch.randn(2, 5, 8)
    graph = graphprune.trace(model, x, attention="queries")
    with pytest.raises(InputError, match="where one of several is left: keep two"):
        graph.plan_of({"g0": [1]})
    assert graphprune.verify(model, graph.plan_of({"g0": [1, 2]}), x).verdict == "equal"


class Latent(nn.Module):
    """Keys and values from a narrow state, and one rotated key that all heads share."""

    def __init__(self, written: bool, rotated: bool) -> None:
        super().__init__()
        self.heads, self.plain, self.turned, self.values = 4, 6, 4, 5
        self.written, self.rotated = written, rotated
        self.q = nn.Linear(8, 4 * (6 + 4))
        self.down, self.up = nn.Linear(8, 8 + 4), nn.Linear(8, 4 * (6 + 5))
        self.o = nn.Linear(4 * 5, 8)
        self.register_buffer("angles", torch.rand(2))

    def turn(self, x):
        if not self.rotated:
            return x
        angle = torch.arange(x.shape[-2])[:, None] * self.angles
        angle = torch.cat((angle, angle), -1)
        left, right = x.chunk(2, -1)
        return x * angle.cos() + torch.cat((-right, left), -1) * angle.sin()

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        q, turned = q.split([self.plain, self.turned], -1)
        state, shared = self.down(x).split([8, self.turned], -1)
        kv = self.up(state).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = kv.split([self.plain, self.values], -1)
        shared = self.turn(shared.view(batch, 1, length, self.turned))
        shared = shared.expand(-1, k.shape[1], -1, -1)
        q = torch.cat((q, self.turn(turned)), -1)
        if self.written:
            keys = k.new_empty(*k.shape[:-1], self.plain + self.turned)
            keys[..., : self.plain].copy_(k)
            keys[..., self.plain :].copy_(shared)
        else:
            keys = torch.cat((k, shared), -1)
        y = F.scaled_dot_product_attention(q, keys, v)
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_heads_that_share_a_key_leave(written, rotated):
    """The shared columns stay as they are, whether they are concatenated or written in place."""
    model, x = Latent(written, rotated).eval(), torch.randn(2, 5, 8)
    small = graphprune.rebuild(model, 0.5, x)
    assert (small.heads, small.q.out_features, small.o.in_features) == (2, 20, 10)
    assert small.down.out_features == 4 + 4  # the state is narrower, the shared key is not
    assert graphprune.verify(model, small, x).verdict == "equal"


@pytest.mark.parametrize("written", [False, True])
def test_columns_of_a_shared_key_leave_with_those_of_all_queries(written):
    model, x = Latent(written, False).eval(), torch.randn(2, 5, 8)
    small = graphprune.rebuild(model, 0.5, x, attention="head_dim")
    assert (small.heads, small.plain, small.turned) == (4, 3, 2)
    assert graphprune.verify(model, small, x).verdict == "equal"


def test_columns_beside_a_shared_part_leave_where_no_block_can():
    """A projection that reads the width of blocks whose number is fixed."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.line, self.out = nn.Linear(3, 4 * 6), nn.Linear(3, 2), nn.Linear(8, 5)

        def forward(self, x):
            blocks = self.wide(x).unflatten(-1, (4, -1))
            line = self.line(x).unsqueeze(1).expand(-1, 4, -1)
            return self.out(torch.cat((blocks, line), -1))

    model, x = Blocks().eval(), torch.randn(2, 3)
    small = graphprune.rebuild(model, 0.5, x)
    assert (small.wide.out_features, small.line.out_features) == (12, 1)
    assert graphprune.verify(model, small, x).verdict == "equal"
