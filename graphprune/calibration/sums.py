"""Sums over calibration data: of squared errors, and of the normal equations of a refit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 200  # of conjugate gradients
_CLOSE = 1e-16  # of the squared residual: rounding


@dataclass
class Errors:
    """Squared errors at the end of a layer, and how much the values there vary, in float64."""

    error: float = 0.0  # the sum of squared errors
    goal: Tensor | float = 0.0  # the sums of the wanted values, by channel
    squares: float = 0.0  # the sum of their squares
    count: int = 0  # places

    def add(self, gap: Tensor, goal: Tensor) -> None:
        """Errors and wanted values, of shape [places, ...]."""
        self.error += float(gap.double().square().sum())
        self.squares += float(goal.double().square().sum())
        self.goal = self.goal + goal.double().sum(0)
        self.count += len(goal)

    @property
    def energy(self) -> float:
        """The squared deviation of the wanted values from their means."""
        total = torch.as_tensor(self.goal)
        energy = self.squares - float(total.square().sum()) / max(self.count, 1)
        return max(energy, torch.finfo(torch.float64).tiny)

    @property
    def relative(self) -> float:
        """The squared error as a fraction of the energy."""
        return self.error / self.energy


@dataclass
class Sums(Errors):
    """What the normal equations of one block of columns need as well.

    With windows x and errors e: sums of x x', x e', x and e, of shapes [groups, n, n],
    [groups, n, outputs], [groups, n] and [groups, outputs].
    """

    xx: Tensor | float = 0.0
    xe: Tensor | float = 0.0
    x: Tensor | float = 0.0
    e: Tensor | float = 0.0

    def solve(
        self, ridge: float, centred: bool, weights: bool, free: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Changes of the weights, [groups, outputs, n], and of the bias, [groups, outputs].

        Args:
            ridge: as for ``calibrate``.
            centred: there is a bias.
            weights: otherwise only the bias changes.
            free: which weights may change, [groups, outputs, n]; all when absent.
        """
        xx, xe, x, e = (torch.as_tensor(t) / self.count for t in (self.xx, self.xe, self.x, self.e))
        if centred:
            xx = xx - x[:, :, None] * x[:, None, :]
            xe = xe - x[:, :, None] * e[:, None, :]
        if not weights:
            return torch.zeros_like(xe.mT), e
        size = xx.shape[-1]
        level = ridge * xx.diagonal(dim1=-2, dim2=-1).mean(-1)
        level = level.clamp_min(torch.finfo(torch.float64).tiny)
        xx = xx + level[:, None, None] * torch.eye(size, dtype=xx.dtype, device=xx.device)
        change = torch.linalg.solve(xx, xe).mT if free is None else _solve_where(xx, xe.mT, free)
        return change, e - (change @ x[:, :, None])[:, :, 0]


def _solve_where(matrix: Tensor, wanted: Tensor, free: Tensor) -> Tensor:
    """Rows x of ``x @ matrix = wanted`` that are zero but where they are free.

    Conjugate gradients (Hestenes and Stiefel, 1952), scaled by the diagonal: every row has other
    places that are free, and a factorisation for each would cost too much. Every step lowers the
    error; rows that have converged stand still.

    Args:
        matrix: symmetric and positive, of shape [groups, n, n].
        wanted: of shape [groups, rows, n].
        free: boolean, of shape [groups, rows, n].
    """
    scale = matrix.diagonal(dim1=-2, dim2=-1)[:, None]
    found, left = torch.zeros_like(wanted), wanted * free
    enough = _CLOSE * left.square().sum(-1, keepdim=True)
    step = left / scale
    energy = (left * step).sum(-1, keepdim=True)
    for _ in range(_STEPS):
        moved = (step @ matrix) * free
        far = left.square().sum(-1, keepdim=True) > enough
        if not bool(far.any()):
            break
        along = torch.where(far, energy / (step * moved).sum(-1, keepdim=True), 0.0)
        found, left = found + along * step, left - along * moved
        now = (left * left / scale).sum(-1, keepdim=True)
        step = left / scale + torch.where(far, now / energy, 0.0) * step
        energy = now
    return found
