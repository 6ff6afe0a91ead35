"""The same random numbers whenever a model runs, from torch, numpy and ``random``."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def same_numbers(seed: int = 0, device: torch.device | None = None) -> Iterator[None]:
    """Random numbers that depend on ``seed`` alone; afterwards all goes on as if none was drawn."""
    devices = [device] if device is not None and device.type == "cuda" else []
    others = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for all devices
            if devices:
                torch.cuda.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        random.setstate(others[0])
        np.random.set_state(others[1])


def states() -> object:
    """How far the generators of ``random`` and numpy have come, to be compared."""
    known: Any = np.random.get_state(legacy=False)
    inner = known["state"]
    return (
        random.getstate(),
        inner["key"].tobytes(),
        inner["pos"],
        known["has_gauss"],
        known["gauss"],
    )
