"""Whether a calibrated model is better: its outputs and the original's, on items set apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graphprune.calibration.sums import Errors, reduced
from graphprune.ranks import Ranks
from graphprune.record.batches import Batch, at_rest
from graphprune.record.padding import outputs, unpadded


def distance(
    small: nn.Module,
    model: nn.Module,
    batches: Sequence[Batch],
    masks: Sequence[Tensor | None],
    ranks: Ranks | None = None,
) -> float | None:
    """The squared error of the outputs as a fraction of their variance, the mean of all outputs.

    Args:
        small: one of the models.
        model: the original.
        batches: what both run on.
        masks: of each batch, which positions are no padding.
        ranks: which have other batches: the error is that on all.

    Returns:
        ``None`` where no output has the same shape in both models, or is finite.
    """
    known: dict[int, Errors] = {}
    with torch.no_grad(), at_rest(model), at_rest(small):
        for batch, mask in zip(batches, masks):
            pairs = zip(outputs(model, batch), outputs(small, batch))
            for place, (wanted, found) in enumerate(pairs):
                if wanted.shape == found.shape and wanted.numel():
                    rows = [unpadded(t, mask).reshape(-1, 1) for t in (wanted, found.to(wanted))]
                    known.setdefault(place, Errors()).add(rows[0] - rows[1], rows[0])
    known = reduced(known, ranks or Ranks(False))
    levels = [errors.relative for errors in known.values() if errors.squares > 0]
    total = sum(levels) / len(levels) if levels else None
    return total if total is None or (total == total and total != float("inf")) else None
