"""Sums over calibration data: of squared errors, and of the normal equations of a refit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def solve(self, ridge: float, centred: bool, weights: bool) -> tuple[Tensor, Tensor]:
        """Changes of the weights, [groups, outputs, n], and of the bias, [groups, outputs]."""
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
        change = torch.linalg.solve(xx, xe).mT
        return change, e - (change @ x[:, :, None])[:, :, 0]
