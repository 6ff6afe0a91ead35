"""Dimensions change places, or are merged and split: the op itself is run on the ids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.ops.calls import args_of, target_of
from graphprune.ops.fact import Fact, Unfollowed, moved_fact, moved_numbers_fact
from graphprune.ops.given import Given, Pruned
from graphprune.ops.heads import STAY
from graphprune.ops.ids import (
    Layers,
    align,
    along,
    move_layer,
    reshape_blocks,
    reshape_layer,
    spread,
    varying,
)
from graphprune.ops.registry import declare as _declare
from graphprune.ops.registry import free
from graphprune.ops.samples import Length, of
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten
declare = partial(_declare, macs=free)  # nothing is multiplied here


def view_fact(op: object, x: Fact, size: object, *args: object) -> Fact:
    """A reshape; strides may differ from the recorded ones."""
    if not isinstance(size, list | tuple):
        raise Unfollowed("a view as another dtype")
    return Fact(x.value.reshape(size), x.unknown.reshape(size))


def sizes_given(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Given]:
    """The sizes of the result; those it has of a dimension split in two, say."""
    given = args_of(node)[1] if len(args_of(node)) > 1 else node.kwargs.get("size")
    if isinstance(given, list | tuple):
        shape = graph.shape(node, alive)
        new = [size if old != -1 else -1 for old, size in zip(given, shape)]
        yield Given(list(given), new, "size", places=[(node, dim) for dim in range(len(given))])


def copies_given(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Given]:
    """The sizes of the result, or how many copies ``repeat_interleave`` makes."""
    if all(number.argument != "repeats" for number in node.meta["numbers"]):
        yield from sizes_given(graph, node, alive)
        return
    sizes = node.all_input_nodes[0].meta["shape"]
    shape = graph.shape(node, alive)
    for dim, (one, old, new) in enumerate(zip(sizes, node.meta["shape"], shape)):
        if one == 1 < old:
            yield Given([old], [new], "repeats", places=[(node, dim)])


@declare(
    aten.permute,
    linear=True,
    fact=moved_fact,
    sample=of((2, 3, 4), [2, 0, 1]),
    any_size=True,
    hull=True,
)
@declare(aten.movedim, linear=True, fact=moved_fact, sample=of((2, 3, 4), 0, 2), hull=True)
@declare(
    aten.transpose,
    linear=True,
    fact=moved_fact,
    sample=of((2, 3, 4), 0, 2),
    any_size=True,
    hull=True,
)
@declare(aten.transpose_, linear=True, fact=moved_fact, sample=of((2, 3, 4), 0, 2), hull=True)
@declare(aten.t, linear=True, fact=moved_fact, sample=of((2, 3)), any_size=True, hull=True)
@declare(aten.t_, linear=True, fact=moved_fact, sample=of((2, 3)), hull=True)
@declare(
    aten.unsqueeze,
    linear=True,
    fact=moved_fact,
    sample=of((2, 3), 1),
    any_size=True,
    hull=True,
    keeps="order",
)
@declare(aten.unsqueeze_, linear=True, fact=moved_fact, sample=of((2, 3), 1), hull=True)
def permuted(walk: Walk, node: fx.Node, x: Value, *args: object) -> Layers:
    """Dimensions change places: the op is run on the layers as they are."""
    op = target_of(node)
    view = _VIEWS.get(op.overloadpacket, op.overloadpacket)
    return tuple(view(layer, *args) for layer in x.layers)


_VIEWS = {aten.unsqueeze_: aten.unsqueeze, aten.transpose_: aten.transpose, aten.t_: aten.t}


@declare(aten.tril, aten.triu, fact=moved_fact, linear=True, sample=of((2, 3, 4), -1), hull=True)
def triangle(walk: Walk, node: fx.Node, x: Value, *args: object) -> Layers:
    """Half of a matrix: which one a position lies in depends on all before it."""
    return walk.settle(x, {x.ndim - 2, x.ndim - 1}, "half of a matrix of channels")


@declare(
    aten.squeeze, linear=True, fact=moved_fact, sample=of((2, 1, 3), 1), hull=True, keeps="order"
)
@declare(aten.squeeze_, linear=True, fact=moved_fact, sample=of((2, 1, 3), 1), hull=True)
@declare(aten.flip, linear=True, fact=moved_fact, sample=of((2, 3), [0]), hull=True)
def moved(walk: Walk, node: fx.Node, x: Value, *args: object, **kwargs: object) -> Layers:
    """Run the op on the ids."""
    op = target_of(node)
    return tuple(
        move_layer(layer, x.shape, lambda ids: op(ids, *args, **kwargs)) for layer in x.layers
    )


def repeats_given(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Given]:
    """How many copies are made of each dimension: of a single position as many as are read."""
    x, repeats = args_of(node)[:2]
    sizes = (*[1] * (len(repeats) - len(x.meta["shape"])), *x.meta["shape"])
    shape = graph.shape(node, alive)
    new = [now if one == 1 else times for one, times, now in zip(sizes, repeats, shape)]
    yield Given(list(repeats), new, "repeats", places=[(node, dim) for dim in range(len(repeats))])


@declare(
    aten.repeat,
    linear=True,
    makes=True,
    fact=moved_fact,
    given=repeats_given,
    sample=of((2, 1, 3), [1, 4, 2]),
    hull=True,
)
def repeat(walk: Walk, node: fx.Node, x: Value, repeats: Sequence[int]) -> Layers:
    """Copies, of a single position as ``expand`` makes them."""
    shape = node.meta["shape"]
    sizes = (*[1] * (len(shape) - x.ndim), *x.shape)
    fresh = [dim for dim, one in enumerate(sizes) if one == 1 < shape[dim]]
    copies = (along(walk.copies(shape[dim]), dim, len(shape)) for dim in fresh)
    return (*moved(walk, node, x, repeats), *copies)


@declare(
    aten.unfold,
    aten.unfold_copy,
    fact=moved_fact,
    sample=of((3, 6), 1, 2, 2),
    refused=of((6,), 0, 4, 2),
)
def unfold(walk: Walk, node: fx.Node, x: Value, dim: int, size: int, step: int) -> Layers:
    """Windows along a dimension: whole ones leave, where they do not overlap."""
    dim %= max(x.ndim, 1)
    if step != size or x.shape[dim] % size:
        x = replace(x, layers=walk.settle(x, {dim}, "overlapping windows of channels"))
    for layer in x.on(dim):
        walk.collapse(layer.unflatten(dim, (-1, size)), {dim + 1})
    return moved(walk, node, x, dim, size, step)


@declare(aten.pixel_shuffle, fact=moved_numbers_fact, sample=of((1, 8, 2, 2), 2))
def pixel_shuffle(walk: Walk, node: fx.Node, x: Value, factor: int) -> Layers:
    """Channels become places: all sources of one channel leave together."""
    for layer in x.on(-3):
        walk.collapse(layer.unflatten(-3, (-1, factor**2)), {layer.dim() - 2})
    return moved(walk, node, x, factor)


@declare(aten.pixel_unshuffle, fact=moved_numbers_fact, sample=of((1, 2, 4, 4), 2))
def pixel_unshuffle(walk: Walk, node: fx.Node, x: Value, factor: int) -> Layers:
    """Places become channels: none of them can leave."""
    places = walk.settle(x, (x.ndim - 2, x.ndim - 1), "places that become channels")
    return moved(walk, node, replace(x, layers=places), factor)


@declare(aten.diagonal, fact=moved_fact, sample=of((2, 3, 3), 0, 1, 2), refused=of((3, 3), 1))
def diagonal(
    walk: Walk, node: fx.Node, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Layers:
    """A row leaves with its column."""
    sides = {dim1 % x.ndim, dim2 % x.ndim}
    first, second = (x.on(dim) for dim in sorted(sides))
    alone = all(len(varying(layer)) == 1 for layer in (*first, *second))
    if offset or len(first) != 1 or len(second) != 1 or not alone:
        x = replace(x, layers=walk.settle(x, sides, "diagonal of channels"))
    else:
        walk.tie(first[0].flatten(), second[0].flatten())
    return moved(walk, node, x, offset, dim1, dim2)


@declare(
    aten.expand,
    linear=True,
    makes=True,
    fact=moved_fact,
    given=copies_given,
    sample=of((3, 1), [2, 3, 4]),
    hull=True,
)
def expand(walk: Walk, node: fx.Node, x: Value, size: object, **_: object) -> Layers:
    """Copies of a single position can be cut anywhere: they get fresh ids."""
    shape = node.meta["shape"]
    new = len(shape) - x.ndim
    layers = [align(layer, len(shape)) for layer in x.layers]
    for dim, count in enumerate(shape):
        if count > 1 and (dim < new or x.shape[dim - new] == 1):
            layers.append(along(walk.copies(count), dim, len(shape)))
    return tuple(layers)


@declare(aten.channel_shuffle, fact=moved_fact, sample=of((1, 6, 2, 2), 2))
def channel_shuffle(walk: Walk, node: fx.Node, x: Value, groups: int) -> Layers:
    """Groups must stay equal: column j of each is tied to column j of all."""
    for layer in x.on(1):
        walk.align(spread(layer, x.shape, {1}).unflatten(1, (groups, -1)), {1})
    return moved(walk, node, x, groups)


@declare(
    aten.im2col, fact=moved_numbers_fact, sample=of((1, 2, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1])
)
def im2col(walk: Walk, node: fx.Node, x: Value, kernel: Sequence[int], *args: object) -> Layers:
    """Patches: each channel once for every place of the kernel, padding included."""
    layers = walk.settle(x, (x.ndim - 2, x.ndim - 1), "patches over channels")
    times = math.prod(kernel)
    return tuple(
        (i.repeat_interleave(times, -3) if i.shape[-3] > 1 else i).squeeze(-1) for i in layers
    )


@declare(aten.col2im, sample=of((1, 8, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]))
def col2im(
    walk: Walk, node: fx.Node, x: Value, size: Sequence[int], kernel: Sequence[int], *args: object
) -> Layers:
    """Sums of overlapping patches: a channel leaves with all places of the kernel."""
    layers = []
    for layer in walk.settle(x, (x.ndim - 1,), "patches over channels"):
        if layer.shape[-2] > 1:
            blocks = layer.unflatten(-2, (-1, math.prod(kernel)))
            layer = walk.collapse(blocks, {blocks.dim() - 2}).squeeze(-2)
        layers.append(layer.unsqueeze(-1))
    return tuple(layers)


@declare(
    aten.view,
    aten._unsafe_view,
    aten.reshape,
    linear=True,
    fact=view_fact,
    given=sizes_given,
    sample=of((2, 3, 4), [2, 12]),
    hull=True,
    keeps="order",
)
@declare(
    aten._reshape_alias,
    fact=view_fact,
    sample=of((2, 1, 4), [Length(0, 0), Length(0, 2)], [Length(0, 2), 1]),
)
@declare(aten.view_copy, given=sizes_given, sample=of((2, 3, 4), [2, 12]))
def view(walk: Walk, node: fx.Node, x: Value, size: object, *args: object) -> Layers:
    """A reshape; ``view(dtype)`` is refused."""
    if not isinstance(size, list | tuple):
        return walk.refuse([x])
    shape = node.meta["shape"]
    return tuple(reshape_layer(layer, x.shape, shape) for layer in _without_copies(walk, x, shape))


def _without_copies(walk: Walk, x: Value, shape: Sequence[int]) -> list[Tensor]:
    """Fresh ids that are about to share a dimension with others are not worth keeping.

    Nor are those that stay in any case, positions of an embedding, say: all that leaves does so at
    each of them. Copies of keys and values for several queries are where queries leave: what is
    copied stays.
    """
    kept = list(x.layers)
    for before, _ in reshape_blocks(x.shape, shape):
        inside = [layer for layer in kept if varying(layer) & set(before)]
        fresh = [layer for layer in inside if walk.is_fresh(layer)]
        shared = sum(x.shape[dim] > 1 for dim in before) > 1
        settled = [i for i in inside if len(inside) > 1 and shared and walk.ties.stays(i)]
        if settled and len(settled) < len(inside):
            kept = [layer for layer in kept if all(layer is not other for other in settled)]
            inside = [layer for layer in inside if all(layer is not other for other in settled)]
            fresh = [layer for layer in fresh if all(layer is not other for other in settled)]
        if shared and walk.attention == "queries" and len(inside) > len(fresh):
            copied = [layer for layer in fresh if walk.is_copy(layer)]
            if len(copied) == 1 and max(before) in varying(copied[0]):
                for layer in inside:
                    if layer is not copied[0]:
                        walk.freeze(layer, STAY)
                        kept = [other for other in kept if other is not layer]
                continue
        for layer in fresh:
            if shared and (len(inside) > len(fresh) or walk.is_copy(layer)):
                walk.freeze(layer, "copies merged with channels")
                kept = [other for other in kept if other is not layer]
    return kept


@declare(
    aten.as_strided_,
    aten.as_strided,
    sample=of((2, 3), [Length(0, 0), Length(0, 1)], [Length(0, 1), 1]),
    refused=of((2, 3), [3, 2], [1, 3]),
)
def as_strided(
    walk: Walk, node: fx.Node, x: Value, size: Sequence[int], stride: Any, offset: int | None = None
) -> Layers:
    """Only the form that leaves every element where it was is understood."""
    (source,) = (n.meta["stride"] for n in node.all_input_nodes)
    moves = [d for d, n in enumerate(x.shape) if n > 1 and source[d] != stride[d]]
    if tuple(size) != tuple(x.shape) or offset or moves:
        return walk.refuse([x], "as_strided that moves channels")
    return x.layers
