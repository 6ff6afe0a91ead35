"""Products with a weight as matrix products: what every output reads, as rows of a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.record.observe import Pads, Product


@dataclass(frozen=True)
class Window:
    """How a linear layer or a convolution reads its input.

    Attributes:
        kind: ``"linear"``, ``"convolution"`` or ``"transposed"`` (a transposed convolution).
        kernel, stride, dilation: one int per spatial dimension; empty for linear layers.
        pads: zeros before and after, per spatial dimension; for transposed convolutions what is
            cut from the border.
        groups: of a convolution.
    """

    kind: str
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    pads: Pads = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, product: Product) -> Window:
        """How a product that has run reads its input."""
        linear = product.kind == "linear"
        kernel = () if linear else tuple(product.value.shape[2:])
        return cls(
            product.kind, kernel, product.stride, product.pads, product.dilation, product.groups
        )

    def rows(self, x: Tensor, pick: Tensor | None = None) -> Tensor:
        """What output places read, in the order of the columns of :meth:`matrix`.

        Args:
            x: the input of the layer.
            pick: numbers of the output places of the whole batch; all of them when absent.

        Returns:
            Shape [places, groups, columns].
        """
        if self.kind == "linear":
            lines = x.reshape(-1, x.shape[-1])
            lines = lines if pick is None else lines[pick]
        else:
            lines = self._gathered(x, pick)
        return lines.reshape(len(lines), self.groups, -1)

    def _gathered(self, x: Tensor, pick: Tensor | None) -> Tensor:
        """The windows of a convolution, [places, channels, kernel]: channels are read together."""
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel)]
        stride, pads = self.stride, list(self.pads)
        if self.kind == "transposed":  # zeros between the inputs, read by the flipped kernel
            x = _stuffed(x, self.stride)
            stride = (1,) * len(self.kernel)
            pads = [(span - a, span - b) for span, (a, b) in zip(spans, self.pads)]
        if any(map(any, pads)):
            x = F.pad(x, [p for pair in reversed(pads) for p in pair])
        sizes = (len(x), *x.shape[2:])
        strides = [math.prod(sizes[d + 1 :]) for d in range(len(sizes))]
        lead = [len(x), *((n - s - 1) // t + 1 for n, s, t in zip(x.shape[2:], spans, stride))]
        steps = [strides[0], *(s * t for s, t in zip(strides[1:], stride))]
        first = _grid(lead, steps).to(x.device)
        taps = _grid(self.kernel, [s * d for s, d in zip(strides[1:], self.dilation)]).to(x.device)
        places = (first if pick is None else first[pick])[:, None] + taps
        lines = x.movedim(1, -1).reshape(-1, x.shape[1]).index_select(0, places.flatten())
        return lines.reshape(*places.shape, -1).transpose(1, 2)

    def outputs(self, y: Tensor, pick: Tensor | None = None) -> Tensor:
        """The outputs at these places: [places, groups, outputs per group]."""
        y = y if self.kind == "linear" else y.movedim(1, -1)
        rows = y.flatten(0, -2) if pick is None else y[torch.unravel_index(pick, y.shape[:-1])]
        return rows.reshape(len(rows), self.groups, -1)

    def places(self, y: Tensor) -> int:
        """How many output places an output has."""
        return y.numel() // y.shape[-1 if self.kind == "linear" else 1]

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as [groups, outputs per group, columns]; columns are (channel, kernel)."""
        if self.kind == "transposed":
            inputs, outputs, *kernel = weight.shape
            blocks = weight.reshape(self.groups, inputs // self.groups, outputs, *kernel)
            blocks = blocks.transpose(1, 2).flip([*range(3, blocks.dim())])
            return blocks.reshape(self.groups, outputs, -1)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`, in the shape of a weight."""
        if self.kind != "transposed":
            return matrix.reshape(like.shape)
        inputs, outputs, *kernel = like.shape
        blocks = matrix.reshape(self.groups, outputs, inputs // self.groups, *kernel)
        return blocks.flip([*range(3, blocks.dim())]).transpose(1, 2).reshape(like.shape)


def _grid(sizes: Sequence[int], steps: Sequence[int]) -> Tensor:
    """The sums of the coordinates of all points of a grid, each times its step."""
    found = torch.zeros((), dtype=torch.int64)
    for size, step in zip(sizes, steps):
        found = found[..., None] + torch.arange(size) * step
    return found.flatten()


def _stuffed(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The input with zeros between its places."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    steps = [slice(None, None, s) for s in stride]
    wide[(slice(None), slice(None), *steps)] = x
    return wide
