"""Constants that removed channels leave behind, as changes of biases."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from graphprune.masks.dead.passes import Pass
from graphprune.masks.dead.sinks import Sink
from graphprune.plan.plan import BiasChange


def changes(one: Pass, slots: np.ndarray) -> tuple[BiasChange, ...]:
    """What is added to biases and running means when the given slices stay."""
    alive = one.alive(slots)
    done: dict[str, BiasChange] = {}
    for reader, sink in one.sinks.items():
        gone = reader.gone(alive)[reader.affine.columns]
        if sink.tensor in done or not bool(gone.any()):
            continue
        total = sink.sign * reader.affine.parts[:, gone].sum(1) * reader.kept(alive)
        if not bool((total != 0).any()):
            continue
        for change in _written(one, sink, total):
            done[change.tensor] = change
    return tuple(done.values())


def _written(one: Pass, sink: Sink, total: Tensor) -> Iterator[BiasChange]:
    if sink.mask is not None:  # a masked bias that must hold a constant is not masked any more
        bias, mask = one.vectors[sink.tensor], one.vectors[sink.mask]
        opened = (mask == 0) & (total != 0)
        total = torch.where(opened, total - bias, total)
        if bool(opened.any()):
            yield BiasChange(sink.mask, tuple(opened.double().tolist()))
    yield BiasChange(sink.tensor, tuple(total.tolist()), sink.like)
