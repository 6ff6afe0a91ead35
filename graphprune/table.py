"""Plain-text tables for ``print``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def render(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A title over left-aligned columns."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in cells]
    rule = "  ".join("-" * w for w in widths)
    return "\n".join([*([title] if title else []), lines[0], rule, *lines[1:]])
