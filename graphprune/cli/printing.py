"""What the command line shows: tables for people, reports as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.markup import escape
from rich.table import Table

from graphprune.api import ChannelGraph
from graphprune.measurement import Measurement
from graphprune.plan.plan import Plan
from graphprune.text import shorten
from graphprune.verification.report import Report


def new_table(title: str, *columns: str, wide: int | None = None) -> Table:
    """An empty table: numbers on the right, the wide column and the next one may wrap."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for position, column in enumerate(columns):
        numbers = position > 0 and wide != position and column not in ("kind", "inputs")
        table.add_column(
            column,
            justify="right" if numbers else "left",
            overflow="fold",
            no_wrap=wide is not None and position not in (wide, wide + 1),
        )
    return table


def groups_of_plan(plan: Plan) -> Table:
    """The kept channels of every group."""
    table = new_table("channels kept", "group", "channels", "kind", "layers", wide=3)
    for group in plan.groups:
        kind = "exact" if group.exact else "renormalising"
        kept = f"{group.size} -> {len(group.kept)}"
        table.add_row(group.name, kept, kind, escape(shorten(group.layers, 3)))
    return table


def groups_of_graph(graph: ChannelGraph) -> Table:
    """All groups, frozen ones dimmed."""
    channels = sum(group.size for group in graph)
    title = f"{type(graph.model).__name__}: {len(graph)} groups, {channels:,} removable channels"
    table = new_table(title, "group", "channels", "kind", "layers", wide=3)
    for group in graph.analysis.all_groups:
        layers = escape(shorten(group.layers, 3))
        note = f"{layers}\n[dim]{escape(group.note)}[/]" if group.note else layers
        style = "dim" if group.frozen else ""
        table.add_row(group.name, str(group.size), group.kind, note, style=style)
    return table


def costs(before: Measurement, after: Measurement) -> Table:
    """A model before and after."""
    title = f"cost on {escape(after.inputs)}, {after.device}"
    table = new_table(title, "", "original", "small", "share")
    for row in before.compare(after).rows():
        table.add_row(*row)
    return table


def cost(cost: Measurement) -> Table:
    """A model by itself."""
    table = new_table(f"cost on {escape(cost.inputs)}", "", "original")
    for name, text, _ in cost.rows():
        table.add_row(name, text)
    return table


def checks(report: Report) -> Table:
    """The differences that were found."""
    title = f"largest relative differences, tolerance {report.tolerance:.0e}"
    table = new_table(title, "compared", "inputs", "difference", wide=0)
    for check in report.checks:
        table.add_row(escape(check.name), escape(check.inputs), f"{check.difference:.1e}")
    return table


def report_data(report: Report | None) -> dict[str, Any] | None:
    """A report as plain data."""
    if report is None:
        return None
    return {**dataclasses.asdict(report), "difference": report.difference}
