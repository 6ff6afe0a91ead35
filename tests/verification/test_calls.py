"""What was found of one run of the masked model serves the next, where it is the same there."""

import pytest
import torch
from support.branches import Branches
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import VerificationError
from graphprune.verification import calls, running
from graphprune.verification.follow import Follower

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def masked(model, *inputs, ratio=0.5):
    """Two masked models of a plan: one remembers what it has found, the other does not."""
    model = model.double().eval()
    plan = graphprune.trace(model, inputs).plan(ratio)
    assert plan.evaluated
    remembering, fresh = graphprune.mask(model, plan), graphprune.mask(model, plan)
    remembering.forward.remembers = True
    return remembering, fresh


def followed(monkeypatch):
    """The ops that are followed from here on."""
    seen = []
    op = Follower.op

    def watch(self, target, *args):
        seen.append(str(target))
        return op(self, target, *args)

    monkeypatch.setattr(Follower, "op", watch)
    return seen


class Encoder(nn.Module):
    """An image in patches, positions by code, a mask over heads, blocks, a token that is read."""

    def __init__(self, width=16, heads=4, depth=2):
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 2, stride=2)
        self.groups = nn.GroupNorm(4, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.groups(self.patch(x)).flatten(2).transpose(1, 2)
        batch, places, _ = x.shape
        x = x + torch.linspace(0, 1, places, dtype=x.dtype)[None, :, None]
        bias = torch.zeros(batch, 1, places, places, dtype=x.dtype)
        for norm, qkv, out in zip(self.norms, self.qkv, self.out):
            q, k, v = (
                part.view(batch, places, self.heads, -1).transpose(1, 2)
                for part in qkv(norm(x)).chunk(3, -1)
            )
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = x + self.drop(out(y.transpose(1, 2).reshape(batch, places, -1)))
        return self.head(torch.cat([x.mean(1, keepdim=True), x], 1).softmax(-1))


class Flattened(nn.Module):
    """Channels between height and width when they are merged: the places of 2x8 and 4x4 differ."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8)

    def forward(self, x):
        h = self.norm(self.conv(x)).transpose(1, 2)  # height, channels, width
        return torch.sigmoid(h.flatten(1)).sum(1), torch.sigmoid(h.reshape(len(x), -1, 4)).sum(1)


class Swapped(nn.Module):
    """Two constants of one size that belong to other layers when the values say so."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.c, self.d = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        one = torch.zeros(len(x), 8, dtype=x.dtype) + 1.5
        two = torch.zeros(len(x), 8, dtype=x.dtype) + 2.5
        if float(x.sum()) > 0:
            one, two = two, one
        left, right = self.norms[0](self.a(x)), self.norms[1](self.b(x))
        weights = one.sum(1, keepdim=True), two.sum(1, keepdim=True)
        one, two = one + 0 * left, two + 0 * right
        return self.c(left * one) / weights[0] + self.d(right * two) / weights[1]


class Stacked(nn.Module):
    """Rows of channels between rows without: where they lie depends on the sizes of the others."""

    def __init__(self):
        super().__init__()
        self.line, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(2, 3)

    def forward(self, before, x, after):
        h = self.norm(self.line(x)).transpose(1, 2)  # channels are rows here
        return self.head(torch.cat([before, h, after], 1).sigmoid().sum(1))


class Pooled(nn.Module):
    """Kernels of pooling rewrite strides in place, without an op of the code."""

    def __init__(self):
        super().__init__()
        self.line, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.pools = nn.ModuleList([nn.AdaptiveAvgPool1d(1), nn.AdaptiveMaxPool1d(1)])

    def forward(self, x):
        h = self.norm(self.line(x)).transpose(1, 2)
        return self.head(sum(pool(h).flatten(1) for pool in self.pools))


ROWS = [(drawn(2, a, 2), drawn(2, 2, 4), drawn(2, b, 2)) for a, b in ((3, 5), (5, 3), (4, 4))]
CASES = {
    "encoder": (Encoder(), [(drawn(b, 3, s, t),) for b, s, t in
                            ((2, 8, 8), (3, 8, 8), (3, 12, 8), (1, 8, 12), (2, 8, 8))]),
    "flattened": (Flattened(), [(drawn(2, 3, *s),) for s in ((2, 16), (4, 8), (8, 4), (2, 16))]),
    "swapped": (Swapped(), [(drawn(5, 4).abs(),), (-drawn(5, 4).abs(),), (drawn(3, 4).abs(),)]),
    "branches": (Branches(), [(drawn(5, 4).abs(),), (-drawn(5, 4).abs(),), (drawn(2, 4).abs(),)]),
    "stacked": (Stacked(), ROWS),
    "pooled": (Pooled(), [(drawn(b, t, 4),) for b, t in ((2, 5), (3, 5), (2, 7))]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*as the model does not read them")
def test_it_is_what_a_model_without_memory_gives(name):
    model, inputs = CASES[name]
    remembering, fresh = masked(model, *inputs[0])
    for training in (False, True):
        for given in inputs:
            outputs = [net.train(training)(*given) for net in (remembering, fresh)]
            for one, other in zip(*(torch.utils._pytree.tree_leaves(out) for out in outputs)):
                assert torch.equal(one, other)
            for net, out in zip((remembering, fresh), outputs):
                net.zero_grad()
                sum(leaf.square().sum() for leaf in torch.utils._pytree.tree_leaves(out)).backward()
            for one, other in zip(remembering.parameters(), fresh.parameters()):
                assert (one.grad is None) == (other.grad is None)
                assert one.grad is None or torch.equal(one.grad, other.grad)


def test_other_batch_sizes_and_train_mode_are_not_followed_again(monkeypatch):
    model, inputs = CASES["encoder"]
    remembering, _ = masked(model, *inputs[0])
    seen = followed(monkeypatch)
    counts = []
    for given in (*inputs[:2], inputs[1]):
        seen.clear()
        remembering.train(len(counts) == 2)(*given)
        counts.append(len(seen))
    assert counts[1] < counts[0] / 4
    assert counts[2] < 4  # dropout is another call in train mode


@pytest.mark.filterwarnings("ignore:.*as the model does not read them")
def test_other_weights_are_followed(monkeypatch):
    model, inputs = CASES["branches"]
    remembering, _ = masked(model, *inputs[0])
    seen = followed(monkeypatch)
    remembering(*inputs[0])
    seen.clear()
    remembering(*inputs[0])
    assert not seen
    remembering(*inputs[1])
    assert "aten.linear.default" in seen


def test_a_memory_without_sizes_would_be_noticed(monkeypatch):
    """The test above fails where rows of channels are taken to lie where they lay before."""
    monkeypatch.setattr(calls, "JOINS", {"none"})
    monkeypatch.setattr(running, "takes_any_size", lambda func, nodes: True)
    model, inputs = CASES["stacked"]
    remembering, fresh = masked(model, *inputs[0])
    remembering(*inputs[0])
    assert not torch.allclose(remembering(*inputs[1]), fresh(*inputs[1]))


def test_wrong_small_models_with_attention_are_different():
    """Kernels of attention are said to draw random numbers; that decides nothing."""
    torch.manual_seed(0)
    model, x = Encoder().double().eval(), drawn(2, 3, 8, 8)
    small = graphprune.rebuild(model, 0.5, x)
    assert graphprune.verify(model, small, x).verdict == "equal"
    for weight in (small.norms[0].weight, small.qkv[1].weight):
        right = weight.detach().clone()
        with torch.no_grad():
            weight *= 1 + 1e-6
        with pytest.raises(VerificationError):
            graphprune.verify(model, small, x)
        weight.data = right
