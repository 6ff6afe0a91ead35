"""Norms, activations, pooling, embeddings and other layers with channels of their own."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import IMAGE, Apply, awkward, conv, sandwich


@awkward(IMAGE, removable=8 + 5)
def prelu_per_channel():
    return sandwich(nn.PReLU(8))


@awkward(IMAGE, removable=8 + 5)
def prelu_of_one():
    return sandwich(nn.PReLU())


@awkward(IMAGE, removable=8 + 5)
def instance_norm_plain():
    return sandwich(nn.InstanceNorm2d(8))


@awkward(IMAGE, removable=8 + 5)
def instance_norm_affine_tracking():
    return sandwich(nn.InstanceNorm2d(8, affine=True, track_running_stats=True))


@awkward(IMAGE, removable=3 + 5)  # 2 groups of 3 columns leave more than 2 whole groups
def group_norm_columns():
    return sandwich(nn.GroupNorm(2, 6), 6)


@awkward(IMAGE, removable=4 + 5)  # 4 whole groups leave more than 3 columns: exact
def group_norm_whole_groups():
    return sandwich(nn.GroupNorm(4, 12), 12)


@awkward(IMAGE, removable=8 + 5)
def group_norm_of_one_group():
    return sandwich(nn.GroupNorm(1, 8))


@awkward(IMAGE, removable=8 + 5)
def group_norm_per_channel():
    return sandwich(nn.GroupNorm(8, 8))


@awkward(IMAGE, removable=8 + 5)
def batch_norm_without_statistics():
    return sandwich(nn.BatchNorm2d(8, affine=False, track_running_stats=False))


@awkward(IMAGE, removable=8 + 5)
def batch_norm_of_cumulative_average():
    return sandwich(nn.BatchNorm2d(8, momentum=None))


@awkward(IMAGE, removable=8 + 5)
def layer_norm_channels_last():
    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return sandwich(Permuted())


@awkward(IMAGE, removable=8 + 5)
def layer_norm_over_the_whole_map():
    return sandwich(nn.LayerNorm([8, 8, 8]))


@awkward(IMAGE, removable=8 + 5)
def layer_norm_without_affine():
    return sandwich(Apply(lambda x: F.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1)))


@awkward(IMAGE, removable=5)  # neighbouring channels are averaged: they stay
def local_response_norm():
    return sandwich(nn.LocalResponseNorm(3))


@awkward(IMAGE, removable=8 + 5)  # a norm over channels: over the kept ones
def normalised_features():
    return sandwich(Apply(lambda x: F.normalize(x, dim=1)))


@awkward(IMAGE, removable=8 + 5)  # a softmax over channels shares out one unit among the kept
def softmax_over_channels():
    return sandwich(nn.Softmax2d())


@awkward(IMAGE, removable=8 + 5)
def mean_over_channels():
    return sandwich(Apply(lambda x: x * torch.sigmoid(x.mean(1, keepdim=True))))


@awkward(IMAGE, removable=8 + 5)
def sum_over_channels_after_sigmoid():
    return sandwich(Apply(lambda x: x * torch.sigmoid(x).sum(1, keepdim=True)))


@awkward(IMAGE, removable=8 + 5)  # the largest of the kept ones
def maximum_over_channels():
    return sandwich(Apply(lambda x: x * torch.sigmoid(x.max(1, keepdim=True)[0])))


@awkward(IMAGE, removable=5)  # neighbouring channels are convolved
def efficient_channel_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

        def forward(self, x):
            y = self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
            return x * torch.sigmoid(y)[:, :, None, None]

    return sandwich(Attention())


@awkward(IMAGE, removable=8 + 5)
def activations():
    kinds = (nn.Hardswish, nn.SiLU, nn.GELU, nn.Mish, nn.Softplus, nn.Hardsigmoid, nn.ELU, nn.CELU,
             nn.SELU, nn.Hardtanh, nn.LeakyReLU, nn.Softsign, nn.LogSigmoid)  # fmt: skip
    return sandwich(nn.Sequential(*(kind() for kind in kinds)))


@awkward(IMAGE, removable=8 + 5)
def activations_in_place():
    kinds = (nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Mish, nn.ELU, nn.LeakyReLU, nn.Hardtanh)
    layers = [layer for kind in kinds for layer in (nn.AvgPool2d(1), kind(inplace=True))]
    return sandwich(nn.Sequential(*layers, nn.AvgPool2d(1), nn.Threshold(0.01, 0.3, inplace=True)))


@awkward(IMAGE, removable=8 + 5)
def poolings():
    return sandwich(nn.Sequential(
        nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1), nn.LPPool2d(2, 2, 1), nn.AdaptiveMaxPool2d(4),
        nn.Upsample(scale_factor=2), nn.UpsamplingBilinear2d(scale_factor=2),
        nn.AdaptiveAvgPool2d((4, 3))))  # fmt: skip


@awkward(IMAGE, removable=8 + 5)
def dropouts():
    return sandwich(nn.Sequential(nn.Dropout(0.4), nn.Dropout2d(0.4), nn.AlphaDropout(0.2)))


@awkward(IMAGE, removable=8 + 5)
def segnet_unpooling():
    class Unpool(nn.Module):
        def forward(self, x):
            y, where = F.max_pool2d(x, 2, return_indices=True)
            return F.max_unpool2d(torch.tanh(y), where, 2)

    return sandwich(Unpool())


def _tokens():
    return (torch.arange(20).reshape(2, 10) * 7 % 11,)


@awkward(_tokens, removable=8 + 6)  # the rows of the table stay
class EmbeddingClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(11, 8, padding_idx=0), nn.Conv1d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, tokens):
        return self.head(F.relu(self.conv(self.table(tokens).transpose(1, 2))).amax(-1))


@awkward(_tokens, removable=8 + 12)  # the table is also the classifier; 12 hidden
class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        return self.out(self.norm(x + self.down(F.gelu(self.up(x)))))


@awkward(_tokens, removable=8)
class EmbeddingBagClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(11, 8, mode="sum"), nn.Linear(8, 4)

    def forward(self, tokens):
        return self.head(torch.relu(self.table(tokens)))


@awkward((2, 10, 6), removable=12 + 4)  # the stream of 12, and 4 whole heads
class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.width = 4, 3
        self.inp, self.out, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        x = self.inp(x)
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, self.heads, self.width).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        y = ((q @ k.transpose(-2, -1)) / 3**0.5).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(b, n, -1)
        return self.head((x + self.out(y)).mean(1))


@awkward(IMAGE, removable=None)  # recurrent layers: sound, whatever they freeze
class ConvGRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.rnn, self.head = conv(3, 6), nn.GRU(6, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x):
        out, _ = self.rnn(torch.relu(self.conv(x)).mean(2).transpose(1, 2))
        return self.head(out[:, -1])
