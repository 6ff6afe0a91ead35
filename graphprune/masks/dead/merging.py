"""What no bias can take goes to the weights of channels that stay.

Zeroes in front of a LayerNorm go to the other channels (see :mod:`.relations`). Constants go to one
constant channel: behind zero padding, it adds less at the borders than in the middle. So does every
other one: channels of constants a and b that are read with weights v and w add what the first one
adds with v + b / a * w, at every place. One channel thus stands for all of them, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from graphprune.masks.dead.passes import Pass
from graphprune.masks.dead.readers import AffineReader, Blame
from graphprune.masks.dead.sinks import Matrix, Sink
from graphprune.plan.plan import MergeChange

EQUAL = 1e-11  # relative
STANDS_IN = "it stands for others that no bias can take (borders of zero padding)"


def agree(passes: Sequence[Pass], fold: str) -> None:
    """Keep constants that differ from call to call of a layer, or from input shape to shape.

    Constants that no bias can take are merged where all calls that read a weight see the same.
    """
    sinks: dict[Sink, list[AffineReader]] = {}
    matrices: dict[Matrix, list[AffineReader]] = {}
    for one in passes:
        for reader, sink in one.sinks.items():
            sinks.setdefault(sink, []).append(reader)
        for reader, matrix in one.matrices.items():
            matrices.setdefault(matrix, []).append(reader)
    for calls in matrices.values():
        _agree_on_relations(calls)
    differing = {}
    for calls in sinks.values():
        differing.update(dict.fromkeys(calls, _differing(calls)))
    for calls in matrices.values() if fold == "exact" else ():
        _merge(calls, differing)
    for reader, columns in differing.items():
        reader.affine.refuse(columns & reader.affine.nonzero & ~reader.affine.merged)


def _agree_on_relations(calls: Sequence[AffineReader]) -> None:
    """A sum of other inputs is taken up by a weight where all calls that read it see the same."""
    first = calls[0].affine.relation
    if first is not None and all(first.equals(reader.affine.relation) for reader in calls):
        return
    for reader in calls:
        reader.affine.unrelate()


def _differing(calls: Sequence[AffineReader]) -> torch.Tensor:
    """Inputs of which a bias would need several constants."""
    first = calls[0].affine.added()
    differs = torch.zeros(first.shape[1], dtype=torch.bool)
    for reader in calls[1:]:
        part = reader.affine.added()
        size = max(float(first.abs().max()), float(part.abs().max()))
        differs |= ((part - first).abs() > EQUAL * size).any(0) & ~reader.affine.uneven
    return differs


def _merge(calls: Sequence[AffineReader], differing: Mapping[AffineReader, torch.Tensor]) -> None:
    """The constant of a channel is merged in all calls that read a weight, or in none."""
    first = calls[0].affine
    same = first.flat.clone()
    for reader in calls[1:]:
        gap = (reader.affine.level - first.level).abs()
        same &= reader.affine.flat & (gap <= EQUAL * first.level.abs())
    wanted = torch.stack([reader.affine.left_over for reader in calls]).any(0)
    for reader in calls:
        wanted |= differing.get(reader, wanted)
    for reader in calls:
        reader.affine.flat = same  # what may stand for others
        reader.affine.refuse(wanted & ~same & reader.affine.nonzero)
        reader.affine.merge(wanted & same)


def representatives(one: Pass, slots: np.ndarray) -> Iterator[Blame]:
    """For each reader with constants to merge a channel that must stay, if none does yet."""
    alive = one.alive(slots)
    for reader in one.matrices:
        leaving = _leaving(reader, alive)
        if bool(leaving.any()) and not bool((reader.affine.flat & ~reader.gone(alive)).any()):
            best = (reader.affine.level.abs() * leaving).argmax()
            hit = torch.zeros_like(leaving)
            hit[best] = True
            yield reader.refuse(hit, alive, STANDS_IN)


def merges(one: Pass, slots: np.ndarray) -> tuple[MergeChange, ...]:
    """What weights take up when the given slices stay."""
    alive = one.alive(slots)
    spread = _spread(one, alive)
    found: dict[Matrix, MergeChange] = {}
    for reader, matrix in one.matrices.items():
        leaving, level = _leaving(reader, alive), reader.affine.level
        if matrix in found or not bool(leaving.any()):
            continue
        into = int((level.abs() * (reader.affine.flat & ~reader.gone(alive))).argmax())
        sources = leaving.nonzero().flatten()
        found[matrix] = MergeChange(
            matrix.tensor,
            matrix.dim,
            into,
            tuple(sources.tolist()),
            tuple((level[sources] / level[into]).tolist()),
            matrix.mask,
        )
    return (*found.values(), *spread)


def _spread(one: Pass, alive: np.ndarray) -> list[MergeChange]:
    """What weights of other channels take up of zeroes in front of a LayerNorm."""
    found: dict[Matrix, MergeChange] = {}
    for reader, matrix in one.matrices.items():
        known = reader.affine.relation
        if known is None or matrix in found:
            continue
        read = reader.affine.read_by(reader.kept(alive)) & (known.factors != 0)
        sources = (reader.gone(alive) & known.zero & read).nonzero().flatten()
        into, *others = known.shares.nonzero().flatten().tolist()
        if len(sources):
            found[matrix] = MergeChange(
                matrix.tensor,
                matrix.dim,
                into,
                tuple(sources.tolist()),
                tuple(known.factors[sources].tolist()),
                matrix.mask,
                tuple(others),
                tuple(known.shares[[into, *others]].tolist()),
            )
    return list(found.values())


def _leaving(reader: AffineReader, alive: np.ndarray) -> torch.Tensor:
    """Inputs that leave and whose constants are to be merged."""
    affine = reader.affine
    return reader.gone(alive) & affine.merged & affine.read_by(reader.kept(alive))
