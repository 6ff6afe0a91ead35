"""Pruning inside attention heads: all heads stay and become narrower."""

import pytest
import torch
from support.zoo import ZOO
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import InputError

SPELLINGS = (
    "attention_scaled_by_a_shape",
    "attention_fused_by_torch",
    "attention_normalised_inside_heads",
    "attention_rotated_by_halves",
    "attention_rotated_by_pairs",
    "attention_by_einsum",
    "multi_query_attention",
    "CrossAttention",
    "packed_attention_chunked",
    "multihead_attention_layer",
    "encoder_layer_norm_first",
    "Llama",
)
WORDS = ("attention", "encoder", "decoder", "transformer", "gpt", "llama")
REST = [n for n in ZOO if any(word in n.lower() for word in WORDS) and n not in SPELLINGS]


def check(name):
    entry = ZOO[name]
    model, inputs = entry.build(), entry.inputs()
    graph = graphprune.trace(model, inputs, attention="head_dim")
    small = graphprune.rebuild(model, graph.plan(0.5))
    assert graphprune.verify(model, small, inputs).difference < 1e-10


@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
@pytest.mark.parametrize("name", SPELLINGS)
def test_small_equals_masked(name):
    check(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
@pytest.mark.parametrize("name", REST)
def test_every_other_spelling(name):
    check(name)


class Attention(nn.Module):
    def __init__(self, width=24, heads=3, rotary=False):
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(b, n, self.heads, -1).transpose(1, 2)
        v = self.v(x).view(b, n, self.heads, -1).transpose(1, 2)
        if self.rotary:
            q, k = self.rotated(q), self.rotated(k)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, -1))

    def rotated(self, x):
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * angle.cos() + turned * angle.sin()


X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))


def graph_of(**options):
    torch.manual_seed(0)
    model = Attention(**options).eval()
    return model, graphprune.trace(model, X, attention="head_dim")


def test_queries_go_with_keys_and_values_with_the_projection():
    _, graph = graph_of()
    sizes = {group.layers: group.size for group in graph}
    assert sizes == {("q", "k"): 8, ("v", "out"): 8}


def test_rotary_pairs_go_together():
    _, graph = graph_of(rotary=True)
    assert graph.group_of("q").size == 4


def test_heads_stay_and_the_scale_is_the_original_one():
    model, graph = graph_of()
    plan = graph.plan_of({graph.group_of("q").name: range(2)})
    small = graphprune.rebuild(model, plan)
    assert (small.heads, small.q.out_features, small.v.out_features) == (3, 6, 24)
    assert [change.path for change in plan.literals] == [("scale",)]
    assert plan.literals[0].new == 8**-0.5
    assert graphprune.verify(model, small, X).difference < 1e-10


def test_whole_heads_by_default():
    torch.manual_seed(0)
    model = Attention().eval()
    (group,) = graphprune.trace(model, X)
    assert group.size == 3


def test_one_after_the_other():
    torch.manual_seed(2)
    model = Attention().eval()
    small = graphprune.rebuild(model, 0.4, X)
    smaller = graphprune.rebuild(small, 0.5, X, attention="head_dim")
    assert (smaller.heads, smaller.q.out_features) == (2, 8)
    assert graphprune.verify(model, smaller, X).difference < 1e-10


def test_an_unknown_word_is_refused():
    with pytest.raises(
        InputError, match="attention must be one of heads, queries, head_dim, not 'width'"
    ):
        graphprune.trace(Attention(), X, attention="width")


class Root(nn.Module):
    """The root of the mean square, in plain code."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


NORMS = {
    "lengths": lambda width: lambda x: F.normalize(x, dim=-1),
    "squares": lambda width: lambda x: x / (x * x).sum(-1, keepdim=True).add(1e-6).sqrt(),
    "plain": Root,
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
    "bare": lambda width: nn.LayerNorm(width, elementwise_affine=False),
}


class Normed(nn.Module):
    """Queries and keys are normalised over the width of each head."""

    def __init__(self, norm, shared, asks=False):
        super().__init__()
        self.heads, self.asks = 4, asks
        self.shared = shared
        self.q, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k, self.v = (nn.Linear(32, 32 // shared) for _ in range(2))
        self.norms = [NORMS[norm](8), NORMS[norm](8)] if norm else [nn.Identity(), nn.Identity()]
        if isinstance(self.norms[0], nn.Module):
            self.norms = nn.ModuleList(self.norms)

    def forward(self, x):
        b, n, _ = x.shape
        few = self.heads // self.shared
        q = self.q(x).view(b, n, self.heads, -1)
        k, v = (part(x).view(b, n, few, -1) for part in (self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (self.norms[0](q), self.norms[1](k), v))
        if self.asks and k.shape[-1] == v.shape[-1]:
            y = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
        else:
            k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


def narrowed(model, x):
    """Its small model, with the options that make heads narrower."""
    graph = graphprune.trace(model, x, attention="head_dim")
    small = graphprune.rebuild(model, graph.plan(0.5, criterion="random"))
    assert graphprune.verify(model, small, x).difference < 1e-10
    return small


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("shared", [1, 2])
def test_a_norm_over_heads_lets_their_columns_leave(norm, shared):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 32), Normed(norm, shared), nn.Linear(32, 3)).double().eval()
    small = narrowed(model, torch.randn(2, 6, 5).double())
    assert small[1].q.out_features == 16
    assert small[1].v.out_features == 16 // shared


def test_code_that_compares_widths_goes_on_the_same_way():
    """Keys and values then lose equally many columns, where queries share them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 32), Normed("", 2, asks=True), nn.Linear(32, 3))
    small = narrowed(model.double().eval(), torch.randn(2, 6, 5).double())
    assert small[1].k.out_features == small[1].v.out_features == 8
