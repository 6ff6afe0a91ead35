"""What a model and its small one cost: one latency of each, measured side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from graphprune.deploy.timing import bench
from graphprune.measurement import Measurement, measure
from graphprune.plan.plan import plan_of

_SECONDS = 1.0  # for each model


def measured(
    original: nn.Module, small: nn.Module, example: object, threads: int | None
) -> tuple[Measurement, Measurement]:
    """Costs before and after.

    The latencies are those that a plan for a latency was accepted by; without such a plan, both
    models are run in turns. Elsewhere than on the CPU each is measured by itself.
    """
    plan = plan_of(small)
    known = plan.request.get("latency") if plan is not None else None
    before, after = (measure(model, example, latency=False) for model in (original, small))
    if isinstance(known, Mapping):
        return (
            replace(before, latency=float(known["before"])),
            replace(after, latency=float(known["measured"])),
        )
    if before.device != "cpu":
        return (
            measure(original, example, threads=threads),
            measure(small, example, threads=threads),
        )
    models = {"original": original, "small": small}
    threads = threads or torch.get_num_threads()
    rows = bench(models, example, threads=threads, seconds=_SECONDS).rows
    found = [
        replace(cost, latency=row.latency, spread=row.spread)
        for cost, row in zip((before, after), rows)
    ]
    return found[0], found[1]
