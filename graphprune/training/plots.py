"""Pictures of a history: a value against the cost, and the widths of layers over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphprune.measurement import count_text
from graphprune.text import BLUE, PALE, RED, apart, new_chart, save_figure, shorten

NAMES = {"macs": "MACs", "params": "parameters"}
_LABELS = 14  # lines that get a label; of more, those that lost most
Point = tuple[float, float, int, bool]  # place, value, step, whether it was kept


def draw_value(path: str | Path, points: Sequence[Point], value: str, against: str) -> Path:
    """Draw a value against another; the first and the last point say their step."""
    across = NAMES.get(against, against)
    figure, axes = new_chart(f"{value} by {across}", 6, 3.6)
    kept = [point for point in points if point[3]]
    undone = [point for point in points if not point[3]]
    axes.plot([p[0] for p in kept], [p[1] for p in kept], marker="o", markersize=4.5, color=BLUE)
    axes.plot([p[0] for p in undone], [p[1] for p in undone], linestyle="", marker="x", color=RED)
    told = [(p, f"step {p[2]}", BLUE) for p in dict.fromkeys([*kept[:1], *kept[-1:]])]
    told += [(p, "undone", RED) for p in undone[:1]]
    for (x, y, *_), text, colour in told if against != "step" else told[-len(undone[:1]) :]:
        axes.annotate(
            text, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8,
            color=colour,
        )  # fmt: skip
    axes.set(xlabel=across, ylabel=value)
    axes.margins(0.1)
    if against in NAMES:
        axes.xaxis.set_major_formatter(lambda number, place: count_text(round(number)))
    return save_figure(figure, path)


def draw_widths(path: str | Path, widths: Mapping[str, Sequence[tuple[int, int]]]) -> Path:
    """Draw the width of layers over the steps as a share of the first one.

    Layers whose shares are alike are one line, which is named at its end.

    Args:
        path: where to write.
        widths: pairs of step and width, by layer.
    """
    alike = shares_of(widths)
    figure, axes = new_chart("Width of layers", 7.5, 4)
    ends = [step for line in alike for step, _ in (line[0], line[-1])]
    end = max(ends) + max(1, (max(ends) - min(ends)) / 12)  # the last widths have a length as well
    for line in alike:
        changed = any(share != 100 for _, share in line)
        steps, shares = zip(*line)
        colour, order = (BLUE, 3) if changed else (PALE, 2)
        steps, shares = (*steps, end), (*shares, shares[-1])
        axes.step(steps, shares, where="post", color=colour, alpha=0.8, zorder=order, linewidth=1.4)
    axes.set(xlabel="step", ylabel="width in % of the first")
    high = max(share for line in alike for _, share in line)
    axes.set_ylim(0, 1.05 * high)
    lowest = sorted(alike, key=lambda line: line[-1][1])[:_LABELS]
    _label(axes, {line: alike[line] for line in lowest}, end, high / 22)
    return save_figure(figure, path)


def shares_of(
    widths: Mapping[str, Sequence[tuple[int, int]]],
) -> dict[tuple[tuple[int, float], ...], list[str]]:
    """Layers by their widths over the steps, in percent of the first.

    Example:
        >>> shares_of({"a": [(0, 4), (1, 2)], "b": [(0, 8), (1, 4)], "c": [(0, 3), (1, 3)]})
        {((0, 100.0), (1, 50.0)): ['a', 'b'], ((0, 100.0), (1, 100.0)): ['c']}
    """
    alike: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, known in widths.items():
        line = tuple((step, 100 * width / known[0][1]) for step, width in known)
        alike.setdefault(line, []).append(name)
    return alike


def _label(axes: Any, lines: Mapping[Any, Sequence[str]], end: float, gap: float) -> None:
    """Names at the ends of lines, none on another."""
    places = apart({line: line[-1][1] for line in lines}, gap)
    for line, names in lines.items():
        text = f"{line[-1][1]:.0f} %  {shorten(names, 2)}"
        colour = BLUE if any(share != 100 for _, share in line) else PALE
        axes.annotate(
            text, (end, places[line]), xytext=(8, 0), textcoords="offset points", va="center",
            fontsize=7.5, color=colour, annotation_clip=False,
        )  # fmt: skip
