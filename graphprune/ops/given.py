"""Sizes and places that ops are given as numbers, and those they need after pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import fx

from graphprune.ops.ids import Path, Shape

_ALONG = {"start", "end", "length", "index"}  # places of a dimension
_RENAMED = {
    "shape": "size",
    "num_groups": "group",
    "split_sizes": "split_size",
    "split_size_or_sections": "split_size",
    "indices_or_sections": "indices",
}


class Given(NamedTuple):
    """Sizes that an op was given, and those it needs.

    ``argument`` is the name of theirs in the schema of the op, ``first`` the place of the first
    one: in a list, or the dimension that it is a place of; ``places`` are the dimensions that they
    measure, as (value, dimension), where that is known.
    """

    old: list[int]
    new: list[int]
    argument: str
    first: int = 0
    places: Sequence[tuple[fx.Node, int]] | None = None


class Number(NamedTuple):
    """A number that the user's code gave to a function, and where it stands in the arguments.

    ``argument`` and ``place`` say which one of an op it is, as in :class:`Given`.
    """

    value: float
    path: Path
    argument: str = ""
    place: int = 0


class Pruned(Protocol):
    """What is known of a recorded graph after pruning; ``alive`` says by id what stays."""

    def shape(self, node: fx.Node, alive: np.ndarray) -> Shape:
        """The shape of a value."""

    def positions(self, node: fx.Node, dim: int, alive: np.ndarray) -> np.ndarray:
        """For each position of a value along ``dim`` whether it stays."""


def meant(name: str, place: int, dim: int) -> tuple[str, int]:
    """What an argument of a function that acts along ``dim`` is called, and its place, in ops."""
    if name == "sizes":  # of unflatten: part of a shape
        return "size", dim + place
    return (name, dim) if name in _ALONG else (_RENAMED.get(name, name), place)


def ints_of(node: fx.Node) -> list[int]:
    """The ints given to the function that called an op."""
    return [n.value for n in node.meta["numbers"] if isinstance(n.value, int)]


def numbers_for(node: fx.Node, given: Given) -> dict[int, Number]:
    """The numbers of the call that sizes of an op are, by the places of these sizes.

    There are none where the sizes were computed inside a function of torch.
    """
    found: dict[int, Number] = {}
    for number in node.meta["numbers"]:
        place = number.place - given.first
        if number.argument == given.argument and 0 <= place < len(given.old):
            inferred = number.value == -1 and given.argument == "size"
            if number.value != given.old[place] and not inferred:
                return {}
            found[place] = number
    return found
