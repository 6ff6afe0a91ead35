"""Convolutions and linear layers with known weights: what each input channel adds to an output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.masks.dead.relations import Relation
from graphprune.ops.fact import Fact
from graphprune.ops.views import matrix_of

aten = torch.ops.aten
EVEN = 1e-12  # relative: two places that differ by rounding hold the same constant
UNKNOWN, NONZERO, VARYING, NO_BIAS, CHANGING = range(1, 6)
REASONS = {
    UNKNOWN: "not constant",
    NONZERO: "not zero, and fold is 'none',",
    VARYING: "not the same at all places",
    NO_BIAS: "not for a bias, of which there is none,",
    CHANGING: "not the same in every call or for every input shape",
}


class Affine:
    """``sum over channels of weight * x``, for the channels that are constant.

    ``taps`` is the weight as [outputs, inputs of a group, places of the kernel]; ``needed`` says
    which outputs are read by anything but a multiplication by zero; ``relation`` which inputs are
    constants and a sum of others.
    """

    def __init__(
        self, node: fx.Node, x: Fact, weight: Fact, how: tuple[Any, ...] | None, needed: Tensor,
        relation: Relation | None = None,
    ) -> None:  # fmt: skip
        self.node, self.how, self.needed, self.relation = node, how, needed, relation
        dim, before = 1 if how else -1, x.unknown
        x = x if relation is None else relation.filled(x, dim)
        related = (before & ~x.unknown).movedim(dim, 0)
        self.related = related.reshape(len(related), -1).any(1)  # constants and a sum of others
        self.groups = how[5] if how else 1
        transposed = bool(how and how[3])
        self.taps = _taps(weight.value, self.groups, transposed)
        self.outputs, self.width = self.taps.shape[:2]
        channels, unknown = (
            part.movedim(1 if how else -1, 0).reshape(part.shape[1 if how else -1], -1)
            for part in (x.value, x.unknown)
        )
        self.state = torch.zeros(len(channels), dtype=torch.int64)
        self.nonzero = ~unknown.any(1) & (channels != 0).any(1)
        self.state[unknown.any(1)] = UNKNOWN
        self.reads = (self.taps != 0).any(2)
        self.bad = self.reads & self._spread(self.state > 0)
        self.columns = self.nonzero.nonzero().flatten()
        self.parts = torch.zeros(self.outputs, len(self.columns), dtype=torch.float64)
        self.uneven = torch.zeros(len(channels), dtype=torch.bool)
        self.flat = torch.zeros(len(channels), dtype=torch.bool)  # one number other than zero
        self.level = torch.zeros(len(channels), dtype=torch.float64)  # that number
        self.merged = torch.zeros(len(channels), dtype=torch.bool)
        if len(self.columns):
            self._constants(x, channels, weight)
        self.flat &= ~self.related  # none of them stands for other constants
        if relation is not None and relation.keeps is not None:
            self.bad[:, relation.keeps] |= (self.reads & self.related).any(1)

    def _spread(self, channels: Tensor) -> Tensor:
        """A vector of inputs as [outputs, inputs of a group]."""
        rows = channels.reshape(self.groups, 1, self.width)
        return rows.expand(-1, self.outputs // self.groups, -1).reshape(self.outputs, self.width)

    def _constants(self, x: Fact, channels: Tensor, weight: Fact) -> None:
        """What constant channels add, taken in the middle, and whether it is the same all over."""
        patterns, middle = _patterns(x.value, weight.value, self.how)
        low, high = channels.amin(1), channels.amax(1)
        self.flat = self.nonzero & (high - low <= EVEN * torch.maximum(high.abs(), low.abs()))
        self.level[self.flat] = channels[self.flat, 0]
        step = max(1, (1 << 24) // (self.outputs * len(patterns)))
        for start in range(0, len(self.columns), step):
            places = torch.arange(start, min(start + step, len(self.columns)))
            rows, taps = self._of(self.columns[places])
            sums = torch.einsum("ut,oct->uoc", patterns, taps) * channels[self.columns[places], 0]
            gap, size = sums.amax(0) - sums.amin(0), taps.abs().sum(2)
            size = size * high[self.columns[places]].abs()
            self._store(places, rows, sums[middle], gap > EVEN * size)
        for place, column in enumerate(self.columns.tolist()):
            if not self.flat[column]:
                self._varying(place, column, x, weight)

    def _of(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Which outputs read some inputs, [outputs, columns], and with which taps."""
        group = columns // self.width
        own = torch.arange(self.outputs) // (self.outputs // self.groups)
        rows = own[:, None] == group
        return rows, self.taps[:, columns % self.width] * rows[..., None]

    def _store(self, places: Tensor, rows: Tensor, part: Tensor, uneven: Tensor) -> None:
        columns = self.columns[places]
        self.parts[:, places] = part
        outputs, which = (uneven & rows).nonzero(as_tuple=True)
        self.bad[outputs, columns[which] % self.width] = True
        self.state[columns[which]] = VARYING

    def _varying(self, place: int, column: int, x: Fact, weight: Fact) -> None:
        """A constant that is not the same at all places."""
        columns = torch.tensor([column])
        rows, taps = self._of(columns)
        self.bad[rows[:, 0], column % self.width] = False
        if self.how is None:
            values = x.value[..., column].flatten()
            sums = taps[:, 0] * values
            middle = len(values) // 2
        else:
            maps = x.value[:, column : column + 1]
            sums = _alone(maps, taps, weight.value, self.how).movedim(1, 0).flatten(1)
            shape = _alone(maps[:1], taps[:1], weight.value, self.how).shape[2:]
            middle = _centre(shape)
        gap = sums.amax(1) - sums.amin(1)
        uneven = gap > EVEN * sums.abs().amax(1)
        self.state[column] = 0
        self._store(torch.tensor([place]), rows, sums[:, [middle]], uneven[:, None])

    def settle(self, fold: str, sink: bool) -> None:
        """Decide about constants: ``fold`` as in ``Plan.from_masks``; ``sink``: a bias takes them.

        In the approximate mode the value in the middle stands for all places.
        """
        del self.taps  # as large as the weight
        if fold == "approximate":
            self.uneven = self.state == VARYING
            self.state[self.uneven] = 0
            self.bad &= self._spread(~self.uneven)
        if fold == "none" or not sink:
            self.state[self.nonzero] = NONZERO if fold == "none" else NO_BIAS
            self.bad |= self.reads & self._spread(self.nonzero)

    def added(self) -> Tensor:
        """What each constant input adds to each output that is needed, [outputs, inputs]."""
        part = torch.zeros(self.outputs, len(self.state), dtype=torch.float64)
        part[:, self.columns] = self.parts
        part[~self.needed] = 0
        return part

    @property
    def left_over(self) -> Tensor:
        """Inputs of one constant that no bias can take, at the borders, say."""
        return self.flat & ((self.state == VARYING) | (self.state == NO_BIAS))

    def merge(self, merged: Tensor) -> None:
        """Inputs whose constants go to the weights of another constant input that stays."""
        self.merged = merged
        self.state[merged] = 0
        self.bad &= self._spread(~merged)
        self.parts[:, merged[self.columns]] = 0

    def refuse(self, columns: Tensor) -> None:
        """Inputs that must stay because they are another constant in another call."""
        self.state[columns] = CHANGING
        self.bad |= self.reads & self._spread(columns)

    def unrelate(self) -> None:
        """Inputs that are a sum of others must stay: nothing can take that up."""
        self.refuse(self.related)
        self.state[self.related] = UNKNOWN
        self.relation = None

    def blocked(self, kept: Tensor) -> Tensor:
        """Inputs that must stay because of what they add to kept outputs."""
        rows = (self.bad & kept[:, None]).reshape(self.groups, -1, self.width)
        return rows.any(1).flatten()

    def read_by(self, kept: Tensor) -> Tensor:
        """Inputs that kept outputs read."""
        return (self.reads & kept[:, None]).reshape(self.groups, -1, self.width).any(1).flatten()

    def reason(self, channel: int) -> str:
        """Why an input must stay."""
        return REASONS[int(self.state[channel])]


def _taps(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    flat = weight.reshape(*weight.shape[:2], -1)
    if not transposed:
        return flat
    split = flat.reshape(groups, -1, *flat.shape[1:]).transpose(1, 2)
    return split.reshape(-1, *split.shape[2:])


def _patterns(x: Tensor, weight: Tensor, how: tuple[object, ...] | None) -> tuple[Tensor, int]:
    """Which taps fall on the map and not on its padding, at all places: distinct rows of ones.

    Returns:
        [patterns, taps] of ones and zeroes, and the number of the pattern in the middle.
    """
    if how is None:
        return torch.ones(1, 1, dtype=torch.float64), 0
    count = math.prod(weight.shape[2:])
    ones = torch.ones(1, 1, *x.shape[2:], dtype=torch.float64)
    taps = torch.eye(count, dtype=torch.float64)[:, None]
    maps = _alone(ones, taps, weight, how)
    patterns, which = maps.flatten(2)[0].T.unique(dim=0, return_inverse=True)
    return patterns, int(which[_centre(maps.shape[2:])])


def _alone(maps: Tensor, taps: Tensor, weight: Tensor, how: tuple[object, ...]) -> Tensor:
    """One input channel by itself, with ``taps`` [outputs, 1, places of the kernel]."""
    kernel = taps.reshape(len(taps), 1, *weight.shape[2:])
    kernel = kernel.transpose(0, 1) if how[3] else kernel
    return aten.convolution.default(maps, kernel, None, *how[:5], 1)


def _centre(shape: Sequence[int]) -> int:
    place = 0
    for size in shape:
        place = place * size + size // 2
    return place


def parts_of(node: fx.Node) -> tuple[Any, Any, Any, bool, tuple[Any, ...] | None] | None:
    """Input, weight, bias, whether inputs come first in the weight, and how it is convolved."""
    factors = matrix_of(node)
    if factors is None:
        return None
    return factors.x, factors.weight, factors.bias, factors.turned, factors.window
