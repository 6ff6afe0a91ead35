"""Attention in every spelling: whole heads leave, and the channels of the stream."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import awkward
from support.zoo.streams import HEADS, TOKENS, WIDTH, stream, words


def attend(q, k, v, scale):
    return ((q @ k.transpose(-2, -1)) * scale).softmax(-1) @ v


class Attention(nn.Module):
    """Separate projections; subclasses spell the rest."""

    def __init__(self, width=WIDTH, heads=HEADS, head_dim=3, value_dim=None):
        super().__init__()
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim or head_dim
        self.scale = head_dim**-0.5
        self.q, self.k = nn.Linear(width, heads * head_dim), nn.Linear(width, heads * head_dim)
        self.v = nn.Linear(width, heads * self.value_dim)
        self.out = nn.Linear(heads * self.value_dim, width)

    def split(self, x, dim=None):
        b, n, _ = x.shape
        return x.view(b, n, self.heads, dim or self.head_dim).transpose(1, 2)

    def parts(self, x):
        return self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x), self.value_dim)

    def mix(self, q, k, v):
        return attend(q, k, v, self.scale)

    def forward(self, x):
        y = self.mix(*self.parts(x))
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_scaled_by_attribute():
    return stream(Attention())


@awkward(TOKENS, removable=12 + 2)  # whole heads, although a head has more channels
def attention_of_wide_heads():
    return stream(Attention(heads=2, head_dim=6))


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_with_wider_values():
    return stream(Attention(head_dim=2, value_dim=5))


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_scaled_by_a_shape():
    class Scaled(Attention):
        def mix(self, q, k, v):
            return attend(q, k, v, q.shape[-1] ** -0.5)

    return stream(Scaled())


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_scaled_by_math_sqrt():
    class Scaled(Attention):
        def mix(self, q, k, v):
            scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
            return torch.matmul(F.softmax(scores, dim=-1), v)

    return stream(Scaled())


class Divided(Attention):
    """The width of a head is that of the stream over the heads."""

    root = staticmethod(lambda width: math.sqrt(width))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (
            part(x).reshape(b, n, self.heads, c // self.heads).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        y = attend(q, k, v, 1 / self.root(c // self.heads))
        return self.out(y.transpose(1, 2).reshape(b, n, c))


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_scaled_by_the_width_over_the_heads():
    return stream(Divided())


@awkward(TOKENS, removable=0)  # a float says nothing of where it came from
def attention_scaled_by_a_float_of_the_width():
    class Lost(Divided):
        root = staticmethod(lambda width: float(width) ** 0.5)

    return stream(Lost())


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_fused_by_torch():
    class Fused(Attention):
        def mix(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    return stream(Fused())


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_fused_causal_own_scale():
    class Fused(Attention):
        def mix(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)

    return stream(Fused())


@awkward(TOKENS, removable=WIDTH + HEADS)  # the bias of a head goes with it
def attention_fused_with_bias_per_head():
    class Fused(Attention):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(1, self.heads, 5, 5))

        def mix(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)

    return stream(Fused())


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_masked_by_buffer():
    class Masked(Attention):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(8, 8).tril().view(1, 1, 8, 8).bool())

        def mix(self, q, k, v):
            n = q.shape[-2]
            scores = q @ k.transpose(-2, -1) * self.scale
            low = torch.finfo(scores.dtype).min
            return scores.masked_fill(~self.mask[:, :, :n, :n], low).softmax(-1) @ v

    return stream(Masked())


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_with_slopes_per_head():  # ALiBi
    class Slopes(Attention):
        def __init__(self):
            super().__init__()
            self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, 1 + self.heads))

        def mix(self, q, k, v):
            at = torch.arange(q.shape[-2], dtype=q.dtype)
            far = (at[None] - at[:, None]).abs()
            scores = q @ k.mT * self.scale - self.slopes.view(1, -1, 1, 1) * far
            return scores.softmax(-1) @ v

    return stream(Slopes())


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_with_embedded_distances():  # T5
    class Buckets(Attention):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, self.heads)

        def mix(self, q, k, v):
            at = torch.arange(q.shape[-2])
            bias = self.table((at[None] - at[:, None]).clamp(-4, 4) + 4)
            return (q @ k.mT + bias.permute(2, 0, 1).unsqueeze(0)).softmax(-1) @ v

    return stream(Buckets())


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_of_cosines():  # Swin v2
    class Cosine(Attention):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.rand(self.heads, 1, 1))

        def mix(self, q, k, v):
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            return (scores * self.temperature.clamp(max=0.9).exp()).softmax(-1) @ v

    return stream(Cosine())


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_normalised_inside_heads():
    class Normed(Attention):
        def __init__(self):
            super().__init__()
            self.q_norm, self.k_norm = nn.LayerNorm(3), nn.LayerNorm(3)

        def mix(self, q, k, v):
            return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)

    return stream(Normed())


@awkward(TOKENS, removable=WIDTH + HEADS)  # statistics over the kept heads
def attention_normalised_over_all_heads():
    class Normed(Attention):
        def __init__(self):
            super().__init__()
            self.q_norm, self.k_norm = nn.LayerNorm(12), nn.LayerNorm(12)

        def parts(self, x):
            q, k = self.q_norm(self.q(x)), self.k_norm(self.k(x))
            return self.split(q), self.split(k), self.split(self.v(x))

    return stream(Normed())


def rotations(n, dim, dtype):
    angles = torch.arange(n)[:, None] * 100.0 ** (-torch.arange(0, dim, 2) / dim)
    return angles.to(dtype)


def rotate_half(x):
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


@awkward(TOKENS, removable=WIDTH + 3)  # 3 heads of 4 channels: two pairs each
def attention_rotated_by_halves():
    class Rotary(Attention):
        def mix(self, q, k, v):
            angles = rotations(q.shape[-2], q.shape[-1], q.dtype)
            cos, sin = torch.cat([angles] * 2, -1).cos(), torch.cat([angles] * 2, -1).sin()
            q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
            return super().mix(q, k, v)

    return stream(Rotary(heads=3, head_dim=4))


@awkward(TOKENS, removable=WIDTH + 3)
def attention_rotated_by_pairs():
    class Rotary(Attention):
        def turn(self, x):
            angles = rotations(x.shape[-2], x.shape[-1], x.dtype)
            a, b = x[..., ::2], x[..., 1::2]
            cos, sin = angles.cos(), angles.sin()
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

        def mix(self, q, k, v):
            return super().mix(self.turn(q), self.turn(k), v)

    return stream(Rotary(heads=3, head_dim=4))


@awkward(TOKENS, removable=WIDTH + 3)
def attention_rotated_as_complex_numbers():
    class Rotary(Attention):
        def turn(self, x):
            angles = rotations(x.shape[-2], x.shape[-1], x.dtype)
            turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            turned = turned * torch.polar(torch.ones_like(angles), angles)
            return torch.view_as_real(turned).flatten(3)

        def mix(self, q, k, v):
            return super().mix(self.turn(q), self.turn(k), v)

    return stream(Rotary(heads=3, head_dim=4))


@awkward(TOKENS, removable=WIDTH + 3)  # only the first half of each head turns
def attention_rotated_partly():
    class Rotary(Attention):
        def turn(self, x):
            angles = rotations(x.shape[-2], 2, x.dtype)
            first, rest = x[..., :2], x[..., 2:]
            cos, sin = torch.cat([angles] * 2, -1).cos(), torch.cat([angles] * 2, -1).sin()
            return torch.cat([first * cos + rotate_half(first) * sin, rest], -1)

        def mix(self, q, k, v):
            return super().mix(self.turn(q), self.turn(k), v)

    return stream(Rotary(heads=3, head_dim=4))


class Gated(Attention):
    """The output of attention times a gate of all channels, or of one number per head."""

    def __init__(self, per_head):
        super().__init__()
        self.per_head = per_head
        self.gate = nn.Linear(WIDTH, HEADS if per_head else 12)

    def forward(self, x):
        y, gate = self.mix(*self.parts(x)), torch.sigmoid(self.gate(x))
        if self.per_head:
            y = y * gate.transpose(1, 2).unsqueeze(-1)
            return self.out(y.transpose(1, 2).flatten(2))
        return self.out(y.transpose(1, 2).flatten(2) * gate)


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_gated_by_channel():
    return stream(Gated(False))


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_gated_by_head():
    return stream(Gated(True))


class Talking(Attention):
    """Heads mixed by linear layers before and after the softmax."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def split(self, x, dim=None):
        b, n, _ = x.shape
        return x.view(b, n, -1, self.head_dim).transpose(1, 2)

    def mix(self, q, k, v):
        scores = self.before((q @ k.mT * self.scale).permute(0, 2, 3, 1))
        weights = self.after(scores.softmax(2)).permute(0, 3, 1, 2)
        return weights @ v


# Heads of queries and keys, heads of the softmax, heads of values: three sets.
@awkward(TOKENS, removable=WIDTH + HEADS + HEADS + HEADS)
def attention_of_talking_heads():
    return stream(Talking())


@awkward(words, removable=8 + 4)  # the positions' table goes with the stream
class WordsAndPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Embedding(9, 8)
        self.attention, self.head = Attention(width=8, head_dim=2), nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.words(tokens) * math.sqrt(8) + self.places(torch.arange(tokens.shape[1]))
        return self.head(x + self.attention(x))


@awkward(TOKENS, removable=WIDTH + HEADS)
def a_rotation_that_leaves_no_part_of_the_heads():
    """Code for rotations of a part, where the part is all: the rest has no columns."""

    class Rotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.o, self.heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), 4

        def forward(self, x):
            b, n, _ = x.shape
            parts = (
                t.reshape(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
            )
            q, k, v = parts
            angles = torch.arange(n, dtype=x.dtype)[:, None] * torch.ones(3, dtype=x.dtype)
            part = angles.shape[-1]
            q, k = (torch.cat((t[..., :part] * angles.cos(), t[..., part:]), -1) for t in (q, k))
            y = (q @ k.transpose(2, 3)).softmax(-1) @ v
            return self.o(y.transpose(1, 2).reshape(b, n, -1))

    return stream(Rotated())
