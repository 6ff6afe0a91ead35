"""Checks of numbers that users pass; ``True`` is none."""

from __future__ import annotations

import math
from numbers import Real
from typing import TypeGuard


def is_int(value: object, least: int | None = None) -> TypeGuard[int]:
    """Whether a value is an int, and not smaller than ``least``."""
    return (
        isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)
    )


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether a value is a number between two bounds, these included; NaN is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and low <= float(value) <= high
