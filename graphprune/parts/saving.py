"""What parts save of what a target limits: scores are divided by it, so that a budget is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import fx, nn

from graphprune.parts.find import Finder, Part
from graphprune.planning.latency import Bench, aligned
from graphprune.planning.targets import Target

_LEAST = 1e-6  # of the whole: what saves nothing else leaves last


def savings(
    parts: Sequence[Part],
    targets: Mapping[str, Target],
    finder: Finder,
    model: nn.Module,
    bench: Bench,
) -> dict[str, float]:
    """The fraction of the costs that leaves with every part alone, by its name.

    Of parameters (and bytes of weights), of multiply-accumulates, of milliseconds as measured op by
    op; of activations, which live at once, that of multiply-accumulates. The mean over the targets;
    1 for all parts without any.
    """
    if not targets:
        return dict.fromkeys((part.name for part in parts), 1.0)
    total = dict.fromkeys((part.name for part in parts), 0.0)
    for kind in targets:
        if kind in ("params", "bytes"):
            whole: float = sum(parameter.numel() for parameter in model.parameters())
            saved = {part.name: float(part.params) for part in parts}
        elif kind == "latency":
            times = _times(finder, model, bench)
            whole = sum(times.values())
            saved = {part.name: finder.saved(part, times) for part in parts}
        else:
            whole = sum(finder.macs.values())
            saved = {part.name: float(part.macs) for part in parts}
        for name, amount in saved.items():
            total[name] += amount / max(whole, 1e-12) / len(targets)
    return {name: max(share, _LEAST) for name, share in total.items()}


def _times(finder: Finder, model: nn.Module, bench: Bench) -> dict[fx.Node, float]:
    """Milliseconds of every recorded op."""
    (sample,) = bench.samples([model], [np.zeros(0)])
    ops = finder.record.ops
    return dict(zip(ops, aligned(ops, sample).tolist()))
