"""Products of a batch size and a width: the width follows, the batch size stays free."""

import builtins
import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)


class Weighed(Net):
    def __init__(self):
        super().__init__()
        self.weights = nn.Linear(8, 72)


class Dynamic(Weighed):
    """A depthwise convolution whose weights come from the input: batch and channels in one."""

    def forward(self, x):
        y = self.stem(x)
        w = self.weights(y.mean((2, 3))).reshape(len(y) * 8, 1, 3, 3)
        z = F.conv2d(y.reshape(1, -1, *y.shape[2:]), w, padding=1, groups=len(y) * 8)
        return self.head(z.view_as(y).mean((2, 3)))


class Named(Weighed):
    """The same with numbers in variables, from a shape."""

    def forward(self, x):
        y = self.stem(x)
        number = x.shape[0] * 8
        w = self.weights(y.mean((2, 3))).reshape(number, 1, 3, 3)
        z = F.conv2d(y.reshape(1, number, *y.shape[2:]), w, padding=1, groups=number)
        return self.head(z.view(len(x), 8, x.size(2), -1).mean((2, 3)))


class Converted(Weighed):
    """A batch size that was made a plain int."""

    def forward(self, x):
        y = self.stem(x)
        number = int(x.shape[0]) * 8
        w = self.weights(y.mean((2, 3))).reshape(number, 1, 3, 3)
        z = F.conv2d(y.reshape(1, number, *y.shape[2:]), w, padding=1, groups=number)
        return self.head(z.view(len(x), 8, x.size(2), -1).mean((2, 3)))


class Places(Net):
    """Channels and places of an image in one."""

    def forward(self, x):
        y = self.stem(x)
        high, wide = y.shape[2:]
        flat = y.permute(0, 2, 3, 1).reshape(len(x), high * wide * 8)
        return self.head(flat.reshape(len(flat), high, wide, 8).mean((1, 2)))


class Circular(Net):
    """Padding that torch takes apart, and the rows of a weight counted."""

    def __init__(self):
        super().__init__()
        self.mid = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = F.pad(self.stem(x), (1, 1, 1, 2), mode="circular")
        y = self.mid(y).reshape(len(x), len(self.mid.weight), -1)
        return self.head(torch.stack([y[row] for row in range(len(y))]).mean(2))


@pytest.mark.parametrize("kind", [Dynamic, Named, Converted, Places, Circular])
def test_other_batch_sizes_are_taken(kind):
    torch.manual_seed(0)
    model = kind().double().eval()
    small = graphprune.rebuild(model, 0.5, X)
    assert small.stem.out_channels == 4
    assert graphprune.verify(model, small, X).difference < 1e-10
    again = graphprune.rebuild(copy.deepcopy(small), 0.5, X)
    assert again.stem.out_channels == 2
    assert graphprune.verify(model, again, X).difference < 1e-10
    for batch in (1, 3):
        for made in (small, again):
            assert made(torch.randn(batch, 3, 6, 6, dtype=torch.float64)).shape == (batch, 3)


def test_what_is_no_product_freezes():
    class Sum(Net):
        def forward(self, x):
            y = self.stem(x)
            y = F.pad(y.flatten(2).mean(2).reshape(-1), (0, 3)).reshape(1, len(x) * 8 + 3)
            return self.head(y[:, : len(x) * 8].reshape(len(x), -1))

    graph = graphprune.trace(Sum().eval(), X.float())
    assert all("reads a model input" in g.note for g in graph.groups) or not graph.groups


def test_len_is_pythons_own_after_a_recording():
    before, seen = builtins.len, []

    def other():
        graphprune.trace(Dynamic().eval(), X.float())
        seen.append(len(torch.ones(3)))

    threads = [threading.Thread(target=other) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [3, 3]
    assert builtins.len is before
    assert type(len(torch.ones(3))) is int
