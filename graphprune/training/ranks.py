"""Several processes that train one model: all of them remove the same channels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from graphprune.channels.analysis import Group
from graphprune.criteria import Criterion, Unseen, find, name_of
from graphprune.errors import RankError

_SAME = (
    "give every rank the same model, schedule and options, and call step() equally often on all "
    "of them"
)


class Ranks:
    """The processes of a group; one process on its own is a group of one.

    Args:
        group: of ``torch.distributed``; the default group when it is initialised.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        ready = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(group) if ready else 1
        self.first = not ready or dist.get_rank(group) == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside fails on all ranks or on none; not to be nested.

        A rank that raises tells the others where they meet next, in :meth:`share`, :meth:`check`,
        :meth:`mean` or at the end. Otherwise they would wait for it until a timeout.

        Raises:
            RankError: another rank has failed; says which, and how.
        """
        try:
            yield
        except RankError:  # on all of them
            raise
        except Exception as error:
            self._gather((f"{type(error).__name__}: {error}", None))
            raise
        self.share(None)

    def share(self, value: object) -> list[Any]:
        """The values of all ranks, in order.

        Raises:
            RankError: a rank has failed.
        """
        found = self._gather(("", value))
        for rank, (failure, _) in enumerate(found):
            if failure:
                raise RankError(f"rank {rank} has failed: {failure}")
        return [other for _, other in found]

    def check(self, what: str, value: object, advice: str = _SAME) -> None:
        """Raise on every rank unless all ranks have the same value.

        Raises:
            RankError: says which rank has what.
        """
        found = self.share(value)
        if all(other == found[0] for other in found):
            return
        odd = next(rank for rank, other in enumerate(found) if other != found[0])
        raise RankError(
            f"the ranks disagree on {what}: rank 0 has {_short(found[0])}, rank {odd} has "
            f"{_short(found[odd])}; {advice}"
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
        return criterion if self.size == 1 else Averaged(criterion, self)

    def _gather(self, value: tuple[str, Any]) -> list[tuple[str, object]]:
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=self.group)
        return found


class Averaged:
    """A criterion whose scores are the mean over all ranks, each of which sees other data."""

    def __init__(self, criterion: str | Criterion, ranks: Ranks) -> None:
        entry = find(criterion)
        self.function = entry.function
        self.ranks = ranks
        self.__name__ = name_of(criterion)
        self.needs = entry.needs
        self.aggregate = entry.aggregate
        self.comparable = entry.comparable
        self.scope, self.normalise = entry.scope, entry.normalise

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [channels] or [slots, channels].

        Raises:
            Unseen: one of the ranks cannot judge the group.
        """
        unseen = ""
        scores = torch.zeros(group.size)
        try:
            scores = self.function(group, tensors, generator)
        except Unseen as reason:
            unseen = str(reason)
        first = next(filter(None, self.ranks.share(unseen)), "")
        if first:
            raise Unseen(first)
        return self.ranks.mean(scores)


def _short(value: object, most: int = 200) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."


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
