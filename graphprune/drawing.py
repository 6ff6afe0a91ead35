"""The channel graph as a networkx graph and as a picture."""

from __future__ import annotations

from pathlib import Path

import networkx as nx

from graphprune.analysis import Analysis
from graphprune.errors import InputError

_COLOURS = {"exact": "#2a78a8", "renormalising": "#c98a1b", "frozen": "#8a8f98"}


def to_networkx(analysis: Analysis) -> nx.Graph:
    """Groups and slots as nodes; the ops that read the tensors as edges."""
    readers: dict[str, list[str]] = {}
    for record in analysis.records:
        for node in record.graph.nodes:
            if node.op == "get_attr":
                ops = [str(user.target) for user in node.users]
                readers.setdefault(str(node.target), []).extend(ops)
    graph = nx.Graph()
    for group in analysis.all_groups:
        graph.add_node(group.name, kind="group", channels=group.size, state=group.kind)
        for member in group.members:
            slot = (member.slot.tensor, member.slot.dim)
            graph.add_node(slot, kind="slot", size=member.slot.size)
            ops = sorted(set(readers.get(member.slot.tensor, ())))
            graph.add_edge(group.name, slot, ops=ops, reads=member.reads)
    return graph


def draw(analysis: Analysis, title: str, path: Path) -> Path:
    """Layers in rows, groups in columns: a dot where a group owns or reads channels of a layer."""
    from matplotlib.figure import Figure

    groups = analysis.all_groups
    layers = list(dict.fromkeys(slot.module for slot in analysis.slots))
    layers = [name for name in layers if any(name in group.layers for group in groups)]
    rows = {name: number for number, name in enumerate(layers)}
    figure = Figure(figsize=(3.5 + 0.32 * len(groups), 1.6 + 0.22 * len(layers)))
    axes = figure.add_subplot()
    for column, group in enumerate(groups):
        colour = _COLOURS[group.kind]
        mine = sorted({rows[name] for name in group.layers})
        axes.plot([column, column], [mine[0], mine[-1]], color=colour, linewidth=1.5, zorder=1)
        for name in group.layers:
            reads = all(m.reads for m in group.members if m.slot.module == name)
            face = "white" if reads else colour
            axes.scatter(column, rows[name], s=42, color=face, edgecolors=colour, zorder=2)
    axes.set_xticks(range(len(groups)), [f"{g.name} ({g.size})" for g in groups], rotation=90)
    axes.set_yticks(range(len(layers)), [name or "(root)" for name in layers])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=8)
    axes.set_title(f"{title}: filled = writes the channels, hollow = reads them", fontsize=9)
    for kind, colour in _COLOURS.items():
        axes.scatter([], [], color=colour, label=kind)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    try:
        figure.savefig(path, bbox_inches="tight", dpi=150)
    except ValueError as error:
        raise InputError(f"cannot draw to {path}: {error}") from None
    return path
