"""Where things stand in the drawing of a graph: rows of layers, lines of groups, in pixels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graphprune.channels.analysis import Analysis, Group
from graphprune.channels.drawing import Band, bands_of, block_of, layers_of, leaf_of, spans_of
from graphprune.plan.plan import GroupPlan

ROW, LANE, CHARACTER, TOP, BAR = 20, 34, 6.7, 10, 8  # pixels; of the monospaced font


@dataclass(frozen=True)
class Row:
    """A layer; ``block`` is named at its first one, ``shaded`` is every other block."""

    block: str
    leaf: str
    y: float
    shaded: bool


@dataclass(frozen=True)
class Line:
    """A group: a line with a filled dot where layers write its channels, an open one elsewhere."""

    kind: str
    label: str
    tip: str
    x: float
    ends: tuple[float, float]
    writes: tuple[float, ...]
    reads: tuple[float, ...]


@dataclass(frozen=True)
class Span:
    """A bar beside the layers of a part that left, or could."""

    ends: tuple[float, float]
    left: bool


@dataclass(frozen=True)
class Picture:
    """The whole drawing."""

    width: float
    height: float
    leaf: float  # where the names of layers start
    rows: tuple[Row, ...]
    lines: tuple[Line, ...]
    spans: tuple[Span, ...]

    @property
    def kinds(self) -> list[str]:
        """The kinds of groups, for the legend."""
        return [
            k for k in ("exact", "renormalising", "frozen") if k in {x.kind for x in self.lines}
        ]


def picture_of(
    analysis: Analysis,
    plans: Sequence[GroupPlan],
    parts: Iterable[Sequence[str]] = (),
    gone: Iterable[str] = (),
) -> Picture:
    """Place layers in rows as they run, and groups beside them.

    Args:
        analysis: the groups.
        plans: which channels stay.
        parts: modules of every part that can leave whole.
        gone: the names of modules that left.
    """
    groups = analysis.all_groups
    kept = {group.name: _kept(group, plans) for group in groups}
    layers = layers_of(analysis, groups)
    bands = bands_of(groups, {name: number for number, name in enumerate(layers)})
    leaf = 20 + CHARACTER * (max((len(block_of(name)) for name in layers), default=0) + 2)
    first = leaf + CHARACTER * max((len(leaf_of(name)) for name in layers), default=0) + 24
    labels = {band.lane: 0 for band in bands}
    for band in bands:
        labels[band.lane] = max(labels[band.lane], len(_label(band.group, kept)))
    places, right = {}, first
    for lane in sorted(labels):
        places[lane] = right
        right += LANE + CHARACTER * labels[lane]
    spans = [Span(_ends(span), False) for part in parts for span in spans_of(layers, part)]
    spans += [Span(_ends(span), True) for name in gone for span in spans_of(layers, [name])]
    return Picture(
        right,
        2 * TOP + ROW * len(layers),
        leaf,
        tuple(_rows(layers)),
        tuple(_line(band, places[band.lane], kept) for band in bands),
        tuple(spans),
    )


def _y(row: int) -> float:
    return TOP + (row + 0.5) * ROW


def _ends(span: tuple[int, int]) -> tuple[float, float]:
    return _y(span[0]) - ROW / 3, _y(span[1]) + ROW / 3


def _rows(layers: Sequence[str]) -> Iterable[Row]:
    shaded, before = True, None
    for number, layer in enumerate(layers):
        block = block_of(layer)
        if block != before:
            shaded = not shaded
        yield Row("" if block == before else block, leaf_of(layer), _y(number), shaded)
        before = block


def _kept(group: Group, plans: Sequence[GroupPlan]) -> int:
    """How many channels stay; several groups may tie the same layers."""
    alike = [p for p in plans if p.layers == group.layers and p.size == group.size]
    found = [plan for plan in alike if plan.name == group.name] or alike
    return group.size if group.frozen or not found else len(found[0].kept)


def _label(group: Group, kept: Mapping[str, int]) -> str:
    left = kept[group.name]
    changed = f" \N{RIGHTWARDS ARROW} {left}" if left != group.size else ""
    return f"{group.name} \N{MIDDLE DOT} {group.size}{changed}"


def _line(band: Band, x: float, kept: Mapping[str, int]) -> Line:
    group = band.group
    tip = f"{_label(group, kept)} channels, {group.kind}"
    return Line(
        group.kind,
        _label(group, kept),
        f"{tip}\n{group.note}" if group.note else tip,
        x,
        (_y(min(band.rows)), _y(max(band.rows))),
        tuple(_y(row) for row, reads in band.rows.items() if not reads),
        tuple(_y(row) for row, reads in band.rows.items() if reads),
    )
