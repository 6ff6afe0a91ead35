"""How many batches can be held at once between two layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprune.calibration.replay import Replay, Run


def rooms(original: Replay, small: Replay, ends: Sequence[int], memory: float) -> list[int]:
    """With how many batches, the first ones, each layer is fitted; never fewer than before it.

    Early layers of networks of images hold much more than late ones. They are fitted to fewer
    batches; the others come to a later layer when there is room for them, and run once as well.

    Args:
        original: one of the two models.
        small: the other.
        ends: where layers end, in order.
        memory: bytes of activations.
    """
    totals = [0.0] * len(ends)
    room = [0] * len(ends)
    for one, other in zip(original.runs, small.runs):
        peaks = [a + b for a, b in zip(_peaks(one, ends), _peaks(other, ends))]
        for place, peak in enumerate(peaks):
            totals[place] += peak
            if totals[place] <= memory or not room[place]:
                room[place] += 1
    for place in range(len(room) - 2, -1, -1):
        room[place] = min(room[place], room[place + 1])
    return room


def _peaks(run: Run, ends: Sequence[int]) -> list[int]:
    """The most bytes of values that a run holds between one layer and the next."""
    alive, now = [], 0
    sizes = {node: _bytes(node.meta) for node in run.nodes if node.op == "call_function"}
    for number, node in enumerate(run.nodes):
        now += sizes.get(node, 0)
        alive.append(now)
        now -= sum(sizes.get(gone, 0) for gone in run.leaving.get(number, ()))
    found, start = [], 0
    for end in ends:
        stop = run.place.get(end, start) + 1
        found.append(max(alive[start:stop], default=0))
        start = max(start, stop)
    return found


def _bytes(meta: dict[str, object]) -> int:
    shape, dtype = meta.get("shape"), meta.get("dtype")
    if not isinstance(shape, tuple) or not isinstance(dtype, torch.dtype):
        return 0
    count = 1
    for size in shape:
        count *= int(size)
    return count * dtype.itemsize
