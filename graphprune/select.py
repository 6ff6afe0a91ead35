"""From scores to kept channels. Knows neither criteria nor layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import InputError

SCOPES = ("local", "global")
Kept = dict[str, tuple[int, ...]]


def check_ratio(ratio: Any) -> float:
    """A ratio in [0, 1) as a float.

    Raises:
        InputError: not a number, or outside the range.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise InputError(
            f"ratio must be a number in [0, 1) or a Plan, not {type(ratio).__name__} {ratio!r}"
        )
    if not 0 <= ratio < 1:
        raise InputError(f"ratio must be in [0, 1), the fraction to remove: got {ratio}")
    return float(ratio)


def select(scores: Mapping[str, Tensor], ratio: float, scope: str) -> Kept:
    """Choose the channels that stay.

    Args:
        scores: one score per channel, by group name.
        ratio: the fraction to remove from every group (local) or of all channels (global).
        scope: ``"local"`` ranks within each group; ``"global"`` ranks all channels together,
            each score divided by the mean of its group. No group loses its last channel.

    Returns:
        The kept channels by group name, increasing. Equal scores keep the earlier channel.

    Raises:
        InputError: an unknown scope.
    """
    if scope not in SCOPES:
        raise InputError(f"unknown scope {scope!r}; choose one of {', '.join(SCOPES)}")
    if scope == "local":
        return {
            name: _best(score, len(score) - math.floor(ratio * len(score) + 1e-9))
            for name, score in scores.items()
        }
    if not scores:
        return {}
    best = {name: int(score.argmax()) for name, score in scores.items()}
    relative = {name: score / (score.mean() or 1.0) for name, score in scores.items()}
    for name, index in best.items():
        relative[name] = relative[name].clone()
        relative[name][index] = torch.inf
    ranked = torch.cat(list(relative.values()))
    remove = math.floor(ratio * len(ranked) + 1e-9)
    order = torch.argsort(ranked.flip(0), stable=True)[:remove]
    removed = torch.zeros(len(ranked), dtype=torch.bool)
    removed[len(ranked) - 1 - order] = True
    removed &= ranked.isfinite()
    parts = removed.split([len(score) for score in scores.values()])
    return {
        name: tuple(torch.nonzero(~part).flatten().tolist())
        for name, part in zip(scores, parts, strict=True)
    }


def _best(score: Tensor, count: int) -> tuple[int, ...]:
    order = torch.argsort(score, descending=True, stable=True)
    return tuple(sorted(order[: max(count, 1)].tolist()))
