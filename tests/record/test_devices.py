"""Constants that code keeps on the CPU meet what is recorded on ``meta``."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune

X = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TABLE = torch.linspace(-1, 1, 5, dtype=torch.float64)


class Between(nn.Module):
    """Two layers and code between them; it may keep tensors where no module looks."""

    def __init__(self, code):
        super().__init__()
        self.first, self.second, self.code = nn.Linear(6, 8), nn.Linear(8, 3), code
        self.box = [TABLE]

    def forward(self, x):
        return self.second(self.code(self, self.first(x)))


def built(code):
    torch.manual_seed(0)
    return Between(code).double().eval()


def attended(self, h):
    h = h[:, None]
    return F.scaled_dot_product_attention(h, h, h, torch.ones(5, 5, dtype=torch.bool).tril())[:, 0]


def joined(self, h):
    return torch.cat([h, torch.zeros(2, 1, 8, dtype=torch.float64, device="cpu")], 1)


READS = {
    "of the module of the code": lambda self, h: h * TABLE[:, None],
    "in a list": lambda self, h: h + self.box[0][:, None],
    "made of numbers": lambda self, h: h * torch.tensor([1.0, 2, 3, 4, 5]).double()[:, None],
    "a single number": lambda self, h: h * torch.tensor(2.0),
    "places": lambda self, h: h[:, torch.arange(4, device="cpu")],
    "a condition": lambda self, h: torch.where(TABLE[:, None] > 0, h, 0.0),
    "a joined one": joined,
    "on the left of a product": lambda self, h: TABLE.diag() @ h,
    "in einsum": lambda self, h: torch.einsum("ij,bjk->bik", TABLE.diag(), h),
    "a mask of attention": attended,
    "written to what is recorded": lambda self, h: h.clone().mul_(TABLE[:, None]),
}


@pytest.mark.parametrize("code", READS.values(), ids=READS)
def test_what_code_reads_comes_along(code):
    """No weights are needed for it: they are not on ``meta``."""
    model = built(code)
    before = TABLE.clone()
    graph = graphprune.trace(model, X)
    assert [record.device for record in graph.analysis.records] == ["meta"]
    assert [(group.layers, group.size) for group in graph] == [(("first", "second"), 8)]
    assert torch.equal(TABLE, before)
    small = graphprune.rebuild(model, graph.plan(0.5))
    if code is not joined:  # at its own batch size only
        assert graphprune.verify(model, small, X).difference < 1e-10
    assert torch.allclose(small(X), graphprune.mask(model, graph.plan(0.5))(X), atol=1e-12)


def test_its_own_sizes_and_values_count():
    """Eight numbers for eight channels: none of these can leave."""
    eight = torch.linspace(0, 1, 8, dtype=torch.float64)
    graph = graphprune.trace(built(lambda self, h: h * eight), X)
    assert [record.device for record in graph.analysis.records] == ["meta"]
    assert not graph.groups
    reason = "combined with a tensor of fixed size"
    assert any(group.reason.text == reason for group in graph.frozen)


def assigned(self, h):
    out = torch.zeros(h.shape, dtype=h.dtype, device="cpu")
    out[..., :] = h
    return out


def added(self, h):
    out = torch.zeros(h.shape, dtype=h.dtype, device="cpu")
    out.add_(h)
    return out


def given(self, h):
    out = torch.zeros(h.shape, dtype=h.dtype, device="cpu")
    torch.mul(h, 2, out=out)
    return out


@pytest.mark.parametrize("code", [assigned, added, given])
def test_what_code_writes_to_is_no_copy(code):
    """A copy on ``meta`` would be written to, and the code goes on with the original."""
    model = built(code)
    graph = graphprune.trace(model, X)
    assert [record.device for record in graph.analysis.records] == ["cpu"]
    assert [(group.layers, group.size) for group in graph] == [(("first", "second"), 8)]
    plan = graph.plan(0.5)
    with torch.no_grad():
        found, expected = graphprune.rebuild(model, plan)(X), graphprune.mask(model, plan)(X)
    assert expected.std() > 0.01
    assert torch.allclose(found, expected, atol=1e-12)
