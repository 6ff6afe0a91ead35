"""Whether a calibrated model is better: its outputs and the original's, on items set apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.calibration.items import disturbed, padding
from graphprune.calibration.sums import Errors
from graphprune.record.batches import Batch, at_rest, run

_CLOSE = 1e-4  # of the largest value: rounding


def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """All floating point tensors that a model returns, in order."""
    out = run(model, batch)
    known = isinstance(out, Tensor | tuple | list | dict) or not hasattr(out, "__dict__")
    return [
        leaf.detach()
        for leaf in pytree.tree_leaves(out if known else vars(out))
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def distance(
    small: nn.Module, model: nn.Module, batches: Sequence[Batch], masks: Sequence[Tensor | None]
) -> float | None:
    """The squared error of the outputs as a fraction of their variance, the mean of all outputs.

    Returns:
        ``None`` where no output has the same shape in both models, or is finite.
    """
    known: dict[int, Errors] = {}
    with torch.no_grad(), at_rest(model), at_rest(small):
        for batch, mask in zip(batches, masks):
            pairs = zip(outputs(model, batch), outputs(small, batch))
            for place, (wanted, found) in enumerate(pairs):
                if wanted.shape == found.shape and wanted.numel():
                    rows = [_rows(t, mask).reshape(-1, 1) for t in (wanted, found.to(wanted))]
                    known.setdefault(place, Errors()).add(rows[0] - rows[1], rows[0])
    levels = [errors.relative for errors in known.values() if errors.squares > 0]
    total = sum(levels) / len(levels) if levels else None
    return total if total is None or (total == total and total != float("inf")) else None


def _rows(output: Tensor, mask: Tensor | None) -> Tensor:
    """An output as [rows, ...], without the padded ones."""
    if mask is not None and output.shape[:2] == mask.shape:
        return output[mask.to(output.device)]
    return output if output.dim() else output[None]


def masks_of(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor | None]:
    """Which positions of each batch are no padding, where the model says so itself.

    A mask among the inputs is believed if other values in the positions that it leaves out change
    no output elsewhere.
    """
    found = [padding(batch) for batch in batches]
    first = next((n for n, pair in enumerate(found) if pair is not None), None)
    if first is None:
        return [None] * len(batches)
    pair = found[first]
    assert pair is not None
    name, mask = pair
    with torch.no_grad(), at_rest(model):
        before = outputs(model, batches[first])
        after = outputs(model, disturbed(batches[first], name, mask))
    believed = len(before) == len(after) and all(_unmoved(*two, mask) for two in zip(before, after))
    return [pair[1] if believed and pair and pair[0] == name else None for pair in found]


def _unmoved(before: Tensor, after: Tensor, mask: Tensor) -> bool:
    if before.shape != after.shape:
        return False
    first, second = _rows(before, mask), _rows(after, mask)
    if not first.numel():
        return True
    return bool((first - second).abs().amax() <= _CLOSE * first.abs().amax())
