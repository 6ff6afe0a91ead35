"""The registry of criteria: what a criterion is, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from graphprune.channels.analysis import Group
from graphprune.errors import InputError

Criterion = Callable[[Group, Mapping[str, Tensor], torch.Generator], Tensor]
C = TypeVar("C", bound=Criterion)
Variants = Callable[[Sequence[Group], Mapping[str, Tensor]], Sequence[Mapping[str, float]]]
WEIGHTS = frozenset({"weights"})


class Unseen(Exception):
    """Raised by a criterion for a group that it cannot judge; the text says why.

    The group stays whole, and a warning names it. A score made up for it would be compared with
    true scores when channels are ranked over all groups.
    """


@dataclass(frozen=True)
class Entry:
    """A criterion and what it says of itself.

    Attributes:
        name: for messages and plans.
        function: the criterion.
        needs: what it must be given: ``"weights"`` or names of statistics.
        aggregate: how the scores of several slots become one, unless the user says otherwise.
        comparable: whether the scores of different groups are on one scale.
        scope, normalise: what plans do with the scores, unless the user says otherwise.
        without_data: the criterion that stands in where no data are given; needs are errors when
            absent.
        variants: what else the scores may be, for plans to try: factors by group name.
        others: criteria of the same needs, for plans to try as well.
        blind: whether it looks at no weight, either.
        apart: whether it scores a group without the generator, so that processes can share them.
    """

    name: str
    function: Criterion
    needs: frozenset[str] = WEIGHTS
    aggregate: str = "sum"
    comparable: bool = False
    scope: str | None = None
    normalise: str | None = None
    without_data: str | None = None
    variants: Variants | None = None
    others: Sequence[Criterion] = ()
    blind: bool = False
    apart: bool = False


_SAID = ("comparable", "scope", "normalise", "without_data", "variants", "others", "blind", "apart")
_REGISTRY: dict[str, Entry] = {}


def register_criterion(name: str, needs: Iterable[str] | str | None = None) -> Callable[[C], C]:
    """Register a criterion under a name.

    A criterion is called with a group, all parameters and buffers by name (with the statistics it
    needs as ``.statistics``), and a seeded generator. It returns scores of shape [channels], or
    [slots, channels], which are then aggregated; high for important channels. Any callable will
    do, a function or an object with options. It may have the attributes ``needs``, ``aggregate``
    (how slots are aggregated by default), ``comparable`` (whether scores of different groups are
    on one scale), ``scope`` and ``normalise`` (what plans use by default), and may raise
    ``Unseen`` for a group that it cannot judge.

    Args:
        name: what users pass as ``criterion=``.
        needs: ``"weights"``, ``"gradients"``, ``"activations"``, ``"activation_gradients"`` or any
            other registered statistic, one or several; when absent, the attribute ``needs`` of the
            criterion, else the weights alone.

    Raises:
        KeyError: the name is taken.

    Example:
        >>> import torch
        >>> from graphprune.criteria import register_criterion
        >>> @register_criterion("first-channels")
        ... def first(group, tensors, generator):
        ...     return -torch.arange(float(group.size))
    """

    def decorate(criterion: C) -> C:
        if name in _REGISTRY:
            raise KeyError(f"criterion {name!r} is registered already")
        _REGISTRY[name] = _entry(name, criterion, needs)
        return criterion

    return decorate


def criteria() -> tuple[str, ...]:
    """The names of all registered criteria."""
    return tuple(sorted(_REGISTRY))


def find(criterion: str | Criterion) -> Entry:
    """A criterion by its name, or a callable, with what it says of itself.

    Raises:
        InputError: an unknown name, or not callable.
    """
    if isinstance(criterion, str):
        if criterion not in _REGISTRY:
            raise InputError(
                f"unknown criterion {criterion!r}; choose one of {', '.join(criteria())}, or pass "
                "a callable (group, tensors, generator) -> scores"
            )
        return _REGISTRY[criterion]
    if isinstance(criterion, type):
        raise InputError(
            f"criterion is the class {criterion.__name__}: pass an instance, "
            f"{criterion.__name__}(...)"
        )
    if not callable(criterion):
        raise InputError(f"criterion must be a name or a callable, not {type(criterion).__name__}")
    return _entry(name_of(criterion), criterion, None)


def name_of(criterion: object) -> str:
    """The name of a criterion for messages and plans: a name, or options as in the code."""
    if isinstance(criterion, str):
        return criterion
    if hasattr(criterion, "__dataclass_fields__"):
        return repr(criterion)
    return str(getattr(criterion, "__name__", type(criterion).__name__))


def _entry(name: str, criterion: Criterion, needs: Iterable[str] | str | None) -> Entry:
    found = getattr(criterion, "needs", WEIGHTS) if needs is None else needs
    return Entry(
        name,
        criterion,
        frozenset({found} if isinstance(found, str) else found),
        getattr(criterion, "aggregate", Entry.aggregate),
        *(getattr(criterion, name, getattr(Entry, name)) for name in _SAID),
    )
