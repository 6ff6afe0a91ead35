"""A model that is changed in place is changed wholly, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.record.tensors import held_tensors, named_modules


@contextlib.contextmanager
def whole_or_not(model: nn.Module, written: Iterable[str] = ()) -> Iterator[None]:
    """Put a model back as it was when what is done inside does not come to its end.

    Errors and interruptions alike: modules get back their attributes and their class, tensors
    their values and gradients. The old values stay in memory until the end.

    Args:
        model: what is changed.
        written: tensors whose values are written over; all others are only replaced.
    """
    modules = [_Module.of(module) for _, module in named_modules(model)]
    copied = set(written)
    tensors = [_Values.of(tensor, name in copied) for name, tensor in held_tensors(model)]
    try:
        yield
    except BaseException:
        for module in modules:
            module.restore()
        for values in tensors:
            values.restore()
        raise


@dataclass
class _Module:
    """The attributes of a module, and what is in those that torch keeps members in."""

    module: nn.Module
    kind: type
    state: dict[str, Any]
    inside: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> _Module:
        state = dict(vars(module))
        held = {key: value for key, value in state.items() if type(value) in (dict, set, list)}
        return cls(module, type(module), state, {k: v.copy() for k, v in held.items()})

    def restore(self) -> None:
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        for key, items in self.inside.items():
            holder = self.state[key]
            if isinstance(holder, list):
                holder[:] = items
            elif holder != items or list(holder) != list(items):
                holder.clear()
                holder.update(items)
        vars(self.module).clear()
        vars(self.module).update(self.state)


@dataclass
class _Values:
    """The values of a tensor, and its gradient."""

    tensor: Tensor
    data: Tensor
    copied: Tensor | None
    grad: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, copy: bool) -> _Values:
        data = tensor.data
        return cls(tensor, data, data.clone() if copy else None, tensor.grad)

    def restore(self) -> None:
        if self.copied is not None:
            self.data.copy_(self.copied)
        replace_data(self.tensor, self.data, self.grad)


def replace_data(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Give a parameter or buffer other values, which may have another shape, and a gradient."""
    tensor.grad = None
    if tensor.requires_grad:  # a loss that is still alive holds autograd's node, with the old shape
        passing = torch.float32 if tensor.dtype == torch.float16 else torch.float16
        tensor.data = torch.empty(0, dtype=passing, device=tensor.device)  # another dtype drops it
    tensor.data = data
    tensor.grad = grad
