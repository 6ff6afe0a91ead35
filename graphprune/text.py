"""What people look at: plain-text tables, figures as files, progress bars."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from graphprune.errors import InputError

T = TypeVar("T")
K = TypeVar("K")
INK, PALE, GRID = "#20262e", "#7b838d", "#e6e8eb"  # colours of charts
BLUE, RED = "#1f6f9f", "#b3403a"


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


def new_figure(width: float, height: float, **options: Any) -> Any:
    """An empty figure of matplotlib, which is loaded only when somebody draws.

    Args:
        width: in inches.
        height: in inches.
        **options: of ``matplotlib.figure.Figure``.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f'drawing needs matplotlib ({error}): pip install "graphprune[plots]"'
        ) from None
    return Figure(figsize=(width, height), **options)


def new_chart(title: str, width: float, height: float) -> tuple[Any, Any]:
    """A figure with a title and plain axes: no frame, pale lines behind.

    Args:
        title: above the picture, at the left.
        width: in inches.
        height: in inches.

    Returns:
        The figure and its axes.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure = new_figure(width, height, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, weight="bold", color=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=PALE)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=9, color=INK)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure, axes


def apart(places: Mapping[K, float], gap: float) -> dict[K, float]:
    """Places of labels, moved as little as it takes until none is nearer than ``gap`` to another.

    Example:
        >>> apart({"a": 1.0, "b": 2.0, "c": 9.0}, 2.0)
        {'a': 0.5, 'b': 2.5, 'c': 9.0}
    """
    order = sorted(places, key=lambda name: places[name])
    runs: list[list[float]] = []  # labels side by side, as distances from an even row of labels
    for number, name in enumerate(order):
        runs.append([places[name] - number * gap])
        while len(runs) > 1 and _mean(runs[-2]) > _mean(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    moved = [_mean(run) for run in runs for _ in run]
    return {name: moved[number] + number * gap for number, name in enumerate(order)}


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def save_figure(figure: Any, path: str | Path, **options: Any) -> Path:
    """Write a figure of matplotlib; the suffix chooses the format.

    Raises:
        InputError: an unknown suffix, or the file cannot be written.
    """
    try:
        figure.savefig(path, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot draw to {str(path)!r}: {error}") from None
    return Path(path)


@contextlib.contextmanager
def bar(description: str, total: int | None, wanted: bool) -> Iterator[Callable[..., None]]:
    """A progress bar while the block runs, if it is wanted and the error stream is a terminal.

    Args:
        description: what stands beside it.
        total: how many steps there are, when that is known.
        wanted: whether to show it.

    Yields:
        What to call after every step, or with the number of steps that are done.
    """
    if not wanted:
        yield lambda done=None: None
        return
    state = random.getstate()
    from rich.console import Console  # here, since most programs show no bar
    from rich.progress import Progress

    random.setstate(state)  # rich draws a number when it is imported
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done=None: None
        return
    with Progress(console=console, transient=True) as shown:
        task = shown.add_task(description, total=total)
        yield lambda done=None: shown.update(
            task, completed=done, advance=1 if done is None else None
        )


def tracked(items: Iterable[T], description: str, total: int | None, wanted: bool) -> Iterator[T]:
    """The items, each of them a step of a :func:`bar`."""
    with bar(description, total, wanted) as step:
        for item in items:
            yield item
            step()


@contextlib.contextmanager
def noted(note: str | None) -> Iterator[None]:
    """Add a note to any error, an interruption included: where finished work is, say."""
    try:
        yield
    except BaseException as error:
        if note is not None:
            error.add_note(note)
        raise
