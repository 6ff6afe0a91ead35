"""Limits on what a small model may cost, from numbers and texts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphprune.arguments import is_number
from graphprune.errors import InputError

QUANTITIES = ("macs", "params", "bytes", "memory", "latency")
_UNITS = {"": 1.0, "%": 0.01, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12,
          "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "us": 1e-3, "ms": 1.0, "s": 1e3}  # fmt: skip
_AMOUNT = r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z%]*)"
_SECONDS = ("us", "ms", "s")


@dataclass(frozen=True)
class Target:
    """A limit: ``fraction`` of the original's, or an absolute ``amount``."""

    amount: float
    fraction: bool

    def of(self, before: float) -> float:
        """The limit as an amount."""
        return self.amount * before if self.fraction else self.amount


def targets_of(given: object) -> dict[str, Target]:
    """The limits that a user names.

    Raises:
        InputError: an unknown quantity, or no limit.
    """
    if not isinstance(given, Mapping) or not given:
        raise InputError(
            'target must map quantities to limits, such as {"macs": 0.5}; '
            f"quantities: {', '.join(QUANTITIES)}; got {given!r}"
        )
    for name in given:
        if name not in QUANTITIES:
            raise InputError(f"unknown target {name!r}; choose of {', '.join(QUANTITIES)}")
    return {name: _target(name, value) for name, value in given.items()}


def _target(name: str, value: Any) -> Target:
    """A limit from a number or a text."""
    problem = InputError(
        f"target {name!r} must be a fraction in (0, 1], an amount above 1, or a text such as "
        f'"50%" or "{"0.8 ms" if name == "latency" else "1.2G"}"; got {value!r}'
    )
    if isinstance(value, str):
        found = re.fullmatch(_AMOUNT, value.lower().strip())
        unit = found[2] if found else "?"
        if found is None or unit not in _UNITS:
            raise problem
        if (unit in _SECONDS) != (name == "latency") and unit not in ("", "%"):
            raise problem
        if name == "latency" and unit in _SECONDS and float(found[1]) > 0:
            return Target(float(found[1]) * _UNITS[unit], False)
        amount = float(found[1]) * _UNITS[unit]
        if unit == "%" and not 0 < amount <= 1:
            raise problem
        value = amount
    if not is_number(value) or not 0 < value < math.inf:
        raise problem
    return Target(float(value), value <= 1)
