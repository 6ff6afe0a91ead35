"""Parameters and buffers used in unusual ways."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from support.zoo.registry import IMAGE, awkward, conv, sandwich


class ScaleOffset(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.offset = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("gain", torch.rand(8) + 0.5)
        self.register_buffer("shift", torch.randn(8), persistent=False)

    def forward(self, x):
        x = x * self.scale * self.temperature + self.offset
        return x * self.gain.view(1, 8, 1, 1) - self.shift[None, :, None, None]


@awkward(IMAGE, removable=8 + 5)
def bare_scale_offset_and_buffers():
    return sandwich(ScaleOffset())


@awkward(IMAGE, removable=8)  # the image is normalised with buffers of its own 3 channels
class NormalisedInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.rand(3, 1, 1))
        self.register_buffer("std", torch.rand(1, 3, 1, 1) + 0.5)
        self.conv, self.head = conv(3, 8), conv(8, 2)

    def forward(self, x):
        return self.head(F.relu(self.conv((x - self.mean) / self.std)))


@awkward(IMAGE, removable=8 + 5)
def fixed_depthwise_kernel_buffer():
    class Sobel(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.randn(8, 1, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.kernel, padding=1, groups=x.shape[1])

    return sandwich(Sobel())


@awkward(IMAGE, removable=8 + 5)
def blur_pool_expanded_kernel():
    class Blur(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.rand(1, 1, 3, 3))

        def forward(self, x):
            kernel = self.kernel.expand(x.shape[1], -1, -1, -1)
            return F.conv2d(x, kernel, stride=2, groups=x.shape[1])

    return sandwich(Blur())


@awkward(IMAGE, removable=8 + 6 + 5)
def functional_convolution():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernels = nn.ParameterList([torch.randn(6, 8, 3, 3) * 0.1, torch.randn(6)])

        def forward(self, x):
            return F.conv2d(x, self.kernels[0], self.kernels[1])

    return sandwich(Functional(), 8, 6)


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        w = w / (w.view(w.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


@awkward(IMAGE, removable=8 + 6 + 5)  # statistics over the kept inputs
def weight_standardisation():
    return sandwich(StandardisedConv(8, 6, 3, padding=1), 8, 6)


class StandardisedByBatchNorm(nn.Conv2d):
    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias, 1, self.padding)


@awkward(IMAGE, removable=8 + 6 + 5)
def weight_standardisation_by_batch_norm():
    return sandwich(StandardisedByBatchNorm(8, 6, 3, padding=1), 8, 6)


@awkward(IMAGE, removable=8 + 6 + 5)
def weight_norm_parametrised():
    return sandwich(parametrizations.weight_norm(conv(8, 6)), 8, 6)


@awkward(IMAGE, removable=8 + 6 + 5)
def weight_norm_by_hook():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return sandwich(nn.utils.weight_norm(conv(8, 6)), 8, 6)


# The vector of the power iteration runs over inputs and kernel positions: whole inputs leave.
@awkward(IMAGE, removable=8 + 6 + 5)
def spectral_norm_parametrised():
    return sandwich(parametrizations.spectral_norm(conv(8, 6)), 8, 6)


@awkward(IMAGE, removable=8 + 6 + 5)
def own_parametrisation():
    class Squared(nn.Module):
        def forward(self, weight):
            return weight * weight.abs()

    layer = conv(8, 6)
    nn.utils.parametrize.register_parametrization(layer, "weight", Squared())
    return sandwich(layer, 8, 6)


@awkward((3, 6), removable=10)  # hidden widths are all the same 10
class TiedLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 10)
        self.out = nn.Linear(10, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(F.relu(self.inp(x)))))))


@awkward((3, 6), removable=10)
class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 10)
        self.offset = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return F.linear(torch.relu(self.encoder(x)), self.encoder.weight.t(), self.offset)


@awkward(IMAGE, removable=8 + 5)  # in and out of the shared layer are one
def layer_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm1, self.norm2 = conv(8, 8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x):
            x = F.relu(self.norm1(self.conv(x)))
            return F.relu(self.norm2(self.conv(x)))

    return sandwich(Twice())


@awkward(IMAGE, IMAGE, removable=7 + 5)  # one tower, two names, two inputs
class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(conv(3, 7), nn.BatchNorm2d(7), nn.ReLU(), conv(7, 5))
        self.alias = self.tower
        self.head = nn.Linear(5, 2)

    def forward(self, x, y):
        return self.head((self.tower(x) - self.alias(y)).abs().mean((2, 3)))


@awkward(IMAGE, removable=8 + 6)
def frozen_backbone():
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 2))
    for parameter in net[:3].parameters():
        parameter.requires_grad_(False)
    return net


@awkward(lambda: torch.randn(2, 3, 8, 8).half(), removable=8 + 6)
def half_precision():
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 2)
    ).half()


@awkward(lambda: torch.randn(2, 3, 8, 8).bfloat16(), removable=8 + 6)
def bfloat16_parameters():
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 2)
    ).bfloat16()


@awkward(
    lambda: torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last),
    removable=8 + 4 + 5,
)
def channels_last_memory():
    inner = nn.Sequential(nn.AdaptiveAvgPool2d(2), conv(8, 4, 1), nn.ReLU())
    return sandwich(inner, 8, 4).to(memory_format=torch.channels_last)


@awkward((2, 5), IMAGE, removable=None)  # kernels made by a network
class DynamicConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.make, self.head = conv(3, 6), nn.Linear(5, 4 * 6), conv(4, 2)

    def forward(self, z, x):
        kernels = self.make(z).mean(0).view(4, 6, 1, 1)
        return self.head(F.conv2d(F.relu(self.stem(x)), kernels))


@awkward(IMAGE, removable=None)  # anti-alias, distance to prototypes: sound, whatever it freezes
class Prototypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.prototypes = conv(3, 8), nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return -torch.cdist(torch.relu(self.conv(x)).mean((2, 3)), self.prototypes)
