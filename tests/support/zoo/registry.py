"""The registry of awkward networks, and what they are made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

ZOO: dict[str, Entry] = {}


@dataclass(frozen=True)
class Entry:
    """A network: how to build it, its example inputs and how many channels can be removed."""

    name: str
    factory: Callable[[], nn.Module]
    draw: Callable[[], Any]
    removable: int | None

    def build(self, seed: int = 0) -> nn.Module:
        """The network with random weights and non-trivial norms, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return randomise(self.factory(), seed).eval()

    def inputs(self) -> Any:
        """The example inputs, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            return self.draw()


def awkward(
    *shapes: tuple[int, ...] | Callable[[], Any], removable: int | None
) -> Callable[[Any], Any]:
    """Register a network class or function; ``shapes`` of its inputs, or a function of none."""

    def draw() -> Any:
        if callable(shapes[0]):
            return shapes[0]()
        return tuple(torch.randn(shape) for shape in shapes)

    def register(factory: Any) -> Any:
        name = factory.__name__
        if name in ZOO:
            raise KeyError(f"two networks called {name}")
        ZOO[name] = Entry(name, factory, draw, removable)
        return factory

    return register


IMAGE = (2, 3, 8, 8)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm random statistics, scales of both signs and offsets."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor | None, low: float, high: float, signs: bool = False) -> None:
        if tensor is None:
            return
        drawn = torch.empty(tensor.shape).uniform_(low, high, generator=generator)
        if signs:
            drawn *= torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
        tensor.data.copy_(drawn)

    for module in model.modules():
        if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm):
            fill(module.weight, 0.5, 1.5, signs=True)
            fill(module.bias, -0.5, 0.5)
            fill(getattr(module, "running_mean", None), -0.5, 0.5)
            fill(getattr(module, "running_var", None), 0.5, 2.0)
        if isinstance(module, nn.PReLU):
            fill(module.weight, -0.5, 0.5)
    return model


def conv(into: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the resolution unless told otherwise."""
    options.setdefault("padding", kernel // 2)
    return nn.Conv2d(into, out, kernel, **options)


def sandwich(thing: nn.Module, before: int = 8, after: int | None = None) -> nn.Module:
    """Convolution, BatchNorm, ReLU, the awkward thing, convolution, pooling, classifier.

    The five channels of the last convolution can always be removed.
    """
    return nn.Sequential(
        OrderedDict(
            stem=conv(3, before),
            norm=nn.BatchNorm2d(before),
            act=nn.ReLU(),
            thing=thing,
            last=conv(before if after is None else after, 5),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(5, 4),
        )
    )


class Apply(nn.Module):
    """A module around a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)
