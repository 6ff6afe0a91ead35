"""Steps of random networks in the spellings that people's code has."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.zoo.steps import Step, step


@step
class TensorSplit(Step):
    """``tensor_split`` by a number or by places, and the parts in another order."""

    def __init__(self, at: int | tuple[int, ...], form: str) -> None:
        super().__init__()
        self.at, self.form = at, form

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        if self.form == "function":
            first, *rest = torch.tensor_split(x, self.at, dim=1)
        elif self.form == "negative":
            first, *rest = x.tensor_split(self.at, -3)
        else:
            first, *rest = x.tensor_split(torch.tensor(self.at), dim=1)
        return torch.cat([*rest, torch.tanh(first)], 1)


@step
class UnequalChunk(Step):
    """Parts of which the last is smaller, put back in another order."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, values: list[Tensor]) -> Tensor:
        *rest, last = values[-1].chunk(self.parts, 1)
        return torch.cat([torch.sigmoid(last), *rest], 1)


@step
class ByRatio(Step):
    """A part of the channels through a convolution of its own: ``int(width * ratio)``."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv2d(int(channels * ratio), int(channels * ratio), 1)

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        first = int(x.shape[1] * self.ratio)
        return torch.cat([self.conv(x[:, :first]), x[:, first:]], 1)


@step
class Narrow(Step):
    """The last channels by ``narrow``, dims and places counted from the end."""

    def __init__(self, channels: int, width: int, out: int) -> None:
        super().__init__()
        self.width = width
        self.conv = nn.Conv2d(width, out, 1)

    def forward(self, values: list[Tensor]) -> Tensor:
        return self.conv(values[-1].narrow(-3, -self.width, self.width))


@step
class Interleaved(Step):
    """A gate whose two halves lie between each other."""

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        return x[:, ::2] * torch.sigmoid(x[:, 1::2])


@step
class Unfolded(Step):
    """Windows over channels that overlap, each summed up."""

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, values: list[Tensor]) -> Tensor:
        return values[-1].unfold(1, self.size, self.stride).sum(-1)


@step
class ShuffledMean(Step):
    """A gate made of the spatial mean behind a pixel shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels // 4, channels)

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        gate = torch.sigmoid(self.fc(F.pixel_shuffle(x, 2).mean((2, 3))))
        return x * gate[:, :, None, None]


@step
class GroupedEinsum(Step):
    """A product by groups as an einsum, read by a convolution of as many groups."""

    def __init__(self, channels: int, groups: int, inner: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(groups, inner, channels // groups) * 0.5)
        self.conv = nn.Conv2d(groups * inner, channels, 1, groups=groups)

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1].unflatten(1, (self.groups, -1))
        y = torch.einsum("bgchw,gdc->bgdhw", x, self.weight)
        return self.conv(torch.tanh(y.flatten(1, 2)))


@step
class Projected(Step):
    """An LSTM with a projection, along the columns of the pooled rows."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(channels, hidden, proj_size=out, batch_first=True)

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        y, _ = self.rnn(x.mean(2).transpose(1, 2))
        return y.transpose(1, 2).unsqueeze(2).expand(-1, -1, x.shape[2], -1)


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What libraries put around a forward."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)

    return wrapper


@functools.lru_cache(maxsize=8)
def parts_of(channels: int, groups: int) -> tuple[int, int]:
    """Sizes that a cache remembers from call to call."""
    return groups, channels // groups


class Tagged(Tensor):
    """Another class of tensors, as libraries have for images and boxes."""


@step
class Spelled(Step):
    """A channel shuffle, in one of several spellings of the same."""

    def __init__(self, groups: int, spelling: str) -> None:
        super().__init__()
        self.groups, self.spelling = groups, spelling

    @decorated
    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        return getattr(self, self.spelling)(x)

    def chained(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return (
            torch.tanh(x)
            .view(b, self.groups, c // self.groups, h, w)
            .transpose(1, 2)
            .reshape(
                b,
                c,
                h,
                w,
            )
        )

    def cached(self, x: Tensor) -> Tensor:
        groups, width = parts_of(x.size(1), self.groups)
        y = x.view(x.size(0), groups, width, *x.shape[2:])
        return y.transpose(1, 2).flatten(1, 2)

    def counted(self, x: Tensor) -> Tensor:
        y = x.reshape(len(x) * self.groups, -1, *x.shape[2:])
        y = y.view(len(x), self.groups, -1, *x.shape[2:]).transpose(1, 2)
        return y.reshape(len(x), -1, *x.shape[2:])

    def copied(self, x: Tensor) -> Tensor:
        y = copy.copy(torch.tanh(x)).unflatten(1, (self.groups, -1))
        return y.transpose(1, 2).flatten(1, 2)

    def tagged(self, x: Tensor) -> Tensor:
        y = x.as_subclass(Tagged).unflatten(1, (self.groups, -1)).transpose(1, 2)
        return y.flatten(1, 2).as_subclass(Tensor)


SPELLED = ("chained", "cached", "counted", "copied", "tagged")
