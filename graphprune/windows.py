"""Products with a weight as matrix products: what every output reads, as rows of a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.observe import Pads, Product


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

    def views(self, x: Tensor) -> Tensor:
        """What every output place reads, as a view: [batch, *places, channels, *kernel]."""
        if self.kind == "linear":
            return x if x.dim() > 1 else x.unsqueeze(0)
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel)]
        stride = self.stride
        pads = list(self.pads)
        if self.kind == "transposed":  # zeros between the inputs, read by the flipped kernel
            x = _stuffed(x, self.stride)
            stride = (1,) * len(self.kernel)
            pads = [(span - a, span - b) for span, (a, b) in zip(spans, self.pads)]
        if any(map(any, pads)):
            x = F.pad(x, [p for pair in reversed(pads) for p in pair])
        for dim, (span, step, dilation) in enumerate(zip(spans, stride, self.dilation), start=2):
            x = x.unfold(dim, span + 1, step)[..., ::dilation]
        places = range(2, 2 + len(self.kernel))
        kernel = range(2 + len(self.kernel), x.dim())
        return x.permute(0, *places, 1, *kernel)

    def rows(self, x: Tensor, pick: Tensor | None = None) -> Tensor:
        """What output places read, in the order of the columns of :meth:`matrix`.

        Args:
            x: the input of the layer.
            pick: numbers of the output places of the whole batch; all of them when absent.

        Returns:
            Shape [places, groups, columns].
        """
        view = self.views(x)
        lead = view.shape[: view.dim() - 1 - len(self.kernel)]
        if pick is not None:
            view = view[torch.unravel_index(pick, lead)]
            return view.reshape(len(pick), self.groups, -1)
        return view.reshape(math.prod(lead), self.groups, -1)

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


def _stuffed(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The input with zeros between its places."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    steps = [slice(None, None, s) for s in stride]
    wide[(slice(None), slice(None), *steps)] = x
    return wide
