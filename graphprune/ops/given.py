"""Sizes and places that ops are given as numbers, and those they need after pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import fx

from graphprune.ops.ids import Path, Shape


class Given(NamedTuple):
    """Sizes that an op was given, and those it needs.

    ``kind`` tells which of several equal ints is meant, see :func:`locate`; ``places`` are the
    dimensions that they measure, as (value, dimension), where that is known.
    """

    old: list[int]
    new: list[int]
    kind: str = ""
    places: Sequence[tuple[fx.Node, int]] | None = None


class Pruned(Protocol):
    """What is known of a recorded graph after pruning; ``alive`` says by id what stays."""

    def shape(self, node: fx.Node, alive: np.ndarray) -> Shape:
        """The shape of a value."""

    def positions(self, node: fx.Node, dim: int, alive: np.ndarray) -> np.ndarray:
        """For each position of a value along ``dim`` whether it stays."""


def args_of(node: fx.Node) -> Any:
    """The positional arguments of a node; their types are known from the op."""
    return node.args


def ints_of(node: fx.Node) -> list[int]:
    """The ints given to the function that called an op."""
    return [number for number in node.meta["numbers"] if isinstance(number, int)]


def paths_of(node: fx.Node) -> list[Path]:
    """Where these ints stand in the arguments."""
    pairs = zip(node.meta["numbers"], node.meta["paths"])
    return [path for number, path in pairs if isinstance(number, int)]


def locate(node: fx.Node, old: Sequence[int], kind: str = "") -> slice | None:
    """Where the sizes that an op was given stand among the ints of the call that ran it.

    ``kind`` tells which of several equal ints is meant: the ``start`` or ``stop`` of a slice, the
    ``length`` of ``narrow``, or the ``last`` one.
    """
    ints = ints_of(node)
    if kind in ("start", "stop", "length"):
        return _end_of_slice(node, old[0], kind)
    places = range(len(ints) - len(old) + 1)
    for start in reversed(places) if kind == "last" else places:
        part = ints[start : start + len(old)]
        if all(a == b or a == -1 for a, b in zip(part, old)):
            return slice(start, start + len(old))
    return None


def _end_of_slice(node: fx.Node, old: int, kind: str) -> slice | None:
    ints, paths = ints_of(node), paths_of(node)
    named = [place for place, path in enumerate(paths) if path[-1] == kind and ints[place] == old]
    if named:
        dim = args_of(node)[1] if len(args_of(node)) > 1 else 0
        named.sort(key=lambda place: dim not in paths[place][1:2])
        return slice(named[0], named[0] + 1)
    listed = [place for place, path in enumerate(paths) if type(path[-1]) is int and path[1:]]
    listed = [place for place in listed if ints[place] == old and kind != "length"]
    if listed:  # of tensor_split
        return slice(listed[0], listed[0] + 1)
    narrowed = {"start": 1, "length": 2}.get(kind, 3)
    if len(ints) == 3 and "start" not in {path[-1] for path in paths} and narrowed < 3:
        return slice(narrowed, narrowed + 1) if ints[narrowed] == old else None
    return None
