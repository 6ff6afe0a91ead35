"""Reshapes, slices, splits, shuffles, padding: channels move."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import IMAGE, Apply, awkward, conv, sandwich


@awkward(IMAGE, removable=4 + 5)  # the four sources of an output channel go together
def pixel_shuffle():
    return sandwich(nn.PixelShuffle(2), 16, 4)


@awkward(IMAGE, removable=4 + 5)
def pixel_unshuffle():
    return sandwich(nn.PixelUnshuffle(2), 4, 16)


@awkward(IMAGE, removable=4 + 5)
def focus_layer():
    def focus(x):
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return torch.cat(parts, 1)

    return sandwich(Apply(focus), 4, 16)


def shuffled(x):
    b, c, h, w = x.shape
    return x.view(b, 3, c // 3, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


@awkward(IMAGE, removable=4 + 5)  # 3 groups of 4 columns
def channel_shuffle_by_view():
    return sandwich(Apply(shuffled), 12)


@awkward(IMAGE, removable=4 + 5)
def channel_shuffle_layer():
    return sandwich(nn.ChannelShuffle(3), 12)


class C2f(nn.Module):
    def __init__(self):
        super().__init__()
        self.cv1, self.cv2 = conv(8, 12, 1), conv(24, 7, 1)
        self.m = nn.ModuleList(nn.Sequential(conv(6, 4), nn.SiLU(), conv(4, 6)) for _ in range(2))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        for m in self.m:
            y.append(y[-1] + m(y[-1]))
        return self.cv2(torch.cat(y, 1))


# stem 8; column j of both halves with both residuals 6; inner 4 + 4; cv2 7; last 5
@awkward(IMAGE, removable=8 + 6 + 4 + 4 + 7 + 5)
def c2f_with_reuse():
    return sandwich(C2f(), after=7)


class SplitSizes(nn.Module):
    def __init__(self, literal):
        super().__init__()
        self.sizes, self.literal = [5, 7], literal
        self.conv, self.a, self.b = conv(8, 12), conv(5, 6), conv(7, 6)

    def forward(self, x):
        a, b = torch.split(self.conv(x), [5, 7] if self.literal else self.sizes, dim=1)
        return self.a(a) * self.b(b)


@awkward(IMAGE, removable=8 + 12 + 6 + 5)
def split_into_attribute_sizes():
    return sandwich(SplitSizes(False), after=6)


@awkward(IMAGE, removable=8 + 12 + 6 + 5)
def split_into_literal_sizes():
    return sandwich(SplitSizes(True), after=6)


@awkward(IMAGE, removable=8 + 12 + 4 + 5)  # slices tie nothing by themselves
def overlapping_slices():
    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b, self.c = conv(8, 12), conv(5, 4), conv(7, 4), conv(6, 4)

        def forward(self, x):
            x = self.conv(x)
            return self.a(x[:, :5]) + self.b(x[:, 5:]) - self.c(x[:, 3:-3])

    return sandwich(Slices(), after=4)


@awkward(IMAGE, removable=4 + 5)  # pairs leave whole
def strided_slice_of_channels():
    return sandwich(Apply(lambda x: x[:, ::2]), 8, 4)


@awkward(IMAGE, removable=5)
def rolled_channels():
    return sandwich(Apply(lambda x: x.roll(3, 1)))


@awkward(IMAGE, removable=8 + 5)  # the reverse of what is kept is what is kept of the reverse
def flipped_channels():
    return sandwich(Apply(lambda x: x.flip(1)))


@awkward(IMAGE, removable=5)
def channels_picked_by_list():
    return sandwich(Apply(lambda x: x[:, [6, 1, 3]]), 8, 3)


@awkward(IMAGE, removable=6 + 5)
def repeated_channels():
    return sandwich(Apply(lambda x: x.repeat(1, 2, 1, 1)), 6, 12)


@awkward(IMAGE, removable=6 + 5)
def interleaved_channels():
    return sandwich(Apply(lambda x: x.repeat_interleave(2, 1)), 6, 12)


@awkward(IMAGE, removable=8 + 5)
def expanded_pool():
    return sandwich(Apply(lambda x: x - x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8)))


@awkward(IMAGE, removable=4 + 5)  # 3 x 4, summed over the 3
def unflattened_and_summed():
    return sandwich(Apply(lambda x: x.unflatten(1, (3, 4)).sum(1)), 12, 4)


@awkward(IMAGE, removable=4 + 5)
def maxout():
    return sandwich(Apply(lambda x: x.view(x.shape[0], 4, 3, 8, -1).amax(2)), 12, 4)


@awkward(IMAGE, removable=8 + 5)
def padded_spatially():
    return sandwich(Apply(lambda x: F.pad(x, (1, 2, 0, 1), value=0.5)))


@awkward(IMAGE, removable=8 + 3 + 5)  # what reads the three constant channels is free as well
def padded_channels():
    return sandwich(Apply(lambda x: F.pad(x, (0, 0, 0, 0, 1, 2))), 8, 11)


@awkward(IMAGE, removable=6 + 2 + 5)  # the two cropped channels are free to go, too
def cropped_channels_by_negative_pad():
    return sandwich(Apply(lambda x: F.pad(x, (0, 0, 0, 0, -1, -1))), 8, 6)


@awkward(IMAGE, removable=8 + 4 + 5)  # so is what reads the zeros
def zeros_concatenated():
    def widen(x):
        b, _, h, w = x.shape
        return torch.cat([x, x.new_zeros(b, 4, h, w)], 1)

    return sandwich(Apply(widen), 8, 12)


@awkward(IMAGE, removable=8 + 4 + 5)
def zeros_concatenated_by_factory():
    def widen(x):
        b, _, h, w = x.shape
        return torch.cat([x, torch.zeros(b, 4, h, w, dtype=x.dtype)], 1)

    return sandwich(Apply(widen), 8, 12)


class Filled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(8, 6), conv(8, 4)
        self.sizes = [6, 4]

    def forward(self, x):
        first, second = self.sizes
        out = torch.zeros(x.shape[0], first + second, *x.shape[2:], dtype=x.dtype)
        out[:, :first] = self.a(x)
        out[:, first:] = self.b(x)
        return out


@awkward(IMAGE, removable=8 + 6 + 4 + 5)
def filled_slice_by_slice():
    return sandwich(Filled(), after=10)


class FilledLiterally(Filled):
    def forward(self, x):
        out = torch.zeros(x.shape[0], 10, *x.shape[2:], dtype=x.dtype)
        out[:, :6] = self.a(x)
        out[:, 6:] = self.b(x)
        return out


@awkward(IMAGE, removable=8 + 6 + 4 + 5)
def filled_slice_by_slice_literally():
    return sandwich(FilledLiterally(), after=10)


@awkward(IMAGE, removable=8 + 5)
def coordinates_concatenated():
    def coordinates(x):
        rows = torch.linspace(-1, 1, x.shape[2], dtype=x.dtype).view(1, 1, -1, 1)
        return torch.cat([x, rows.expand(x.shape[0], 1, x.shape[2], x.shape[3])], 1)

    return sandwich(Apply(coordinates), 8, 9)


@awkward(IMAGE, removable=8 + 5)
def folded_windows():
    def windows(x):
        b, c, h, w = x.shape
        y = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        y = torch.tanh(y).view(b, h // 2, w // 2, 2, 2, c)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)

    return sandwich(Apply(windows))


@awkward(IMAGE, removable=8 + 6 + 5)
def unfolded_patches():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fold = nn.Linear(8 * 4, 6)

        def forward(self, x):
            y = self.fold(F.unfold(x, 2, stride=2).transpose(1, 2))
            return y.transpose(1, 2).unflatten(-1, (x.shape[2] // 2, -1))

    return nn.Sequential(conv(3, 8), nn.ReLU(), Patches(), nn.ReLU(), conv(6, 5), conv(5, 2))


@awkward(IMAGE, removable=8 + 10 + 5)
def einsum_mix():
    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.randn(10, 8))

        def forward(self, x):
            return torch.einsum("bchw,dc->bdhw", x, self.mix)

    return sandwich(Mix(), 8, 10)


@awkward(IMAGE, removable=8 + 5)
def einsum_gate():
    return sandwich(Apply(lambda x: x * torch.einsum("bchw,bc->bhw", x, x.mean((2, 3)))[:, None]))


@awkward(IMAGE, removable=None)  # every pair of channels is an input of the classifier
class BilinearPooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(3, 5), nn.Linear(30, 4)

    def forward(self, x):
        a, b = self.a(x).flatten(2), self.b(x).flatten(2)
        return self.head(torch.bmm(a, b.transpose(1, 2)).flatten(1))


class Blocks(nn.Module):
    """Channels as (blocks, width), of which a weight reads the blocks; the width is the output."""

    def __init__(self, read):
        super().__init__()
        self.wide, self.blocks, self.read = nn.Linear(6, 12), nn.Linear(4, 5), read

    def forward(self, x):
        y = self.wide(x).sigmoid().reshape(x.shape[0], -1, 3)
        return self.read(y, self.blocks.weight) + self.blocks.bias[:, None]


@awkward((2, 6), removable=4)
def blocks_that_a_linear_layer_reads():
    return Blocks(lambda y, weight: F.linear(y.transpose(1, 2), weight).transpose(1, 2))


@awkward((2, 6), removable=4)
def blocks_that_a_matrix_reads():
    return Blocks(lambda y, weight: weight @ y)


@awkward((2, 6), removable=4)
def blocks_that_an_einsum_reads():
    return Blocks(lambda y, weight: torch.einsum("bkw,ok->bow", y, weight))


@awkward((2, 6), removable=4)
def blocks_that_a_convolution_reads():
    return Blocks(lambda y, weight: F.conv1d(y, weight[..., None]))


@awkward((3, 6, 4), removable=10)
class FlattenedPositions(nn.Module):
    """A head over all patches, whose embedding of places stays (PatchTST)."""

    def __init__(self):
        super().__init__()
        self.inp, self.mid = nn.Linear(4, 10), nn.Linear(10, 10)
        self.places, self.head = nn.Parameter(torch.randn(1, 6, 10)), nn.Linear(6 * 10, 3)

    def forward(self, x):
        x = self.inp(x) + self.places[:, : x.shape[1]]
        return self.head((x + self.mid(x).relu()).flatten(1))


@awkward((3, 6, 4), removable=8 + 4)
class PlacesBesideChannels(nn.Module):
    """Each place has channels of its own, the same for all inputs (TabTransformer)."""

    def __init__(self):
        super().__init__()
        self.inp, self.head = nn.Linear(4, 8), nn.Linear(6 * 12, 3)
        self.shared, self.norm = nn.Parameter(torch.randn(6, 4)), nn.LayerNorm(12)

    def forward(self, x):
        shared = self.shared.expand(len(x), -1, -1)
        return self.head(self.norm(torch.cat([self.inp(x), shared], -1)).flatten(1))
