"""Attention between other partners: shared keys, other sequences, no softmax."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.attention import Attention, attend
from support.zoo.registry import awkward
from support.zoo.streams import HEADS, TOKENS, WIDTH, Stream, stream, varied


class Grouped(Attention):
    """Fewer heads of keys and values than of queries; subclasses spread them."""

    def __init__(self, heads=6, shared=3, head_dim=2):
        super().__init__(heads=heads, head_dim=head_dim)
        self.shared, self.groups = shared, heads // shared
        self.k, self.v = (nn.Linear(WIDTH, shared * head_dim) for _ in range(2))

    def parts(self, x):
        b, n, _ = x.shape
        return (
            f(x).view(b, n, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v)
        )


# A head of keys and values goes with all its queries, by any spelling.
@awkward(TOKENS, removable=WIDTH + 3)
def grouped_queries_by_repeat_interleave():
    class Repeat(Grouped):
        def mix(self, q, k, v):
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
            return attend(q, k, v, self.scale)

    return stream(Repeat())


@awkward(TOKENS, removable=WIDTH + 3)
def grouped_queries_by_expand():  # Llama
    class Expand(Grouped):
        def spread(self, x):
            b, heads, n, dim = x.shape
            x = x[:, :, None, :, :].expand(b, heads, self.groups, n, dim)
            return x.reshape(b, heads * self.groups, n, dim)

        def mix(self, q, k, v):
            return attend(q, self.spread(k), self.spread(v), self.scale)

    return stream(Expand())


@awkward(TOKENS, removable=WIDTH + 3)
def grouped_queries_fused_by_torch():
    class Fused(Grouped):
        def mix(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return stream(Fused())


@awkward(TOKENS, removable=WIDTH + 3)
def grouped_queries_by_a_fifth_dimension():
    class View(Grouped):
        def mix(self, q, k, v):
            q = q.unflatten(1, (self.shared, self.groups))
            return attend(q, k.unsqueeze(2), v.unsqueeze(2), self.scale).flatten(1, 2)

    return stream(View())


@awkward(TOKENS, removable=WIDTH + 2)  # the same with more queries than heads of keys
def grouped_queries_of_two_shared_heads():
    class Repeat(Grouped):
        def mix(self, q, k, v):
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
            return attend(q, k, v, self.scale)

    return stream(Repeat(heads=6, shared=2))


@awkward(TOKENS, removable=WIDTH + HEADS)  # the one head of keys and values stays
def multi_query_attention():
    class One(Attention):
        def __init__(self):
            super().__init__()
            self.k, self.v = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)

        def parts(self, x):
            return self.split(self.q(x)), self.k(x).unsqueeze(1), self.v(x).unsqueeze(1)

    return stream(One())


@awkward(TOKENS, removable=WIDTH + HEADS)  # the class token asks, all answer
def class_attention():
    class Class(Attention):
        def forward(self, x):
            y = self.mix(self.split(self.q(x[:, :1])), *list(self.parts(x))[1:])
            y = self.out(y.transpose(1, 2).reshape(x.shape[0], 1, -1))
            return torch.cat([y, torch.zeros_like(x[:, 1:])], dim=1)

    return stream(Class())


# The two streams are separate: queries read the first, keys and values the second.
@awkward(TOKENS, (2, 7, 5), removable=WIDTH + 8 + HEADS)
class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.memory, self.head = nn.Linear(6, 12), nn.Linear(5, 8), nn.Linear(12, 4)
        self.attention = Attention()
        self.attention.k, self.attention.v = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x, context):
        x, context, a = self.inp(x), torch.tanh(self.memory(context)), self.attention
        y = a.mix(*(a.split(t) for t in (a.q(x), a.k(context), a.v(context))))
        return self.head(x + a.out(y.transpose(1, 2).flatten(2)))


# Learned queries are the stream of the reader; the tokens' own width is another one.
@awkward(TOKENS, removable=WIDTH + 12 + HEADS)
class LearnedQueries(nn.Module):
    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, 12))
        self.inp, self.attention, self.head = nn.Linear(6, 12), Attention(), nn.Linear(12, 4)

    def forward(self, x):
        x, a = torch.tanh(self.inp(x)), self.attention
        latents = self.latents.expand(x.shape[0], -1, -1)
        y = a.mix(a.split(a.q(latents)), a.split(a.k(x)), a.split(a.v(x)))
        return self.head(latents + a.out(y.transpose(1, 2).flatten(2)))


@awkward(TOKENS, removable=WIDTH + HEADS)  # heads hide in the batch dimension
def attention_with_heads_in_the_batch():
    class Batched(Attention):
        def forward(self, x):
            b, n, _ = x.shape
            x = x.transpose(0, 1)
            q, k, v = (
                f(x).contiguous().view(n, b * self.heads, self.head_dim).transpose(0, 1)
                for f in (self.q, self.k, self.v)
            )
            weights = torch.bmm(q * self.scale, k.transpose(1, 2)).softmax(-1)
            y = torch.bmm(weights, v).transpose(0, 1).contiguous().view(n, b, -1)
            return self.out(y).transpose(0, 1)

    return stream(Batched())


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_by_einsum():
    class Einsum(Attention):
        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
            weights = (torch.einsum("bihd,bjhd->bhij", q, k) * self.scale).softmax(-1)
            return self.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))

    return stream(Einsum())


# Weights with dimensions of their own: heads and the width of all heads leave each by itself.
@awkward(TOKENS, removable=WIDTH + HEADS + 3)
def attention_of_three_dimensional_weights():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Parameter(torch.randn(3, WIDTH, HEADS, 3) * 0.3)
            self.out = nn.Parameter(torch.randn(HEADS, 3, WIDTH) * 0.3)

        def forward(self, x):
            q, k, v = torch.einsum("bnc,schd->sbnhd", x, self.qkv)
            weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
            return torch.einsum("bhij,bjhd,hdc->bic", weights, v, self.out)

    return stream(Dense())


# Every head is a module of its own and must keep a channel: what leaves is inside the heads.
@awkward(TOKENS, removable=WIDTH + HEADS * (3 + 3))
def attention_of_a_list_of_heads():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, 3) for _ in range(3))

        def forward(self, x):
            return attend(self.q(x), self.k(x), self.v(x), 0.6)

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(One() for _ in range(HEADS))
            self.out = nn.Linear(12, WIDTH)

        def forward(self, x):
            return self.out(torch.cat([head(x) for head in self.heads], dim=-1))

    return stream(Several())


@awkward(TOKENS, removable=WIDTH + HEADS)  # both halves of a head's queries go with it
def differential_attention():
    class Differential(Attention):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)

        def parts(self, x):
            b, n, _ = x.shape
            q, k = (f(x).view(b, n, self.heads, 2, -1).transpose(1, 2) for f in (self.q, self.k))
            return q, k, self.split(self.v(x))

        def mix(self, q, k, v):
            first, second = (
                (q[..., i, :] @ k[..., i, :].mT * self.scale).softmax(-1) for i in range(2)
            )
            return (first - 0.3 * second) @ v

    return stream(Differential())


@awkward(TOKENS, removable=WIDTH + HEADS)  # keys times values first: two widths of a head meet
def linear_attention():
    class Kernels(Attention):
        def mix(self, q, k, v):
            q, k = F.elu(q) + 1, F.elu(k) + 1
            below = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
            return q @ (k.mT @ v) / below

    return stream(Kernels())


@awkward(TOKENS, removable=WIDTH + 5 + 7)  # without heads: queries with keys, and values
def linear_attention_without_heads():
    class Kernels(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5)
            self.v, self.out = nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)

        def forward(self, x):
            q, k = torch.sigmoid(self.q(x)), torch.sigmoid(self.k(x))
            return self.out(
                torch.einsum("bnd,bde->bne", q, torch.einsum("bnd,bne->bde", k, self.v(x)))
            )

    return stream(Kernels())


@awkward(TOKENS, removable=WIDTH + HEADS)  # the softmax runs over the channels of each head
def efficient_attention():
    class Efficient(Attention):
        def mix(self, q, k, v):
            return q.softmax(-1) @ (k.softmax(-2).mT @ v)

    return stream(Efficient())


@awkward(TOKENS, removable=WIDTH + 7)  # seven memory slots, normalised over the kept ones
def external_attention():
    class External(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values = (
                nn.Linear(WIDTH, 7, bias=False), nn.Linear(7, WIDTH, bias=False))  # fmt: skip

        def forward(self, x):
            weights = self.keys(x).softmax(dim=1)
            return self.values(weights / (1e-9 + weights.sum(dim=2, keepdim=True)))

    return stream(External())


@awkward(TOKENS, removable=12 + HEADS)  # two layers of attention share their weights
def attention_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.norm = Attention(), nn.LayerNorm(12)

        def forward(self, x):
            x = x + self.attention(self.norm(x))
            return self.attention(self.norm(x))

    return stream(Twice())


@awkward(TOKENS, removable=WIDTH + HEADS)  # the values of one layer serve the next: same heads
class ValueResidual(Stream):
    def __init__(self):
        super().__init__(Attention())
        self.second = Attention()
        del self.second.v
        varied(self)

    def forward(self, x):
        x = self.inp(x)
        q, k, values = self.thing.parts(x)
        x = x + self.thing.out(self.thing.mix(q, k, values).transpose(1, 2).flatten(2))
        second = self.second
        q, k = (second.split(f(x)) for f in (second.q, second.k))
        y = second.mix(q, k, values)
        return self.head(x + second.out(y.transpose(1, 2).flatten(2)))


# What is the same for all heads is repeated for each: a mask, a bias, places in a table.
@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_with_a_repeated_mask():
    class Masked(Attention):
        def mix(self, q, k, v):
            mask = q.new_ones(q.shape[0], q.shape[2], k.shape[2]).tril()
            mask = mask.unsqueeze(1).repeat(1, self.heads, 1, 1)
            scores = (q @ k.transpose(-2, -1)) * self.scale
            return scores.masked_fill(mask == 0, -1e9).softmax(-1) @ v

    return stream(Masked())


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_with_places_gathered_for_each_head():  # CoAtNet
    class Biased(Attention):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, HEADS))

        def mix(self, q, k, v):
            n = q.shape[2]
            places = (torch.arange(n)[:, None] - torch.arange(n)[None]).clamp(-3, 3) + 3
            bias = self.table.gather(0, places.reshape(-1, 1).repeat(1, self.heads))
            scores = (q @ k.transpose(-2, -1)) * self.scale
            return (scores + bias.T.reshape(1, self.heads, n, n)).softmax(-1) @ v

    return stream(Biased())
