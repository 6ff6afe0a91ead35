"""Plain-text tables for ``print``, and what their cells say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def render(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A title over left-aligned columns."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in cells]
    rule = "  ".join("-" * w for w in widths)
    return "\n".join([*([title] if title else []), lines[0], rule, *lines[1:]])


def share(part: float, whole: float) -> str:
    """A percentage, for tables."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def shorten(names: Iterable[str], most: int = 4, width: int = 0) -> str:
    """A list of names for a table cell: some, and one at least, of about ``width`` in all."""
    names = list(names)
    while width and most > 1 and len(", ".join(names[:most])) > width:
        most -= 1
    rest = len(names) - most
    return ", ".join(names[:most]) + (f", ... ({rest} more)" if rest > 0 else "")
