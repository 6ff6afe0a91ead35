"""Attention whose queries, keys and values come out of one projection."""

from torch import nn
from torch.nn import functional as F

from support.zoo.attention import attend
from support.zoo.registry import awkward
from support.zoo.streams import HEADS, TOKENS, WIDTH, stream


class Packed(nn.Module):
    """One projection for queries, keys and values; subclasses take it apart."""

    def __init__(self, heads=HEADS, head_dim=3):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * heads * head_dim), nn.Linear(12, WIDTH)

    def mix(self, q, k, v):
        return attend(q, k, v, self.scale)


# The projection is one grid of three times heads, so queries and values keep the same heads.
@awkward(TOKENS, removable=WIDTH + HEADS + HEADS)
def attention_of_talking_heads_packed():
    class TalkingPacked(Packed):
        def __init__(self):
            super().__init__()
            self.before, self.after = nn.Conv2d(HEADS, HEADS, 1), nn.Conv2d(HEADS, HEADS, 1)

        def forward(self, x):
            b, n, _ = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
            scores = self.after(self.before(q @ k.transpose(-2, -1)).softmax(-1))
            return self.proj((scores @ v).transpose(1, 2).reshape(b, n, -1))

    return stream(TalkingPacked())


@awkward(TOKENS, removable=WIDTH + HEADS)
class PackedByWidth(nn.Module):  # sizes are computed from the width of the stream
    def __init__(self):
        super().__init__()
        self.inp, self.num_heads, self.head = nn.Linear(6, 12), 4, nn.Linear(12, 2)
        self.qkv, self.proj, self.norm = nn.Linear(12, 36), nn.Linear(12, 12), nn.LayerNorm(12)

    def attention(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, N, C))

    def forward(self, x):
        x = self.inp(x)
        return self.head(x + self.attention(self.norm(x)))


@awkward(TOKENS, removable=WIDTH + HEADS)
def packed_attention_of_fixed_head_width():
    class Fixed(Packed):
        def forward(self, x):
            B, N, C = x.shape
            qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            return self.proj(self.mix(q, k, v).transpose(1, 2).reshape(B, N, C))

    return stream(Fixed())


@awkward(TOKENS, removable=WIDTH + HEADS)
def packed_attention_chunked():
    class Chunked(Packed):
        def forward(self, x):
            q, k, v = (
                t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for t in self.qkv(x).chunk(3, dim=-1)
            )
            return self.proj(self.mix(q, k, v).transpose(1, 2).flatten(2))

    return stream(Chunked())


@awkward(TOKENS, removable=WIDTH + HEADS)
def packed_attention_split_by_attribute():  # GPT-2
    class Split(Packed):
        def __init__(self):
            super().__init__()
            self.embed_dim = 12

        def forward(self, x):
            q, k, v = self.qkv(x).split(self.embed_dim, dim=2)
            shape = (*q.shape[:-1], -1, self.head_dim)
            q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            return self.proj(y.reshape(*y.shape[:-2], -1).contiguous())

    return stream(Split())


@awkward(TOKENS, removable=WIDTH + HEADS)
def packed_attention_sliced():
    class Sliced(Packed):
        def forward(self, x):
            y = self.qkv(x)
            width = y.shape[-1] // 3
            q, k, v = y[..., :width], y[..., width : 2 * width], y[..., 2 * width :]
            q, k, v = (t.unflatten(-1, (-1, 3)).transpose(1, 2) for t in (q, k, v))
            return self.proj(self.mix(q, k, v).transpose(1, 2).flatten(2))

    return stream(Sliced())


@awkward(TOKENS, removable=WIDTH + HEADS)
def packed_attention_head_by_head():  # GPT-NeoX, BLOOM
    class PerHead(Packed):
        def forward(self, x):
            b, n, _ = x.shape
            qkv = self.qkv(x).view(b, n, self.num_heads, 3 * self.head_dim).transpose(1, 2)
            q, k, v = qkv.chunk(3, dim=-1)
            return self.proj(self.mix(q, k, v).transpose(1, 2).contiguous().view(b, n, -1))

    return stream(PerHead())
