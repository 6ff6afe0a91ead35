"""Models that several processes train, wrapped as torch does it."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphprune.errors import RankError


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel`` or ``DataParallel``."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, wrappers) else model


def retire(wrapper: nn.Module) -> None:
    """Make a wrapper, whose buckets have the old shapes, say so when it is used."""

    def forward(*_: object, **__: object) -> Any:
        raise RankError(
            f"channels were removed from the model inside this {type(wrapper).__name__}, whose "
            "buckets have the old shapes: wrap pruner.model anew"
        )

    wrapper.forward = forward
