"""Sums over calibration data: of squared errors, and of the normal equations of a refit."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from graphprune.ranks import Ranks

_STEPS = 200  # of conjugate gradients
_LARGEST = 1 << 25  # numbers in the systems of all rows: beyond, gradients are less
_CLOSE = 1e-16  # of the squared residual: rounding
K = TypeVar("K", bound=Hashable)
E = TypeVar("E", bound="Errors")
Refit = Callable[["Sums"], tuple[Tensor, Tensor]]
RIDGES = tuple(10.0**power for power in range(-5, 4))  # that are tried, from a middle one on
_FIRST = 2


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

    @classmethod
    def of(cls, parts: Iterable[Sums]) -> Sums:
        """The sums of several parts of the data."""
        total = cls()
        for part in parts:
            for name in (each.name for each in fields(cls)):
                setattr(total, name, getattr(total, name) + getattr(part, name))
        return total

    def without(self, part: Sums) -> Sums:
        """What the normal equations need, without a part of the data."""
        names = ("count", "xx", "xe", "x", "e")
        return Sums(**{name: getattr(self, name) - getattr(part, name) for name in names})

    def read(self, rows: Tensor, e: Tensor, weights: bool) -> None:
        """Windows of shape [places, groups, n], and errors of shape [places, groups, outputs]."""
        columns = rows.permute(1, 2, 0).contiguous()
        e = e.transpose(0, 1)
        if weights:
            self.xx = self.xx + (columns @ columns.mT).double()
            self.xe = self.xe + (columns @ e).double()
        self.x = self.x + columns.sum(-1).double()
        self.e = self.e + e.sum(1).double()

    def gain(self, change: Tensor, shift: Tensor, slope: Tensor) -> float:
        """By how much the squared error falls, in units of the values at the end.

        Args:
            change: of the weights, [groups, outputs, n].
            shift: of the bias, [groups, outputs].
            slope: the factor between the output of the layer and these values, [channels].
        """
        x, e, xe = (torch.as_tensor(t) for t in (self.x, self.e, self.xe))
        fit = shift * e
        size = shift * self.count * shift
        if isinstance(self.xx, Tensor):
            fit = fit + (change * xe.mT).sum(-1)
            size = size + 2 * shift * (change @ x[:, :, None])[:, :, 0]
            size = size + ((change @ self.xx) * change).sum(-1)
        return float((slope.square().reshape(shift.shape) * (2 * fit - size)).sum())

    def solve(
        self, ridge: float, centred: bool, weights: bool, free: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Changes of the weights, [groups, outputs, n], and of the bias, [groups, outputs].

        Args:
            ridge: as for ``calibrate``; infinite where the weights stay.
            centred: there is a bias.
            weights: otherwise only the bias changes.
            free: which weights may change, [groups, outputs, n]; all when absent.
        """
        if not weights or math.isinf(ridge):
            e = torch.as_tensor(self.e) / self.count
            still = e.new_zeros(*e.shape, torch.as_tensor(self.x).shape[-1])
            return still, e if centred else torch.zeros_like(e)
        xx, xe, x, e = (torch.as_tensor(t) / self.count for t in (self.xx, self.xe, self.x, self.e))
        if centred:
            xx = xx - x[:, :, None] * x[:, None, :]
            xe = xe - x[:, :, None] * e[:, None, :]
        size = xx.shape[-1]
        level = ridge * xx.diagonal(dim1=-2, dim2=-1).mean(-1)
        level = level.clamp_min(torch.finfo(torch.float64).tiny)
        xx = xx + level[:, None, None] * torch.eye(size, dtype=xx.dtype, device=xx.device)
        change = _solve(xx, xe).mT if free is None else _solve_where(xx, xe.mT, free)
        shift = e - (change @ x[:, :, None])[:, :, 0]
        return change, shift if centred else torch.zeros_like(shift)


def reduced(own: Mapping[K, E], ranks: Ranks, device: torch.device | str = "cpu") -> dict[K, E]:
    """Sums over the data of all ranks, by name."""
    if ranks.size == 1:
        return dict(own)
    kinds: dict[K, type[E]] = ranks.union({name: type(sums) for name, sums in own.items()})
    parts = {
        (name, each.name): torch.as_tensor(getattr(sums, each.name), dtype=torch.float64)
        for name, sums in own.items()
        for each in fields(sums)
        if isinstance(getattr(sums, each.name), Tensor) or getattr(sums, each.name)
    }
    found = {name: kind() for name, kind in kinds.items()}
    for (name, field), total in ranks.sums(parts, device).items():
        kind = type(getattr(found[name], field))
        setattr(found[name], field, total if total.dim() else kind(total))
    return found


def moments(outputs: list[Tensor], device: torch.device, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Variance and mean by channel over all batches, in float64."""
    own = {"count": torch.tensor(float(sum(y.numel() // y.shape[1] for y in outputs)))}
    dims = [[d for d in range(y.dim()) if d != 1] for y in outputs]
    if outputs:
        sums = [real(y).sum(d).double() for y, d in zip(outputs, dims)]
        own["sum"] = torch.stack(sums).sum(0)
    found = ranks.sums(own, device)
    mean = found["sum"] / found["count"]
    squares = {}
    if outputs:
        gaps = [real(y) - mean.to(real(y)).reshape(-1, *[1] * (y.dim() - 2)) for y in outputs]
        parts = [gap.square().sum(d).double() for gap, d in zip(gaps, dims)]
        squares[""] = torch.stack(parts).sum(0)
    return ranks.sums(squares, device)[""] / (found["count"] - 1).clamp_min(1), mean


def real(x: Tensor) -> Tensor:
    """In single or double precision."""
    return x if x.dtype == torch.float64 else x.float()


def held_out(folds: Sequence[Sums], slope: Tensor, refit: Refit, ranks: Ranks) -> float:
    """By how much a refit lowers the squared error of items that it has not seen.

    Args:
        folds: sums of parts of the items; each is held out in turn.
        slope: as for :meth:`Sums.gain`.
        refit: from the sums of the others to changes of weights and bias.
        ranks: which take turns with the folds.
    """
    total = Sums.of(folds)
    found = 0.0
    for fold in folds[ranks.rank :: ranks.size]:
        change, shift = refit(total.without(fold))
        found += fold.gain(change, shift, slope)
    return sum(ranks.share(found))


def choose(
    gain: Callable[[float, bool], float], ridge: float | None, centred: bool, weights: bool
) -> tuple[float, bool, float]:
    """How strongly to hold the weights, and whether to move the bias, by the gain.

    Args:
        gain: by how much the error of items held out falls, given the two.
        ridge: what the user asks for.
        centred: there is a bias.
        weights: otherwise only the bias may move.

    Returns:
        The ridge, infinite where weights stay; whether the bias moves; the gain.
    """
    best = math.inf, centred, gain(math.inf, centred)
    for shifted in (True, False) if centred else (False,):
        if weights and (shifted is centred or not best[2] > 0):
            found = _search(gain, shifted) if ridge is None else (ridge, gain(ridge, shifted))
            best = max(best, (found[0], shifted, found[1]), key=lambda option: option[2])
    return best


def _search(gain: Callable[[float, bool], float], shifted: bool) -> tuple[float, float]:
    """The ridge with the largest gain, from the middle of ``RIDGES`` uphill; and the gain."""
    known: dict[int, float] = {}

    def at(place: int) -> float:
        if not 0 <= place < len(RIDGES):
            return -math.inf
        if place not in known:
            known[place] = gain(RIDGES[place], shifted)
        return known[place]

    best = _FIRST
    step = 1 if at(best + 1) >= at(best) else -1
    while at(best + step) > at(best):
        best += step
    return RIDGES[best], at(best)


def _solve(matrix: Tensor, wanted: Tensor) -> Tensor:
    """Of a symmetric positive matrix; the least solution where rounding has made it none."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        return torch.linalg.pinv(matrix, rtol=1e-13, hermitian=True) @ wanted
    return torch.cholesky_solve(wanted, factor)


def _solve_where(matrix: Tensor, wanted: Tensor, free: Tensor) -> Tensor:
    """Rows x that solve ``x @ matrix = wanted`` best and are zero but where they are free.

    Where few weights of a row are zero, as rounding leaves them, the solution with all of them is
    corrected (Hassibi and Stork, "Second order derivatives for network pruning", NIPS 1992).
    Else conjugate gradients (Hestenes and Stiefel, 1952), scaled by the diagonal: every row has
    other places that are free, and a factorisation for each would cost too much. Every step lowers
    the error; rows that have converged stand still.

    Args:
        matrix: symmetric and positive, of shape [groups, n, n].
        wanted: of shape [groups, rows, n].
        free: boolean, of shape [groups, rows, n].
    """
    counts = (~free).sum(-1)
    if int((counts > 0).sum()) * int(counts.max()) ** 2 <= _LARGEST:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not bool((info != 0).any()):
            return _corrected(torch.cholesky_inverse(factor), wanted, free, counts)
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


def _corrected(inverse: Tensor, wanted: Tensor, free: Tensor, counts: Tensor) -> Tensor:
    """The solution of every row, minus what makes its fixed places zero at the least cost.

    Args:
        inverse: of the matrix, [groups, n, n].
        wanted: [groups, rows, n].
        free: boolean, [groups, rows, n].
        counts: how many places of each row are not free, [groups, rows].
    """
    found = wanted @ inverse
    group, row = (counts > 0).nonzero(as_tuple=True)  # the rows with such places
    held, places = (~free[group, row]).sort(dim=-1, descending=True, stable=True)
    most = int(counts.max())
    held, places = held[:, :most], places[:, :most]
    block = inverse[group[:, None, None], places[:, :, None], places[:, None, :]]
    unit = torch.eye(most, dtype=block.dtype, device=block.device)
    block = torch.where(held[:, :, None] & held[:, None, :], block, unit)
    amounts = found[group, row].gather(-1, places) * held
    forces = torch.linalg.solve(block, amounts[..., None])[..., 0]
    spread = torch.zeros_like(found)
    spread[group[:, None], row[:, None], places] = forces * held
    return (found - spread @ inverse) * free
