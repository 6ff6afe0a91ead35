"""Which sizes and positions each op needs after pruning: one rule per op that is given any."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx

from graphprune.ops.ids import Path, Shape

aten = torch.ops.aten
Want = tuple[list[int], list[int], str]  # sizes an op was given, those it needs, see ``locate``


class Pruned(Protocol):
    """What is known of a recorded graph after pruning; ``alive`` says by id what stays."""

    def shape(self, node: fx.Node, alive: np.ndarray) -> Shape:
        """The shape of a value."""

    def positions(self, node: fx.Node, dim: int, alive: np.ndarray) -> np.ndarray:
        """For each position of a value along ``dim`` whether it stays."""


Rule = Callable[[Pruned, fx.Node, np.ndarray], Iterator[Want]]
WANTED: dict[Any, Rule] = {}


# Ops given the places of channels: a wrong place has the right shape.
POSITIONS = frozenset({aten.slice, aten.select, aten.constant_pad_nd})


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def decorate(rule: Rule) -> Rule:
        WANTED.update(dict.fromkeys(targets, rule))
        return rule

    return decorate


def packet_of(node: fx.Node) -> Any:
    """The op of a node, whichever overload it is."""
    return getattr(node.target, "overloadpacket", None)


def args_of(node: fx.Node) -> Any:
    """The positional arguments of a node; their types are known from the op."""
    return node.args


@_rule(
    aten.view,
    aten._unsafe_view,
    aten.reshape,
    aten.expand,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
    aten.view_copy,
)
def _shape(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    given = args_of(node)[1] if len(args_of(node)) > 1 else node.kwargs.get("size")
    if isinstance(given, list | tuple):
        new = list(graph.shape(node, alive))[-len(given) :] if given else []
        new = [n if g != -1 else -1 for g, n in zip(given, new)]
        if locate(node, given) is not None:
            yield list(given), new, ""
        elif (dims := _unflattened(node, given)) is not None:
            yield list(given[dims]), new[dims], "last"
        else:
            yield *_part(node, given, new), ""


def _unflattened(node: fx.Node, given: Any) -> slice | None:
    """The dimensions made of one by ``unflatten``, which is given that one and their sizes."""
    first: Any = node.all_input_nodes[0] if node.all_input_nodes else None
    dim, *sizes = ints_of(node) or [0]
    source = list(first.meta["shape"]) if first is not None else []
    if not sizes or not -len(source) <= dim < len(source):
        return None
    dim %= len(source)
    shape = source[:dim] + sizes + source[dim + 1 :]
    fits = len(shape) == len(given) and all(a in (b, -1) for a, b in zip(shape, given))
    return slice(dim, dim + len(sizes)) if fits else None


def _part(node: fx.Node, given: Any, new: list[int]) -> tuple[Any, list[int]]:
    """The part of a shape that ends the ints of a call."""
    ints = ints_of(node)
    for width in range(len(ints), 1, -1):
        tail = ints[-width:]
        for start in range(len(given) - width + 1):
            if all(a in (b, -1) for a, b in zip(tail, given[start : start + width])):
                return list(given[start : start + width]), new[start : start + width]
    return list(given), new


def measured(node: fx.Node, given: Sequence[int]) -> list[tuple[fx.Node, int] | None]:
    """The dimensions, as (value, dimension), that the sizes given to an op measure."""
    packet = packet_of(node)
    if WANTED.get(packet) is _split:
        kwargs: Any = node.kwargs
        dim = args_of(node)[2] if len(args_of(node)) > 2 else kwargs.get("dim", 0)
        items = node.meta["items"]
        return [(items[n], dim % len(items[n].meta["shape"])) for n in range(len(given))]
    sizes = args_of(node)[1] if len(args_of(node)) > 1 else None
    if WANTED.get(packet) is _shape and isinstance(sizes, list | tuple):
        for start in range(len(sizes) - len(given) + 1):
            if list(sizes[start : start + len(given)]) == list(given):
                first = len(node.meta["shape"]) - len(sizes) + start
                return [(node, first + n) for n in range(len(given))]
    return [None] * len(given)


@_rule(aten.zeros, aten.ones, aten.full, aten.empty, aten.rand, aten.randn)
def _factory(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    given, new = list(args_of(node)[0]), list(graph.shape(node, alive))
    if locate(node, given) is None:  # some sizes were tensors
        ints = ints_of(node)
        found = {
            tuple(new[dim] for dim in dims)
            for dims in itertools.combinations(range(len(given)), len(ints))
            if [given[dim] for dim in dims] == ints
        }
        if len(found) == 1:
            given, new = list(ints), list(*found)
    yield given, new, ""


@_rule(aten.split, aten.unsafe_split)
def _split(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    kwargs: Any = node.kwargs
    dim = args_of(node)[2] if len(args_of(node)) > 2 else kwargs.get("dim", 0)
    items = node.meta["items"]
    new = [graph.shape(item, alive)[dim] for item in items.values()]
    given = args_of(node)[1]
    several = isinstance(given, list | tuple)
    yield (list(given), new, "") if several else ([given], new[:1], "")


_rule(aten.split_with_sizes, aten.unsafe_split_with_sizes)(_split)


@_rule(aten.slice)
def _slice(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    given: list[Any] = [*args_of(node), *(0, None, None, 1)[len(args_of(node)) - 1 :]]
    x, dim, start, end, step = given
    if step != 1:
        return
    keep = graph.positions(x, dim, alive)
    size, new_size = len(keep), int(keep.sum())
    first = 0 if start is None else _clip(start, size)
    last = size if end is None else _clip(end, size)
    begin, stop = int(keep[:first].sum()), int(keep[:last].sum())
    if start:
        yield [start], [start if keep.all() else _place(start, begin, new_size)], "start"
    if locate(node, [last - first], "length") is not None:  # narrow
        yield [last - first], [stop - begin], "length"
    elif end is not None and end < size:
        yield [end], [end if keep.all() else _place(end, stop, new_size)], "stop"


def _place(old: int, new: int, size: int) -> int:
    """Counted from the end as before, where that is possible."""
    return new - size if old < 0 and new < size else new


def _clip(index: int, size: int) -> int:
    return max(0, min(size, index + size if index < 0 else index))


@_rule(aten.select)
def _select(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    x, dim, index = args_of(node)
    keep = graph.positions(x, dim, alive)
    new = int(keep[: index % len(keep)].sum())
    if new != index % len(keep):
        yield [index], [new if index >= 0 else new - int(keep.sum())], "last"


@_rule(aten.constant_pad_nd)
def _pad(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    pad = list(args_of(node)[1])
    new = list(pad)
    ndim = len(node.meta["shape"])
    for i in range(0, len(pad), 2):
        dim = ndim - 1 - i // 2
        before, after = pad[i], pad[i + 1]
        keep, source = (graph.positions(n, dim, alive) for n in (node, args_of(node)[0]))
        new[i] = int(keep[:before].sum() if before > 0 else -source[:-before].sum())
        end = len(keep) - after
        new[i + 1] = int(keep[end:].sum() if after > 0 else -source[len(source) + after :].sum())
    yield pad, new, ""


@_rule(aten.convolution)
def _convolution(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    groups = int(args_of(node)[8])
    if groups > 1:
        keep = graph.positions(node, 1, alive).reshape(groups, -1)
        yield [groups], [int(keep.any(1).sum())], "last"


@_rule(aten.native_group_norm)
def _group_norm(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    groups = int(args_of(node)[6])
    if groups > 1:
        keep = graph.positions(node.meta["items"][0], 1, alive).reshape(groups, -1)
        yield [groups], [int(keep.any(1).sum())], ""


@_rule(aten.native_layer_norm, aten._fused_rms_norm)
def _layer_norm(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Want]:
    given = list(args_of(node)[1])
    yield given, list(graph.shape(node.meta["items"][0], alive))[-len(given) :], ""


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
    narrowed = {"start": 1, "length": 2}.get(kind, 3)
    if len(ints) == 3 and "start" not in {path[-1] for path in paths} and narrowed < 3:
        return slice(narrowed, narrowed + 1) if ints[narrowed] == old else None
    return None
