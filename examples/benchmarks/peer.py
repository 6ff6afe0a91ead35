"""The same job done by Torch-Pruning 1.6.1, for comparison."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from suites import Case, call, parameters, tensors
from torch import nn


def shrink(model: nn.Module, x: Any, case: Case, ratio: float, scope: str) -> float:
    """Build the dependency graph and prune once, in place.

    Returns:
        Seconds.
    """
    import torch_pruning

    start = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=scope == "global",
        ignored_layers=case.heads(model),
        output_transform=tensors,
    )
    pruner.step()
    return time.perf_counter() - start


def outcome(case: Case, ratio: float, scope: str) -> dict[str, Any]:
    """Whether the peer prunes the model, whether the result runs, and what it keeps."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = case.model()
    x = case.draw(case.batch)
    before = parameters(model)
    batch = case.draw(case.batch + 1)
    with torch.no_grad():
        wanted = [out.shape for out in tensors(call(model, batch))]
    try:
        seconds = shrink(model, x, case, ratio, scope)
    except Exception as error:
        return {"peer": f"fails: {type(error).__name__}"}
    kept = parameters(model) / before
    notes = []
    for mode in ("eval", "train") if case.trains else ("eval",):
        try:
            with torch.no_grad():
                found = [out.shape for out in tensors(call(model.train(mode == "train"), batch))]
        except Exception as error:
            notes.append(f"result fails in {mode} mode: {type(error).__name__}")
            continue
        if mode == "eval" and case.kind != "detection" and found != wanted:
            notes.append("outputs of other shapes")
    return {"peer": "; ".join(notes) or "runs", "peer_kept": kept, "peer_seconds": seconds}
