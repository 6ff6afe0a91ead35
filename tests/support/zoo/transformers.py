"""Small transformers of several families."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.attention import Attention, attend, rotate_half
from support.zoo.registry import IMAGE, awkward
from support.zoo.streams import HEADS, TOKENS, WIDTH, stream, varied, words


class Block(nn.Module):
    """Attention and a hidden layer on a residual stream."""

    def __init__(self, width, hidden, attention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


# The stream, with the class token and the positions; heads and hidden layers of two blocks.
@awkward(IMAGE, removable=12 + 2 * (HEADS + 16))
class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token, self.places = (
            nn.Parameter(torch.randn(1, 1, 12)),
            nn.Parameter(torch.randn(1, 5, 12)),
        )
        self.blocks = nn.Sequential(*(Block(12, 16, Attention()) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 4)
        varied(self)

    def forward(self, image):
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


# Positions are resized to the map: bicubic over places, never over channels.
@awkward(IMAGE, removable=12 + HEADS)
class ResizedPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, 12, 4, 4), nn.Parameter(torch.randn(1, 9, 12))
        self.attention, self.head = Attention(), nn.Linear(12, 4)

    def forward(self, image):
        x = self.patches(image)
        places = self.places.reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
        x = x + F.interpolate(places, size=x.shape[2:], mode="bicubic", align_corners=False)
        x = x.flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x)).mean(1))


class CausalBlock(Block):
    """The block of a GPT."""

    def __init__(self, width, hidden, heads):
        super().__init__(width, hidden, nn.Linear(width, 3 * width))
        self.heads, self.width, self.out = heads, width, nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.attention(self.norm1(x)).split(self.width, dim=2)
        b, n, c = x.size()
        q, k, v = (t.view(b, n, self.heads, c // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(b, n, c))
        return x + self.mlp(self.norm2(x))


# The table of words is the classifier as well: its rows stay, its channels are the stream.
@awkward(words, removable=12 + 2 * (HEADS + 16))
class TiedGpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 12), nn.Embedding(9, 12)
        self.blocks = nn.ModuleList(CausalBlock(12, 16, HEADS) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 11, bias=False)
        self.head.weight = self.words.weight
        varied(self)

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class RMSNorm(nn.Module):
    """As Llama writes it."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), 1e-6

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class LlamaBlock(nn.Module):
    """Rotary grouped-query attention and a gated hidden layer."""

    def __init__(self, width=12, heads=6, shared=3, dim=4, hidden=16):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.dim, self.groups = dim, heads // shared
        self.q = nn.Linear(width, heads * dim, bias=False)
        self.out = nn.Linear(heads * dim, width, bias=False)
        self.k, self.v = (nn.Linear(width, shared * dim, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def attention(self, x, cos, sin):
        shape = (*x.shape[:-1], -1, self.dim)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:-1], -1))

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


# The stream; shared heads with their queries, and the hidden layer, of two blocks.
@awkward(words, removable=12 + 2 * (3 + 16))
class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 12), nn.Linear(12, 11, bias=False)
        self.blocks = nn.ModuleList(LlamaBlock() for _ in range(2))
        self.norm = RMSNorm(12)
        self.register_buffer("inverse", 100.0 ** (-torch.arange(0, 4, 2) / 4), persistent=False)

    def forward(self, tokens):
        x = self.words(tokens)
        angles = torch.arange(tokens.shape[1])[:, None] * self.inverse
        angles = torch.cat([angles, angles], dim=-1)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.head(self.norm(x))


@awkward(TOKENS, removable=WIDTH + 16 + HEADS)  # attention and hidden layer side by side
def parallel_attention_and_hidden_layer():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fused = nn.LayerNorm(12), nn.Linear(12, 36 + 16)
            self.sizes, self.out = [12, 12, 12, 16], nn.Linear(12 + 16, 12)

        def forward(self, x):
            q, k, v, hidden = self.fused(self.norm(x)).split(self.sizes, dim=-1)
            q, k, v = (t.unflatten(-1, (-1, 3)).transpose(1, 2) for t in (q, k, v))
            y = attend(q, k, v, 0.6).transpose(1, 2).flatten(2)
            return self.out(torch.cat([y, F.gelu(hidden)], dim=-1))

    return stream(Parallel())


@awkward(words, removable=8 + 12 + 16 + HEADS)  # ALBERT: narrow words, one block for all layers
class SharedLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.widen, self.head = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 3)
        self.block = varied(Block(12, 16, Attention()))

    def forward(self, tokens):
        x = self.widen(self.words(tokens))
        for _ in range(3):
            x = self.block(x)
        return self.head(torch.tanh(x[:, 0]))


# Each position is one of several kinds of embedding, summed: BERT.
@awkward(words, removable=12 + HEADS)
class SummedEmbeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(n, 12) for n in (11, 9, 2))
        self.register_buffer("at", torch.arange(9).expand(1, -1), persistent=False)
        self.norm, self.attention, self.head = nn.LayerNorm(12), Attention(), nn.Linear(12, 3)

    def forward(self, tokens, kinds=None):
        at = self.at[:, : tokens.shape[1]]
        kinds = torch.zeros_like(tokens) if kinds is None else kinds
        x = self.norm(self.words(tokens) + self.places(at) + self.kinds(kinds))
        return self.head(x + self.attention(x))


# Sines of the positions, half of them cosines: made anew for the width of the stream.
@awkward(words, removable=12 + HEADS)
class SinusoidalPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.attention, self.head = nn.Embedding(11, 12), Attention(), nn.Linear(12, 3)
        table = torch.zeros(9, 12)
        steps = torch.exp(torch.arange(0, 12, 2) * (-math.log(100.0) / 12))
        table[:, 0::2] = torch.sin(torch.arange(9)[:, None] * steps)
        table[:, 1::2] = torch.cos(torch.arange(9)[:, None] * steps)
        self.register_buffer("table", table[None])

    def forward(self, tokens):
        x = self.words(tokens)
        x = x + self.table[:, : x.size(1)]
        return self.head(x + self.attention(x))


# Adaptive norms: shift, scale and gate of the stream in six parts of one layer.
@awkward(TOKENS, (2, 5), removable=12 + 7 + 16 + HEADS)
class DiffusionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.head, self.time = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(5, 7)
        self.norm, self.parts = nn.LayerNorm(12, elementwise_affine=False), nn.Linear(7, 6 * 12)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12))

    def forward(self, x, time):
        x = self.inp(x)
        a, b, c, d, e, f = self.parts(F.silu(self.time(time))).chunk(6, dim=1)
        y = self.norm(x) * (1 + b.unsqueeze(1)) + a.unsqueeze(1)
        x = x + c.unsqueeze(1) * self.attention(y)
        y = self.norm(x) * (1 + e.unsqueeze(1)) + d.unsqueeze(1)
        return self.head(x + f.unsqueeze(1) * self.mlp(y))
