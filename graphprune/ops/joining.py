"""Parts of a dimension, parts put together, and padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.ops.calls import Overload, args_of
from graphprune.ops.fact import Fact, moved_fact, moved_numbers_fact
from graphprune.ops.given import Given, Pruned
from graphprune.ops.ids import KEPT, Layers, along, compact, spread, varying
from graphprune.ops.made import made
from graphprune.ops.registry import declare as _declare
from graphprune.ops.registry import free
from graphprune.ops.samples import of
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten
declare = partial(_declare, macs=free)  # nothing is multiplied here


def cat_fact(op: Overload, tensors: Any, dim: int = 0) -> Fact:
    """Concatenation, of one dtype as the op would make it."""
    value = torch.cat([fact.value for fact in tensors], dim)
    return Fact(value, torch.cat([fact.unknown for fact in tensors], dim))


def cat_meta(tensors: Sequence[Tensor], dim: int = 0) -> object:
    """The plain form."""
    first = tensors[0]
    dim %= max(first.dim(), 1)
    rest = (first.shape[:dim], first.shape[dim + 1 :])
    for tensor in tensors:
        same = tensor.dtype == first.dtype and tensor.dim() == first.dim() > 0
        alike = same and (tensor.shape[:dim], tensor.shape[dim + 1 :]) == rest
        if not alike or not tensor.is_contiguous():
            return NotImplemented
    width = sum(tensor.shape[dim] for tensor in tensors)
    return made(first, (*rest[0], width, *rest[1]))


def parts_given(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Given]:
    """The sizes of the parts."""
    kwargs: Any = node.kwargs
    dim = args_of(node)[2] if len(args_of(node)) > 2 else kwargs.get("dim", 0)
    items = node.meta["items"]
    new = [graph.shape(item, alive)[dim] for item in items.values()]
    given = args_of(node)[1]
    several = isinstance(given, list | tuple)
    given, new = (list(given), new) if several else ([given], new[:1])
    places = [(items[n], dim % len(items[n].meta["shape"])) for n in range(len(given))]
    yield Given(given, new, "split_size", places=places)


def slice_given(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Given]:
    """Where a slice begins and ends, or how long it is."""
    given: list[Any] = [*args_of(node), *(0, None, None, 1)[len(args_of(node)) - 1 :]]
    x, dim, start, end, step = given
    if step != 1:
        return
    keep = graph.positions(x, dim, alive)
    size, new_size = len(keep), int(keep.sum())
    first = 0 if start is None else _clip(start, size)
    last = size if end is None else _clip(end, size)
    begin, stop = int(keep[:first].sum()), int(keep[:last].sum())
    dim %= len(node.meta["shape"])
    if start:
        needed = start if keep.all() else _place(start, begin, new_size)
        yield Given([start], [needed], *_end(node, start, "start", dim))
    if any(number.argument == "length" for number in node.meta["numbers"]):  # narrow
        yield Given([last - first], [stop - begin], "length", dim)
    elif end is not None and end < size:
        needed = end if keep.all() else _place(end, stop, new_size)
        measured = [(node, dim)] if not first and end > 0 else None
        yield Given([end], [needed], *_end(node, end, "end", dim), measured)


def _end(node: fx.Node, given: int, name: str, dim: int) -> tuple[str, int]:
    """How an end of a slice was given: as such, or among the places of ``tensor_split``."""
    for number in node.meta["numbers"]:
        if number.argument == "indices" and number.value == given:
            return "indices", number.place
    return name, dim


def _place(old: int, new: int, size: int) -> int:
    """Counted from the end as before, where that is possible."""
    return new - size if old < 0 and new < size else new


def _clip(index: int, size: int) -> int:
    return max(0, min(size, index + size if index < 0 else index))


def select_given(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Given]:
    """The place that is taken."""
    x, dim, index = args_of(node)
    keep = graph.positions(x, dim, alive)
    new = int(keep[: index % len(keep)].sum())
    if new != index % len(keep):
        needed = new if index >= 0 else new - int(keep.sum())
        yield Given([index], [needed], "index", dim % len(x.meta["shape"]))


def pad_given(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Given]:
    """How much is added, or cut off."""
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
    yield Given(pad, new, "pad")


@declare(
    aten.slice,
    linear=True,
    fact=moved_fact,
    given=slice_given,
    places=True,
    sample=of((2, 6), 1, 2, 5),
    refused=of((7,), 0, 1, 7, 2),
    any_size=True,
    hull=True,
)
def slice_(
    walk: Walk,
    node: fx.Node,
    x: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Layers:
    """A slice. Strided slices pick one of each block of channels, which leaves as a whole."""
    dim %= x.ndim
    if step != 1:
        x = _in_strides(walk, x, dim, slice(start, end, step))
    _read(walk, x, dim, range(*slice(start, end).indices(x.shape[dim])))
    return tuple(_part(layer, dim, start, end, step) for layer in x.layers)


def _in_strides(walk: Walk, x: Value, dim: int, taken: slice) -> Value:
    """Blocks of as many channels as the stride is wide: gate and value side by side, say."""
    first, last, step = taken.indices(x.shape[dim])
    if first >= step or last != x.shape[dim] or last % step:
        return replace(x, layers=walk.settle(x, {dim}, "strided slice of channels"))
    for layer in x.on(dim):
        walk.collapse(layer.unflatten(dim, (-1, step)), {dim + 1})
    return x


def _part(layer: Tensor, dim: int, start: object, end: object, step: int = 1) -> Tensor:
    if layer.shape[dim] == 1:
        return layer
    return compact(aten.slice(layer, dim, start, end, step))


def _read(walk: Walk, x: Value, dim: int, positions: Sequence[int]) -> None:
    """Positions of a table that an op reads."""
    if not x.constant:
        return
    chosen = torch.zeros(x.shape[dim], dtype=torch.bool)
    chosen[list(positions)] = True
    for layer in x.on(dim):
        read, others = (layer.index_select(dim, m.nonzero().flatten()) for m in (chosen, ~chosen))
        walk.read_part(read, others)


@declare(aten.rot90, fact=moved_fact, linear=True, sample=of((2, 3, 4), 1, [1, 2]), hull=True)
def rot90(walk: Walk, node: fx.Node, x: Value, k: int = 1, dims: Any = (0, 1)) -> Layers:
    """A turn of maps; channels stay where they are."""
    return walk.settle(x, {d % x.ndim for d in dims}, "rotation of channels")


@declare(aten.roll, fact=moved_fact, sample=of((2, 3), [1], [1]))
def roll(walk: Walk, node: fx.Node, x: Value, shifts: Any, dims: Any = ()) -> Layers:
    """A cyclic shift (of windows, say); over channels its amount has no meaning after pruning."""
    dims = dims if isinstance(dims, list | tuple) else [dims]
    return walk.settle(x, {d % x.ndim for d in dims} or range(x.ndim), "roll over channels")


@declare(
    aten.select,
    linear=True,
    fact=moved_fact,
    given=select_given,
    places=True,
    sample=of((2, 6), 1, 3),
    any_size=True,
    hull=True,
)
def select(walk: Walk, node: fx.Node, x: Value, dim: int, index: int) -> Layers:
    """One position of a dimension, which must then stay."""
    dim %= x.ndim
    _read(walk, x, dim, [index % x.shape[dim]])
    return _one(walk, x, dim, index)


def _one(walk: Walk, x: Value, dim: int, index: int) -> Layers:
    for layer in x.on(dim):
        if len(varying(layer)) > 1:
            walk.keep_grid(layer, {dim})
    return tuple(
        compact(layer.select(dim, index if layer.shape[dim] > 1 else 0)) for layer in x.layers
    )


@declare(aten.unbind, linear=True, fact=moved_fact, sample=of((2, 3, 4), 1), hull=True)
def unbind(walk: Walk, node: fx.Node, x: Value, dim: int = 0) -> list[Layers]:
    """All positions of a dimension, one by one."""
    return [_one(walk, x, dim % x.ndim, index) for index in range(x.shape[dim])]


@declare(
    aten.split_with_sizes,
    linear=True,
    fact=moved_fact,
    given=parts_given,
    sample=of((2, 6), [2, 4], 1),
    any_size=True,
    hull=True,
)
@declare(
    aten.unsafe_split_with_sizes, fact=moved_fact, given=parts_given, sample=of((2, 6), [2, 4], 1)
)
@declare(aten.split_with_sizes_copy, given=parts_given, sample=of((2, 6), [2, 4], 1))
def split_with_sizes(
    walk: Walk, node: fx.Node, x: Value, sizes: Sequence[int], dim: int = 0
) -> list[Layers]:
    """Parts of given sizes."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        tuple(_part(layer, dim % x.ndim, start, start + size) for layer in x.layers)
        for start, size in zip(starts, sizes, strict=True)
    ]


@declare(
    aten.split,
    linear=True,
    fact=moved_fact,
    given=parts_given,
    sample=of((2, 6), 3, 1),
    any_size=True,
    hull=True,
)
@declare(aten.unsafe_split, fact=moved_fact, given=parts_given, sample=of((2, 6), 3, 1))
@declare(aten.split_copy, given=parts_given, sample=of((2, 6), 3, 1))
def split(walk: Walk, node: fx.Node, x: Value, size: Any, dim: int = 0) -> list[Layers]:
    """Equal parts, which must stay equal: column j of each part is tied to column j of all.

    Where the last part is smaller, columns that it lacks are tied among the others.
    """
    if isinstance(size, list | tuple):
        return split_with_sizes(walk, node, x, size, dim)
    dim %= x.ndim
    starts = range(0, x.shape[dim], size)
    for layer in x.on(dim):
        wide, rest = spread(layer, x.shape, {dim}), x.shape[dim] % size
        full = wide.narrow(dim, 0, x.shape[dim] - rest).unflatten(dim, (-1, size))
        if not rest:
            walk.align(full, {dim})
            continue
        last = wide.narrow(dim, x.shape[dim] - rest, rest).unsqueeze(dim)
        common, more = full.split([rest, size - rest], dim + 1)
        walk.collapse(torch.cat([common, last], dim), {dim})
        walk.collapse(more, {dim})
    return [tuple(_part(layer, dim, n, n + size) for layer in x.layers) for n in starts]


@declare(aten.tensor_split, linear=True, fact=moved_fact, sample=of((2, 6), 3, 1), hull=True)
def tensor_split(walk: Walk, node: fx.Node, x: Value, count: object, dim: int = 0) -> list[Layers]:
    """Parts of which the first ones are larger by one: columns stay together, as in ``split``."""
    dim %= x.ndim
    if not isinstance(count, int) or x.shape[dim] < count:
        return [walk.refuse([x])] * len(node.meta["items"])
    width, more = divmod(x.shape[dim], count)
    sizes = [width + (number < more) for number in range(count)]
    for layer in x.on(dim):
        parts = spread(layer, x.shape, {dim}).split(sizes, dim)
        common = torch.stack([part.narrow(dim, 0, width) for part in parts], dim)
        if not more:
            walk.align(common, {dim})
            continue
        last = torch.stack([part.narrow(dim, width, 1) for part in parts[:more]], dim)
        walk.collapse(common, {dim})
        walk.collapse(last, {dim})
    return split_with_sizes(walk, node, x, sizes, dim)


@declare(
    aten.cat,
    aten.concat,
    linear=True,
    fact=cat_fact,
    meta=cat_meta,
    sample=of([(2, 3), (2, 4)], 1),
    hull=True,
    joins=True,
)
def cat(walk: Walk, node: fx.Node, tensors: Any, dim: int = 0) -> Layers:
    """Concatenation: ids are concatenated along ``dim`` and tied along all others."""
    ndim = len(node.meta["shape"])
    dim %= ndim
    some = [value for value in tensors if value.ndim == ndim]
    some = [value for value in some if value.shape[dim]] or some
    parts = _whole_rows(walk, node, some, dim)  # a part without columns holds no channels
    across = [
        Value(
            tuple(1 if d == dim else n for d, n in enumerate(value.shape)),
            tuple(layer for layer in value.layers if layer.shape[dim] == 1),
        )
        for value in parts
    ]
    layers = walk.broadcast(across, ndim)
    if any(value.on(dim) for value in parts):
        layers += (_cat_ids(walk, parts, dim),)
    return layers


def _whole_rows(walk: Walk, node: fx.Node, parts: list[Value], dim: int) -> list[Value]:
    """Grids beside a part that leaves by rows only do so too: heads of which a part was rotated.

    A part whose columns are the same in all rows (one rotated key, copied for all heads) stays as
    wide as it is while rows leave; where none can, columns leave.
    """
    grids = [i for value in parts for i in value.on(dim) if len(varying(i)) > 1]
    sides = {varying(grid) - {dim} for grid in grids}
    beside = [value for value in parts if any(varying(i) in sides for i in value.layers)]
    shared = {id(i): i for v in beside for i in v.on(dim) if varying(i) == {dim}}
    if shared and walk.attention != "head_dim":
        walk.crossed += [(node, grid.narrow(dim, 0, 1)) for grid in grids]
    elif shared:
        beside, shared = [value for value in beside if not value.on(dim)], {}
    if shared and any(walk.by_blocks(node, grid, dim) for grid in grids):
        rows, across, shared = sides, False, {}
    else:
        rows, across = {varying(i) for v in beside for i in v.layers if i.shape[dim] == 1}, True
    for line in shared.values():
        walk.freeze(line, "the same in all rows of a grid that leave")
    result = []
    for value in parts:
        layers: list[Tensor] = []
        for i in value.layers:
            others = varying(i) - {dim}
            if id(i) not in shared:
                grid = i.shape[dim] > 1 and others in rows
                layers.append(walk.collapse(i, {dim} if across else others) if grid else i)
        result.append(replace(value, layers=tuple(layers)))
    return result


def _cat_ids(walk: Walk, parts: list[Value], dim: int) -> Tensor:
    rows = []
    for value in parts:
        own = value.on(dim)
        for other in own[1:]:
            walk.tie(own[0], other)
        ids = own[0] if own else torch.full((1,) * value.ndim, KEPT)
        rows.append(spread(ids, value.shape, {dim}))
    sizes = [max(row.shape[d] for row in rows) for d in range(rows[0].dim())]
    wide = [
        row.expand([n if d != dim else row.shape[d] for d, n in enumerate(sizes)]) for row in rows
    ]
    return torch.cat(wide, dim)


@declare(aten.stack, linear=True, fact=moved_fact, sample=of([(2, 3), (2, 3)], 1), hull=True)
def stack(walk: Walk, node: fx.Node, tensors: Any, dim: int = 0) -> Layers:
    """Concatenation along a new dimension."""
    ndim = len(node.meta["shape"])
    dim %= ndim
    parts = [
        Value(
            (*value.shape[:dim], 1, *value.shape[dim:]),
            tuple(layer.unsqueeze(dim) for layer in value.layers),
        )
        for value in tensors
    ]
    return walk.broadcast(parts, ndim)


@declare(
    aten.constant_pad_nd,
    fact=moved_numbers_fact,
    given=pad_given,
    places=True,
    sample=of((2, 3), [1, 2]),
    any_size=True,
)
def constant_pad_nd(
    walk: Walk, node: fx.Node, x: Value, pad: Sequence[int], value: float = 0
) -> Layers:
    """Padding: padded channels hold a constant and get ids of their own, which tie nothing."""
    amounts = {x.ndim - 1 - i // 2: (pad[i], pad[i + 1]) for i in range(0, len(pad), 2)}
    layers = []
    for layer in x.layers:
        for dim, (before, after) in amounts.items():
            if layer.shape[dim] > 1:
                layer = _pad_ids(walk, layer, dim, before, after)
        layers.append(layer)
    return tuple(layers)


def _pad_ids(walk: Walk, layer: Tensor, dim: int, before: int, after: int) -> Tensor:
    start, stop = max(-before, 0), layer.shape[dim] - max(-after, 0)
    shape = list(layer.shape)

    def constant(amount: int) -> list[Tensor]:
        if amount <= 0:
            return []
        shape[dim] = amount
        return [along(walk.ties.fresh(amount), dim, layer.dim()).expand(shape)]

    middle = layer.narrow(dim, start, stop - start)
    return torch.cat([*constant(before), middle, *constant(after)], dim)


@declare(
    aten.reflection_pad1d,
    aten.replication_pad1d,
    fact=moved_numbers_fact,
    sample=of((2, 3, 4), [1, 1]),
)
@declare(
    aten.reflection_pad2d,
    aten.replication_pad2d,
    fact=moved_numbers_fact,
    sample=of((1, 3, 4, 4), [1, 1, 0, 1]),
)
@declare(
    aten.reflection_pad3d,
    aten.replication_pad3d,
    fact=moved_numbers_fact,
    sample=of((1, 3, 4, 4, 4), [1, 1, 0, 1, 0, 0]),
)
def border_pad(walk: Walk, node: fx.Node, x: Value, pad: Sequence[int]) -> Layers:
    """Padding with values of the border, over the last dimensions."""
    dims = range(x.ndim - len(pad) // 2, x.ndim)
    return walk.settle(x, dims, "padding over channels by reflection")
