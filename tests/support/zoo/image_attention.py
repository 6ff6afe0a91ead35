"""Attention on maps: rows, neighbours, sampled points, reduced keys."""

from torch import nn
from torch.nn import functional as F

from support.zoo.attention import Attention
from support.zoo.registry import IMAGE, awkward, conv, sandwich
from support.zoo.streams import HEADS, WIDTH, varied


# Axial attention: rows and columns have heads of their own.
@awkward(IMAGE, removable=WIDTH + HEADS + HEADS + 5)
def axial_attention():
    class Axial(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.columns = varied(Attention()), varied(Attention())

        def forward(self, x):
            b, c, h, w = x.shape
            x = x + self.rows(x.permute(0, 2, 3, 1).reshape(b * h, w, c)).view(b, h, w, c).permute(
                0, 3, 1, 2
            )
            y = self.columns(x.permute(0, 3, 2, 1).reshape(b * w, h, c))
            return x + y.view(b, w, h, c).permute(0, 3, 2, 1)

    return sandwich(Axial(), WIDTH)


# Convolutional attention with narrow keys; the values are an image again for the positions.
@awkward(IMAGE, removable=WIDTH + 3 + 5)
def attention_of_a_convolution_split_in_heads():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.key_dim, self.head_dim = 3, 2, 4
            self.qkv, self.proj = conv(WIDTH, 24, 1), conv(12, WIDTH, 1)
            self.pe = conv(12, 12, groups=12)

        def forward(self, x):
            B, C, H, W = x.shape
            N = H * W
            q, k, v = (
                self.qkv(x)
                .view(B, self.num_heads, self.key_dim * 2 + self.head_dim, N)
                .split([self.key_dim, self.key_dim, self.head_dim], dim=2)
            )
            weights = ((q.transpose(-2, -1) @ k) * self.key_dim**-0.5).softmax(dim=-1)
            y = (v @ weights.transpose(-2, -1)).view(B, C, H, W)
            return x + self.proj(y + self.pe(v.reshape(B, C, H, W)))

    return sandwich(Split(), WIDTH)


@awkward(IMAGE, removable=WIDTH + HEADS + 12 + 5)  # keys of a reduced map: norm 12 inside
def spatial_reduction_attention():
    class Reduced(Attention):
        def __init__(self):
            super().__init__()
            self.kv, self.reduce = nn.Linear(12, 24), nn.Conv2d(12, 12, 2, 2)
            self.norm = nn.LayerNorm(12)
            del self.k, self.v

        def forward(self, image):
            b, c, h, w = image.shape
            x = image.flatten(2).transpose(1, 2)
            small = self.norm(self.reduce(image).reshape(b, c, -1).transpose(1, 2))
            kv = self.kv(small).reshape(b, -1, 2, self.heads, self.head_dim)
            k, v = kv.permute(2, 0, 3, 1, 4)
            y = self.mix(self.split(self.q(x)), k, v).transpose(1, 2).reshape(b, h * w, -1)
            return image + self.out(y).transpose(1, 2).reshape(b, c, h, w)

    return sandwich(varied(Reduced()), WIDTH)


# A 1 x 1 unfold: each pixel asks its nine neighbours.
@awkward(IMAGE, removable=WIDTH + HEADS + 5)
def attention_over_unfolded_neighbours():
    class Neighbours(Attention):
        def forward(self, image):
            b, c, h, w = image.shape
            x = image.permute(0, 2, 3, 1)
            q = self.q(x).view(b, h * w, self.heads, self.head_dim, 1)
            k, v = (
                F.unfold(f(x).permute(0, 3, 1, 2), 3, padding=1)
                .view(b, self.heads, self.head_dim, 9, h * w)
                .permute(0, 4, 1, 2, 3)
                for f in (self.k, self.v)
            )
            weights = ((q * k).sum(3, keepdim=True) * self.scale).softmax(-1)
            y = (weights * v).sum(-1).flatten(2)
            return image + self.out(y).transpose(1, 2).view(b, c, h, w)

    return sandwich(varied(Neighbours()), WIDTH)


# Points sampled around each pixel, for each head: offsets and weights go with the head.
@awkward(IMAGE, removable=WIDTH + HEADS + 5)
def deformable_attention():
    class Deformable(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.points = HEADS, 2
            self.offsets, self.weights = nn.Linear(12, HEADS * 2 * 2), nn.Linear(12, HEADS * 2)
            self.value, self.out = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, image):
            b, c, h, w = image.shape
            x = image.flatten(2).transpose(1, 2)
            at = self.offsets(x).view(b, h * w, self.heads, self.points, 2).tanh()
            at = at.transpose(1, 2).flatten(0, 1)
            weights = self.weights(x).view(b, h * w, self.heads, self.points).softmax(-1)
            value = self.value(x).transpose(1, 2).reshape(b * self.heads, -1, h, w)
            found = F.grid_sample(value, at, align_corners=False)
            y = (found * weights.transpose(1, 2).reshape(b * self.heads, 1, h * w, -1)).sum(-1)
            y = y.view(b, -1, h * w).transpose(1, 2)
            return image + self.out(y).transpose(1, 2).reshape(b, c, h, w)

    return sandwich(varied(Deformable()), WIDTH)
