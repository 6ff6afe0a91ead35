"""What channels cost when the layers that read them are refitted, on items not refitted to.

Least squares on few rows explains them all: with fewer rows than channels every channel is a
combination of others, and seems to leave for nothing. A refit is therefore made from one half of
the items and judged on the other, as it will be judged on the items that a model meets later; and
so is the ridge of the refit chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CHECKS = 10  # numbers of removed channels at which errors are computed
_SMALL = 1e-3  # of the worth of a weight: rows that make up no more are passed over


@dataclass(frozen=True)
class Halves:
    """A weight, and what it reads in two halves of the items.

    Attributes:
        covariances: of the columns in each half, [b, n, n].
        weight: in units of the outputs' worth, [b, rows, n].
        columns: of each channel, [channels, columns each].
    """

    covariances: tuple[Tensor, Tensor]
    weight: Tensor
    columns: Tensor

    @cached_property
    def rows(self) -> Tensor:
        """Numbers of the rows that are worth something."""
        power, order = self.weight.square().sum((0, 2)).sort(descending=True)
        behind = power.flip(0).cumsum(0).flip(0)  # of each row and all that are worth less
        return order[behind > _SMALL * power.sum()]

    def ridge(self) -> float:
        """The one whose refit without half of the channels is best on the other half."""
        if len(self.columns) < 2:
            return RIDGES[0]
        return min(RIDGES, key=lambda ridge: self.error(self.cheap, ridge))

    def seen(self) -> tuple[float, float]:
        """The error without half of the channels: on the items refitted to, and on others."""
        ridge = self.ridge()
        return self.error(self.cheap, ridge, others=False), self.error(self.cheap, ridge)

    @cached_property
    def cheap(self) -> Tensor:
        """Half of the channels: those with the least energy."""
        first, second = (each.diagonal(dim1=-2, dim2=-1) for each in self.covariances)
        energy = self.weight.square().sum(1) * (first + second)
        each = energy.sum(0)[self.columns].sum(1)
        return each.argsort(stable=True)[: len(self.columns) // 2]

    def error(self, leaving: Tensor, ridge: float, others: bool = True) -> float:
        """The squared error without some channels, each half being refitted from the other.

        Args:
            leaving: numbers of the channels.
            ridge: of the refit.
            others: otherwise each half is refitted from itself.
        """
        gone = self.columns[leaving].flatten()
        stays = torch.ones(self.weight.shape[-1], dtype=torch.bool)
        stays[gone] = False
        rest = stays.nonzero()[:, 0]
        lost = self.weight[:, self.rows][:, :, gone]
        fits = self.covariances
        checks = fits[::-1] if others else fits
        found = sum(_error(*pair, lost, gone, rest, ridge) for pair in zip(fits, checks))
        return found / len(fits)


def _error(
    fit: Tensor, check: Tensor, lost: Tensor, gone: Tensor, rest: Tensor, ridge: float
) -> float:
    """The error that one refit leaves on other items.

    Args:
        fit: covariance of the items that are fitted, [b, n, n].
        check: of the others.
        lost: the weights that read what is gone, [b, rows, gone].
        gone: numbers of the columns that are.
        rest: of the others.
        ridge: as a fraction of the mean variance.
    """
    change = _refit(fit, lost, gone, rest, ridge)
    across = check[:, rest[:, None], gone] @ lost.mT
    error = ((lost @ check[:, gone[:, None], gone]) * lost).sum()
    error = error - 2 * (change.mT * across).sum()
    return float(error + ((change @ check[:, rest[:, None], rest]) * change).sum())


def _refit(fit: Tensor, lost: Tensor, gone: Tensor, rest: Tensor, ridge: float) -> Tensor:
    """Changes of the weights that stay, [b, rows, rest]."""
    diagonal = fit.diagonal(dim1=-2, dim2=-1)
    level = ridge * diagonal.mean(-1) + 1e-12 * (diagonal.amax() + 1e-30)
    matrix = fit[:, rest[:, None], rest] + level[:, None, None] * torch.eye(len(rest)).double()
    factor, info = torch.linalg.cholesky_ex(matrix)
    wanted = fit[:, rest[:, None], gone] @ lost.mT
    if bool((info != 0).any()):
        return (torch.linalg.pinv(matrix, hermitian=True) @ wanted).mT
    return torch.cholesky_solve(wanted, factor).mT


def held_out(
    sides: Sequence[Halves], ridges: Sequence[float], order: Tensor, costs: Tensor
) -> Tensor:
    """Costs of channels in the order in which they leave, on items not refitted to.

    Args:
        sides: the weights that read the channels.
        ridges: of each of them.
        order: channels, [leaving].
        costs: what each seems to cost where all items are refitted to; between two numbers of
            removed channels at which the error is computed, it is shared out as these are.
    """
    found = costs.clone()
    checks = sorted({round(len(order) * (n + 1) / CHECKS) for n in range(CHECKS)} - {0})
    start, before = 0, 0.0
    for stop in checks:
        held = sum(side.error(order[:stop], r) for side, r in zip(sides, ridges))
        # what n rows leave on others is e + v / n, on themselves e - v / n; n / 2 rows: e + 2 v / n
        error = (2 * held + float(costs[:stop].sum())) / 3
        part, more = costs[start:stop], max(error - before, 0.0)
        whole = float(part.sum())
        shares = part / whole if whole > 0 else torch.full_like(part, 1 / len(part))
        found[start:stop] = more * shares
        start, before = stop, max(error, before)
    return found
