"""Normalisation over channels in every spelling, and norms that other inputs steer."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import IMAGE, Apply, awkward, conv, sandwich
from support.zoo.streams import TOKENS, WIDTH, plain, stream

# Two layers around a norm: all channels, with statistics over the kept ones.
TOKEN_NORM = 8


class Scaled(nn.Module):
    """A function of the features and a weight."""

    def __init__(self, function, width=8, parts=1):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.rand(width) + 0.5 for _ in range(parts))

    def forward(self, x):
        return self.function(x, *self.weights)


@awkward(TOKENS, removable=TOKEN_NORM)
def rms_norm_layer():
    return plain(nn.RMSNorm(8, eps=1e-3), 8)


@awkward(TOKENS, removable=TOKEN_NORM)  # the eps depends on the dtype, so it must not be folded
def rms_norm_layer_of_default_eps():
    return plain(nn.RMSNorm(8), 8)


@awkward(TOKENS, removable=TOKEN_NORM)
def rms_norm_function_without_weight():
    return plain(Apply(lambda x: F.rms_norm(x, (x.shape[-1],), eps=1e-4)), 8)


@awkward(TOKENS, removable=TOKEN_NORM)
def rms_norm_by_rsqrt_of_mean_square():
    return plain(Scaled(lambda x, w: x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-3) * w), 8)


@awkward(TOKENS, removable=TOKEN_NORM)
def rms_norm_in_float32():
    def norm(x, w):
        y = x.float() if x.dtype == torch.float16 else x
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-3)
        return w * y.to(x.dtype)

    return plain(Scaled(norm), 8)


@awkward(TOKENS, removable=TOKEN_NORM)  # Gemma: the weight is an offset of one
def rms_norm_with_one_plus_weight():
    def norm(x, w):
        return (x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-3)) * (1.0 + w)

    return plain(Scaled(norm), 8)


@awkward(TOKENS, removable=TOKEN_NORM)  # the number of channels comes from the shape
def rms_norm_by_norm_and_shape():
    def norm(x, w):
        return w * x / (x.norm(2, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-4)

    return plain(Scaled(norm), 8)


@awkward(TOKENS, removable=TOKEN_NORM)  # the number of channels is an attribute
def rms_norm_by_normalize_and_attribute():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.gain = 8**0.5, nn.Parameter(torch.rand(8) + 0.5)

        def forward(self, x):
            return F.normalize(x, dim=-1) * self.scale * self.gain

    return plain(Norm(), 8)


@awkward(TOKENS, removable=TOKEN_NORM)
def rms_norm_by_sum_over_size():
    def norm(x, w):
        return x * (x.square().sum(-1, keepdim=True) / x.size(-1) + 1e-3).rsqrt() * w

    return plain(Scaled(norm), 8)


@awkward(TOKENS, removable=TOKEN_NORM)
def rms_norm_by_einsum_and_power():
    def norm(x, w):
        return x * (torch.einsum("bnd,bnd->bn", x, x) / x.shape[-1] + 1e-3).pow(-0.5)[..., None] * w

    return plain(Scaled(norm), 8)


@awkward(IMAGE, removable=8 + 5)
def rms_norm_over_channels_of_a_map():
    return sandwich(
        Scaled(lambda x, w: F.normalize(x, dim=1) * w.view(1, -1, 1, 1) * (x.shape[1] ** 0.5))
    )


@awkward(IMAGE, removable=8 + 5)
def pixel_norm():
    return sandwich(Apply(lambda x: x / (x.pow(2).mean(dim=1, keepdim=True) + 1e-4).sqrt()))


@awkward(TOKENS, removable=WIDTH + 16)  # a stream under three norms, one of them the last
def rms_norm_in_a_residual_stream():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.last = nn.Linear(12, 16), nn.Linear(16, 12), nn.RMSNorm(12)

        def forward(self, x):
            return self.last(x + self.down(F.silu(self.up(x))))

    return stream(Block(), norm=nn.RMSNorm(12))


@awkward(TOKENS, removable=TOKEN_NORM)  # a single learned number
def scale_norm():
    class ScaleNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.g = nn.Parameter(torch.tensor(1.7))

        def forward(self, x):
            return self.g * x / torch.linalg.norm(x, dim=-1, keepdim=True).clamp(min=1e-3)

    return plain(ScaleNorm(), 8)


@awkward(TOKENS, removable=TOKEN_NORM)
def layer_norm_by_mean_and_variance():
    def norm(x, w, b):
        mean = x.mean(-1, keepdim=True)
        return w * (x - mean) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-3) + b

    return plain(Scaled(norm, parts=2), 8)


@awkward(TOKENS, removable=TOKEN_NORM)
def layer_norm_by_standard_deviation():
    def norm(x, w, b):
        return w * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3) + b

    return plain(Scaled(norm, parts=2), 8)


@awkward(TOKENS, removable=TOKEN_NORM)
def layer_norm_by_mean_of_squares():
    def norm(x, w, b):
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * w + b

    return plain(Scaled(norm, parts=2), 8)


@awkward(TOKENS, removable=TOKEN_NORM)
def layer_norm_by_var_mean():
    def norm(x, w, b):
        var, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        return torch.addcmul(b, (x - mean) * (var + 1e-3).rsqrt(), w)

    return plain(Scaled(norm, parts=2), 8)


@awkward(IMAGE, removable=8 + 5)  # ConvNeXt's own
def layer_norm_channels_first():
    def norm(x, w, b):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-3)
        return w[:, None, None] * x + b[:, None, None]

    return sandwich(Scaled(norm, parts=2))


@awkward(IMAGE, removable=4 + 5)  # 4 groups of 3: whole groups leave 4, columns 3
def group_norm_by_views():
    def norm(x, w, b):
        n, c, h, w_ = x.shape
        y = x.view(n, 4, -1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 1e-3).sqrt()
        return y.view(n, c, h, w_) * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)

    return sandwich(Scaled(norm, 12, 2), 12)


@awkward(IMAGE, removable=8 + 5)  # statistics over places, by hand
def instance_norm_by_mean_and_variance():
    def norm(x):
        return (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-3)

    return sandwich(Apply(norm))


@awkward(IMAGE, removable=8 + 5)  # a norm of places, then shares of the channels
def global_response_norm():
    def norm(x, gamma, beta):
        x = x.permute(0, 2, 3, 1)
        g = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        share = g / (g.mean(dim=-1, keepdim=True) + 1e-3)
        return (gamma * (x * share) + beta + x).permute(0, 3, 1, 2)

    return sandwich(Scaled(norm, parts=2))


@awkward(IMAGE, removable=8 + 5)
def filter_response_norm():
    def norm(x, gamma, beta, tau):
        x = x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + 1e-3)
        return torch.maximum(x * gamma[:, None, None] + beta[:, None, None], tau[:, None, None])

    return sandwich(Scaled(norm, parts=3))


class Steered(nn.Module):
    """A norm whose scale and offset come from a second input."""

    def __init__(self, norm, spread):
        super().__init__()
        self.stem, self.norm, self.spread = conv(3, 8), norm, spread
        self.scale, self.head = nn.Linear(5, 16), conv(8, 2)

    def forward(self, x, z):
        gamma, beta = self.spread(self.scale(z))
        x = self.norm(self.stem(x)) * (1 + gamma[..., None, None]) + beta[..., None, None]
        return self.head(F.relu(x))


@awkward(IMAGE, (2, 5), removable=8)  # column j of both halves of the scale
def instance_norm_steered_by_halves():
    return Steered(nn.InstanceNorm2d(8), lambda s: s.chunk(2, dim=1))


@awkward(IMAGE, (2, 5), removable=8)  # pairs of scale and offset, side by side
def batch_norm_steered_by_pairs():
    return Steered(nn.BatchNorm2d(8, affine=False), lambda s: s.view(-1, 8, 2).unbind(2))


@awkward(IMAGE, (2, 5), removable=8)
def group_norm_steered_by_views():
    return Steered(nn.GroupNorm(1, 8), lambda s: s.view(-1, 2, 8).unbind(1))


@awkward(lambda: (torch.randn(IMAGE), torch.tensor([3, 0])), removable=8)
class ConditionalBatchNorm(nn.Module):  # a row of scales for each class
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = conv(3, 8), nn.BatchNorm2d(8, affine=False), conv(8, 2)
        self.table = nn.Embedding(4, 16)

    def forward(self, x, label):
        gamma, beta = self.table(label).chunk(2, 1)
        x = self.norm(self.stem(x))
        return self.head(F.relu(gamma.view(-1, 8, 1, 1) * x + beta.view(-1, 8, 1, 1)))


@awkward(IMAGE, IMAGE, removable=8 + 8)  # moments of one map for the other: its own channels
def adaptive_instance_norm():
    class Adaptive(nn.Module):
        def __init__(self):
            super().__init__()
            self.content, self.style = conv(3, 8), nn.Sequential(conv(3, 8), nn.ReLU())
            self.mix, self.head = conv(8, 8), conv(8, 2)

        def forward(self, x, y):
            x, y = self.content(x), self.style(y)
            x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-2)
            x = x * y.std((2, 3), keepdim=True) + y.mean((2, 3), keepdim=True)
            return self.head(torch.relu(self.mix(x)))

    return Adaptive()


@awkward(TOKENS, removable=TOKEN_NORM)  # shares of one: over the kept channels
def softmax_over_features():
    return plain(nn.Softmax(dim=-1), 8)


@awkward(TOKENS, removable=TOKEN_NORM)
def softmax_by_exponentials():
    def share(x):
        y = torch.exp(x - 1)
        return y / y.sum(-1, keepdim=True)

    return plain(Apply(share), 8)


@awkward(TOKENS, removable=TOKEN_NORM)  # standardised by batch statistics, over tokens
def batch_norm_of_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            return self.norm(x.transpose(1, 2)).transpose(1, 2)

    return plain(Tokens(), 8)
