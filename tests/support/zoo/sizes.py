"""Sizes in code: literals, attributes, shapes and comparisons of shapes."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import IMAGE, Apply, awkward, conv, sandwich


class LeNet(nn.Module):
    """LeNet with functional pooling, as tutorials write it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 30), nn.Linear(30, 20), nn.Linear(20, 10)

    def flatten(self, x):
        return x.view(-1, int(x.nelement() / x.shape[0]))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = self.flatten(x)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


@awkward((2, 1, 32, 32), removable=6 + 16 + 30 + 20)
class LeNetComputedView(LeNet):
    pass


@awkward((2, 1, 32, 32), removable=6 + 16 + 30 + 20)
class LeNetLiteralView(LeNet):
    def flatten(self, x):
        return x.view(-1, 16 * 5 * 5)


@awkward((2, 1, 32, 32), removable=6 + 16 + 30 + 20)
class LeNetNumFlatFeatures(LeNet):
    def flatten(self, x):
        count = 1
        for size in x.size()[1:]:
            count *= size
        return x.view(-1, count)


@awkward((2, 1, 32, 32), removable=6 + 16 + 30 + 20)
class LeNetAttributeView(LeNet):
    def __init__(self):
        super().__init__()
        self.channels = 16

    def flatten(self, x):
        return x.reshape(x.size(0), self.channels * 25)


@awkward((3, 7), removable=11 + 5)
def mlp():
    return nn.Sequential(
        nn.Linear(7, 11), nn.BatchNorm1d(11), nn.Tanh(), nn.Dropout(), nn.Linear(11, 5, bias=False),
        nn.ReLU(), nn.Linear(5, 3), nn.LogSoftmax(1))  # fmt: skip


@awkward((2, 4, 7), removable=11)
def mlp_on_sequences():
    return nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 3), nn.Flatten())


@awkward(IMAGE, removable=6 + 10)
def vgg_flattened_map():
    return nn.Sequential(
        conv(3, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 10), nn.ReLU(),
        nn.Linear(10, 4))  # fmt: skip


@awkward(IMAGE, removable=8 + 5)
def asserted_shape():
    class Asserted(nn.Module):
        def __init__(self):
            super().__init__()
            self.channels = 8

        def forward(self, x):
            assert x.shape[1] == self.channels, "wrong number of channels"
            return x * 2

    return sandwich(Asserted())


@awkward(IMAGE, removable=8 + 5)
def shortcut_if_shapes_agree():
    class Maybe(nn.Module):
        def __init__(self, into, out):
            super().__init__()
            self.conv = conv(into, out)

        def forward(self, x):
            y = self.conv(x)
            return x + y if x.shape == y.shape else y

    return sandwich(Maybe(8, 8))


@awkward(IMAGE, removable=8 + 12 + 5)  # the shapes differ, and must go on differing
def no_shortcut_if_shapes_differ():
    class Maybe(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(8, 12)

        def forward(self, x):
            y = self.conv(x)
            return x + y if x.shape == y.shape else y

    return sandwich(Maybe(), after=12)


@awkward(IMAGE, removable=8 + 5)
def literal_reshape_of_a_gate():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return x * torch.sigmoid(self.fc(x.mean((2, 3)))).reshape(-1, 8, 1, 1)

    return sandwich(Gate())


@awkward(IMAGE, removable=8 + 5)  # zeros of the layer's own width
def zeros_of_attribute_width():
    class Zeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = 8

        def forward(self, x):
            state = torch.zeros(x.shape[0], self.width, *x.shape[2:], dtype=x.dtype)
            for _ in range(3):
                state = 0.5 * state + torch.tanh(x + state)
            return state

    return sandwich(Zeros())


@awkward(IMAGE, removable=8 + 5)
def literal_beside_a_starred_shape():
    return sandwich(Apply(lambda x: x.view(-1, 8, *x.shape[2:]).flip(1)))


@awkward(IMAGE, removable=8 + 5)
def literal_behind_star_arguments():
    class Star(nn.Module):
        def forward(self, *args):
            return args[0].view(-1, 8, args[0].shape[2] * args[0].shape[3]).view_as(args[0])

    return sandwich(Star())


@awkward(IMAGE, removable=8 + 5)
def zeros_of_literal_width():
    def function(x):
        return x + torch.ones(1, 8, 1, 1, dtype=x.dtype)

    return sandwich(Apply(function))


# Column j of the three equal parts; the convolutions' outputs are tied to the parts they join,
# except those of the last one, whose 3 outputs stand alone.
@awkward(IMAGE, removable=3 + 3 + 5)
def res2net_width():
    class Res2(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = 3
            self.convs = nn.ModuleList([conv(3, 3), conv(3, 3)])

        def forward(self, x):
            parts = torch.split(x, self.width, 1)
            out = [parts[0]]
            for part, layer in zip(parts[1:], self.convs, strict=True):
                out.append(F.relu(layer(part + out[-1])))
            return torch.cat(out, 1)

    return sandwich(Res2(), 9)


# Sizes that torch's own layers remember change with their parameters; numbers made of them do not.
@awkward(lambda: (torch.tensor([[1, 4, 2], [0, 3, 5]]),), removable=8 + 12 + 9)
class ScaledBySizesOfLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.state = nn.Embedding(6, 8), nn.GRU(8, 12, batch_first=True)
        self.norm, self.wide, self.last = nn.BatchNorm1d(12), nn.Linear(12, 9), nn.Linear(9, 4)

    def forward(self, tokens):
        x = self.words(tokens) * math.sqrt(self.words.embedding_dim)
        x = self.state(x * self.state.input_size)[0] / self.state.hidden_size
        x = self.norm(x.mean(1)) * self.norm.num_features**-0.5
        return self.last(self.wide(x).relu() / self.wide.out_features + 1 / self.last.in_features)
