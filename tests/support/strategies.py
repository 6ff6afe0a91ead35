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

import graphprune
from support.zoo import randomise
from support.zoo.spellings import SPELLED
from support.zoo.steps import SPELLINGS, STEPS

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13)
MOST = 36
SIDE = 8


@dataclass(frozen=True)
class Spec:
    """A drawn network: ``(step, arguments)`` pairs, and which values have heads."""

    steps: tuple[tuple[str, tuple[Any, ...]], ...]
    heads: tuple[tuple[int, bool], ...]
    seed: int

    def build(self) -> nn.Module:
        """The network, with random weights and statistics."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return randomise(Drawn(self), self.seed).double().eval()

    def inputs(self) -> Tensor:
        """Two images."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(2, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)


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
        if side <= 4:  # few places: scores and steps cost time
            found["attention"] = lambda: self.attention("Attention", self.pick(SPELLINGS))
            found["recurrent"] = lambda: self.recurrent(self.pick([False, True]))
        if 2 <= side <= 4:
            found["window"] = lambda: self.attention("Window", self.pick([0, 1]))
        found["token_norm"] = lambda: self.put(
            "TokenNorm", c, c, self.pick(["layer", "rms", "by_hand"])
        )
        found["experts"] = lambda: self.put("Experts", c, c, self.pick([2, 3, 5]), 2)
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
        self.spellings(found)
        if side >= 4:
            found["pool"] = lambda: self.put("Pool", c, self.pick(["max", "avg"]), side=side // 2)
        if side >= 4 and 4 * c <= MOST:
            found["unshuffle"] = lambda: self.put("Pixels", 4 * c, True, side=side // 2)
        if side <= 4 and c % 4 == 0:
            found["pixel_shuffle"] = lambda: self.put("Pixels", c // 4, False, side=2 * side)
        return found

    def spellings(self, found: dict[str, Callable[[], None]]) -> None:
        """The steps of support.zoo.spellings that fit."""
        c, side = self.widths[-1], self.sides[-1]
        found["narrow"] = lambda: self.narrow(self.pick(range(1, c + 1)))
        if c > 1:
            found["by_ratio"] = lambda: self.put("ByRatio", c, c, self.pick([0.5, 0.75]))
        if c > 2:
            found["tensor_split"] = lambda: self.tensor_split(self.pick(range(1, c)))
            found["unequal_chunk"] = lambda: self.put("UnequalChunk", c, self.pick(range(2, c)))
            found["unfolded"] = lambda: self.unfolded(self.pick(range(2, min(c, 4) + 1)))
        if c % 2 == 0:
            found["interleaved"] = lambda: self.put("Interleaved", c // 2)
        if c <= 6:
            found["projected"] = lambda: self.projected(self.pick([2, 3]))
        if c % 4 == 0 and side >= 2:
            found["shuffled_mean"] = lambda: self.put("ShuffledMean", c, c)
        if _divisors(c):
            groups = _divisors(c)
            found["grouped_einsum"] = lambda: self.grouped_einsum(self.pick(groups))
            found["spelled"] = lambda: self.put("Spelled", c, self.pick(groups), self.pick(SPELLED))

    def projected(self, out: int) -> None:
        self.put("Projected", out, self.widths[-1], self.pick([out + 1, out + 3]), out)

    def grouped_einsum(self, groups: int) -> None:
        c = self.widths[-1]
        self.put("GroupedEinsum", c, c, groups, self.pick([1, 2, 3]))

    def narrow(self, width: int) -> None:
        out = self.pick(WIDTHS)
        self.put("Narrow", out, self.widths[-1], width, out)

    def tensor_split(self, at: int) -> None:
        at_or_places = self.pick([max(at, 2), (at,), tuple(sorted({1, at}))])
        form = self.pick(["function", "negative", "tensor"])
        self.put("TensorSplit", self.widths[-1], at_or_places, form)

    def unfolded(self, size: int) -> None:
        stride = self.pick(range(1, size + 1))
        self.put("Unfolded", (self.widths[-1] - size) // stride + 1, size, stride)

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

    def attention(self, name: str, how: str | int) -> None:
        c, (heads, width) = self.widths[-1], self.pick([(2, 1), (3, 2), (4, 2), (2, 3)])
        self.put(name, c, c, heads, width, how)

    def recurrent(self, both: bool) -> None:
        hidden, kind = self.pick([2, 3, 5]), self.pick(["lstm", "gru"])
        self.put("Recurrent", 2 * hidden if both else hidden, self.widths[-1], hidden, kind, both)

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
    """At least one channel of every group, by group name; all where some numbers cannot be."""
    kept = {}
    for group in graph.groups:
        if group.limit:
            kept[group.name] = list(range(group.size))
            continue
        bits = draw(st.integers(1, 2**group.size - 1))
        kept[group.name] = [channel for channel in range(group.size) if bits >> channel & 1]
    return kept


def zeroed(model: nn.Module, seed: int, rows: bool) -> nn.Module:
    """Set random slices of weights to zero: filters, or slices along any dimension, and vectors."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            few = 0.7 if parameter.dim() > 1 else 0.0 if rows else 0.3
            if float(drawn(1)) < few:
                dim = 0 if rows else int(drawn(1) * parameter.dim())
                parameter.index_fill_(dim, (drawn(parameter.shape[dim]) < 0.5).nonzero()[:, 0], 0)
    return model
