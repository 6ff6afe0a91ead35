"""What a search has found: the model, and the curve that it was chosen from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.plan.plan import Plan
from graphprune.text import BLUE, INK, PALE, RED, new_chart, render, save_figure

TITLES = {"macs": "MACs", "params": "parameters"}


@dataclass(frozen=True)
class Tried:
    """One budget that was tried.

    Attributes:
        budget: the fraction of the original's that was allowed.
        reached: what the plan came to, as such a fraction.
        drop: the evaluation of the original minus that of the small model, in its unit.
        most: below which the drop is with the confidence asked for, over other examples of the
            kind; ``None`` where the evaluation returns a single number.
        plan: which channels stayed: ``graphprune.rebuild(model, tried.plan)``.
    """

    budget: float
    reached: float
    drop: float
    most: float | None
    plan: Plan = field(repr=False, compare=False)

    def loss(self, sure: bool) -> float:
        """What must not be above the drop allowed."""
        return self.most if sure and self.most is not None else self.drop


@dataclass(frozen=True)
class Smallest:
    """What :func:`smallest` found; ``print`` it, :meth:`plot` it, or go on with ``model``.

    Attributes:
        model: the smallest model found, which carries its plan; the original itself where no budget
            that was tried will do.
        quantity: that was made small.
        max_drop: that was allowed.
        base: the evaluation of the original: the mean, where it is a number for every example.
        chosen: the budget of the model; ``None`` for the original.
        curve: all budgets that were tried, the largest first.
        examples: how many the evaluation told of; ``None`` where it is a single number.
        confidence: of the bounds.
        shares: whether answers were right or wrong, 1 or 0: then drops are told in points of 100.
    """

    model: nn.Module
    quantity: str
    max_drop: float
    base: float
    chosen: Tried | None
    curve: tuple[Tried, ...]
    examples: int | None
    confidence: float
    shares: bool = False

    @property
    def plan(self) -> Plan | None:
        """Which channels of the original stayed; ``None`` for the original."""
        return None if self.chosen is None else self.chosen.plan

    @property
    def nearest(self) -> Tried | None:
        """The budget with the smallest bound of the drop, or the smallest drop."""
        return min(self.curve, key=lambda tried: tried.loss(True), default=None)

    def sentence(self, tried: Tried) -> str:
        """What a budget loses, in words.

        Args:
            tried: one of the curve.
        """
        what = f"{100 * tried.reached:.1f} % of the {TITLES.get(self.quantity, self.quantity)}"
        base = f"{100 * self.base:.2f} %" if self.shares else f"{self.base:.4g}"
        return f"{what}: loses {self._amount(tried.drop)} of {base} {self._bound(tried)}"

    def __str__(self) -> str:
        """The choice in words, and the curve as a table."""
        if self.chosen is None:
            allowed = self._amount(self.max_drop)
            title = f"no budget that was tried loses at most {allowed}: the original stays"
            if self.nearest is not None:
                title += f"\nthe nearest: {self.sentence(self.nearest)}"
        else:
            title = self.sentence(self.chosen)
        rows = [
            (
                f"{100 * tried.reached:.1f} %",
                self._number(tried.drop),
                "" if tried.most is None else self._number(tried.most),
                "chosen" if tried is self.chosen else "",
            )
            for tried in self.curve
        ]
        unit = ", points" if self.shares else ""
        most = f"at most, {100 * self.confidence:g} %"
        return render(title, (self.quantity, f"drop{unit}", most, ""), rows)

    def to_dict(self) -> dict[str, Any]:
        """All of it but the model and the plans, as plain data."""
        told = {
            name: getattr(self, name)
            for name in ("quantity", "max_drop", "base", "examples", "confidence")
        }
        return {**told, "chosen": _plain(self.chosen), "curve": [_plain(t) for t in self.curve]}

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict())

    def plot(self, path: str | Path) -> Path:
        """Draw the drops, and their bounds, against what is left of the original.

        Args:
            path: where to write; the suffix chooses the format (``.svg``, ``.png``, ``.pdf``).

        Raises:
            InputError: matplotlib is not installed, or the file cannot be written.
        """
        scale = 100 if self.shares else 1
        name = TITLES.get(self.quantity, self.quantity)
        figure, axes = new_chart(f"Drop by {name} kept", 6, 3.6)
        xs = [100.0, *(100 * tried.reached for tried in self.curve)]
        axes.plot(xs, [0.0, *(scale * tried.drop for tried in self.curve)], marker="o", color=BLUE)
        axes.axhline(scale * self.max_drop, color=RED, linewidth=1)
        axes.annotate(
            f"at most {scale * self.max_drop:g}", (100, scale * self.max_drop), xytext=(0, 4),
            textcoords="offset points", ha="right", fontsize=8, color=RED,
        )  # fmt: skip
        for tried in self.curve:
            if tried.most is not None:
                ends = (scale * tried.drop, scale * tried.most)
                axes.plot([100 * tried.reached] * 2, ends, color=PALE, marker="_", zorder=1)
        if self.chosen is not None:
            axes.annotate(
                "chosen", (100 * self.chosen.reached, scale * self.chosen.drop), xytext=(8, -4),
                textcoords="offset points", ha="left", fontsize=8, color=INK,
            )  # fmt: skip
        axes.set(xlabel=f"{name} kept, %", ylabel="drop, points" if self.shares else "drop")
        axes.margins(0.1)
        return save_figure(figure, path)

    def _number(self, value: float) -> str:
        return f"{100 * value:.2f}" if self.shares else f"{value:.3g}"

    def _amount(self, value: float) -> str:
        return f"{self._number(value)} points" if self.shares else self._number(value)

    def _bound(self, tried: Tried) -> str:
        if tried.most is None:
            return "(no bound: evaluate returned one number, not one for every example)"
        return (
            f"(at most {self._number(tried.most)} with {100 * self.confidence:g} %, from "
            f"{self.examples:,} examples)"
        )


def _plain(tried: Tried | None) -> Mapping[str, float | None] | None:
    names = ("budget", "reached", "drop", "most")
    return None if tried is None else {name: getattr(tried, name) for name in names}
