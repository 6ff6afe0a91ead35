"""Several processes that work on one model: what they sum, share and decide together.

A process on its own is a group of one, for which everything here returns what it is given. Sums and
broadcasts are announced by a meeting in which a rank that has failed is heard, so that none of the
others waits for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from graphprune.errors import InputError, RankError

_BUCKET = 1 << 24  # numbers that are reduced at once
_SAME = (
    "give every rank the same model, schedule and options, and call the same functions equally "
    "often on all of them"
)
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Ranks:
    """The processes of a group; one process on its own is a group of one.

    Args:
        group: of ``torch.distributed``; the default group when it is initialised. ``False``: this
            process works on its own, whatever is initialised.

    Raises:
        InputError: something else, or a group that this process is not in.
    """

    def __init__(self, group: Any = None) -> None:
        ready = dist.is_available() and dist.is_initialized()
        if group not in (None, False) and not (ready and isinstance(group, dist.ProcessGroup)):
            raise InputError(
                "process_group must be a group of torch.distributed that this process is in, "
                f"False for a process on its own, or None for the default group; got {group!r}"
            )
        ready = ready and group is not False
        self.asked = group
        self.group = group if ready else None
        self.size = dist.get_world_size(group) if ready else 1
        self.rank = dist.get_rank(group) if ready else 0

    @property
    def first(self) -> bool:
        """Whether this is the rank whose word counts."""
        return self.rank == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside fails on all ranks or on none.

        A rank that raises tells the others where they meet next, in :meth:`share` and all that is
        built on it, or at the end. Otherwise they would wait for it until a timeout.

        Raises:
            RankError: another rank has failed; says which, and how.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except RankError:  # on all of them
            raise
        except Exception as error:
            if not self._knows(error):
                with contextlib.suppress(RankError):
                    self._gather((f"{type(error).__name__}: {error}", None))
                vars(error).setdefault("_told", []).append(self._name)
            raise
        self.share(None)

    def _knows(self, error: BaseException | None) -> bool:
        """Whether an error, or what it came from, was told to the others where they met within."""
        while error is not None:
            if self._name in vars(error).get("_told", ()):
                return True
            error = error.__cause__ or error.__context__
        return False

    @cached_property
    def _name(self) -> str:
        group = self.group if self.group is not None else dist.group.WORLD
        return str(getattr(group, "group_name", group))

    def share(self, value: T) -> list[T]:
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

    def decided(self, value: T) -> T:
        """The value of the first rank: machines may round otherwise, and all must do the same."""
        if self.size == 1:
            return value
        found: list[Any] = self.share(value if self.first else None)
        return found[0]

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks."""
        return self.sum(tensor) / self.size if self.size > 1 else tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, which all have the same shape."""
        found: Tensor = self.sums({"": tensor}, tensor.device)[""].to(tensor.dtype)
        return found

    def sums(self, own: Mapping[K, Tensor], device: torch.device | str = "cpu") -> dict[K, Tensor]:
        """Sums over the ranks by name, in float64; what a rank does not have counts as zero.

        Args:
            own: the numbers of this rank, on any device.
            device: where the sums will be.

        Returns:
            In the order of the first rank that has each; on all ranks the same to the last bit.

        Raises:
            RankError: a rank has failed, or has another shape.
        """
        if self.size == 1:
            return {name: tensor.to(device, torch.float64) for name, tensor in own.items()}
        shapes: dict[K, tuple[int, ...]] = {}
        for rank, others in enumerate(self.share({n: tuple(t.shape) for n, t in own.items()})):
            for name, shape in others.items():
                if shapes.setdefault(name, shape) != shape:
                    raise RankError(
                        f"the ranks disagree on the shape of {name}: {shapes[name]}, and {shape} "
                        f"on rank {rank}; {_SAME}"
                    )
        found: dict[K, Tensor] = {}
        for names in _buckets(shapes):
            parts = [
                own[name].detach().to(self._device, torch.float64)
                if name in own
                else torch.zeros(shapes[name], dtype=torch.float64, device=self._device)
                for name in names
            ]
            flat = torch.cat([part.reshape(-1) for part in parts])
            with _answered():
                dist.all_reduce(flat, group=self.group)
            pieces = flat.to(device).split([part.numel() for part in parts])
            found.update({n: p.reshape(shapes[n]) for n, p in zip(names, pieces)})
        return found

    @torch.no_grad()
    def copy_from(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Give tensors the values that they have on one rank.

        Raises:
            RankError: a rank has failed, or its tensors have other shapes or types.
        """
        if self.size == 1:
            return
        self.check("tensors", [(tuple(t.shape), str(t.dtype)) for t in tensors])
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault(tensor.dtype, []).append(tensor.detach())
        source = rank if self.group is None else dist.get_global_rank(self.group, rank)
        for together in kinds.values():
            flat = torch.cat([tensor.reshape(-1).to(self._device) for tensor in together])
            with _answered():
                dist.broadcast(flat, source, group=self.group)
            if self.rank != rank:
                for tensor, piece in zip(together, flat.split([t.numel() for t in together])):
                    tensor.copy_(piece.reshape(tensor.shape))

    def union(self, own: Mapping[K, T]) -> dict[K, T]:
        """What any of the ranks has, by name; a rank that lacks one gets that of the first."""
        names = [set(each) for each in self.share(list(own))]
        known = dict(own)
        if any(each != names[0] for each in names):
            everywhere = set.intersection(*names)
            for others in reversed(self.share({n: own[n] for n in own if n not in everywhere})):
                known.update({name: value for name, value in others.items() if name not in own})
        return known

    def in_turn(
        self, own: Sequence[T], turns: Sequence[int] | None = None
    ) -> tuple[list[T], list[int]]:
        """What all ranks have, one of each in turn: the order that a ``DistributedSampler`` deals.

        Item i of rank r stands before item i of rank r + 1 and all items i + 1. Ranks with fewer
        items are passed over in the end.

        Args:
            own: such as sizes of the batches of this rank.
            turns: of each, where some have been left out since; else their numbers.

        Returns:
            All of them, and the places of the own ones.
        """
        found = self.share(list(zip(range(len(own)) if turns is None else turns, own)))
        dealt = [(turn, r, item) for r, items in enumerate(found) for turn, item in items]
        dealt.sort(key=lambda item: item[:2])
        places = [place for place, (_, rank, _) in enumerate(dealt) if rank == self.rank]
        return [item for _, _, item in dealt], places

    @cached_property
    def _device(self) -> torch.device:
        """Where the group can reduce numbers: nccl has no kernels for the CPU."""
        kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(self.group).split(",")]
        return torch.device("cpu" if "cpu" in kinds else kinds[0])

    def _gather(self, value: tuple[str, Any]) -> list[tuple[str, Any]]:
        found: list[Any] = [value] * self.size
        if self.size > 1:
            with _answered():
                dist.all_gather_object(found, value, group=self.group)
        return found


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """Say what it means when the other processes do not answer."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankError(
            f"another rank does not answer: {error}\nit has ended, or has not called the same "
            "function: call it on all ranks; one that works on its own passes process_group=False"
        ) from error


def _buckets(shapes: Mapping[K, tuple[int, ...]]) -> Iterable[list[K]]:
    """Names in order, a bounded number of numbers at a time."""
    names: list[K] = []
    count = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        if names and count + size > _BUCKET:
            yield names
            names, count = [], 0
        names.append(name)
        count += size
    if names:
        yield names


def _short(value: object, most: int = 200) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."
