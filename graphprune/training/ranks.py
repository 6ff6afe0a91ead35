"""Several processes that train one model: all of them remove the same channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from graphprune.analysis import Group
from graphprune.criteria import Criterion, find, name_of
from graphprune.errors import RankError


class Ranks:
    """The processes of a group; one process on its own is a group of one.

    Args:
        group: of ``torch.distributed``; the default group when it is initialised.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        ready = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(group) if ready else 1

    def check(self, what: str, value: object) -> None:
        """Raise on every rank unless all ranks have the same value.

        Raises:
            RankError: says which rank has what.
        """
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        if all(other == found[0] for other in found):
            return
        odd = next(rank for rank, other in enumerate(found) if other != found[0])
        raise RankError(
            f"the ranks disagree on {what}: rank 0 has {_short(found[0])}, rank {odd} has "
            f"{_short(found[odd])}; give every rank the same model, schedule and options, and call "
            "step() equally often on all of them"
        )

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks."""
        if self.size == 1:
            return tensor
        on_gpu = dist.get_backend(self.group) == "nccl"  # which has no kernels for the CPU
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else tensor.device
        total = tensor.detach().to(device, copy=True).contiguous()
        dist.all_reduce(total, group=self.group)
        return (total / self.size).to(tensor.device)

    def criterion(self, criterion: str | Criterion) -> str | Criterion:
        """The same criterion, with its scores averaged over the ranks."""
        return criterion if self.size == 1 else Averaged(criterion, self.mean)


class Averaged:
    """A criterion whose scores are the mean over all ranks, each of which sees other data."""

    def __init__(self, criterion: str | Criterion, mean: Callable[[Tensor], Tensor]) -> None:
        entry = find(criterion)
        self.function = entry.function
        self.mean = mean
        self.__name__ = name_of(criterion)
        self.needs = entry.needs
        self.aggregate = entry.aggregate
        self.comparable = entry.comparable

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [channels] or [slots, channels]."""
        return self.mean(self.function(group, tensors, generator))


def _short(value: object, most: int = 200) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel`` or ``DataParallel``."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, wrappers) else model


def retire(wrapper: nn.Module) -> None:
    """Make a wrapper, whose buckets have the old shapes, say so when it is used."""

    def forward(*_: Any, **__: Any) -> Any:
        raise RankError(
            f"channels were removed from the model inside this {type(wrapper).__name__}, whose "
            "buckets have the old shapes: wrap pruner.model anew"
        )

    wrapper.forward = forward
