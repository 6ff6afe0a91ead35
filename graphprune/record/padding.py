"""Which positions of a batch are padding: those that a mask leaves out, if the model shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.record.batches import Batch, at_rest, run

_MASK = re.compile(r"(^|_)mask$")
_CLOSE = 1e-4  # of the largest value: rounding


class Masks:
    """The masks of one batch after the other, as far as they are believed.

    A mask among the inputs is believed if other values in the positions that it leaves out change
    no output elsewhere; that is tried on the first batch that has one.

    Args:
        model: runs on the batches; it is left as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name: str | None = None
        self.believed = False

    def of(self, batch: Batch) -> Tensor | None:
        """Which positions are no padding, [items, positions]; ``None``: all, or nobody says."""
        pair = padding(batch)
        if pair is None:
            return None
        name, mask = pair
        if self.name is None:
            self.name, self.believed = name, self._try(batch, name, mask)
        return mask if self.believed and name == self.name else None

    def _try(self, batch: Batch, name: str, mask: Tensor) -> bool:
        with torch.no_grad(), at_rest(self.model):
            before = outputs(self.model, batch)
            after = outputs(self.model, disturbed(batch, name, mask))
        return len(before) == len(after) and all(_unmoved(*two, mask) for two in zip(before, after))


def masks_of(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor | None]:
    """Which positions of each batch are no padding, where the model says so itself."""
    masks = Masks(model)
    return [masks.of(batch) for batch in batches]


def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """All floating point tensors that a model returns, in order."""
    out = run(model, batch)
    known = isinstance(out, Tensor | tuple | list | dict) or not hasattr(out, "__dict__")
    return [
        leaf.detach()
        for leaf in pytree.tree_leaves(out if known else vars(out))
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def unpadded(output: Tensor, mask: Tensor | None) -> Tensor:
    """An output as [rows, ...], without the padded ones."""
    if mask is not None and output.shape[:2] == mask.shape:
        return output[mask.to(output.device)]
    return output if output.dim() else output[None]


def counted(mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Numbers of the rows of an output that count; ``None``: all of them.

    Args:
        mask: which positions of a batch are no padding.
        shape: of the output, without its channels.
    """
    if mask is None or tuple(shape) != tuple(mask.shape):
        return None
    return mask.flatten().nonzero()[:, 0].cpu()


def padding(batch: Batch) -> tuple[str, Tensor] | None:
    """A mask of positions among keyword inputs: its name, and where it is not zero.

    It holds zeroes and ones, has the shape of another input, [items, positions], and its two
    sizes differ, so that nothing else can be taken for it.
    """
    inputs: Mapping[str, Any] = batch.kwargs
    for name, value in inputs.items():
        if not _MASK.search(name) or not isinstance(value, Tensor) or value.dim() != 2:
            continue
        if value.is_floating_point() or value.is_complex() or value.shape[0] == value.shape[1]:
            continue
        if bool(((value != 0) & (value != 1)).any()) or bool((value != 0).all()):
            continue
        alike = [t for key, t in inputs.items() if key != name and isinstance(t, Tensor)]
        if any(t.shape[:2] == value.shape for t in alike):
            return name, value != 0
    return None


def disturbed(batch: Batch, name: str, mask: Tensor) -> Batch:
    """The batch with other values in padded positions: those of positions that count."""
    first = mask.to(torch.int64).argmax(1)

    def change(key: str, value: object) -> Any:
        if key == name or not isinstance(value, Tensor) or value.shape[:2] != mask.shape:
            return value
        filling = value[torch.arange(len(value)), first][:, None]
        shape = (*mask.shape, *[1] * (value.dim() - 2))
        return torch.where(mask.reshape(shape), value, filling)

    return replace(batch, kwargs={key: change(key, value) for key, value in batch.kwargs.items()})


def _unmoved(before: Tensor, after: Tensor, mask: Tensor) -> bool:
    if before.shape != after.shape:
        return False
    first, second = unpadded(before, mask), unpadded(after, mask)
    if not first.numel():
        return True
    return bool((first - second).abs().amax() <= _CLOSE * first.abs().amax())
