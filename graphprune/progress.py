"""Progress bars on the error stream, for those who want one and can see it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")


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
    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
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
