"""Weights that are computed: factors, kernels made by networks, mixtures of kernels."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import IMAGE, Apply, awkward, conv, sandwich
from support.zoo.streams import TOKENS, WIDTH, plain, varied

KERNELS = 3


class Factors(nn.Module):
    """A linear layer whose weight is a product."""

    def __init__(self, rank=3):
        super().__init__()
        self.a, self.b = (
            nn.Parameter(torch.randn(8, rank)), nn.Parameter(torch.randn(rank, WIDTH)))  # fmt: skip

    def forward(self, x):
        return F.linear(x, self.a @ self.b)


# The rank, inputs and outputs of the product.
@awkward(TOKENS, removable=WIDTH + 8 + 3)
def low_rank_weight():
    return plain(Factors(), WIDTH, 8)


@awkward(TOKENS, removable=WIDTH + 8 + 3)  # a weight with a low-rank addition
def low_rank_update_of_a_weight():
    class Update(Factors):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, WIDTH))

        def forward(self, x):
            return F.linear(x, self.weight + self.a @ self.b * 0.5)

    return plain(Update(), WIDTH, 8)


@awkward(TOKENS, removable=WIDTH + 8 + 3)  # LoRA as layers of their own
def low_rank_branch_beside_a_layer():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(WIDTH, 8)
            self.down, self.up = nn.Linear(WIDTH, 3, bias=False), nn.Linear(3, 8, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x)) * 2.0

    return plain(Branch(), WIDTH, 8)


@awkward(IMAGE, removable=8 + 6 + 3 + 5)  # kernels by einsum of three factors
def convolution_of_factors():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.inp = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3, 8))
            self.space = nn.Parameter(torch.randn(3, 3, 3) * 0.2)

        def forward(self, x):
            weight = torch.einsum("or,ri,rhw->oihw", self.out, self.inp, self.space)
            return F.conv2d(x, weight, padding=1)

    return sandwich(Product(), 8, 6)


@awkward(IMAGE, removable=8 + 6 + 5)
def convolution_with_masked_weight():
    class Masked(nn.Conv2d):
        def __init__(self):
            super().__init__(8, 6, 3, padding=1)
            self.register_buffer("mask", (torch.rand(6, 8, 3, 3) > 0.4).float())

        def forward(self, x):
            return self._conv_forward(x, self.weight * self.mask, self.bias)

    return sandwich(Masked(), 8, 6)


@awkward(IMAGE, removable=8 + 6 + 5)  # positions after the middle are masked, not channels
def convolution_masked_by_position():
    class Causal(nn.Conv2d):
        def __init__(self):
            super().__init__(8, 6, 3, padding=1)
            mask = torch.ones(1, 1, 3, 3)
            mask[..., 1, 2:] = mask[..., 2, :] = 0
            self.register_buffer("mask", mask)

        def forward(self, x):
            return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)

    return sandwich(Causal(), 8, 6)


@awkward(IMAGE, removable=8 + 6 + 5)  # equal rates of learning: a scale of the fan-in's size
def convolution_with_scaled_weight():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = (
                nn.Parameter(torch.randn(6, 8, 3, 3)),
                nn.Parameter(torch.zeros(6)),
            )
            self.scale = (2 / self.weight[0].numel()) ** 0.5

        def forward(self, x):
            return F.conv2d(x, self.weight * self.scale, self.bias, padding=1)

    return sandwich(varied(Scaled()), 8, 6)


# Cosines of features and rows: both norms are over the kept channels. The classes are outputs.
@awkward(TOKENS, removable=WIDTH)
def cosine_classifier():
    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.weight = nn.Linear(6, WIDTH), nn.Parameter(torch.randn(4, WIDTH))

        def forward(self, x):
            return F.linear(F.normalize(self.inp(x), dim=-1), F.normalize(self.weight, dim=-1)) * 9

    return Cosine()


class Mixture(nn.Module):
    """Kernels are a mixture that the sample decides on; every sample is a group."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, KERNELS)
        )
        self.kernels = nn.Parameter(torch.randn(KERNELS, 6, 8, 3, 3) * 0.2)
        self.biases = nn.Parameter(torch.randn(KERNELS, 6))
        self.out_planes = 6


# Inputs, outputs, the four channels that decide; the kernels that are mixed stay.
MIXTURE = 8 + 4 + 6 + 5


@awkward(IMAGE, removable=MIXTURE)
def mixture_of_kernels_in_groups():  # CondConv, dynamic convolution
    class Grouped(Mixture):
        def forward(self, x):
            b, c, h, w = x.shape
            weights = self.inner(x).softmax(1)
            kernels = torch.mm(weights, self.kernels.view(KERNELS, -1)).view(-1, c, 3, 3)
            biases = torch.mm(weights, self.biases).view(-1)
            x = F.conv2d(x.reshape(1, -1, h, w), kernels, biases, padding=1, groups=b)
            return x.view(b, self.out_planes, x.size(-2), x.size(-1))

    return sandwich(Grouped(), 8, 6)


@awkward(IMAGE, removable=MIXTURE)
def mixture_of_kernels_of_the_batch():
    class Mean(Mixture):
        def forward(self, x):
            weights = self.inner(x).softmax(1).mean(0)
            kernel = (weights.view(-1, 1, 1, 1, 1) * self.kernels).sum(0)
            return F.conv2d(x, kernel, weights @ self.biases, padding=1)

    return sandwich(Mean(), 8, 6)


@awkward(IMAGE, removable=MIXTURE)
def mixture_of_convolutions():
    class Outputs(Mixture):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(conv(8, 6) for _ in range(KERNELS))
            del self.kernels, self.biases

        def forward(self, x):
            weights = self.inner(x).softmax(1)
            outs = torch.stack([layer(x) for layer in self.convs], dim=1)
            return torch.einsum("bechw,be->bchw", outs, weights)

    return sandwich(Outputs(), 8, 6)


# The rows of the layer that makes the kernels are pairs of an output and an input channel. A pair
# would leave with either of the two; as ties go, those of one side leave and the other 6 stay.
@awkward((2, 5), IMAGE, removable=4)
class KernelsFromANetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.make, self.head = conv(3, 6), nn.Linear(5, 4 * 6), conv(4, 2)

    def forward(self, z, x):
        kernels = self.make(z).mean(0).view(4, 6, 1, 1)
        return self.head(F.relu(F.conv2d(F.relu(self.stem(x)), kernels)))


# One depthwise kernel per sample and channel.
@awkward(IMAGE, removable=8 + 5)
def depthwise_kernels_from_the_image():
    class Depthwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.make = conv(8, 8, 1)

        def forward(self, x):
            b, c, h, w = x.shape
            kernels = self.make(F.adaptive_avg_pool2d(x, 3)).reshape(b * c, 1, 3, 3)
            y = F.conv2d(x.reshape(1, b * c, h, w), kernels, padding=1, groups=b * c)
            return y.view(b, c, h, w)

    return sandwich(Depthwise())


# Involution: kernels for each place, shared by the channels of two groups.
@awkward(IMAGE, removable=8 + 3 + 5)
def involution():
    class Involution(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.span = conv(8, 3, 1), conv(3, 9, 1)

        def forward(self, x):
            b, c, h, w = x.shape
            kernels = self.span(F.relu(self.down(x))).view(b, 1, 9, h, w)
            patches = F.unfold(x, 3, padding=1).view(b, c, 9, h, w)
            return (kernels * patches).sum(2)

    return sandwich(Involution())


# Every pair of a channel of one branch and one of the other is an input of the classifier: those of
# the first branch leave, each with its row of pairs; the 5 of the other stay.
@awkward(IMAGE, removable=6)
class OuterProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(3, 5), nn.Linear(30, 4)

    def forward(self, x):
        a, b = F.relu(self.a(x)).flatten(2), F.relu(self.b(x)).flatten(2)
        return self.head((a @ b.transpose(1, 2)).flatten(1))


@awkward((3, 6), removable=5)  # products of two modes, by einsum and reshape: the 7 stay
class TensorFusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(6, 7), nn.Linear(35, 4)

    def forward(self, x):
        a, b = torch.tanh(self.a(x)), torch.tanh(self.b(x))
        return self.head(torch.einsum("bi,bj->bij", a, b).reshape(x.shape[0], -1))


# The scale of the weight is a sum over all of it: the kept ones alone decide then.
@awkward(IMAGE, removable=8 + 6 + 5)
def weight_centred_by_its_mean():
    class Centred(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean(dim=[1, 2, 3], keepdim=True)
            return self._conv_forward(x, weight, self.bias)

    return sandwich(Centred(8, 6, 3, padding=1), 8, 6)


# Two branches of kernels are added before the convolution: re-parametrisation.
@awkward(IMAGE, removable=8 + 6 + 5)
def kernels_of_two_sizes_added():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.small = conv(8, 6, 3), conv(8, 6, 1)

        def forward(self, x):
            kernel = self.large.weight + F.pad(self.small.weight, [1, 1, 1, 1])
            return F.conv2d(x, kernel, self.large.bias + self.small.bias, padding=1)

    return sandwich(Added(), 8, 6)


@awkward(IMAGE, removable=8 + 5)  # a straight-through estimate: rounded forward, plain backward
def rounded_activations():
    def rounded(x):
        return x + ((x * 4).round() / 4 - x).detach()

    return sandwich(Apply(rounded))
