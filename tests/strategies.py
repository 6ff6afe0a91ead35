"""All hypothesis strategies: random networks, and random plans for them.

A network is a list of steps; step ``i`` reads the last value and, where it joins, one of the
earlier ones. Values are images of 8 pixels or fewer, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import randomise

import graphprune

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13)
MOST = 36
SIDE = 8
EPS = 0.1  # norms of dead channels would otherwise blow rounding up by 1 / sqrt(eps) each


@dataclass(frozen=True)
class Spec:
    """A drawn network: ``(step, arguments)`` pairs, and which values have heads."""

    steps: tuple[tuple[str, tuple[Any, ...]], ...]
    heads: tuple[tuple[int, bool], ...]
    seed: int

    def build(self) -> nn.Module:
        """The network, with random weights and statistics."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return randomise(Drawn(self), self.seed).double().eval()

    def inputs(self) -> Tensor:
        """Two images."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(2, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)


class Step(nn.Module):
    """Makes a value from those before."""

    def forward(self, values: list[Tensor]) -> Tensor:
        raise NotImplementedError


STEPS: dict[str, type[Step]] = {}


def step(cls: type[Step]) -> type[Step]:
    STEPS[cls.__name__] = cls
    return cls


@step
class Conv(Step):
    """Convolution, norm, activation."""

    def __init__(self, into: int, out: int, kernel: int, groups: int, norm: str, act: str) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv = nn.Conv2d(into, out, kernel, padding=kernel // 2, groups=groups, bias=bias)
        self.norm = {
            "none": nn.Identity, "batch": lambda: nn.BatchNorm2d(out, eps=EPS),
            "instance": lambda: nn.InstanceNorm2d(out, EPS, affine=True),
            "group": lambda: nn.GroupNorm(2 if out % 2 == 0 else 1, out, EPS),
        }[norm]()  # fmt: skip
        self.act = {"relu": nn.ReLU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(),
                    "prelu": nn.PReLU(out), "none": nn.Identity()}[act]  # fmt: skip

    def forward(self, values: list[Tensor]) -> Tensor:
        return self.act(self.norm(self.conv(values[-1])))


@step
class Transposed(Step):
    """Transposed convolution that keeps the resolution."""

    def __init__(self, into: int, out: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(into, out, 3, padding=1, groups=groups)

    def forward(self, values: list[Tensor]) -> Tensor:
        return torch.relu(self.conv(values[-1]))


@step
class Add(Step):
    """Residual addition of an earlier value, projected where widths differ."""

    def __init__(self, other: int, into: int, out: int) -> None:
        super().__init__()
        self.other = other
        self.project = nn.Identity() if into == out else nn.Conv2d(into, out, 1, bias=False)

    def forward(self, values: list[Tensor]) -> Tensor:
        return values[-1] + self.project(values[self.other])


@step
class Concat(Step):
    """Concatenation with an earlier value, then a norm over both."""

    def __init__(self, other: int, channels: int) -> None:
        super().__init__()
        self.other, self.norm = other, nn.BatchNorm2d(channels, eps=EPS)

    def forward(self, values: list[Tensor]) -> Tensor:
        return self.norm(torch.cat([values[self.other], values[-1]], dim=1))


@step
class Chunk(Step):
    """Equal parts, multiplied, added, or put back in another order."""

    def __init__(self, parts: int, join: str) -> None:
        super().__init__()
        self.parts, self.join = parts, join

    def forward(self, values: list[Tensor]) -> Tensor:
        first, *rest = torch.chunk(values[-1], self.parts, 1)
        if self.join == "cat":
            return torch.cat([*rest, first], 1)
        for part in rest:
            first = first * torch.sigmoid(part) if self.join == "gate" else first + part
        return first


@step
class Split(Step):
    """Two unequal parts, each through its own convolution."""

    def __init__(self, first: int, second: int, out: int) -> None:
        super().__init__()
        self.sizes = [first, second]
        self.a, self.b = nn.Conv2d(first, out, 1), nn.Conv2d(second, out, 3, padding=1)

    def forward(self, values: list[Tensor]) -> Tensor:
        a, b = torch.split(values[-1], self.sizes, dim=1)
        return torch.tanh(self.a(a)) * self.b(b)


@step
class Shared(Step):
    """One convolution called several times."""

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels, eps=EPS)
        self.times = times

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        for _ in range(self.times):
            x = torch.relu(self.norm(self.conv(x)))
        return x


@step
class Shuffle(Step):
    """Channel shuffle by views."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        b, c, h, w = x.size()
        x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous()
        return x.view(b, -1, h, w)


@step
class Pixels(Step):
    """Space to depth, or depth to space."""

    def __init__(self, down: bool) -> None:
        super().__init__()
        self.layer = nn.PixelUnshuffle(2) if down else nn.PixelShuffle(2)

    def forward(self, values: list[Tensor]) -> Tensor:
        return self.layer(values[-1])


@step
class Squeeze(Step):
    """Squeeze and excitation."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, inner), nn.Linear(inner, channels)

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


@step
class Scale(Step):
    """Bare parameters and a buffer on the channel dimension."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))
        self.offset = nn.Parameter(torch.randn(channels))
        self.register_buffer("gain", torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, values: list[Tensor]) -> Tensor:
        return values[-1] * self.scale * self.gain + self.offset.view(-1, 1, 1)


@step
class Pad(Step):
    """Constant channels before and after."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, values: list[Tensor]) -> Tensor:
        return F.pad(values[-1], (0, 0, 0, 0, self.before, self.after), value=0.25)


@step
class Pool(Step):
    """Half the resolution."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2) if kind == "max" else nn.AvgPool2d(2)

    def forward(self, values: list[Tensor]) -> Tensor:
        return self.pool(values[-1])


class Head(nn.Module):
    """A linear classifier on the mean of a value, or on all of it."""

    def __init__(self, channels: int, side: int, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.fc = nn.Linear(channels * side * side if flat else channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1) if self.flat else x.mean((2, 3)))


class Drawn(nn.Module):
    """Interprets a spec."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.steps = nn.ModuleList(STEPS[name](*arguments) for name, arguments in spec.steps)
        self.at = tuple(at for at, _ in spec.heads)
        with torch.no_grad():
            shapes = [value.shape for value in self.values(torch.zeros(2, 3, SIDE, SIDE))]
        self.heads = nn.ModuleList(
            Head(shapes[at][1], shapes[at][2], flat) for at, flat in spec.heads
        )

    def values(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for layer in self.steps:
            values.append(layer(values))
        return values

    def forward(self, x: Tensor) -> Any:
        values = self.values(x)
        outs = [head(values[at]) for head, at in zip(self.heads, [int(at) for at in self.at])]
        return outs[0] if len(outs) == 1 else tuple(outs)


def _divisors(n: int, *others: int) -> list[int]:
    return [d for d in range(2, n + 1) if all(m % d == 0 for m in (n, *others))]


class _Drawing:
    """What has been drawn so far: the width and side of every value."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.widths, self.sides = [3], [SIDE]
        self.steps: list[tuple[str, tuple[Any, ...]]] = []

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def put(self, name: str, width: int, *arguments: Any, side: int | None = None) -> None:
        self.steps.append((name, arguments))
        self.widths.append(width)
        self.sides.append(self.sides[-1] if side is None else side)

    def conv(self, out: int | None = None, groups: int = 1) -> None:
        norm = self.pick(["batch", "batch", "none", "instance", "group"])
        act = self.pick(["relu", "tanh", "sigmoid", "prelu", "none"])
        out = self.pick(WIDTHS) if out is None else out
        self.put("Conv", out, self.widths[-1], out, self.pick([1, 3]), groups, norm, act)

    def options(self) -> dict[str, Callable[[], None]]:
        """The steps that fit the current value."""
        c, side = self.widths[-1], self.sides[-1]
        same = [i for i, s in enumerate(self.sides[:-1]) if s == side]
        room = [i for i in same if self.widths[i] + c <= MOST]
        found: dict[str, Callable[[], None]] = {
            "conv": self.conv,
            "transposed": lambda: self.transposed(1),
            "scale": lambda: self.put("Scale", c, c),
            "squeeze": lambda: self.put("Squeeze", c, c, self.pick([1, 2, 5])),
            "shared": lambda: self.put("Shared", c, c, self.pick([2, 3])),
            "depthwise": lambda: self.conv(c * self.pick([1, 2] if 2 * c <= MOST else [1]), c),
        }
        if same:
            found["add"] = lambda: self.add(self.pick(same))
        if room:
            found["concat"] = lambda: self.concat(self.pick(room))
        if c > 1:
            found["split"] = lambda: self.split(self.pick(range(1, c)))
        if _divisors(c):
            found["chunk"] = self.chunk
            found["shuffle"] = lambda: self.put("Shuffle", c, self.pick(_divisors(c)))
            found["grouped"] = lambda: self.grouped(self.pick(_divisors(c)))
            found["grouped_transposed"] = lambda: self.transposed(self.pick(_divisors(c)))
        if c + 3 <= MOST:
            found["pad"] = lambda: self.pad(self.pick([0, 1, 2]), self.pick([0, 1]))
        if side >= 4:
            found["pool"] = lambda: self.put("Pool", c, self.pick(["max", "avg"]), side=side // 2)
        if side >= 4 and 4 * c <= MOST:
            found["unshuffle"] = lambda: self.put("Pixels", 4 * c, True, side=side // 2)
        if side <= 4 and c % 4 == 0:
            found["pixel_shuffle"] = lambda: self.put("Pixels", c // 4, False, side=2 * side)
        return found

    def add(self, other: int) -> None:
        c = self.widths[-1]
        self.put("Add", c, other, self.widths[other], c)

    def concat(self, other: int) -> None:
        width = self.widths[-1] + self.widths[other]
        self.put("Concat", width, other, width)

    def split(self, first: int) -> None:
        out = self.pick(WIDTHS)
        self.put("Split", out, first, self.widths[-1] - first, out)

    def chunk(self) -> None:
        c = self.widths[-1]
        parts, join = self.pick(_divisors(c)), self.pick(["gate", "sum", "cat"])
        self.put("Chunk", c if join == "cat" else c // parts, parts, join)

    def grouped(self, groups: int) -> None:
        self.conv(groups * self.pick([n for n in (1, 2, 3) if groups * n <= MOST]), groups)

    def transposed(self, groups: int) -> None:
        out = groups * self.pick([n for n in (1, 2, 3) if groups * n <= MOST])
        self.put("Transposed", out, self.widths[-1], out, groups)

    def pad(self, before: int, after: int) -> None:
        self.put("Pad", self.widths[-1] + before + after, before, after)


@st.composite
def specs(draw: Callable[[Any], Any], most: int = 12) -> Spec:
    """Networks of up to ``most`` steps with one or more heads."""
    drawing = _Drawing(draw)
    drawing.conv()
    for _ in range(draw(st.integers(1, most - 1))):
        found = drawing.options()
        found[drawing.pick(sorted(found))]()
    last = len(drawing.steps)
    extra = draw(st.lists(st.integers(1, last), max_size=2, unique=True))
    heads = [(at, draw(st.booleans())) for at in dict.fromkeys([last, *extra])]
    return Spec(tuple(drawing.steps), tuple(heads), draw(st.integers(0, 99)))


@st.composite
def kept_channels(
    draw: Callable[[Any], Any], graph: graphprune.ChannelGraph
) -> dict[str, list[int]]:
    """At least one channel of every group, and by group name."""
    kept = {}
    for group in graph.groups:
        bits = draw(st.integers(1, 2**group.size - 1))
        kept[group.name] = [channel for channel in range(group.size) if bits >> channel & 1]
    return kept
