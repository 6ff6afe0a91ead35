"""The masked model runs the user's own code: on any inputs, whichever way the code takes."""

import copy

import pytest
import torch
from support.branches import Branches
from support.zoo import ZOO
from torch import nn
from torch.nn import functional as F

import graphprune

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def close(a, b):
    a, b = a.detach(), b.detach()
    assert float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) < 1e-10


def pair(model, *inputs, ratio=0.5, **options):
    """The masked and the small model of a plan whose statistics zeroes do not say."""
    model = model.double().eval()
    plan = graphprune.trace(model, inputs).plan(ratio, **options)
    assert plan.evaluated
    return graphprune.mask(model, plan), graphprune.rebuild(model, plan)


class Heads(nn.Module):
    """Statistics over all heads, and a bias of scores that is copied for each of them."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(6, width) for _ in range(3))
        self.norm, self.out = nn.RMSNorm(width), nn.Linear(width, 3)

    def forward(self, x, bias):
        batch = len(x)
        bias = bias.repeat_interleave(self.heads, dim=0).view(batch, self.heads, 1, -1)
        states = self.norm(self.q(x)), self.k(x), self.v(x)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in states)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(y.transpose(1, 2).flatten(2))


def test_another_batch_size_than_was_traced():
    masked, small = pair(Heads(), drawn(1, 5, 6), drawn(1, 1, 5))
    for batch in (1, 2, 3):
        inputs = drawn(batch, 5, 6), drawn(batch, 1, 5)
        close(masked(*inputs), small(*inputs))


class Routed(nn.Module):
    """Each row goes to the expert of its largest score; how many go where are Python numbers."""

    def __init__(self, skip=False):
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.gate, self.head = nn.Linear(16, 3), nn.Linear(16, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16)) for _ in range(3)
        )
        self.skip = skip

    def forward(self, x):
        h = self.norm(self.stem(x))
        chosen = self.gate(h).argmax(1)
        order = chosen.argsort()
        counts = torch.bincount(chosen, minlength=3).tolist()
        parts = []
        for part, expert in zip(h[order].split(counts), self.experts):
            if self.skip and not len(part):
                continue
            parts.append(expert(part))
        return self.head(torch.zeros_like(h).index_add(0, order, torch.cat(parts)))


@pytest.mark.parametrize("skip", [False, True])
def test_counts_that_come_from_values(skip):
    torch.manual_seed(0)
    x = drawn(8, 6)
    masked, small = pair(Routed(skip), x)
    for inputs in (x, x.flip(0), drawn(8, 6), drawn(3, 6), drawn(1, 6)):
        close(masked(inputs), small(inputs))


@pytest.mark.filterwarnings("ignore:.*as the model does not read them")
def test_a_branch_that_the_example_does_not_take():
    """The weight that was not read was not cut either: a softmax over all of its outputs."""
    torch.manual_seed(0)
    x = drawn(5, 4).abs()
    masked, small = pair(Branches(), x)
    close(masked(x), small(x))
    kept = {(s.tensor, s.dim): list(s.kept) for s in masked.forward.plan.slots}
    rows, columns = kept["stem.weight", 0], kept["head.weight", 1]
    h = F.layer_norm(masked.stem(-x)[:, rows], (len(rows),))
    shares = F.softmax(h @ masked.b[:, rows].T * 2, -1)[:, columns]
    close(masked(-x), shares @ masked.head.weight[:, columns].T + masked.head.bias)


class Normed(nn.Sequential):
    def __init__(self, norm):
        super().__init__(nn.Linear(4, 8), norm, nn.GELU(), nn.Linear(8, 3))


def test_gradients_flow_and_removed_channels_have_none():
    masked, small = pair(Normed(nn.LayerNorm(8)), drawn(3, 4))
    x = drawn(6, 4)
    for net in (masked, small):
        net.train()
        net(x).square().sum().backward()
    (slot,) = (s for s in small.graphprune_plan.slots if (s.tensor, s.dim) == ("0.weight", 0))
    gone = sorted({*range(8)} - {*slot.kept})
    close(masked[0].weight.grad[list(slot.kept)], small[0].weight.grad)
    assert not masked[0].weight.grad[gone].any()


def test_code_without_gradients_has_none():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x):
            with torch.no_grad():
                x = self.a(x)
            return self.b(self.norm(x))

    masked, small = pair(Frozen(), drawn(3, 4))
    for net in (masked, small):
        net(drawn(3, 4)).sum().backward()
        assert net.a.weight.grad is None
        assert net.b.weight.grad is not None


def test_two_rounds_of_columns_and_whole_groups():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 4, 1)
    ).double()  # fmt: skip
    x = drawn(2, 3, 4, 4)
    once = graphprune.rebuild(net, 0.5, x)
    twice = graphprune.rebuild(once, 0.5, x)
    masked = graphprune.mask(net, twice.graphprune_plan)
    close(masked(x), twice(x))
    assert graphprune.verify(net, twice, x).verdict == "equal"


CUT_BOTH_WAYS = (
    "attention_scaled_by_a_shape",
    "attention_fused_causal_own_scale",
    "attention_by_einsum",
    "attention_gated_by_head",
    "packed_attention_sliced",
)


@pytest.mark.parametrize("name", CUT_BOTH_WAYS)
def test_heads_in_one_round_and_columns_in_another(name):
    """Of heads x width, the first head and the first column may both have left."""
    entry = ZOO[name]
    model, inputs = entry.build(), entry.inputs()
    for orders in (("heads", "head_dim"), ("head_dim", "heads")):
        small = model
        for attention in orders:
            graph = graphprune.trace(small, inputs, attention=attention)
            small = graphprune.rebuild(small, graph.plan(0.4, criterion="random", seed=0))
        assert graphprune.verify(model, small, inputs).difference < 1e-10


@pytest.mark.parametrize("weights", [False, True])
def test_columns_of_a_layer_of_torch_that_has_lost_heads(weights):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(6, 16), nn.Linear(16, 3)
            self.b = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x):
            x = self.a(x)
            return self.c(self.b(x, x, x, need_weights=weights)[0])

    torch.manual_seed(0)
    model, x = Model().double().eval(), drawn(2, 5, 6)
    small = model
    for attention in ("heads", "head_dim"):
        graph = graphprune.trace(small, x, attention=attention)
        small = graphprune.rebuild(small, graph.plan(0.5, criterion="random", seed=0))
    close(graphprune.mask(model, small.graphprune_plan)(x), small(x))


class Ratio(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(self.a(x) / self.b(x))


class Standardised(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("std", torch.rand(8) + 0.5)

    def forward(self, x):
        return self.c(self.a(x) / self.std)


@pytest.mark.parametrize("kind", [Ratio, Standardised])
def test_a_division_by_removed_channels(kind):
    masked, small = pair(kind(), drawn(5, 4))
    x = drawn(5, 4)
    assert masked(x).isfinite().all()
    close(masked(x), small(x))


def test_a_copy_of_a_masked_model_is_its_own():
    masked, _ = pair(Normed(nn.RMSNorm(8)), drawn(3, 4))
    twin = copy.deepcopy(masked)
    x = drawn(3, 4)
    with torch.no_grad():
        wanted = masked(x)
        masked[3].bias += 1
    close(twin(x), wanted)
    assert twin.forward.module is twin


def test_constants_of_the_code_leave_with_the_channels_they_join():
    """Zeroes padded to the channels of another stream count in no statistic once these leave."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 12), nn.Linear(12, 2)

        def forward(self, x):
            wide = F.pad(self.a(x), (3, 3))
            mean = wide.mean(-1, keepdim=True)
            return self.c((wide - mean) + self.b(x))

    masked, small = pair(Padded(), drawn(3, 4))
    x = drawn(3, 4)
    close(masked(x), small(x))
