"""Gradual pruning inside other people's loops: Lightning, and the Trainer of transformers.

Their packages are imported when a callback is first asked for; neither is needed otherwise.
"""

from __future__ import annotations

import importlib

_HOMES = {"LightningPruning": "lightning", "TrainerPruning": "huggingface"}

__all__ = ["LightningPruning", "TrainerPruning"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
