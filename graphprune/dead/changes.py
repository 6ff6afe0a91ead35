"""Constants that removed channels leave behind, as changes of biases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from graphprune.dead.passes import Pass
from graphprune.dead.readers import AffineReader, Blame
from graphprune.dead.sinks import Sink
from graphprune.plan import BiasChange

EQUAL = 1e-11  # relative to the largest contribution


def _added(reader: AffineReader, alive: np.ndarray) -> Tensor:
    """What each removed input adds to each kept output, [outputs, inputs]."""
    affine = reader.affine
    part = torch.zeros(affine.outputs, len(affine.state), dtype=torch.float64)
    part[:, affine.columns] = affine.parts
    part[:, ~reader.gone(alive)] = 0
    part[~reader.kept(alive)] = 0
    return part


def disagreeing(passes: Sequence[Pass], slots: np.ndarray) -> Iterator[tuple[Pass, Blame]]:
    """Constants that differ from call to call of a layer, or from one input shape to another."""
    first: dict[Sink, tuple[AffineReader, Tensor]] = {}
    for one in passes:
        alive = one.alive(slots)
        for reader, sink in one.sinks.items():
            if not bool((reader.gone(alive) & reader.affine.nonzero).any()) and sink not in first:
                part: Tensor = torch.zeros(())  # compared with zero, broadcast
            else:
                part = _added(reader, alive)
            known = first.setdefault(sink, (reader, part))[1]
            if part.dim() == known.dim() == 0:
                continue
            size = max(float(known.abs().max()), float(part.abs().max()))
            differs = ((part - known).abs() > EQUAL * size).any(0) & ~reader.affine.uneven
            if bool(differs.any()):
                text = "its constant is not the same in every call or for every input shape"
                yield one, reader.refuse(differs & reader.gone(alive), alive, text)


def changes(one: Pass, slots: np.ndarray) -> tuple[BiasChange, ...]:
    """What is added to biases and running means when the given slices stay."""
    alive = one.alive(slots)
    done: dict[str, BiasChange] = {}
    for reader, sink in one.sinks.items():
        if sink.tensor in done or not bool((reader.gone(alive) & reader.affine.nonzero).any()):
            continue
        total = sink.sign * _added(reader, alive).sum(1)
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
