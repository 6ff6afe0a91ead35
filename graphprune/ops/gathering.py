"""Positions picked by an index: which ones is known only at run time.

The indexed dimension cannot lose channels. Along all others, source, index and what is written
are tied position by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from graphprune.ops.calls import Overload, args_of
from graphprune.ops.fact import Fact, Unfollowed, found, moved_fact, values
from graphprune.ops.ids import Layers, compact, varying
from graphprune.ops.registry import declare as _declare
from graphprune.ops.registry import free
from graphprune.ops.samples import bits, of, places
from graphprune.ops.values import Natural, Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten
declare = partial(_declare, macs=free)  # nothing is multiplied here
PICKED = "channels picked by index"
_AT = torch.tensor([0, 3])


def picked_fact(op: Overload, x: Fact, *args: object, **kwargs: object) -> Fact:
    """Positions picked by an index that does not depend on the input."""
    if not all(fact.constant for fact in found((args, kwargs))):
        raise Unfollowed("an index that depends on the input")
    args, kwargs = values((args, kwargs))
    return Fact(op(x.value, *args, **kwargs), op(x.unknown, *args, **kwargs))


def embedding_fact(op: Overload, table: Fact, index: Fact, *args: object) -> Fact:
    """A column that is the same in all rows is known whatever row is read."""
    if index.constant:
        rows = index.value
        return Fact(op(table.value, rows), op(table.unknown.double(), rows) != 0)
    shape = (*index.value.shape, table.value.shape[1])
    same = (table.value == table.value[:1]).all(0) & ~table.unknown.any(0)
    return Fact(table.value[0].expand(shape).clone(), (~same).expand(shape).clone())


def _beside(walk: Walk, values: Sequence[Value], dim: int) -> Layers:
    """Tie values along all dimensions but ``dim``; where their sizes differ, nothing can leave."""
    ndim = values[0].ndim
    dim %= max(ndim, 1)
    if any(value.ndim != ndim for value in values):
        walk.refuse(values, PICKED)
        return ()
    stay = {d for d in range(ndim) if d == dim or len({v.shape[d] for v in values}) > 1}
    sides = [
        replace(
            value,
            shape=tuple(1 if d == dim else n for d, n in enumerate(value.shape)),
            layers=walk.settle(value, stay, PICKED),
        )
        for value in values
    ]
    return walk.broadcast(sides, ndim)


@declare(aten.gather, fact=picked_fact, rows="picked", sample=of((2, 5), 1, places(5, 2, 3)))
def gather(walk: Walk, node: fx.Node, x: Value, dim: int, index: Value, **_: object) -> Layers:
    """Each position of the index has its own place to read along ``dim``."""
    return _beside(walk, [x, index], dim)


@declare(
    aten.scatter,
    aten.scatter_,
    aten.scatter_add,
    aten.scatter_add_,
    rows="written",
    sample=of((2, 5), 1, places(5, 2, 3), (2, 3)),
)
@declare(
    aten.scatter_reduce,
    aten.scatter_reduce_,
    rows="written",
    sample=of((2, 5), 1, places(5, 2, 3), (2, 3), "sum"),
)
def scatter(
    walk: Walk,
    node: fx.Node,
    x: Value,
    dim: int,
    index: Value,
    source: object,
    *args: object,
    **_: object,
) -> Layers:
    """Each position of the index has its own place to write along ``dim``."""
    return _beside(walk, [x, index, *([source] if isinstance(source, Value) else [])], dim)


@declare(
    aten.index_add,
    aten.index_add_,
    aten.index_copy,
    aten.index_copy_,
    rows="written",
    sample=of((2, 5), 1, _AT, (2, 2)),
)
def index_add(
    walk: Walk, node: fx.Node, x: Value, dim: int, index: Value, source: Value, **_: object
) -> Layers:
    """Slices are added or written at places of ``dim``."""
    walk.freeze_value(index, walk.reason("positions to write"))
    return _beside(walk, [x, source], dim)


@declare(aten.slice_scatter, fact=moved_fact, sample=of((2, 5), (2, 2), 1, 1, 3))
@declare(aten.select_scatter, fact=moved_fact, sample=of((2, 5), (2,), 1, 3))
def slice_scatter(
    walk: Walk, node: fx.Node, x: Value, source: Value, dim: int = 0, *args: object
) -> Layers:
    """A slice, or one position, is written at its place."""
    dim %= x.ndim
    if source.ndim < x.ndim:
        shape = (*source.shape[:dim], 1, *source.shape[dim:])
        source = replace(source, shape=shape, layers=tuple(i.unsqueeze(dim) for i in source.layers))
    return _beside(walk, [x, source], dim)


@declare(aten.index_fill, aten.index_fill_, sample=of((2, 5), 1, _AT, 0.5))
def index_fill(
    walk: Walk, node: fx.Node, x: Value, dim: int, index: Value, value: object
) -> Layers:
    """Slices at places of ``dim`` are filled with one number."""
    walk.freeze_value(index, walk.reason("positions to write"))
    return _beside(walk, [x], dim)


@declare(aten.index_select, fact=picked_fact, rows="picked", sample=of((2, 5), 1, _AT))
def index_select(walk: Walk, node: fx.Node, x: Value, dim: int, index: Value) -> Layers:
    """Positions picked by an index, which must then stay unless they are known."""
    source = args_of(node)[2]
    known = _known(walk, x, dim % x.ndim, index, source)
    if known is not None:
        return known
    walk.freeze_value(index, walk.reason("positions to read"))
    return walk.settle(x, {dim % x.ndim}, PICKED)


_PICKS = {aten.index.Tensor, aten.index_select.default}


def _known(walk: Walk, x: Value, dim: int, index: Value, source: fx.Node) -> Layers | None:
    """The layers after channels were permuted by a buffer whose numbers are known.

    The buffer loses the places of removed channels, and the others are renumbered.
    """
    values = walk.numbers(str(source.target)) if source.op == "get_attr" else None
    lines = [layer for layer in x.on(dim) if varying(layer) == {dim}]
    plain = values is not None and values.dim() == 1 and len(lines) == len(x.on(dim)) == 1
    if not plain or not index.layers or any(user.target not in _PICKS for user in source.users):
        return None
    if any(user.args[0] is source for user in source.users):
        return None
    assert values is not None
    if not len(values) or int(values.min()) < 0:
        return None
    line, name = lines[0], str(source.target)
    known = walk.renumber(name, line.flatten())
    walk.tie(known, line.flatten())
    picked = line.index_select(dim, values)
    walk.tie(index.layers[0].flatten(), picked.flatten())
    return tuple(picked if layer is line else layer for layer in x.layers)


def _is_mask(node: fx.Node) -> bool:
    return node.meta["dtype"] in (torch.bool, torch.uint8)


def _places(walk: Walk, node: fx.Node, x: Value, indices: Any) -> tuple[Layers, list[Any]]:
    """The layers that advanced indexing leaves, and an index of zeros that moves them alike.

    A mask stands for as many dimensions as it has. An empty index (an expert without tokens) stands
    for one of a single position: the ids there are those of any other.
    """
    picked: set[int] = set()
    items: list[Any] = []
    sources = args_of(node)[1]
    for item, source in zip(indices, sources, strict=True):
        width = item.ndim if item is not None and _is_mask(source) else 1
        if item is None:
            items.append(None)
        else:
            picked |= set(range(len(items), len(items) + width))
            shape = (1,) if _is_mask(source) else tuple(max(n, 1) for n in item.shape)
            items += [torch.zeros(shape, dtype=torch.int64)] * width
            walk.freeze_value(item, walk.reason("positions to read"))
    return walk.settle(x, picked, PICKED), items


@declare(aten.index, fact=picked_fact, rows="picked", sample=of((2, 5), [None, _AT]))
@declare(aten._unsafe_index, sample=of((2, 5), [None, _AT]))
def index(walk: Walk, node: fx.Node, x: Value, indices: Any) -> Layers:
    """Advanced indexing: the indexed dimensions freeze, the others run through the op."""
    sources = args_of(node)[1]
    places = [dim for dim, item in enumerate(indices) if item is not None]
    if len(places) == 1 and not _is_mask(sources[places[0]]):
        known = _known(walk, x, places[0], indices[places[0]], sources[places[0]])
        if known is not None:
            return known
    layers, items = _places(walk, node, x, indices)
    return tuple(compact(aten.index(layer, items)) for layer in layers)


@declare(
    aten.index_put,
    aten.index_put_,
    aten._index_put_impl_,
    aten._unsafe_index_put,
    rows="written",
    sample=of((2, 5), [None, _AT], (2, 2)),
)
def index_put(
    walk: Walk, node: fx.Node, x: Value, indices: Any, values: Value, *args: Any
) -> Layers:
    """Values are written where the index points; one number behind a mask is pointwise."""
    sources = args_of(node)[1]
    if len(indices) == 1 and _is_mask(sources[0]) and all(n == 1 for n in values.shape):
        (mask,) = indices
        wide = (1,) * (x.ndim - mask.ndim)
        layers = tuple(layer.reshape(*layer.shape, *wide) for layer in mask.layers)
        return walk.broadcast([x, Value((*mask.shape, *wide), layers)], x.ndim)
    layers, items = _places(walk, node, x, indices)
    part = aten.index(torch.zeros(1).expand(x.shape), items)
    moved = Value(tuple(part.shape), tuple(compact(aten.index(i, items)) for i in layers))
    walk.broadcast([moved, values], max(moved.ndim, values.ndim))
    return layers


@declare(
    aten.masked_scatter,
    aten.masked_scatter_,
    rows="written",
    refused=of((2, 5), bits(2, 5), (2, 5)),
)
def masked_scatter(walk: Walk, node: fx.Node, x: Value, mask: Value, source: Value) -> Layers:
    """Rows of the source, one after the other, replace those rows that the mask names whole."""
    last = {x.ndim - 1}
    rows = all(varying(layer) <= last for layer in x.layers)
    if not (rows and _same_along_rows(node.args[1]) and source.shape[-1:] == x.shape[-1:]):
        return walk.refuse([x, mask, source], "positions to write")
    kept = walk.settle(mask, range(mask.ndim - 1), "positions to write")
    below = walk.settle(source, range(source.ndim - 1), "positions to read")
    sides = [(value.shape, layers) for value, layers in ((mask, kept), (source, below))]
    ends = [
        Value((1,) * (x.ndim - 1) + shape[-1:],
              tuple(layer.reshape((1,) * (x.ndim - 1) + (-1,)) for layer in layers))
        for shape, layers in sides
    ]  # fmt: skip
    return walk.broadcast([x, *ends], x.ndim)


def _same_along_rows(mask: Any) -> bool:
    """Whether a mask was expanded along its last dimension."""
    while mask.target in (aten._to_copy.default, aten.clone.default, aten.detach.default):
        mask = mask.args[0]
    if mask.target is not aten.expand.default:
        return False
    return bool(mask.args[0].meta["shape"][-1:] == (1,))


@declare(
    aten.embedding,
    fact=embedding_fact,
    rows="picked",
    sample=of((5, 3), torch.tensor([[0, 4], [2, 2]])),
    any_size=True,
)
def embedding(walk: Walk, node: fx.Node, weight: Value, indices: Value, *args: object) -> Layers:
    """Rows of a table: which rows are read is known only at run time."""
    layers = walk.settle(weight, {0}, Natural.TABLE)
    walk.freeze_value(indices, walk.reason("positions to read"))
    ndim = len(node.meta["shape"])
    return tuple(layer.reshape((1,) * (ndim - 1) + (-1,)) for layer in layers)


@declare(
    aten._embedding_bag,
    aten._embedding_bag_forward_only,
    sample=of((5, 3), torch.tensor([0, 4, 2]), torch.tensor([0, 2])),
)
def embedding_bag(walk: Walk, node: fx.Node, weight: Value, *args: object) -> list[Layers]:
    """Sums or means of rows of a table."""
    return [walk.settle(weight, {0}, Natural.TABLE)]


@declare(aten.take, rows="picked", refused=of((2, 5), places(5, 3)))
@declare(aten.masked_select, rows="picked", refused=of((2, 5), bits(2, 5)))
@declare(aten.nonzero, aten.unique_consecutive, rows="ordered", refused=of((2, 5)))
@declare(aten.argsort, rows="ordered", refused=of((5,), 0))
def chosen(walk: Walk, node: fx.Node, *args: object, **kwargs: object) -> object:
    """As many as there are, which only values tell: all that is read stays."""
    return walk.refuse([arg for arg in args if isinstance(arg, Value)])
