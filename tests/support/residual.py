"""Residual networks whose small versions can be refitted."""

import torch
from torch import nn

import graphprune

D = torch.float64


def small_of(net, x, ratio=0.5, **options):
    net = net.double().eval()
    return net, graphprune.rebuild(net, ratio, x[:1], **options)


def error(small, net, x):
    with torch.no_grad():
        return float((small(x) - net(x)).square().mean())


class Residual(nn.Module):
    """A stream of 6 channels, a block that loses hidden channels, and one that does not."""

    def __init__(self, make, norm=nn.Identity, act=nn.Identity, inplace=False):
        super().__init__()
        self.stem = make(4, 6)
        self.a, self.b = make(6, 6), make(6, 6)
        self.c, self.d = make(6, 6), make(6, 6)
        self.norms = nn.ModuleList([norm(6) for _ in range(2)])
        self.act, self.inplace = act(), inplace

    def add(self, x, y):
        if self.inplace:
            y += x
            return y
        return y + x

    def forward(self, x):
        x = self.stem(x)
        x = self.act(self.add(x, self.norms[0](self.b(self.act(self.a(x))))))
        return self.add(x, self.norms[1](self.d(self.act(self.c(x)))))


KEEP = ("stem", "b", "c", "d")


def linear(width, out):
    return nn.Linear(width, out)


def conv(width, out):
    return nn.Conv2d(width, out, 3, padding=1, bias=False)


def settled(net):
    """Norms with statistics of their own."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net
