"""Functions that read two results of like calls: what they carry is the same, not what they are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune

READERS = {
    "attention": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "einsum": lambda q, k, v: torch.einsum("bqd,bkd,bkv->bqv", q, k, v),
    "three products": lambda q, k, v: torch.linalg.multi_dot([q[0], k[0].mT, v[0]])[None],
    "the same twice": lambda q, k, v: F.scaled_dot_product_attention(q, q, v),
    "by name": lambda q, k, v: F.scaled_dot_product_attention(query=q, value=v, key=k),
}


class Net(nn.Module):
    """Queries and keys stay, and go through the same functions; values and the stream leave."""

    def __init__(self, read):
        super().__init__()
        self.wide, self.norm, self.read = nn.Linear(6, 24), nn.LayerNorm(24), read
        self.query, self.key = nn.Linear(24, 8), nn.Linear(24, 8)
        self.value, self.out = nn.Linear(24, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = self.norm(self.wide(x))
        q, k = (side.tanh().mul(0.5).contiguous() for side in (self.query(h), self.key(h)))
        return self.out(self.read(q, k, self.value(h)))


@pytest.mark.parametrize("name", READERS)
def test_results_of_like_calls_are_told_apart(name):
    torch.manual_seed(0)
    model = Net(READERS[name]).double().eval()
    x = torch.randn(1 if name == "three products" else 2, 7, 6, dtype=torch.float64)
    graph = graphprune.trace(model, x)
    plan = graph.plan(0.5, keep=["query", "key"])
    small = graphprune.rebuild(model, plan)
    assert small.wide.out_features == 12
    assert small.query.out_features == 8
    assert small.value.out_features == 6
    with torch.no_grad():
        assert torch.allclose(small(x), graphprune.mask(model, plan)(x), atol=1e-12, rtol=1e-12)
    assert graphprune.verify(model, small, x).verdict == "equal"
