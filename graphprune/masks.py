"""Plans from masked models: remove what is dead, with the same output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.comparing import resized
from graphprune.copying import copy_module
from graphprune.dead import Pass, Search
from graphprune.errors import InputError, TraceError
from graphprune.feasible import feasible
from graphprune.graph import trace
from graphprune.inputs import Call
from graphprune.plan import BiasChange, Cost, Plan, SlotPlan, mark, shorten
from graphprune.skeleton import aliases, named_modules, named_tensors

FOLDS = ("exact", "approximate", "none")


def from_masks(
    model: nn.Module, example_inputs: Any, masks: Mapping[str, Any] | None, fold: str, attention: str
) -> Plan:
    """See :meth:`graphprune.Plan.from_masks`."""
    if fold not in FOLDS:
        raise InputError(f"fold must be one of {', '.join(FOLDS)}, not {fold!r}")
    graph = trace(model, example_inputs, attention=attention)
    zeroed = _zeroed(model, masks or {})
    masked = _apply(model, zeroed) if zeroed else model
    passes = _passes(masked, graph.call, attention, fold)
    settled = graph.settled.copy()
    used = frozenset(
        str(n.target) for n in settled.analysis.records[0].graph.nodes if n.op == "get_attr"
    )
    while True:
        search = Search(settled.analysis, passes, used)
        biases = search.run()
        kept = search.kept()
        if feasible(model, graph.call, settled, kept):
            break
    graph = replace(graph, settled=settled)
    plan = graph.plan_of(kept, {"masks": True, "fold": fold}, check=False)
    left = _left(zeroed, plan)
    return replace(
        plan,
        biases=biases,
        zeroed=left,
        weights=mark(model) if biases or left else None,
        notes=(*search.notes(), *_approximated(passes[0], search, fold)),
        after=_with_biases(plan, biases, model),
    )


def _passes(model: nn.Module, call: Call, attention: str, fold: str) -> list[Pass]:
    """The example inputs, few of them, and others, for which constants must be the same."""
    found: list[Pass] = []
    for call in (_few(model, call), call):
        try:
            found.append(Pass(model, call, attention, fold))
            break
        except TraceError:
            if call is not _few(model, call) and found:
                raise
    for side in (True, False):
        other = _other(found[0].call, side)
        try:
            if other is not None:
                found.append(Pass(model, other, attention, fold))
                break
        except TraceError:
            continue
    return found
