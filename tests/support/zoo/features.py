"""Feature maps of several resolutions, and vectors broadcast over them."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import IMAGE, awkward, conv


# Two branches exchange features twice: each has one stream, and nothing else.
@awkward(IMAGE, removable=8 + 6)
class HighResolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.high, self.low = conv(3, 8), conv(3, 6, stride=2)
        self.down = nn.ModuleList(conv(8, 6, stride=2) for _ in range(2))
        self.up = nn.ModuleList(conv(6, 8, 1) for _ in range(2))
        self.head1, self.head2 = conv(8, 2), conv(6, 2)

    def forward(self, x):
        high, low = F.relu(self.high(x)), F.relu(self.low(x))
        for down, up in zip(self.down, self.up, strict=True):
            new = F.relu(high + F.interpolate(up(low), scale_factor=2, mode="nearest"))
            low = F.relu(low + down(high))
            high = new
        return self.head1(high), self.head2(low)


@awkward(IMAGE, removable=6 + 10 + 8 + 5)  # all stages at one resolution, in one classifier
class Hypercolumns(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), conv(6, 10, stride=2), conv(10, 8, stride=2)
        self.mix, self.head = conv(24, 5, 1), conv(5, 2, 1)

    def forward(self, x):
        stages = []
        for layer in (self.a, self.b, self.c):
            x = F.relu(layer(x))
            stages.append(x)
        size = stages[0].shape[2:]
        columns = [F.interpolate(s, size=size, mode="bilinear") for s in stages]
        return self.head(F.relu(self.mix(torch.cat(columns, dim=1))))


# Convolutions without padding: the skip is cropped in the middle.
@awkward((1, 3, 20, 20), removable=6 + 10 + 6 + 7)
class UNetWithCrop(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.low = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 10, 3)
        self.up = nn.ConvTranspose2d(10, 6, 2, stride=2)
        self.merge, self.out = nn.Conv2d(12, 7, 3), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        skip = F.relu(self.down(x))
        up = self.up(F.relu(self.low(F.max_pool2d(skip, 2))))
        top, left = ((a - b) // 2 for a, b in zip(skip.shape[2:], up.shape[2:], strict=True))
        skip = skip[:, :, top : top + up.shape[2], left : left + up.shape[3]]
        return self.out(F.relu(self.merge(torch.cat((skip, up), dim=1))))


@awkward(IMAGE, removable=6 + 10 + 8 + 8)  # top-down and bottom-up, weighted by learned shares
class WeightedPyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 6), conv(6, 10, stride=2)
        self.la, self.lb = conv(6, 8, 1), conv(10, 8, 1)
        self.down, self.head = conv(8, 8, stride=2), conv(8, 2)
        self.shares = nn.ParameterList(torch.rand(2) for _ in range(2))
        self.last = conv(8, 8)

    def fuse(self, weights, *maps):
        weights = F.relu(weights)
        return sum(w * m for w, m in zip(weights, maps, strict=True)) / (weights.sum() + 1e-3)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.b(a))
        pa, pb = self.la(a), self.lb(b)
        pa = self.fuse(self.shares[0], pa, F.interpolate(pb, scale_factor=2.0))
        pb = self.fuse(self.shares[1], pb, self.down(pa))
        return {"a": self.head(self.last(pa)), "b": self.head(self.last(pb))}


@awkward(IMAGE, removable=6 + 4 * 3 + 5)  # pooled at four scales, all beside the input
class PyramidPooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.last, self.head = conv(3, 6), conv(18, 5), conv(5, 2)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), conv(6, 3, 1)) for size in (1, 2, 3, 6)
        )

    def forward(self, x):
        x = F.relu(self.stem(x))
        maps = [F.interpolate(b(x), x.shape[-2:], mode="bilinear") for b in self.branches]
        return self.head(F.relu(self.last(torch.cat([x, *maps], dim=1))))


# A vector is broadcast over the map, before and after a layer that reads both.
@awkward(IMAGE, (2, 5), removable=8 + 7 + 5)
class BroadcastLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.vector, self.both = conv(3, 8), nn.Linear(5, 7), nn.Linear(15, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x, z):
        x = torch.relu(self.stem(x)).permute(0, 2, 3, 1)
        z = torch.tanh(self.vector(z))[:, None, None, :].expand(-1, x.shape[1], x.shape[2], -1)
        return self.head(torch.relu(self.both(torch.cat([x, z], dim=-1))))


@awkward((2, 4, 6), (2, 3, 6), removable=9)  # every pair of tokens, by broadcasting
class PairsOfTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, x, y):
        return self.head(torch.relu(self.a(x).unsqueeze(2) + self.b(y).unsqueeze(1)))
