"""The ids of a vocabulary that stay, as a part of plans, and what becomes of ids in inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.errors import InputError, PlanError
from graphprune.plan.coding import Runs
from graphprune.record.inputs import Call, parameter_names
from graphprune.text import shorten

GONE = -1


@dataclass(frozen=True)
class Vocabulary:
    """Which ids of a vocabulary stay; the new id of each is its place among them.

    Attributes:
        size: how many ids there were.
        kept: those that stay, in order.
        rows: the tensors, and the dimensions of them, that have a row for every id.
        inputs: the arguments of the model that hold ids.
        outputs: the outputs that hold a logit for every id, and along which dimension.
        special: those ids that stay which the model itself names: the end of a text, say.
        between: the sizes of vocabularies between the first and this one, where it shrank more
            than once.
    """

    size: int
    kept: Runs
    rows: tuple[tuple[str, int], ...]
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, int], ...] = ()
    special: Runs = ()
    between: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[tuple[str, int], ...]:
        """Vocabularies are told apart by their rows."""
        return self.rows

    @cached_property
    def _places(self) -> dict[int, int]:
        return {old: new for new, old in enumerate(self.kept)}

    def new_id(self, old: int) -> int | None:
        """The new id of an old one; ``None`` when it left. Negative ones are no ids, and stay."""
        return old if old < 0 or old >= self.size else self._places.get(old)

    def old_id(self, new: int) -> int:
        """The old id of a new one.

        Raises:
            InputError: there is no such id.
        """
        if not 0 <= new < len(self.kept):
            raise InputError(f"{new} is no id of this vocabulary: it has 0 to {len(self.kept) - 1}")
        return self.kept[new]

    def to_new(self, ids: Tensor | Sequence[Any]) -> Tensor:
        """New ids for old ones, of any shape; those that left become -1, negative ones stay.

        Args:
            ids: a tensor of whole numbers, or lists of them.

        Returns:
            A tensor of the same type; of int64 where that one has no negative numbers.

        Raises:
            InputError: they are no whole numbers.
        """
        given = whole(ids)
        old = given.long()
        table = torch.full((self.size,), GONE)
        table[list(self.kept)] = torch.arange(len(self.kept))
        found = table.to(old.device)[old.clamp(0, self.size - 1)]
        new = torch.where((old >= 0) & (old < self.size), found, old)
        return new.to(given.dtype) if given.dtype.is_signed else new

    def settled(self, ids: Tensor) -> Tensor:
        """Old ids, with some in place of those that left that stay and mean nothing special."""
        old, new = ids.long(), self.to_new(ids).long()
        lost = (new == GONE) & (old >= 0) | (old >= self.size)
        plain = sorted({*self.kept} - {*self.special}) or self.kept
        plain = [number for number in plain if number <= torch.iinfo(ids.dtype).max] or plain
        choice = torch.tensor(plain, device=ids.device)
        return torch.where(lost, choice[old.clamp(min=0) % len(choice)], old).to(ids.dtype)

    def then(self, later: Vocabulary) -> Vocabulary:
        """This choice followed by one among the ids that stayed."""
        if later.size != len(self.kept):
            raise PlanError(
                f"the later plan expects a vocabulary of {later.size} ids, where "
                f"{len(self.kept)} are left: make it for the small model"
            )
        kept, special = (
            tuple(self.kept[index] for index in indices) for indices in (later.kept, later.special)
        )
        between = (*self.between, len(self.kept), *later.between)
        return replace(later, size=self.size, kept=kept, special=special, between=between)

    def __str__(self) -> str:
        """For tables."""
        names = shorten(dict.fromkeys(tensor for tensor, _ in self.rows), 4)
        return f"vocabulary {self.size:,} -> {len(self.kept):,} ids: rows of {names}"


def whole(ids: Any) -> Tensor:
    """Ids as a tensor.

    Raises:
        InputError: they are no whole numbers.
    """
    try:
        given = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        kind = type(ids).__name__
        raise InputError(f"ids must be whole numbers in a tensor or lists, got a {kind}") from None
    if not given.numel() and not isinstance(ids, Tensor):
        return given.long()
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise InputError(f"ids must be whole numbers, got {given.dtype}")
    return given


def input_names(call: Call, model: nn.Module) -> list[str]:
    """What the tensors of a call are called: by argument, and the way into nested ones."""
    found = pytree.tree_flatten_with_path((call.args, call.kwargs))[0]
    known = parameter_names(model)
    return [_name(path, known) for path, leaf in found if isinstance(leaf, Tensor)]


def _name(path: Sequence[Any], known: Sequence[str]) -> str:
    named = path[0].idx == 1
    key = path[1].key if named else path[1].idx
    first = key if named or key >= len(known) else known[key]
    return f"{first}{pytree.keystr(tuple(path[2:]))}"


def changed(
    call: Call,
    model: nn.Module,
    vocabularies: Iterable[Vocabulary],
    change: Callable[[Vocabulary, Tensor], Tensor],
) -> Call:
    """A call in which the ids of vocabularies are changed."""
    of = {name: vocabulary for vocabulary in vocabularies for name in vocabulary.inputs}
    names = iter(input_names(call, model))

    def each(tensor: Tensor) -> Tensor:
        vocabulary = of.get(next(names))
        fits = vocabulary is not None and not tensor.is_floating_point() and not tensor.is_meta
        return change(vocabulary, tensor) if fits and vocabulary is not None else tensor

    return call.map(each)


def for_small(call: Call, model: nn.Module, vocabularies: Sequence[Vocabulary]) -> Call:
    """The call of a small model: new ids, for some that stay where ids have left."""
    if not vocabularies:
        return call
    return changed(call, model, vocabularies, lambda v, ids: v.to_new(v.settled(ids)).to(ids.dtype))


def problems(plan: Any) -> Iterator[str]:
    """What of the vocabularies of a plan contradicts the rest of it."""
    widths = {slot.key: slot for slot in plan.slots}
    for vocabulary in plan.vocabularies:
        kept = vocabulary.kept
        fits = kept and list(kept) == sorted(set(kept)) and 0 <= kept[0] <= kept[-1]
        if not fits or kept[-1] >= vocabulary.size or not {*vocabulary.special} <= {*kept}:
            yield "the ids of a vocabulary are not in order, or too large"
            return
        for row in vocabulary.rows:
            slot = widths.get(row)
            same = slot is not None and slot.kept == kept and slot.size == vocabulary.size
            whole = slot is None and len(kept) == vocabulary.size
            if not same and not whole:
                yield f"dimension {row[1]} of {row[0]!r} does not lose the ids that leave"
