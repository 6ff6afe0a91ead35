"""Sizes that a graph computes: Python ints and lists of them, never tensors.

While a model is recorded its sizes remember where they came from, and a program that
``torch.export`` makes keeps them open. Both need plain arithmetic on numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

END = 2**31 - 1  # from which on the end of a slice means "to the end"


class Sizes(nn.Module):
    """Numbers that the file holds as constants, in an attribute so that they follow widths."""

    SIZES = ("values",)  # which plans may change

    def __init__(self, values: Any) -> None:
        super().__init__()
        self.values = values

    def forward(self) -> Any:
        """The numbers."""
        return self.values

    def extra_repr(self) -> str:
        """For people."""
        return repr(self.values)


def shape(x: Any, start: int = 0, end: int | None = None) -> list[int]:
    """The sizes of a tensor; of a list, how long it is."""
    return [len(x)] if isinstance(x, list) else list(x.shape)[start:end]


def as_tensor(x: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers as a tensor."""
    return torch.tensor(x, dtype=dtype)


def operand(x: Any) -> Any:
    """A number beside tensors: itself, or out of a list of one."""
    if isinstance(x, list):
        return x[0] if len(x) == 1 else as_tensor(x)
    return x


def _each(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of numbers on lists as well, number by number."""

    def on_lists(*given: Any) -> Any:
        length = max((len(x) for x in given if isinstance(x, list)), default=0)
        if not any(isinstance(x, list) for x in given):
            return function(*given)
        columns = (
            x * length if isinstance(x, list) and len(x) == 1 else x
            if isinstance(x, list) else [x] * length
            for x in given
        )  # fmt: skip
        return [function(*row) for row in zip(*columns)]

    on_lists.__name__ = on_lists.__qualname__ = f"numbers_{function.__name__.strip('_<>')}"
    return on_lists


def _div(a: Any, b: Any) -> Any:
    return a // b if isinstance(a, int) and isinstance(b, int) else a / b


def _where(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


def cast(x: Any, whole: bool) -> Any:
    """Floats from ints, or ints from floats, without losing where a size came from."""
    if isinstance(x, list):
        return [cast(item, whole) for item in x]
    if whole:
        return x if isinstance(x, int | torch.SymInt) else math.trunc(x)
    return x if isinstance(x, float) else x * 1.0


def gather(x: Any, index: Any) -> Any:
    """The numbers at places."""
    return [x[place] for place in index] if isinstance(index, list) else x[index]


def part(x: list[Any], start: Any, end: Any, step: Any = None) -> list[Any]:
    """A slice of a list; ``start``, ``end`` and ``step`` are lists of one."""
    step = 1 if step is None else step[0]
    stop = None if end[0] is None or abs(end[0]) >= END else end[0]
    first = None if start[0] is None or abs(start[0]) >= END else start[0]
    return x[first:stop:step]


def concat(*parts: Any) -> list[Any]:
    """Lists behind one another."""
    return [item for part in parts for item in (part if isinstance(part, list) else [part])]


def listed(x: Any) -> list[Any]:
    """A number as a list of one."""
    return x if isinstance(x, list) else [x]


def single(x: Any) -> Any:
    """The number in a list of one."""
    return x[0] if isinstance(x, list) and len(x) == 1 else x


def product(x: Any) -> Any:
    """All numbers multiplied."""
    found: Any = 1
    for item in listed(x):
        found = found * item
    return found


def total(x: Any) -> Any:
    """All numbers added."""
    found: Any = 0
    for item in listed(x):
        found = found + item
    return found


def same(x: Any) -> Any:
    """Itself."""
    return x


_OF_NUMBERS: dict[str, Callable[..., Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": _div,
    "Mod": operator.mod, "Pow": operator.pow, "Neg": operator.neg, "Abs": abs,
    "Equal": operator.eq, "Greater": operator.gt, "GreaterOrEqual": operator.ge,
    "Less": operator.lt, "LessOrEqual": operator.le, "Not": operator.not_,
    "And": operator.and_, "Or": operator.or_, "Where": _where, "Max": max, "Min": min,
    "Floor": math.floor, "Ceil": math.ceil, "Sqrt": math.sqrt,
}  # fmt: skip
POINTWISE = {op: _each(function) for op, function in _OF_NUMBERS.items()}
