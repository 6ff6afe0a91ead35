"""The dimensions of parameters and buffers, with ids for every slice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from graphprune.ops.ids import Ties, along
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk
from graphprune.record.tensors import held_tensors


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter or buffer, with the range of ids of its slices."""

    tensor: str
    dim: int
    start: int
    size: int
    weight: bool  # a parameter of two or more dimensions
    parameter: bool

    @property
    def module(self) -> str:
        """The qualified name of the module that holds the tensor."""
        return self.tensor.rpartition(".")[0]

    @property
    def layer(self) -> str:
        """The module, for people; the tensor itself, where the model holds it."""
        return self.module or self.tensor


@dataclass(frozen=True)
class Rows:
    """Dimensions of tensors that have a row for every id, and the ops that read rows by ids."""

    slots: frozenset[tuple[str, int]]
    lookups: frozenset[fx.Node]

    def free(self, walk: Walk, slots: Iterable[Slot]) -> None:
        """Let these rows leave together."""
        mine = [slot for slot in slots if (slot.tensor, slot.dim) in self.slots]
        lines = [torch.arange(slot.start, slot.start + slot.size) for slot in mine]
        for line in lines[1:]:
            walk.tie(lines[0], line)
        walk.rows, walk.lookups = torch.cat(lines), self.lookups


def integers_in(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The vectors of integers: they may name channels."""
    return {
        name: tensor.detach().cpu()
        for name, tensor in tensors
        if tensor.dtype == torch.int64 and tensor.dim() == 1 and not tensor.is_meta
    }


def slots_of(model: nn.Module, ties: Ties) -> tuple[tuple[Slot, ...], dict[str, Value]]:
    """All dimensions of all parameters and buffers, with ids of their own for every slice."""
    slots, values = [], {}
    parameters = {id(p) for p in model.parameters()}
    for name, tensor in held_tensors(model):
        layers = []
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                ids = ties.fresh(size)
                weight = id(tensor) in parameters and tensor.dim() > 1
                slots.append(Slot(name, dim, int(ids[0]), size, weight, id(tensor) in parameters))
                layers.append(along(ids, dim, tensor.dim()))
        values[name] = Value(tuple(tensor.shape), tuple(layers), constant=True, linear=True)
    return tuple(slots), values
