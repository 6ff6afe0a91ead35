"""Line charts of a history: where points, ticks and labels stand, in pixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from graphprune.measurement import count_text
from graphprune.text import apart
from graphprune.training.history import Entry, widths_over
from graphprune.training.plots import shares_of

WIDTH, HEIGHT = 500, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 150, 14, 34
_NAMED, _LONGEST = 11, 15  # lines of widths that are named, characters of a name
_GAP = 15  # between labels of lines that end close to each other


@dataclass(frozen=True)
class Series:
    """A line: its points, and its last value as a label at ``y``."""

    name: str
    points: tuple[tuple[float, float], ...]
    label: str
    y: float
    kind: str = ""  # of its colour


@dataclass(frozen=True)
class Chart:
    """A chart with a title, ticks ``(place, text)`` and lines."""

    title: str
    unit: str
    across: str
    xs: tuple[tuple[float, str], ...]
    ys: tuple[tuple[float, str], ...]
    series: tuple[Series, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    bottom: int = HEIGHT - _BOTTOM


def charts_of(entries: Sequence[Entry]) -> list[Chart]:
    """The cost over the steps as a share of the first, and a chart for every value."""
    if len(entries) < 2:
        return []
    charts = []
    shares = {
        name: [(e.step, 100 * getattr(e, field) / getattr(entries[0], field)) for e in entries]
        for name, field in (("parameters", "params"), ("MACs", "macs"))
        if getattr(entries[0], field)
    }
    if shares:
        charts.append(_chart("Parameters and MACs", "% of the first", shares, zero=True))
    names = dict.fromkeys(name for entry in entries for name in entry.values)
    for name in names:
        points = [(e.step, e.values[name]) for e in entries if name in e.values]
        points = [point for point in points if math.isfinite(point[1])]
        if len(points) > 1:
            charts.append(_chart(name, "", {"": points}))
    widths = _widths(entries)
    return charts if widths is None else [*charts, widths]


def _widths(entries: Sequence[Entry]) -> Chart | None:
    """Layers whose widths are alike are a line; the narrowest ones say their names."""
    alike = shares_of(widths_over(entries))
    lines: dict[str, list[tuple[float, float]]] = {}
    first, last = entries[0].step, entries[-1].step
    end = last + (last - first) / 12  # the last widths have a length as well
    for line, names in sorted(alike.items(), key=lambda item: -item[0][-1][1]):
        more = f" +{len(names) - 1}" if len(names) > 1 else ""
        steps = [[(a, x), (b, x)] for (a, x), (b, _) in itertools.pairwise(line)]
        lines[names[0] + more] = [*itertools.chain(*steps), line[-1], (end, line[-1][1])]
    if len(alike) < 2 and all(share == 100 for line in alike for _, share in line):
        return None
    chart = _chart("Width of layers", "% of the first", lines, zero=True)
    told = {series.name for series in chart.series[-_NAMED:]}
    ends = apart({s.name: s.points[-1][1] for s in chart.series if s.name in told}, _GAP)
    series = tuple(
        replace(
            line,
            label=f"{lines[line.name][-1][1]:.0f} % {_short(line.name)}"
            if line.name in told
            else "",
            y=ends.get(line.name, line.y),
            kind="thin" if any(y != 100 for _, y in lines[line.name]) else "thin pale",
        )
        for line in chart.series
    )
    return replace(chart, series=series)


def _short(name: str) -> str:
    """The end of a name, which tells it from others."""
    return name if len(name) <= _LONGEST else f"\N{HORIZONTAL ELLIPSIS}{name[-_LONGEST:]}"


def _chart(
    title: str, unit: str, lines: Mapping[str, Sequence[tuple[float, float]]], zero: bool = False
) -> Chart:
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points] + ([0.0] if zero else [])
    across, up = ticks(min(xs), max(xs), 5, whole=True), ticks(min(ys), max(ys), 4)
    low, high = min(up[0], *ys), max(up[-1], *ys)

    def x_of(x: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * _part(x, min(xs), max(xs))

    def y_of(y: float) -> float:
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (1 - _part(y, low, high))

    placed = {
        name: tuple((round(x_of(x), 1), round(y_of(y), 1)) for x, y in points)
        for name, points in lines.items()
    }
    ends = apart({name: points[-1][1] for name, points in placed.items()}, _GAP)
    series = []
    for name, points in lines.items():
        last = points[-1][1]
        text = f"{last:.3g} %" if unit.startswith("%") else f"{last:.4g}"
        series.append(Series(name, placed[name], f"{name} {text}".strip(), ends[name]))
    return Chart(
        title,
        unit,
        "step",
        tuple((round(x_of(x), 1), _text(x)) for x in across),
        tuple((round(y_of(y), 1), _text(y)) for y in up),
        tuple(series),
    )


def _part(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Round numbers that span an interval.

    Args:
        low: its lower end.
        high: its upper end.
        count: about how many steps.
        whole: integers only, and none outside of the interval.

    Example:
        >>> ticks(0.0, 100.0, 4)
        [0.0, 25.0, 50.0, 75.0, 100.0]
        >>> ticks(0, 9, 5, whole=True)
        [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    if high <= low:
        return [float(low)]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * n for n in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
    if whole:
        step = max(1.0, float(round(step)))
    first = math.ceil(low / step - 1e-9) if whole else math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if whole else math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _text(value: float) -> str:
    return count_text(int(value)) if value == int(value) and abs(value) >= 1000 else f"{value:g}"


def path_of(points: Iterable[tuple[float, float]]) -> str:
    """Points as the attribute of an SVG line."""
    return " ".join(f"{x:g},{y:g}" for x, y in points)
