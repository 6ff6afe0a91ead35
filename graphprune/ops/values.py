"""What rules for channels are about: values, and reasons why channels stay."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from graphprune.ops.ids import Layers, Shape

FLOATING = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


class Natural(StrEnum):
    """Reasons why channels stay in every model: nothing about them is out of the ordinary."""

    OUTPUT = "model output"
    INPUT = "reads a model input"
    TABLE = "rows of an embedding table"
    KERNEL = "kernel size"


@dataclass(frozen=True)
class Reason:
    """Why channels are frozen: the op, the module that ran it and the user's source line."""

    text: str
    module: str = ""
    line: str | None = None

    def __str__(self) -> str:
        """For tables."""
        where = f" in {self.module}" if self.module else ""
        return f"{self.text}{where}" + (f" ({self.line})" if self.line else "")


@dataclass(frozen=True)
class Value:
    """A tensor of the recorded graph.

    ``constant`` values are made of parameters alone; ``given`` ones of model inputs alone. A value
    is ``linear`` in a parameter when zeroing the parameter zeroes it as well.
    """

    shape: Shape
    layers: Layers = ()
    constant: bool = False
    given: bool = False
    linear: bool = False

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def on(self, dim: int) -> list[Tensor]:
        """The layers that vary along ``dim``."""
        return [layer for layer in self.layers if layer.shape[dim] > 1]
