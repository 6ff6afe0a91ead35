"""Sizes that a graph computes: Python numbers, never tensors, worked out while the file is read.

Sizes that the file fixes become constants, of which every reader gets its own, in an attribute
that follows when channels leave. Sizes that stay open (of batches, of sequences) are read from the
tensors while the model runs, with plain arithmetic, so that exported programs keep them open.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

END = 2**31 - 1  # from which on the end of a slice means "to the end"
Array = Any  # of numbers and of nodes of the graph that compute one number


class Sizes(nn.Module):
    """Sizes for one call: those of the file, and ``None`` for each that is open and given."""

    SIZES = ("values",)  # which plans may change

    def __init__(self, values: Any) -> None:
        super().__init__()
        self.values = values

    def forward(self, *opened: Any) -> Any:
        """The number, or the numbers with the open ones in their places."""
        if not isinstance(self.values, list):
            return self.values
        given = iter(opened)
        return [next(given) if value is None else value for value in self.values]

    def extra_repr(self) -> str:
        """For people."""
        return repr(self.values)


def as_tensor(x: Any, dtype: torch.dtype) -> Tensor:
    """Numbers as a tensor."""
    return torch.tensor(x, dtype=dtype)


def array(values: Any) -> Array:
    """Numbers and nodes as an array that keeps them as they are."""
    return np.asarray(values, dtype=object)


def is_open(numbers: Array) -> bool:
    """Whether a number is known only while the model runs."""
    return any(isinstance(item, fx.Node) for item in numbers.ravel())


def _div(a: Any, b: Any) -> Any:
    return a // b if isinstance(a, int) and isinstance(b, int) else a / b


def largest(*given: Any) -> Any:
    """The largest of several."""
    return max(given)


def smallest(*given: Any) -> Any:
    """The smallest of several."""
    return min(given)


def chosen(condition: Any, a: Any, b: Any) -> Any:
    """One of two."""
    return a if condition else b


POINTWISE: dict[str, Callable[..., Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": _div,
    "Mod": operator.mod, "Pow": operator.pow, "Neg": operator.neg, "Abs": abs,
    "Equal": operator.eq, "Greater": operator.gt, "GreaterOrEqual": operator.ge,
    "Less": operator.lt, "LessOrEqual": operator.le, "Not": operator.not_,
    "And": operator.and_, "Or": operator.or_, "Where": chosen, "Max": largest, "Min": smallest,
    "Floor": math.floor, "Ceil": math.ceil, "Sqrt": math.sqrt,
}  # fmt: skip


def _bound(value: int | None) -> int | None:
    return None if value is None or abs(value) >= END else value


def _slice(x: Array, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Array:
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps):
        index[axis] = slice(_bound(start), _bound(end), step)
    return x[tuple(index)]


def _unsqueeze(x: Array, axes: Any) -> Array:
    return np.expand_dims(x, tuple(axes))


def _squeeze(x: Array, axes: Any = None) -> Array:
    return np.squeeze(x, None if axes is None else tuple(axes))


# Of an array of numbers and of constant arguments, which the file holds as inputs or attributes.
MOVES: dict[str, tuple[Callable[..., Array], tuple[str, ...]]] = {
    "Slice": (_slice, ("starts", "ends", "axes", "steps")),
    "Unsqueeze": (_unsqueeze, ("axes",)),
    "Squeeze": (_squeeze, ("axes",)),
    "Reshape": (lambda x, shape: x.reshape(shape), ("shape",)),
    "Identity": (lambda x: x, ()),
}
