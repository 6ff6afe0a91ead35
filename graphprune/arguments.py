"""Checks of numbers and paths that users pass; ``True`` is no number."""

from __future__ import annotations

import math
import os
from numbers import Real
from pathlib import Path
from typing import TypeGuard

from graphprune.errors import InputError


def is_int(value: object, least: int | None = None) -> TypeGuard[int]:
    """Whether a value is an int, and not smaller than ``least``."""
    return (
        isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)
    )


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether a value is a number between two bounds, these included; NaN is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and low <= float(value) <= high


def check_seed(seed: object) -> None:
    """Raise unless generators of torch take a seed.

    Raises:
        InputError: they do not.
    """
    if not is_int(seed) or not -(2**63) <= seed < 2**64:
        raise InputError(f"seed must be an int of at most 64 bits, such as 0; got {seed!r}")


def check_tolerance(tolerance: object) -> None:
    """Raise unless it bounds a relative difference.

    Raises:
        InputError: it does not.
    """
    if not is_number(tolerance, 0.0) or tolerance == math.inf:
        raise InputError(f"tolerance must be a finite number of at least 0; got {tolerance!r}")


def as_path(given: object, name: str = "path") -> Path:
    """A path that a user passed.

    Raises:
        InputError: it is none.
    """
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        shown = type(given).__name__ if text is None else repr(given)
        raise InputError(f"{name} must be a path, a text or a pathlib.Path; got {shown}")
    return Path(text)
