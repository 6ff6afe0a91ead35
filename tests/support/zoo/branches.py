"""Sums, concatenations and gates: channels of several layers meet."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import IMAGE, Apply, awkward, conv, sandwich


class Block(nn.Module):
    """The basic block of a CIFAR ResNet, with any shortcut."""

    def __init__(self, into, out, stride=1, shortcut=None):
        super().__init__()
        self.conv1 = conv(into, out, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = conv(out, out, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """Two stages of 8 and 16 channels."""

    def __init__(self, widening):
        super().__init__()
        self.conv1 = conv(3, 8, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = Block(8, 8)
        self.layer2 = nn.Sequential(widening, Block(16, 16))
        self.linear = nn.Linear(16, 4)

    def forward(self, x):
        out = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(F.avg_pool2d(out, out.size()[3]).view(out.size(0), -1))


# Padded shortcuts: channels 4..11 of the second stream are those of the first (8 units), the
# other 8 stand alone, and there are inner widths of 8, 16 and 16.
PADDED = 8 + 8 + 8 + 16 + 16


@awkward(IMAGE, removable=PADDED)
def cifar_padded_closure():
    planes = 16
    pad = Apply(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4)))
    return CifarResNet(Block(8, 16, 2, pad))


class PadByAttribute(nn.Module):
    def __init__(self, planes):
        super().__init__()
        self.planes = planes

    def forward(self, x):
        amount = self.planes // 4
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, amount, amount), "constant", 0)


@awkward(IMAGE, removable=PADDED)
def cifar_padded_attribute():
    return CifarResNet(Block(8, 16, 2, PadByAttribute(16)))


class PadInForward(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


@awkward(IMAGE, removable=PADDED)
def cifar_padded_literal():
    return CifarResNet(PadInForward(8, 16, 2))


@awkward(IMAGE, removable=8 + 16 + 8 + 16 + 16)
def cifar_projected():  # two separate streams
    down = nn.Sequential(conv(8, 16, 1, stride=2), nn.BatchNorm2d(16))
    return CifarResNet(Block(8, 16, 2, down))


@awkward(IMAGE, removable=8 + 7 + 5)  # one stream of 8, inner 7, head 5
def preactivation_block():
    class Preactivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(7)
            self.conv1, self.conv2 = conv(8, 7), conv(7, 8)

        def forward(self, x):
            out = self.conv1(F.relu(self.bn1(x)))
            return x + self.conv2(F.relu(self.bn2(out)))

    return sandwich(Preactivation())


@awkward(IMAGE, removable=8 + 5)  # all four sums tie the same 8
class AddsAcrossLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 8)])
        self.last, self.head = conv(8, 5), nn.Linear(5, 4)

    def forward(self, x):
        seen = []
        for layer in self.convs:
            x = F.relu(layer(x))
            seen.append(x)
        return self.head(self.last(seen[0] + seen[3] - seen[1] * seen[2]).mean((2, 3)))


@awkward(IMAGE, removable=6 + 10 + 6 + 7)
class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = conv(3, 6), conv(6, 10)
        self.up = nn.ConvTranspose2d(10, 6, 2, stride=2)
        self.merge, self.norm, self.out = conv(12, 7), nn.BatchNorm2d(7), conv(7, 2, 1)

    def forward(self, x):
        skip = F.relu(self.down1(x))
        low = F.relu(self.down2(F.max_pool2d(skip, 2)))
        return self.out(F.relu(self.norm(self.merge(torch.cat([self.up(low), skip], 1)))))


@awkward(IMAGE, removable=6 + 10 + 8 + 8)  # backbone 6, 10; laterals tied 8; smooth tied 8
class FPN(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = conv(3, 6), conv(6, 10, stride=2)
        self.lateral1, self.lateral2 = conv(6, 8, 1), conv(10, 8, 1)
        self.smooth1, self.smooth2, self.head = conv(8, 8), conv(8, 8), conv(8, 2, 1)

    def forward(self, x):
        c1 = F.relu(self.c1(x))
        c2 = F.relu(self.c2(c1))
        p2 = self.lateral2(c2)
        p1 = self.lateral1(c1) + F.interpolate(p2, size=c1.shape[-2:], mode="nearest")
        return {"p1": self.head(self.smooth1(p1)), "p2": self.head(self.smooth2(p2))}


@awkward(IMAGE, removable=4 + 3 + 6)
class ConcatOfConcats(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 3), conv(7, 6)
        self.norm, self.head = nn.BatchNorm2d(13), nn.Linear(13, 4)

    def forward(self, x):
        a = F.relu(self.a(x))
        ab = torch.cat([a, F.relu(self.b(a))], 1)
        return self.head(F.relu(self.norm(torch.cat([ab, self.c(ab)], dim=-3))).mean((2, 3)))


@awkward(IMAGE, removable=5)  # the image's own channels stay
class ConcatWithInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = conv(3, 5), nn.BatchNorm2d(8), conv(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.norm(torch.cat([x, self.conv(x)], 1))))


class Squeeze(nn.Module):
    def __init__(self, channels=8, inner=4):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, inner), nn.Linear(inner, channels)

    def forward(self, x):
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        y = torch.sigmoid(self.fc2(F.relu(self.fc1(y)))).view(b, c, 1, 1)
        return x * y.expand_as(x)


@awkward(IMAGE, removable=8 + 4 + 5)
def squeeze_excitation():
    return sandwich(Squeeze())


@awkward((3, 6), removable=10)  # gate, transform and carry share the 10
class Highway(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.h, self.t, self.out = (
            nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 3))  # fmt: skip

    def forward(self, x):
        x = torch.tanh(self.inp(x))
        gate = torch.sigmoid(self.t(x))
        return self.out(gate * torch.relu(self.h(x)) + (1 - gate) * x)


@awkward(IMAGE, removable=6 + 5)  # column j of both halves
def gated_by_chunk():
    def gate(x):
        a, b = x.chunk(2, 1)
        return a * torch.sigmoid(b)

    return sandwich(Apply(gate), 12, 6)


@awkward(IMAGE, removable=6 + 5)
def gated_linear_unit():
    return sandwich(nn.GLU(1), 12, 6)


@awkward((3, 6), (3, 7), removable=8 + 9 + 5)
class BilinearGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(7, 9)
        self.bilinear, self.out = nn.Bilinear(8, 9, 5), nn.Linear(5, 2)

    def forward(self, x, y):
        return self.out(torch.tanh(self.bilinear(self.a(x), self.b(y))))


@awkward(IMAGE, removable=8 + 8 + 3 + 5)  # stem; both branches tied; inner 3
def selective_kernel():
    class Selective(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(8, 8), conv(8, 8, dilation=2, padding=2)
            self.down = nn.Linear(8, 3)
            self.ups = nn.ModuleList([nn.Linear(3, 8), nn.Linear(3, 8)])

        def forward(self, x):
            feats = torch.stack([self.a(x), self.b(x)], dim=1)
            z = F.relu(self.down(feats.sum(1).mean((-1, -2))))
            weights = torch.stack([up(z) for up in self.ups], 1).softmax(1)
            return (feats * weights[..., None, None]).sum(1)

    return sandwich(Selective())


@awkward(IMAGE, removable=8 + 5)
def stochastic_depth():
    class Drop(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(8, 8)

        def forward(self, x):
            y = self.conv(x)
            if self.training:
                keep = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device) < 0.7
                y = y * keep / 0.7
            return x + y

    return sandwich(Drop())


@awkward(IMAGE, removable=6)  # out = x + f(x): the image's channels stay
class GlobalResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = conv(3, 6), conv(6, 3)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


@awkward(IMAGE, removable=8 + 4 + 6 + 5)  # stem, theta with phi, g, last
def non_local_block():
    class NonLocal(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta, self.phi = conv(8, 4, 1), conv(8, 4, 1)
            self.g, self.out = conv(8, 6, 1), conv(6, 8, 1)

        def forward(self, x):
            b, _, h, w = x.shape
            q = self.theta(x).flatten(2).transpose(1, 2)
            k = self.phi(x).flatten(2)
            v = self.g(x).flatten(2).transpose(1, 2)
            y = (torch.bmm(q, k).softmax(-1) @ v).transpose(1, 2).reshape(b, -1, h, w)
            return x + self.out(y)

    return sandwich(NonLocal())
