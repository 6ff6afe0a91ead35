"""Write figures to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphprune.errors import InputError


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
