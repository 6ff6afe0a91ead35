"""What a product multiplies, unpacked once for everyone who asks: scoring, counting, repair.

A rule for factors takes the arguments of an op, with anything in the place of tensors, and says
which of them are multiplied. MACs and facts follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graphprune.ops.fact import Fact, contracted


@dataclass(frozen=True)
class Factors:
    """A sum of products, with the arguments of an op.

    Attributes:
        operands: what is multiplied; of a layer the activation and the weight.
        product: a function of the operands: the sum without what is added afterwards.
        bias: what is added.
        scales: factors of the bias and of the product.
        matrix: the weight is a matrix, or the kernel of a convolution: a layer.
        turned: the matrix lies as [inputs, outputs].
        needs: what else the product is made with, such as where groups of rows end.
        window: of a convolution its stride, padding, dilation, whether it is transposed, output
            padding and groups.
    """

    operands: tuple[Any, ...]
    product: Callable[..., Tensor]
    bias: Any = None
    scales: tuple[float, float] = (1, 1)
    matrix: bool = False
    turned: bool = False
    needs: tuple[Any, ...] = ()
    window: tuple[Any, ...] | None = None

    @property
    def x(self) -> Any:
        """The activation of a layer."""
        return self.operands[0]

    @property
    def weight(self) -> Any:
        """The weight of a layer."""
        return self.operands[1]

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.window is not None and bool(self.window[3])

    @property
    def groups(self) -> int:
        """Groups of a convolution."""
        return 1 if self.window is None else int(self.window[5])

    @property
    def dim(self) -> int:
        """The dimension of the channels in what a layer reads and in what it makes."""
        return -1 if self.window is None else 1

    def macs(self, out: Any) -> Any:
        """Multiply-accumulates, where the operands are shapes."""
        if self.window is None:
            return math.prod(out) * self.x[-1]
        return math.prod(self.x if self.transposed else out) * math.prod(self.weight[1:])

    def fact(self) -> Fact:
        """What is known of the result, where the operands are facts."""
        bias, (beta, alpha) = self.bias, self.scales
        if bias is not None and self.window is not None:
            shape = (-1, *[1] * (self.x.value.dim() - 2))
            bias = Fact(bias.value.reshape(shape), bias.unknown.reshape(shape))
        if bias is not None and beta != 1:
            bias = Fact(bias.value * beta, bias.unknown)
        if alpha == 1:
            return contracted(self.product, self.operands, bias)
        return contracted(lambda *factors: alpha * self.product(*factors), self.operands, bias)
