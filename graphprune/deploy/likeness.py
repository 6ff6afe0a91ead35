"""How a quantized file differs from the float one: agreement, accuracy, error of the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.deploy.engines import Engine
from graphprune.errors import InputError
from graphprune.record.batches import Batch, batches, describe

_ONE_CLASS = 0.99  # of the items predicted as one class: agreement is no evidence


@dataclass(frozen=True)
class Likeness:
    """Two files on the same items.

    Attributes:
        items: how many.
        error: root mean square of the differences of all outputs, over that of the outputs.
        agreement: share of the items of which both find the same class; ``None`` where the first
            output holds no scores ``[items, classes]``.
        before: share of right answers of the float file; ``None`` without targets.
        after: the same of the quantized one.
        told: why the agreement means nothing; empty when it means something.
    """

    items: int
    error: float
    agreement: float | None = None
    before: float | None = None
    after: float | None = None
    told: str = ""

    def __str__(self) -> str:
        """In a line."""
        parts = [f"outputs differ by {100 * self.error:.1f} % of their size on {self.items} items"]
        if self.agreement is not None:
            parts.append(f"top-1 agreement with the float file {100 * self.agreement:.1f} %")
        if self.before is not None and self.after is not None:
            parts.append(f"accuracy {100 * self.before:.1f} % -> {100 * self.after:.1f} %")
        if self.told:
            parts.append(f"the agreement means nothing: {self.told}")
        return "; ".join(parts)


def compared(first: Engine, second: Engine, data: Iterable[object]) -> Likeness:
    """Run two files on all batches.

    Args:
        first: the float file.
        second: the quantized file.
        data: batches; class indices as their targets give the accuracy.
    """
    items, wrong, size = 0, 0.0, 0.0
    predicted: list[tuple[Tensor, Tensor]] = []
    targets: list[Tensor] = []
    for batch in batches(data):
        tensors = fed(batch, first.inputs)
        outputs = first.run(tensors), second.run(tensors)
        items += len(outputs[0][0]) if outputs[0][0].dim() else 1
        for a, b in zip(*outputs):
            if a.is_floating_point():
                wrong += float((a.double() - b.double()).square().nan_to_num(0.0).sum())
                size += float(a.double().square().nan_to_num(0.0).sum())
        a, b = outputs[0][0], outputs[1][0]
        if a.dim() == 2 and a.shape[1] > 1 and a.is_floating_point():
            predicted.append((a.argmax(1), b.argmax(1)))
            targets += _targets(batch, len(a))
    error = (wrong / size) ** 0.5 if size else float(wrong > 0)
    if not predicted:
        return Likeness(items, error)
    before, after = (torch.cat(found) for found in zip(*predicted))
    agreement = float((before == after).double().mean())
    most = float(torch.bincount(before).max()) / len(before)
    told = ""
    if most >= _ONE_CLASS:
        told = f"the float file finds one class for {100 * most:.0f} % of the items"
    if len(targets) != len(predicted):
        return Likeness(items, error, agreement, told=told)
    right = torch.cat(targets)
    return Likeness(
        items,
        error,
        agreement,
        float((before == right).double().mean()),
        float((after == right).double().mean()),
        told,
    )


def fed(batch: object, names: Sequence[str]) -> list[Tensor]:
    """The tensors of a batch that a file takes, in order.

    Raises:
        InputError: it does not take them.
    """
    parts = Batch.of(batch)
    named = {name: value for name, value in parts.kwargs.items() if name in names}
    found: list[Any] = pytree.tree_leaves(parts.args)
    if parts.kwargs:
        found = [named[name] for name in names if name in named]
    tensors = [value for value in found if isinstance(value, Tensor)]
    if len(tensors) != len(names):
        raise InputError(f"the file takes {', '.join(names)}; got a batch {describe(batch)}")
    return tensors


def _targets(batch: object, items: int) -> list[Tensor]:
    """Class indices of a batch, where it holds such."""
    parts = Batch.of(batch)
    found = parts.targets[0] if parts.targets else parts.kwargs.get("labels")
    if not isinstance(found, Tensor) or found.is_floating_point() or found.shape != (items,):
        return []
    return [found.cpu()]


def named_arrays(arrays: Mapping[str, Tensor], names: Sequence[str], size: int) -> list[Any]:
    """Batches from tensors by the names of a file's inputs; ``labels`` are targets.

    Raises:
        InputError: one is missing, or they hold different numbers of items.
    """
    labels = arrays.get("labels")
    given = {name: tensor for name, tensor in arrays.items() if name != "labels" or name in names}
    if len(names) == len(given) == 1:
        given = {names[0]: next(iter(given.values()))}
    missing = [name for name in names if name not in given]
    if missing:
        raise InputError(
            f"the data hold {', '.join(arrays)}, but the file takes {', '.join(names)} (and "
            "labels, if you like)"
        )
    counts = {len(tensor) if tensor.dim() else 0 for tensor in arrays.values()}
    if len(counts) != 1 or 0 in counts:
        raise InputError(f"the data hold different numbers of items: {sorted(counts)}")
    found = []
    for start in range(0, counts.pop(), size):
        inputs = tuple(given[name][start : start + size] for name in names)
        found.append((inputs, labels[start : start + size]) if labels is not None else (inputs,))
    return found
