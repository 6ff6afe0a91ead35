"""Places picked by an index, frequencies, complex numbers, shares of one."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import IMAGE, Apply, awkward, conv, sandwich
from support.zoo.streams import TOKENS, WIDTH, plain, stream


# An order of the tokens for each channel: indices and values go with the channel.
@awkward(TOKENS, removable=WIDTH)
def tokens_sorted_for_each_channel():
    return plain(Apply(lambda x: x.gather(1, x.argsort(1, descending=True)) * torch.tanh(x)))


@awkward(TOKENS, removable=WIDTH)  # the largest of each channel is doubled
def largest_scattered_back():
    def double(x):
        value, place = x.max(1, keepdim=True)
        return x.scatter(1, place, 2 * value)

    return stream(Apply(double))


@awkward(TOKENS, removable=WIDTH)  # an index per channel into the same channel of another tensor
def scattered_with_a_reduction():
    def reduce(x):
        index = (torch.arange(x.shape[1]) // 2).view(1, -1, 1).expand_as(x)
        return torch.zeros_like(x).scatter_reduce(1, index, x, "amax", include_self=False)

    return stream(Apply(reduce))


@awkward(TOKENS, removable=0)  # the index points at channels
def channels_gathered_by_rank():
    return stream(Apply(lambda x: x.gather(2, x.argsort(2))))


@awkward(TOKENS, removable=WIDTH)  # rows of the batch and tokens written by a list of places
def tokens_written_by_index():
    def write(x):
        y = torch.tanh(x).clone()
        y[torch.tensor([0, 1]), torch.tensor([3, 2])] = x[:, 0] * 2
        y[:, torch.tensor([1, 4])] = x[:, :2]
        return y.index_add(1, torch.tensor([0, 0]), x[:, 2:4])

    return stream(Apply(write))


@awkward(TOKENS, removable=WIDTH)  # a mask of places: the rows behind it hold all channels
def tokens_written_behind_a_mask():
    def write(x):
        mask = torch.arange(x.shape[1]) % 2 == 0
        y = x.clone()
        y[:, mask] = torch.tanh(x[:, mask])
        y[x > 1] = 0.5
        return y.masked_scatter(mask[None, :, None].expand_as(x), y[:, 1:4].flatten(0, 1))

    return stream(Apply(write))


@awkward(TOKENS, removable=WIDTH + 8)  # logarithms of shares, and of the sum that is shared out
def logarithms_of_shares():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

        def forward(self, x):
            y = self.up(x)
            return self.down(y.log_softmax(-1) + y.logsumexp(-1, keepdim=True))

    return stream(Shares())


# Learned tokens attend to each other and to the sequence: they are places, not channels.
@awkward(TOKENS, removable=WIDTH)
def tokens_that_are_learned():
    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents = nn.Parameter(torch.randn(1, 4, WIDTH))

        def forward(self, x):
            y = self.latents.expand(x.shape[0], -1, -1)
            y = (y @ x.mT * 0.3).softmax(-1) @ x + y
            y = (y @ y.mT * 0.3).softmax(-1) @ y
            return (x @ y.mT * 0.3).softmax(-1) @ y

    return stream(Latents())


@awkward(IMAGE, removable=8 + 5)  # patches overlap, are changed, and are summed again
def patches_folded_again():
    return sandwich(
        Apply(lambda x: F.fold(F.unfold(x, 3, padding=1).tanh(), x.shape[2:], 3, padding=1))
    )


@awkward(IMAGE, removable=8 + 5)  # magnitudes and angles of frequencies
def magnitudes_and_angles():
    def turn(x):
        f = torch.fft.rfft2(x)
        f = torch.polar(f.abs() + 0.1, f.angle()) + torch.complex(f.real.tanh(), f.imag)
        return torch.fft.irfft2(f.conj() * f, s=x.shape[2:]).roll(1, 2)

    return sandwich(Apply(turn))


# Kernels of one place: channels along the places pass. Between both, columns of the four groups.
@awkward(IMAGE, removable=8 + 16 + 5)
def convolution_over_rows_of_channels():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.grouped = nn.Conv1d(64, 64, 1), nn.Conv1d(64, 64, 1, groups=4)

        def forward(self, x):
            y = self.grouped(self.rows(x.flatten(2).transpose(1, 2)).relu())
            return y.transpose(1, 2).unflatten(2, x.shape[2:])

    return sandwich(Rows())


@awkward(IMAGE, removable=8 + 6 + 5)  # a flow for each sample: positions stay
def warped_by_a_flow():
    class Warped(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.flow = conv(8, 6), conv(6, 2)

        def forward(self, x):
            flow = self.flow(self.hidden(x).relu()).permute(0, 2, 3, 1).tanh()
            return F.grid_sample(x, flow, align_corners=False)

    return sandwich(Warped())
