"""What a model that was read from ONNX knows of its file, to be written back like it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune.deploy.agreeing import Agreement
from graphprune.deploy.flat import Port
from graphprune.deploy.reading.naming import word

_ATTRIBUTE = "onnx_source"
_BATCH, _PLACES, _PIXELS = 2, 16, 64  # sizes that stand for open ones


@dataclass(frozen=True)
class Source:
    """A file of ONNX that a model was read from.

    Attributes:
        file: its name.
        opset: the version of its operators.
        nodes: how many it holds.
        inputs: names, dtypes and sizes of its inputs, open sizes by name.
        outputs: names of its outputs.
        rows: of whole numbers that look rows up, how many rows there are, by input.
        agreement: how the model compares with it in ONNX Runtime; ``None`` when not asked for.
    """

    file: str
    opset: int
    nodes: int
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    rows: tuple[tuple[str, int], ...] = ()
    agreement: Agreement | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return tuple(port.name for port in self.inputs)

    @property
    def dynamic(self) -> dict[str, dict[str, int]]:
        """Which sizes are open, as :func:`graphprune.deploy.export` takes it."""
        found: dict[str, dict[str, int]] = {}
        for port in self.inputs:
            for dim, size in enumerate(port.shape):
                if isinstance(size, str):
                    key = word(size)
                    if port.name in found.get(key, {}):  # one name for two sizes of an input
                        key = f"{key}_{dim}"
                    found.setdefault(key, {})[port.name] = dim
        return found

    def example(self, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs of the sizes that the file says: 2 for open batch sizes, 16 or 64 for others."""
        generator = torch.Generator().manual_seed(seed)
        rows = dict(self.rows)
        sizes: dict[str, int] = {}
        found = []
        for port in self.inputs:
            shape = []
            for dim, size in enumerate(port.shape):
                usual = _BATCH if dim == 0 else _PIXELS if len(port.shape) > 3 else _PLACES
                shape.append(size if isinstance(size, int) else sizes.setdefault(size, usual))
            kind = getattr(torch, port.dtype)
            if kind.is_floating_point:
                found.append(torch.randn(shape, generator=generator).to(kind))
            elif port.name in rows:
                drawn = torch.randint(0, rows[port.name], shape, generator=generator)
                found.append(drawn.to(kind))
            else:
                found.append(torch.ones(shape, dtype=kind))
        return tuple(found)


def source_of(model: nn.Module) -> Source | None:
    """What a model that was read from ONNX, or a smaller one made of it, knows of its file."""
    meta = getattr(model, "meta", None)
    found: Any = getattr(model, _ATTRIBUTE, None)
    if found is None and isinstance(meta, dict):
        found = meta.get(_ATTRIBUTE)
    return found if isinstance(found, Source) else None


def remember(model: fx.GraphModule, source: Source) -> None:
    """Let a model know its file: copies of graphs keep ``meta``, pickles keep attributes."""
    model.meta[_ATTRIBUTE] = source
    setattr(model, _ATTRIBUTE, source)
