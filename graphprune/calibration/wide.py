"""The refit of a layer with more inputs than rows can tell apart, from products of its rows.

With rows X and errors E the ridge regression is ``X' (X X' + level)^-1 E``: what has to be solved
is as large as there are rows, however many inputs there are (Saunders et al., "Ridge Regression
Learning Algorithm in Dual Variables", ICML 1998).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.ranks import Ranks


@dataclass
class Dual:
    """Rows of one layer by their products.

    Attributes:
        products: of rows with each other, [rows, rows], float64.
        errors: in the units of the layer's output, [rows, outputs], float64.
        parts: the part of the items that each row belongs to.
        columns: how many inputs there are.
        slope: the factor between the output and where errors count, [outputs].
    """

    products: Tensor
    errors: Tensor
    parts: Tensor
    columns: int
    slope: Tensor

    def solve(self, ridge: float, centred: bool) -> tuple[Tensor, Tensor]:
        """Factors of the rows in the change of the weights, [rows, outputs]; and of the bias."""
        rows = torch.arange(len(self.errors))
        factors, mean = self._factors(rows, ridge, centred)
        shift = mean - (self.products @ factors).mean(0) if centred else torch.zeros_like(mean)
        return factors, shift

    def gain(self, factors: Tensor, shift: Tensor) -> float:
        """By how much the squared error of all rows falls."""
        left = self.errors - self.products @ factors - shift
        return self._size(self.errors) - self._size(left)

    def _size(self, errors: Tensor) -> float:
        return float((errors * self.slope).square().sum())

    def _factors(self, rows: Tensor, ridge: float, centred: bool) -> tuple[Tensor, Tensor]:
        """From some rows: factors that sum to zero where there is a bias; the mean error."""
        errors = self.errors[rows]
        mean = errors.mean(0) if centred else torch.zeros_like(errors[0])
        if math.isinf(ridge):
            return torch.zeros_like(errors), mean
        found = self.products[rows[:, None], rows]
        if centred:
            found = found - found.mean(0) - found.mean(1, keepdim=True) + found.mean()
        level = ridge * found.diagonal().mean() / self.columns
        level = level.clamp_min(torch.finfo(torch.float64).tiny)
        unit = torch.eye(len(rows), dtype=found.dtype, device=found.device)
        factors = torch.linalg.solve(found / len(rows) + level * unit, (errors - mean) / len(rows))
        return factors - factors.mean(0) if centred else factors, mean

    def held_out(self, ridge: float, centred: bool) -> float:
        """By how much a refit lowers the error of rows of a part that it has not seen."""
        gain = 0.0
        for number in self.parts.unique().tolist():
            rows, held = ((self.parts != number).nonzero()[:, 0], self.parts == number)
            factors, mean = self._factors(rows, ridge, centred)
            fitted = self.products[rows[:, None], rows] @ factors
            shift = mean - fitted.mean(0) if centred else mean
            left = self.errors[held] - self.products[held][:, rows] @ factors - shift
            gain += self._size(self.errors[held]) - self._size(left)
        return gain


class Rows:
    """The rows of all ranks, one rank after the other.

    Args:
        count: of the own rows.
        ranks: which have the others.
    """

    def __init__(self, count: int, ranks: Ranks) -> None:
        counts = ranks.share(count)
        start = sum(counts[: ranks.rank])
        self.ranks, self.total = ranks, sum(counts)
        self.own = slice(start, start + count)

    def of_all(self, own: Tensor) -> Tensor:
        """The rows of all ranks, from the own ones, [rows, ...]."""
        if self.ranks.size == 1:
            return own
        rows = own.new_zeros(self.total, *own.shape[1:])
        rows[self.own] = own
        return self.ranks.sum(rows)


def products(blocks: Iterable[Tensor]) -> Tensor:
    """Products of rows with each other, from blocks of their columns, [rows, columns]."""
    total: Tensor | float = 0.0
    for block in blocks:
        total = total + (block @ block.mT).double()
    assert isinstance(total, Tensor)
    return total


def changes(blocks: Iterable[Tensor], factors: Tensor) -> Iterator[Tensor]:
    """Changes of the weights that read each block of columns, [outputs, columns]."""
    for block in blocks:
        yield (factors.to(block).mT @ block).double()
