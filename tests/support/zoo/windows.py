"""Attention in windows, shifted windows, grids; attention over channels."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.attention import Attention, attend
from support.zoo.packed import Packed
from support.zoo.registry import IMAGE, awkward, conv, sandwich
from support.zoo.streams import HEADS, WIDTH, varied

# The stream of the sandwich, heads, the last convolution.
HEADS_ONLY = WIDTH + HEADS + 5


def partition(x, size):
    """(b, h, w, c) to (windows, size * size, c)."""
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, c)


def reverse(windows, size, h, w):
    b = int(windows.shape[0] / (h * w / size / size))
    x = windows.view(b, h // size, w // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)


class Image(nn.Module):
    """A module for (b, h, w, c) maps as a residual branch on images."""

    def __init__(self, inner):
        super().__init__()
        self.inner = varied(inner)

    def forward(self, x):
        return x + self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class WindowAttention(Packed):
    """Attention in each window, with a table of relative positions, as Swin has it."""

    def __init__(self, size=4):
        super().__init__()
        self.table = nn.Parameter(torch.randn((2 * size - 1) ** 2, HEADS))
        at = torch.stack(torch.meshgrid([torch.arange(size)] * 2, indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None]) + size - 1
        self.register_buffer("index", apart[0] * (2 * size - 1) + apart[1])

    def forward(self, x, mask=None):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * self.scale @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        if mask is not None:
            count = mask.shape[0]
            scores = scores.view(B // count, count, self.num_heads, N, N)
            scores = scores + mask.unsqueeze(1).unsqueeze(0).to(scores.dtype)
            scores = scores.view(-1, self.num_heads, N, N)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class Windowed(nn.Module):
    """Windows around an attention, shifted or not."""

    def __init__(self, shift=0, size=4, attention=None):
        super().__init__()
        self.size, self.shift, self.attention = size, shift, attention or WindowAttention(size)

    def mask(self, h, w):
        marks = torch.zeros(1, h, w, 1)
        for i, rows in enumerate((slice(-4), slice(-4, -2), slice(-2, None))):
            for j, columns in enumerate((slice(-4), slice(-4, -2), slice(-2, None))):
                marks[:, rows, columns] = 3 * i + j
        marks = partition(marks, self.size).squeeze(-1)
        return (marks[:, None] != marks[:, :, None]) * -100.0

    def forward(self, x):
        _, h, w, _ = x.shape
        mask = None
        if self.shift:
            x, mask = torch.roll(x, (-self.shift, -self.shift), (1, 2)), self.mask(h, w)
        x = reverse(self.attention(partition(x, self.size), mask), self.size, h, w)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


@awkward(IMAGE, removable=HEADS_ONLY)
def window_attention():
    return sandwich(Image(Windowed()), WIDTH)


@awkward(IMAGE, removable=HEADS_ONLY)
def shifted_window_attention():
    return sandwich(Image(Windowed(2)), WIDTH)


@awkward(IMAGE, removable=WIDTH + HEADS + HEADS + 24 + 5)  # both attentions, hidden layer of 24
def window_then_shifted_window():
    class Block(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
            self.attention = Windowed(shift)
            self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))

        def forward(self, x):
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x)) if self.attention.shift else x

    return sandwich(Image(nn.Sequential(Block(0), Block(2))), WIDTH)


@awkward((2, 3, 7, 6), removable=HEADS_ONLY)  # the map is padded to whole windows
def window_attention_with_padding():
    class Padded(Windowed):
        def forward(self, x):
            _, h, w, _ = x.shape
            x = F.pad(x, (0, 0, 0, -w % self.size, 0, -h % self.size))
            return super().forward(x)[:, :h, :w].contiguous()

    return sandwich(Image(Padded()), WIDTH)


@awkward(IMAGE, removable=HEADS_ONLY)  # sizes by ``int`` beside sizes that must change
def window_attention_in_one_forward():
    class Together(Packed):
        def forward(self, x):
            _, h, w, C = x.shape
            x = partition(x, 4)
            qkv = self.qkv(x).reshape(-1, 16, 3, self.num_heads, C // self.num_heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            y = self.proj(self.mix(q, k, v).transpose(1, 2).reshape(-1, 16, C))
            return reverse(y, 4, h, w)

    return sandwich(Image(Together()), WIDTH)


@awkward(IMAGE, removable=HEADS_ONLY)  # MaxViT: windows of pixels that are far apart
def grid_attention():
    class Grid(Attention):
        def forward(self, x):
            b, h, w, c = x.shape
            x = x.view(b, 4, h // 4, 4, w // 4, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, c)
            x = super().forward(x)
            x = x.view(b, h // 4, w // 4, 4, 4, -1).permute(0, 3, 1, 4, 2, 5)
            return x.reshape(b, h, w, -1)

    return sandwich(Image(Grid()), WIDTH)


# Four neighbours become one token: whoever reads a channel reads it four times.
@awkward(IMAGE, removable=WIDTH + 10 + 5)
def patch_merging():
    class Merging(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.reduce = nn.LayerNorm(48), nn.Linear(48, 10, bias=False)

        def forward(self, x):
            x = x.permute(0, 2, 3, 1)
            parts = [x[:, i::2, j::2, :] for j in range(2) for i in range(2)]
            return self.reduce(self.norm(torch.cat(parts, -1))).permute(0, 3, 1, 2)

    return sandwich(Merging(), WIDTH, 10)


# Three heads of a query are a window's shift apart: halo of the neighbours by unfold.
@awkward(IMAGE, removable=WIDTH + HEADS + 5)
def halo_attention():
    class Halo(Attention):
        def forward(self, x):
            b, h, w, _ = x.shape
            q = self.q(x).view(b, h // 4, 4, w // 4, 4, -1).transpose(2, 3).flatten(1, 2)
            q = q.flatten(2, 3).unflatten(-1, (self.heads, -1)).transpose(2, 3)
            k, v = (
                F.pad(f(x), (0, 0, 1, 1, 1, 1)).unfold(1, 6, 4).unfold(2, 6, 4).flatten(1, 2)
                for f in (self.k, self.v)
            )
            k, v = (t.unflatten(2, (self.heads, -1)).flatten(4).transpose(3, 4) for t in (k, v))
            y = attend(q, k, v, self.scale).transpose(2, 3).flatten(3)
            y = y.view(b, h // 4, w // 4, 4, 4, -1).transpose(2, 3)
            return self.out(y.reshape(b, h, w, -1))

    return sandwich(Image(Halo()), WIDTH)


@awkward(IMAGE, removable=HEADS_ONLY)  # XCiT: channels of a head attend to each other
def channel_attention_across_covariances():
    class Covariance(Attention):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.rand(self.heads, 1, 1))
            self.qkv, self.q, self.k, self.v = nn.Linear(12, 36), None, None, None

        def forward(self, x):
            b, h, w, c = x.shape
            qkv = self.qkv(x).reshape(b, h * w, 3, self.heads, c // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 4, 1)
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)
            return self.out((weights @ v).permute(0, 3, 1, 2).reshape(b, h, w, c))

    return sandwich(Image(Covariance()), WIDTH)


@awkward(IMAGE, removable=HEADS_ONLY)  # DaViT: the same, with a scale
def channel_attention_scaled():
    class Scaled(Packed):
        def forward(self, x):
            b, h, w, c = x.shape
            x = x.reshape(b, h * w, c)
            qkv = self.qkv(x).reshape(b, h * w, 3, self.num_heads, c // self.num_heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            weights = (k * self.scale).transpose(-1, -2) @ v
            x = (weights.softmax(-1) @ q.transpose(-1, -2)).transpose(-1, -2)
            return self.proj(x.transpose(1, 2).reshape(b, h, w, c))

    return sandwich(Image(Scaled()), WIDTH)


@awkward(IMAGE, removable=HEADS_ONLY)  # Restormer: the same, by convolutions
def channel_attention_of_convolutions():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.qkv = HEADS, conv(12, 36, 1)
            self.dw, self.out = conv(36, 36, groups=36), conv(12, 12, 1)
            self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

        def forward(self, x):
            b, _, h, w = x.shape
            q, k, v = (
                t.reshape(b, self.heads, -1, h * w) for t in self.dw(self.qkv(x)).chunk(3, dim=1)
            )
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            weights = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(-1)
            return x + self.out((weights @ v).reshape(b, -1, h, w))

    return sandwich(varied(Transposed()), WIDTH)


# Channels of the map attend to each other: a softmax over the kept channels.
@awkward(IMAGE, removable=8 + 5)
def channel_attention_without_heads():
    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(1))

        def forward(self, x):
            flat = x.flatten(2)
            weights = (flat @ flat.transpose(1, 2) * 0.1).softmax(-1)
            return x + self.gamma * (weights @ flat).view_as(x)

    return sandwich(Channels())


# Two channel dims on one value: queries' channels, and keys' with values' channels.
@awkward(IMAGE, removable=8 + 4 + 6 + 8 + 5)
def double_attention():
    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.v = conv(8, 4, 1), conv(8, 6, 1), conv(8, 6, 1)
            self.out, self.last = conv(4, 8, 1), conv(8, 8, 1)

        def forward(self, x):
            b, _, h, w = x.shape
            a, at = self.a(x).flatten(2), self.b(x).flatten(2).softmax(-1)
            found = torch.bmm(a, at.transpose(1, 2))
            y = found.matmul(torch.sigmoid(self.v(x).flatten(2)))
            return self.last(torch.relu(self.out(y.view(b, -1, h, w)))) * x + x

    return sandwich(Double())


@awkward(IMAGE, removable=8 + 4 + 5)  # the largest and the mean channel make a spatial gate
def spatial_gate_of_mean_channel():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.mix = conv(8, 4, 1), conv(4, 8, 1), conv(1, 1, 5)

        def forward(self, x):
            pooled = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
            x = x * torch.sigmoid(sum(self.fc2(F.relu(self.fc1(p))) for p in pooled))
            return x * torch.sigmoid(self.mix(x.mean(1, keepdim=True)))

    return sandwich(Gate())


@awkward(IMAGE, removable=8 + 3 + 5)  # one softmax over positions, a bottleneck with LayerNorm
def global_context_block():
    class Context(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask = conv(8, 1, 1)
            self.transform = nn.Sequential(
                conv(8, 3, 1), nn.LayerNorm([3, 1, 1]), nn.ReLU(), conv(3, 8, 1)
            )

        def forward(self, x):
            b, c, h, w = x.shape
            weights = self.mask(x).view(b, 1, h * w).softmax(2).unsqueeze(-1)
            context = torch.matmul(x.view(b, c, h * w).unsqueeze(1), weights)
            return x + self.transform(context.view(b, c, 1, 1))

    return sandwich(varied(Context()))


@awkward(IMAGE, removable=8 + 4 + 5)  # rows and columns pooled, concatenated, split again
def coordinate_attention():
    class Coordinates(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.norm = conv(8, 4, 1), nn.BatchNorm2d(4)
            self.rows, self.columns = conv(4, 8, 1), conv(4, 8, 1)

        def forward(self, x):
            _, _, h, w = x.shape
            both = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).mT], dim=2)
            both = F.hardswish(self.norm(self.down(both)))
            rows, columns = torch.split(both, [h, w], dim=2)
            return x * torch.sigmoid(self.rows(rows)) * torch.sigmoid(self.columns(columns.mT))

    return sandwich(Coordinates())
