"""How much a model suffers when one group alone loses channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.arguments import is_number
from graphprune.channels.analysis import Group
from graphprune.errors import InputError
from graphprune.execute.shrink import shrink
from graphprune.plan.plan import Plan
from graphprune.planning.draft import Draft
from graphprune.planning.make import assemble
from graphprune.planning.options import Request, check_ratio
from graphprune.planning.settle import Settled, follow
from graphprune.ranks import Ranks
from graphprune.record.agreement import agree
from graphprune.record.inputs import Call
from graphprune.record.tensors import fingerprint
from graphprune.text import new_figure, render, save_figure, shorten, tracked

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Curve:
    """What evaluation loses when one group loses channels.

    Attributes:
        key: a name for ``ratios``: the layer that writes the channels, or the group.
        layers: all layers of the group.
        size: its channels.
        ratios: fractions removed, increasing.
        drops: the evaluation of the whole model minus that of the model without them.
        slots: the dimensions of tensors that the group ties, which tell it from other groups.
        kind: ``"channels"``; or ``"block"``, ``"branch"`` or ``"experts"`` of a part, by its name.
    """

    key: str
    layers: tuple[str, ...]
    size: int
    ratios: tuple[float, ...]
    drops: tuple[float, ...]
    slots: tuple[tuple[str, int], ...] = ()
    kind: str = "channels"

    def at(self, ratios: np.ndarray) -> np.ndarray:
        """The drop at fractions in between, never falling; beyond the last one it rises on."""
        known = np.concatenate([[0.0], self.ratios])
        drops = np.maximum.accumulate(np.concatenate([[0.0], self.drops]))
        found = np.interp(ratios, known, drops)
        slope = (drops[-1] - drops[-2]) / (known[-1] - known[-2])
        slope = max(slope, drops[-1] / known[-1])
        return found + slope * np.maximum(ratios - known[-1], 0)


@dataclass(frozen=True)
class Sensitivity:
    """The drops of all groups; ``print`` it, :meth:`plot` it, or plan with it.

    Attributes:
        base: the evaluation of the whole model.
        curves: one for each group that can lose channels, and for each part that can leave.
    """

    base: float
    curves: tuple[Curve, ...]

    def allocation(self, max_drop: float) -> dict[str, float]:
        """For each group the largest fraction whose drop is not above a limit.

        Args:
            max_drop: in the unit of the evaluation, for each group alone.

        Returns:
            Fractions by layer, to be passed as ``ratios``.

        Raises:
            InputError: a negative limit.
        """
        if not is_number(max_drop, 0):
            raise InputError(f"max_drop must be at least 0, got {max_drop!r}")
        found = {}
        for curve in self.curves:
            if curve.kind != "channels":
                continue
            removed = np.arange(curve.size) / curve.size
            removed = removed[removed <= curve.ratios[-1] + 1e-9]  # beyond nothing was measured
            found[curve.key] = float(removed[curve.at(removed) <= max_drop + 1e-12].max())
        return found

    def levels(self, slots: Iterable[tuple[str, int]], size: int) -> np.ndarray | None:
        """The drop at which a group loses its channels, one by one; ``None`` if not measured."""
        slots = tuple(slots)
        for curve in self.curves:
            if curve.slots == slots and curve.size == size:
                removed = np.arange(1, size + 1) / size
                level = curve.at(removed) + 1e-9 * removed  # equal drops: the same fraction of all
                level[-1] = math.inf
                return level
        return None

    def parts(self) -> dict[str, float]:
        """The drop of every part without all of it, or as much as was tried, by its name."""
        return {c.key: c.drops[-1] for c in self.curves if c.kind != "channels"}

    def plot(self, path: str | Path) -> Path:
        """Draw the drops of all groups against the fractions removed.

        Args:
            path: where to write; the suffix chooses the format (``.svg``, ``.png``, ``.pdf``).
        """
        figure = new_figure(7, 4.5, layout="constrained")
        axes = figure.subplots()
        worst = sorted(self.curves, key=lambda curve: -curve.drops[-1])
        for rank, curve in enumerate(worst):
            label = curve.key if rank < 8 else None
            colour = f"C{rank}" if rank < 8 else "#c4cad1"
            points = (0.0, *curve.ratios), (0.0, *curve.drops)
            axes.plot(*points, marker=".", color=colour, label=label, zorder=8 - min(rank, 8))
        axes.set(xlabel="fraction of channels removed", ylabel=f"drop from {self.base:.4g}")
        axes.grid(alpha=0.3)
        if worst:
            axes.legend(title="most sensitive", fontsize="small")
        return save_figure(figure, path)

    def __str__(self) -> str:
        """A table of the drops, one line for each group."""
        ratios = sorted({ratio for curve in self.curves for ratio in curve.ratios})
        rows = []
        for curve in self.curves:
            drops = dict(zip(curve.ratios, curve.drops))
            cells = [f"{drops[r]:.4g}" if r in drops else "-" for r in ratios]
            rows.append((curve.key, curve.size, *cells, shorten(curve.layers)))
        header = ("group of", "channels", *(f"-{ratio:.0%}" for ratio in ratios), "layers")
        return render(f"drop of the evaluation from {self.base:.6g}", header, rows)


def sensitivity(
    model: nn.Module,
    call: Call,
    settled: Settled,
    evaluate: Evaluate,
    fractions: Sequence[float],
    request: Request,
) -> Sensitivity:
    """Measure every group by itself; see ``ChannelGraph.sensitivity``."""
    ranks = Ranks(request.process_group)
    with ranks.together():
        asked = _asked(evaluate, fractions)
        if fingerprint(model) != settled.analysis.architecture:
            raise InputError("the model is not of the architecture that was traced: trace it first")
        agree(ranks, (request.told, asked), model=model)
        evaluate = _mean_over(ranks, evaluate)
        base = number_of(evaluate(model))
        curves: list[Curve] = []
        if "channels" in request.parts:
            curves = _curves(model, call, settled, evaluate, asked, request, base)
        return Sensitivity(base, tuple(curves))


def of_parts(
    model: nn.Module,
    evaluate: Evaluate,
    base: float,
    parts: Iterable[tuple[str, str, tuple[str, ...], int, Mapping[float, Plan]]],
    request: Request,
) -> tuple[Curve, ...]:
    """What evaluation loses without parts.

    Args:
        model: the whole model.
        evaluate: the evaluation.
        base: that of the whole model.
        parts: kind, name, modules and size of every one, with plans by the fraction that leaves.
        request: which processes evaluate together.
    """
    ranks = Ranks(request.process_group)
    evaluate = _mean_over(ranks, evaluate)
    curves = []
    with ranks.together():
        for kind, name, modules, size, plans in parts:
            drops = {r: base - number_of(evaluate(shrink(model, p))) for r, p in plans.items()}
            if drops:
                found = tuple(drops), tuple(drops.values())
                curves.append(Curve(name, modules, size, *found, kind=kind))
    return tuple(curves)


def _asked(evaluate: Any, fractions: Any) -> tuple[float, ...]:
    if not callable(evaluate):
        raise InputError(f"evaluate must be a function model -> number, not {evaluate!r}")
    if not isinstance(fractions, Iterable):
        raise InputError(f"fractions must be several numbers in (0, 1), not {fractions!r}")
    asked = tuple(sorted(check_ratio(fraction, "each of fractions", "") for fraction in fractions))
    if not asked or asked[0] == 0 or len(set(asked)) < len(asked):
        raise InputError(f"fractions must be different numbers in (0, 1), got {list(fractions)}")
    return asked


def _curves(
    model: nn.Module,
    call: Call,
    settled: Settled,
    evaluate: Evaluate,
    asked: tuple[float, ...],
    request: Request,
    base: float,
) -> list[Curve]:
    draft = Draft(model, call, settled, request)
    groups = [group for group in settled.analysis.groups if group.name in draft.scores]
    curves = []
    for group in tracked(groups, "groups", len(groups), request.progress):
        drops: dict[float, float] = {}
        for ratio in asked:
            removed = min(int(ratio * group.size + 1e-9), group.size - 1)
            exact = removed / group.size
            if not removed or exact in drops:
                continue
            counts = np.array([other.size for other in settled.analysis.groups], float)
            counts[settled.analysis.groups.index(group)] -= removed
            chosen = {group.name: draft.kept(counts)[group.name]}
            finding = follow(model, call, settled, chosen)
            if not finding.possible:
                continue  # the code of the model ties it to what stays
            plan = assemble(call, finding.settled, chosen, rescaling=draft.rescaling)
            small = shrink(model, plan)
            drops[exact] = base - number_of(evaluate(small))
        if drops:
            curves.append(
                Curve(
                    _key(group, groups),
                    group.layers,
                    group.size,
                    tuple(drops),
                    tuple(drops.values()),
                    group.slots,
                )
            )
    return curves


def _mean_over(ranks: Ranks, evaluate: Evaluate) -> Evaluate:
    """The evaluation of all ranks: the mean of their numbers, or of those of all items."""
    if ranks.size == 1:
        return evaluate

    def mean(model: nn.Module) -> float:
        numbers = numbers_of(evaluate(model))
        parts = ranks.share((float(numbers.sum()), len(numbers)))
        if len({count == 1 for _, count in parts}) > 1:
            raise InputError(
                "evaluate returned one number on some ranks, and one for every item on others: "
                "all must return the same"
            )
        return sum(part for part, _ in parts) / sum(count for _, count in parts)

    return mean


def number_of(value: Any) -> float:
    """What an evaluation returned; of numbers by item their mean.

    Raises:
        InputError: it is no finite number.
    """
    return float(numbers_of(value).mean())


def numbers_of(value: Any) -> Tensor:
    """One number, or one for each item, in float64.

    Raises:
        InputError: they are none, or not finite.
    """
    try:
        several = isinstance(value, Tensor) and value.numel() > 1
        numbers = value.detach().flatten().tolist() if several else [float(value)]
        found = torch.tensor(numbers, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if len(found) and bool(found.isfinite().all()):
        return found
    raise InputError(
        f"evaluate(model) must return a finite number, larger for better models; got {value!r}"
    )


def _key(group: Group, groups: Sequence[Group]) -> str:
    """The first layer that writes the channels, if it writes no others; else the group."""
    written = [m.slot.module for m in group.members if m.slot.weight and not m.reads]
    for layer in written:
        others = (m for other in groups if other is not group for m in other.members)
        if layer and not any(m.slot.module == layer and not m.reads for m in others):
            return layer
    return group.name
