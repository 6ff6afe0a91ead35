"""Odd calls, branches, outputs, and channels in odd places."""

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from support.zoo.registry import IMAGE, Apply, awkward, conv, sandwich


@awkward((3, 6), removable=8)  # results are written into tensors that the code made
class OutArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        with torch.no_grad():
            a, b = self.a(x), self.b(x)
            room = torch.empty_like(a)
            torch.mul(a, torch.sigmoid(b), out=room)
            torch.add(room, 1.0, out=room)
        return self.head(room)


@awkward((2, 4, 6), (2, 4, 7), removable=8 + 9)  # x W y for each pair, W between two widths
class BilinearForm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(7, 9)
        self.weight = nn.Parameter(torch.randn(8, 9))

    def forward(self, x, y):
        return torch.tanh(self.a(x)) @ self.weight @ torch.tanh(self.b(y)).transpose(1, 2)


@awkward((3, 6), (3, 7), removable=8 + 9)  # one form for each of three labels
class BilinearForms(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(7, 9)
        self.weight = nn.Parameter(torch.randn(3, 8, 9))

    def forward(self, x, y):
        return torch.einsum("bi,kij,bj->bk", self.a(x).relu(), self.weight, self.b(y).relu())


@awkward((3, 6), removable=10 + 7 + 10)  # layers of a stack that carry by their gates
def highway_of_two_widths():
    class Layer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.h, self.t = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x):
            t = torch.sigmoid(self.t(x))
            return torch.lerp(x, F.relu(self.h(x)), t)

    return nn.Sequential(
        nn.Linear(6, 10), Layer(10), nn.Linear(10, 7), Layer(7), nn.Linear(7, 10), Layer(10),
        nn.Linear(10, 3))  # fmt: skip


@awkward(IMAGE, removable=6 + 8 + 10)  # a classifier after every stage
class EarlyExits(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [3, 6, 8, 10]
        self.stages = nn.ModuleList(conv(a, b) for a, b in itertools.pairwise(widths))
        self.exits = nn.ModuleList(nn.Linear(width, 4) for width in widths[1:])

    def forward(self, x):
        outs = []
        for stage, leave in zip(self.stages, self.exits, strict=True):
            x = F.relu(stage(x))
            outs.append(leave(x.mean((2, 3))))
        return outs if self.training else torch.stack(outs).mean(0)


@awkward(IMAGE, removable=6 + 8)  # the branch is chosen by the values: recorded as it runs
class BranchOnValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.usual, self.rare, self.head = conv(3, 6), conv(6, 8), conv(6, 8), conv(8, 2)

    def forward(self, x):
        x = F.relu(self.a(x))
        y = self.usual(x) if x.detach().mean().item() > -1 else self.rare(x)
        return self.head(F.relu(y))


@awkward(IMAGE, removable=6)  # turns until a size is small: as often as the image says
class LoopOverSizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.step, self.head = conv(3, 6), conv(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.a(x)
        while x.shape[-1] > 2:
            x = F.avg_pool2d(F.relu(self.step(x)) + x, 2)
        return self.head(x.mean((2, 3)))


@dataclass
class Result:
    logits: torch.Tensor
    features: torch.Tensor | None = None


def _flat(result):
    return [result.logits, result.features], None


pytree.register_pytree_node(
    Result, _flat, lambda values, _: Result(*values), serialized_type_name="zoo.Result"
)


class Pair(NamedTuple):
    logits: torch.Tensor
    score: torch.Tensor


class Classifier(nn.Module):
    """Two convolutions and a classifier; subclasses wrap what they return."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = conv(3, 8), conv(8, 6), nn.Linear(6, 4)

    def logits(self, x):
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


@awkward(IMAGE, removable=8 + 6)
class DataclassOutput(Classifier):
    def forward(self, x):
        return Result(self.logits(x))


@awkward(IMAGE, removable=8 + 6)
class NamedTupleOutput(Classifier):
    def forward(self, x):
        logits = self.logits(x)
        return Pair(logits, logits.softmax(-1).amax(-1))


@awkward(IMAGE, removable=8 + 6)
class OrderedDictOutput(Classifier):
    def forward(self, x):
        return OrderedDict(out=self.logits(x), shape=x.shape[2:])


# The decoder has the encoder's kernels, transposed.
@awkward(IMAGE, removable=8 + 6)
class TransposedKernels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 6)
        self.offsets = nn.ParameterList([torch.randn(8), torch.randn(3)])

    def forward(self, x):
        y = torch.tanh(self.b(torch.tanh(self.a(x))))
        y = torch.tanh(F.conv_transpose2d(y, self.b.weight, self.offsets[0], padding=1))
        return F.conv_transpose2d(y, self.a.weight, self.offsets[1], padding=1)


# A weight shared with its own transpose ties its rows to its columns.
@awkward((3, 6), removable=9)
class SymmetricWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.weight, self.head = (
            nn.Linear(6, 9), nn.Parameter(torch.randn(9, 9)), nn.Linear(9, 2))  # fmt: skip

    def forward(self, x):
        return self.head(torch.tanh(self.inp(x)) @ (self.weight + self.weight.t()))


@awkward(IMAGE, removable=4 + 5)  # a channel goes with its cheap copy, and both with the residual
def ghost_module():
    class Ghost(nn.Module):
        def __init__(self):
            super().__init__()
            self.primary, self.cheap = conv(8, 4, 1), conv(4, 4, groups=4)

        def forward(self, x):
            a = F.relu(self.primary(x))
            return x + torch.cat([a, F.relu(self.cheap(a))], dim=1)

    return sandwich(Ghost())


@awkward(IMAGE, removable=3 + 6 + 3 + 5)  # a third is convolved, the rest passes by
def partial_convolution():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(3, 3)

        def forward(self, x):
            a, rest = torch.split(x, [3, 6], dim=1)
            return torch.cat((self.conv(a), rest), 1)

    return sandwich(Partial(), 9)


@awkward(IMAGE, removable=3 + 3 + 5)  # column j of both halves; inside the branch
def shuffle_unit_with_split():
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(conv(3, 3, 1), conv(3, 3, groups=3), conv(3, 3, 1))

        def forward(self, x):
            a, b = x.chunk(2, dim=1)
            x = torch.cat((a, self.branch(b)), dim=1)
            b, c, h, w = x.size()
            return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, -1, h, w)

    return sandwich(Unit(), 6)


@awkward(IMAGE, removable=8 + 5)  # a grid made of the sizes samples the map
def sampled_at_a_grid():
    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = conv(8, 2)

        def forward(self, x):
            b, _, h, w = x.shape
            rows, columns = (
                torch.linspace(-1, 1, h, dtype=x.dtype),
                torch.linspace(-1, 1, w, dtype=x.dtype),
            )
            grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)
            grid = grid.expand(b, h, w, 2) + 0.1 * self.flow(x).permute(0, 2, 3, 1)
            return F.grid_sample(x, grid, align_corners=True)

    return sandwich(Sample())


@awkward(IMAGE, IMAGE, removable=8 + 6)  # all products of places: a volume of correlations
class CorrelationVolume(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.mix, self.head = conv(3, 8), conv(64, 6, 1), conv(6, 2)

    def forward(self, x, y):
        a, b = self.features(x).flatten(2), self.features(y).flatten(2)
        volume = (a.transpose(1, 2) @ b) / a.shape[1] ** 0.5
        volume = volume.view(x.shape[0], 64, x.shape[2], x.shape[3])
        return self.head(F.relu(self.mix(volume)))


@awkward((2, 3, 8, 8), removable=8 + 6)  # pieces by an order of the places, not of the channels
class MaskedTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        order = torch.arange(7).flip(0).expand(x.shape[0], -1)
        x = torch.gather(x, 1, order.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        return self.head(F.relu(self.mix(x)))


@awkward(IMAGE, removable=8 + 5)  # an index that permutes all channels, from a buffer
def channels_permuted_by_buffer():
    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("order", torch.tensor([5, 2, 7, 0, 3, 6, 1, 4]))

        def forward(self, x):
            return x[:, self.order]

    return sandwich(Permuted())


@awkward(IMAGE, removable=8 + 5)
def channels_permuted_by_index_select():
    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("order", torch.tensor([5, 2, 7, 0, 3, 6, 1, 4]))

        def forward(self, x):
            return x.index_select(1, self.order)

    return sandwich(Permuted())


@awkward(IMAGE, removable=8 + 5)  # a detour over lists, dictionaries and functions
def detours_of_values():
    def detour(x):
        held = {"a": [x, x.tanh()], "b": (x.sigmoid(),)}
        leaves = [held["a"][1], *held["b"]]
        while len(leaves) < 5:
            leaves.append(leaves[-1] * 0.5 + leaves.pop(0))
            if len(leaves) == 2 and leaves[0].shape == x.shape:
                break
        return torch.stack(leaves, -1).prod(-1)

    return sandwich(Apply(detour))
