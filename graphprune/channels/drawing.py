"""The channel graph as a networkx graph and as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.channels.analysis import Analysis, Group
from graphprune.text import new_figure, save_figure

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes

_COLOURS = {"exact": "#1f6f9f", "renormalising": "#b9770e", "frozen": "#8a8f98"}
_LEAVES, _BAR = "#3d8361", 0.12  # of parts; inches from the left
_INK, _PALE, _STRIPE = "#20262e", "#7b838d", "#f5f7f9"
_ROW, _LANE, _CHARACTER = 0.23, 0.92, 0.066  # inches; the last one is of the small mono font
_LARGEST = 12_000  # pixels of the longer side of a raster image


def to_networkx(analysis: Analysis) -> nx.Graph:
    """Groups and slots as nodes; the ops that read the tensors as edges."""
    readers: dict[str, list[str]] = {}
    for record in analysis.records:
        for node in record.graph.nodes:
            if node.op == "get_attr":
                ops = [str(user.target) for user in node.users]
                readers.setdefault(str(node.target), []).extend(ops)
    import networkx as nx  # here: importing graphprune stays quick

    graph = nx.Graph()
    for group in analysis.all_groups:
        graph.add_node(group.name, kind="group", channels=group.size, state=group.kind)
        for member in group.members:
            slot = (member.slot.tensor, member.slot.dim)
            graph.add_node(slot, kind="slot", size=member.slot.size)
            ops = sorted(set(readers.get(member.slot.tensor, ())))
            graph.add_edge(group.name, slot, ops=ops, reads=member.reads)
    return graph


def draw(analysis: Analysis, title: str, path: Path, parts: Sequence[Sequence[str]] = ()) -> Path:
    """Layers in rows as they run; each group is a line with a dot on every layer it touches.

    Args:
        analysis: the groups.
        title: above the picture.
        path: where to write.
        parts: modules of every part that can leave whole; it is a bar beside its layers.
    """
    groups = analysis.all_groups
    layers = layers_of(analysis, groups)
    bands = bands_of(groups, {name: number for number, name in enumerate(layers)})
    spans = [span for modules in parts for span in spans_of(layers, modules)]
    lanes = 1 + max((band.lane for band in bands), default=0)
    page = _Page.of(title, layers, lanes, 5.8 if spans else 4.4)
    figure = new_figure(page.width, page.height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, page.width)
    axes.set_ylim(page.height, 0)
    _header(axes, page, title, analysis)
    _names(axes, page, layers)
    for band in bands:
        _line(axes, page, band)
    for first, last in spans:
        ends = [page.y(first) - _ROW / 3, page.y(last) + _ROW / 3]
        axes.plot([_BAR, _BAR], ends, color=_LEAVES, linewidth=3, solid_capstyle="butt")
    kinds = [kind for kind in _COLOURS if any(g.kind == kind for g in groups)]
    _legend(axes, page, kinds, bool(spans))
    dpi = min(160.0, _LARGEST / max(page.width, page.height))
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "graphprune"}):  # the same bytes for the same graph
        return save_figure(figure, path, dpi=dpi, metadata=undated)


@dataclass(frozen=True)
class Band:
    """A group at its place: the rows it touches, and which of them only read."""

    group: Group
    lane: int
    rows: Mapping[int, bool]  # row -> whether it only reads the channels


@dataclass(frozen=True)
class _Page:
    """Where things are, in inches from the upper left corner."""

    width: float
    height: float
    leaf: float  # where the names of layers start, behind those of their blocks
    lanes: float
    top: float

    @classmethod
    def of(cls, title: str, layers: Sequence[str], lanes: int, least: float) -> _Page:
        """A page with room for these names, this many lanes, and the legend."""
        leaf = 0.25 + _CHARACTER * (_longest(block_of(name) for name in layers) + 2)
        first = leaf + _CHARACTER * _longest(leaf_of(name) for name in layers) + 0.35
        width = max(first + lanes * _LANE + 0.05, least, 0.5 + 0.12 * len(title))
        return cls(width, 0.95 + _ROW * len(layers) + 0.5, leaf, first, 0.95)

    def x(self, lane: int) -> float:
        """The middle of a lane."""
        return self.lanes + lane * _LANE

    def y(self, row: int) -> float:
        """The middle of a row."""
        return self.top + (row + 0.5) * _ROW


def block_of(layer: str) -> str:
    """What a layer lies in."""
    return layer.rpartition(".")[0]


def leaf_of(layer: str) -> str:
    """The name of a layer without what it lies in."""
    return layer.rpartition(".")[2]


def _longest(texts: Iterable[str]) -> int:
    return max(map(len, texts), default=0)


def layers_of(analysis: Analysis, groups: Sequence[Group]) -> list[str]:
    """The modules whose parameters groups touch, in the order in which they run."""
    touched = {name for group in groups for name in group.layers}
    used = [
        str(node.target).rpartition(".")[0] or str(node.target)
        for record in analysis.records
        for node in record.graph.nodes
        if node.op == "get_attr"
    ]
    return [name for name in dict.fromkeys(used) if name in touched]


def bands_of(groups: Sequence[Group], rows: Mapping[str, int]) -> list[Band]:
    """Groups that several layers write (streams) in the left lanes, all others to their right."""
    streams = [group for group in groups if _writers(group) > 1 and not group.frozen]
    others = [group for group in groups if group not in streams]
    bands: list[Band] = []
    for part in (streams, others):
        first = 1 + max((band.lane for band in bands), default=-1)
        ends: list[int] = []  # the last row taken in each lane
        for group in sorted(part, key=lambda g: min(rows[name] for name in g.layers)):
            touched = {
                rows[name]: all(m.reads for m in group.members if m.slot.layer == name)
                for name in group.layers
            }
            start = min(touched)
            lane = next((n for n, end in enumerate(ends) if end < start), len(ends))
            ends[lane:] = [max(touched), *ends[lane + 1 :]]
            bands.append(Band(group, first + lane, touched))
    return bands


def spans_of(layers: Sequence[str], modules: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The first and last of rows that follow each other and lie in some modules."""
    inside = [any(f"{layer}.".startswith(f"{name}.") for name in modules) for layer in layers]
    for held, run in itertools.groupby(enumerate(inside), key=lambda item: item[1]):
        rows = [row for row, _ in run]
        if held:
            yield rows[0], rows[-1]


def _writers(group: Group) -> int:
    return len({m.slot.module for m in group.members if m.slot.weight and not m.reads})


def _header(axes: Axes, page: _Page, title: str, analysis: Analysis) -> None:
    free = analysis.groups
    text = f"{len(free)} groups of {sum(group.size for group in free):,} removable channels"
    axes.text(0.25, 0.36, title, size=12, weight="bold", color=_INK)
    axes.text(0.25, 0.62, text, size=8.5, color=_PALE)


def _names(axes: Axes, page: _Page, layers: Sequence[str]) -> None:
    """Names of layers behind the name of their block, every other block shaded."""
    shaded, before = False, None
    several = len({block_of(name) for name in layers}) > 1
    for row, layer in enumerate(layers):
        block, y = block_of(layer), page.y(row)
        if block != before:
            shaded, before = not shaded, block
            axes.text(0.25, y, block, size=7.5, family="monospace", color=_PALE, va="center")
        if shaded and several:
            axes.axhspan(y - _ROW / 2, y + _ROW / 2, color=_STRIPE, linewidth=0, zorder=0)
        name = leaf_of(layer)
        axes.text(page.leaf, y, name, size=7.5, family="monospace", color=_INK, va="center")


def _line(axes: Axes, page: _Page, band: Band) -> None:
    colour, x = _COLOURS[band.group.kind], page.x(band.lane)
    ends = [page.y(min(band.rows)), page.y(max(band.rows))]
    axes.plot([x, x], ends, color=colour, linewidth=11, alpha=0.16, solid_capstyle="round")
    axes.plot([x, x], ends, color=colour, linewidth=1.4, zorder=3)
    for hollow in (False, True):
        ys = [page.y(row) for row, reads in band.rows.items() if reads is hollow]
        _dots(axes, x, ys, colour, hollow)
    label = f"{band.group.name} · {band.group.size}"
    axes.text(x + 0.14, ends[0], label, size=7.5, color=colour, va="center", weight="bold")


def _dots(axes: Axes, x: float, ys: Sequence[float], colour: str, hollow: bool) -> None:
    face = "white" if hollow else colour
    axes.scatter([x] * len(ys), ys, s=26, color=face, edgecolors=colour, linewidths=1.4, zorder=4)


def _legend(axes: Axes, page: _Page, kinds: Sequence[str], parts: bool) -> None:
    x, y = 0.3, page.height - 0.26
    for text, hollow in (("writes", False), ("reads", True)):
        _dots(axes, x, [y], _INK, hollow)
        axes.text(x + 0.12, y, text, size=8, color=_INK, va="center")
        x += 0.3 + _CHARACTER * len(text)
    x += 0.2
    for kind in kinds:
        axes.plot([x, x + 0.16], [y, y], color=_COLOURS[kind], linewidth=5, solid_capstyle="round")
        axes.text(x + 0.27, y, kind, size=8, color=_INK, va="center")
        x += 0.5 + _CHARACTER * len(kind)
    if parts:
        axes.plot([x, x], [y - 0.07, y + 0.07], color=_LEAVES, linewidth=3, solid_capstyle="butt")
        axes.text(x + 0.12, y, "can leave", size=8, color=_INK, va="center")
