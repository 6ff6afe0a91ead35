"""Every kind of convolution."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import IMAGE, awkward, conv, sandwich


@awkward((2, 3, 16), removable=8 + 6)
def conv1d():
    return nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3),
        nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(6, 4))  # fmt: skip


@awkward((2, 2, 4, 6, 6), removable=8 + 6)
def conv3d():
    return nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(8, 6, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 4))  # fmt: skip


@awkward((2, 5, 1, 1), removable=8 + 6)
def generator_of_transposed():
    return nn.Sequential(
        nn.ConvTranspose2d(5, 8, 4, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1), nn.Tanh())  # fmt: skip


@awkward((2, 5), removable=8 + 6)  # a norm takes its statistics over all that becomes a channel
def generator_of_shuffled_pixels():
    return nn.Sequential(
        nn.Linear(5, 8 * 9), nn.Unflatten(1, (8, 3, 3)), nn.BatchNorm2d(8), nn.ReLU(),
        conv(8, 6 * 4), nn.PixelShuffle(2), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 3))  # fmt: skip


@awkward((2, 3, 9), removable=8)
def transposed_1d():
    return nn.Sequential(
        nn.Conv1d(3, 8, 1), nn.ReLU(), nn.ConvTranspose1d(8, 2, 3, stride=2, output_padding=1)
    )


@awkward((1, 2, 3, 4, 4), removable=8)
def transposed_3d():
    return nn.Sequential(nn.Conv3d(2, 8, 1), nn.ReLU(), nn.ConvTranspose3d(8, 2, 2, stride=2))


@awkward(IMAGE, removable=8 + 6 + 5)
def dilated():
    return sandwich(conv(8, 6, dilation=2, padding=2), after=6)


# 8 -> 12 in 4 groups: whole groups would leave 4 units, equal columns leave 2 + 3.
@awkward(IMAGE, removable=2 + 3 + 5)
def grouped():
    return sandwich(conv(8, 12, groups=4), after=12)


@awkward(IMAGE, removable=4 + 5)  # 8 -> 8 in 4 groups: 2 + 2 columns
def grouped_tie():
    return sandwich(conv(8, 8, groups=4))


@awkward(IMAGE, removable=2 + 3 + 5)
def grouped_transposed():
    return sandwich(nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4), after=12)


@awkward(IMAGE, removable=8 + 5)
def depthwise():
    return sandwich(conv(8, 8, groups=8))


@awkward(IMAGE, removable=8 + 5)
def depthwise_transposed():
    return sandwich(nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8))


@awkward(IMAGE, removable=6 + 5)  # channel j and its two outputs go together
def depthwise_multiplier():
    return sandwich(conv(6, 12, groups=6), 6, 12)


@awkward(IMAGE, removable=6 + 5)
def depthwise_multiplier_transposed():
    return sandwich(nn.ConvTranspose2d(6, 12, 3, groups=6), 6, 12)


@awkward(IMAGE, removable=5)  # depthwise on the image: its outputs stay
def depthwise_on_the_image():
    return nn.Sequential(
        conv(3, 6, groups=3), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5), nn.ReLU(), conv(5, 2)
    )


# 8 -> 8 -> 8 in 2 groups each: rows 2 in all, columns 4 + 4 + 4 with whatever ties them.
@awkward(IMAGE, removable=4 + 4 + 4 + 5)
def grouped_twice():
    return sandwich(nn.Sequential(conv(8, 8, groups=2), nn.ReLU(), conv(8, 8, groups=2)))


@awkward(IMAGE, removable=8 + 3 + 3 + 5)  # a bottleneck of 6 in 2 groups: 3 columns on each side
def resnext_block():
    class ResNeXt(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(8, 6, 1), conv(6, 6, groups=2), conv(6, 8, 1)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x):
            return x + self.c(F.relu(self.norm(self.b(F.relu(self.a(x))))))

    return sandwich(ResNeXt())


@awkward(IMAGE, removable=8 + 6 + 5)
def padded_by_reflection():
    return sandwich(conv(8, 6, padding_mode="reflect"), after=6)


@awkward(IMAGE, removable=8 + 6 + 5)
def padded_circularly():
    return sandwich(conv(8, 6, padding_mode="circular"), after=6)


@awkward(IMAGE, removable=8 + 6 + 5)
def padded_same_by_name():
    return sandwich(conv(8, 6, 4, padding="same"), after=6)


@awkward(IMAGE, removable=7)  # a width of 1 has nothing to give
def widths_of_one_and_primes():
    return nn.Sequential(conv(3, 1), nn.ReLU(), conv(1, 7), nn.ReLU(), conv(7, 1), conv(1, 2))


@awkward(IMAGE, removable=8 + 6)  # unused is never run
class UnusedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.unused, self.b, self.head = conv(3, 8), conv(8, 4), conv(8, 6), conv(6, 2)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))
