"""Calls and control flow: several inputs and outputs, keyword arguments, heads, modes."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import IMAGE, awkward, conv


class Trunk(nn.Module):
    """Two convolutions and two heads; subclasses differ in what they take and return."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = conv(3, 8), nn.BatchNorm2d(8), conv(8, 6)
        self.head1, self.head2 = nn.Linear(6, 4), nn.Linear(8, 3)

    def features(self, x):
        low = F.relu(self.norm(self.conv1(x)))
        return low, F.relu(self.conv2(low))

    def heads(self, x):
        low, high = self.features(x)
        return self.head1(high.mean((2, 3))), self.head2(low.amax((2, 3)))


@awkward(IMAGE, removable=8 + 6)
class TupleOutput(Trunk):
    def forward(self, x):
        return self.heads(x)


@awkward(IMAGE, removable=8 + 6)
class NestedDictOutput(Trunk):
    def forward(self, x):
        a, b = self.heads(x)
        return {"a": a, "more": [b, {"sum": a.sum() + b.sum(), "name": "net", "none": None}]}


@awkward(IMAGE, removable=8)  # the features of conv2 are an output: they stay
class FeatureOutput(Trunk):
    def forward(self, x):
        _, high = self.features(x)
        return high, self.head1(high.mean((2, 3)))


@awkward(lambda: {"image": torch.randn(IMAGE), "scale": 0.7}, removable=8 + 6)
class KeywordArguments(Trunk):
    def forward(self, *, image, scale=1.0, extra=None):
        out = self.heads(image * scale)
        return out if extra is None else (*out, extra)


@awkward(lambda: ({"left": torch.randn(IMAGE), "right": [torch.randn(IMAGE)]},), removable=8 + 6)
class NestedInputs(Trunk):
    def forward(self, batch):
        return self.heads(batch["left"] - batch["right"][0])


@awkward(IMAGE, (2, 5), removable=8 + 6 + 7 + 5)  # image 8 -> 6, table 7, joint 5
class ImageAndTable(Trunk):
    def __init__(self):
        super().__init__()
        self.table, self.joint, self.out = nn.Linear(5, 7), nn.Linear(13, 5), nn.Linear(5, 2)
        del self.head1, self.head2

    def forward(self, x, table):
        image = self.features(x)[1].mean((2, 3))
        joint = torch.cat([image, torch.relu(self.table(table))], dim=1)
        return self.out(torch.relu(self.joint(joint)))


@awkward(IMAGE, removable=8 + 6)  # the second head reads conv1 in train mode only
class DeepSupervision(Trunk):
    def forward(self, x):
        a, b = self.heads(x)
        return (a, b) if self.training else a


@awkward(IMAGE, removable=8 + 6 + 4)  # so does an auxiliary branch with layers of its own
class AuxiliaryBranch(Trunk):
    def __init__(self):
        super().__init__()
        self.aux = nn.Sequential(conv(8, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2))

    def forward(self, x):
        low, high = self.features(x)
        out = {"out": self.head1(high.mean((2, 3)))}
        if self.training:
            out["aux"] = self.aux(low)
            out["second"] = self.head2(low.mean((2, 3)))
        return out


@awkward(IMAGE, removable=8 + 6)
class EarlyReturn(Trunk):
    def __init__(self):
        super().__init__()
        self.depth = 2

    def forward(self, x):
        low, high = self.features(x)
        if self.depth < 2 or x.shape[-1] < 4:
            return self.head2(low.mean((2, 3)))
        return self.head1(high.mean((2, 3)))


@awkward(IMAGE, removable=8 + 6)
class InPlaceEverything(Trunk):
    def forward(self, x):
        low = F.leaky_relu_(self.norm(self.conv1(x)), 0.1)
        low = low + 0.5
        low[:, :, 0] = 0.0
        low.add_(low.mean((2, 3), keepdim=True)).clamp_(max=3)
        high = self.conv2(low).relu_()
        return self.head1(high.mean((2, 3))), self.head2(low.mean((2, 3)))


@awkward(IMAGE, removable=8 + 6)
class NotDifferentiable(Trunk):  # what the ReLU needs for its gradient is overwritten
    def forward(self, x):
        low = F.relu_(self.norm(self.conv1(x)))
        low *= 1.5
        return self.head1(self.conv2(low).relu_().mean((2, 3)))


@awkward(IMAGE, removable=8 + 6)
class ModuleContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleDict({"a": conv(3, 8), "b": nn.ModuleList([conv(8, 6), conv(6, 2)])})
        self.order = ["a", "b"]

    def forward(self, x):
        x = F.relu(self.steps[self.order[0]](x))
        for layer in self.steps["b"]:
            x = F.leaky_relu(layer(x), 0.2)
        return x


@awkward(IMAGE, removable=8 + 6)
class HooksAddLayers(nn.Module):  # a forward hook scales the features
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = conv(3, 8), conv(8, 6), conv(6, 2)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.conv1.register_forward_hook(Scale(self.scale))

    def forward(self, x):
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))))


class Scale:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, module, args, out):
        return out * self.scale


@awkward(IMAGE, removable=8 + 6 + 3)  # the second head is summed away
class StatisticsOverTheBatch(Trunk):
    def forward(self, x):
        low, high = self.features(x)
        low = low - low.mean(0, keepdim=True)
        return self.head1(high.mean((2, 3))) + self.head2(low.std((2, 3))).sum(1, keepdim=True)


@awkward(IMAGE, removable=8 + 6)
class CheckpointedBlock(Trunk):
    def forward(self, x):
        low = torch.utils.checkpoint.checkpoint(self.conv1, x, use_reentrant=False)
        return self.head1(F.relu(self.conv2(F.relu(low))).mean((2, 3)))


@awkward(IMAGE, removable=8 + 6)
class ReadsValues(Trunk):  # runs on real tensors only
    def forward(self, x):
        a, b = self.heads(x)
        return a * (2.0 if float(x.abs().max()) > 0 else 1.0), b
