"""Data movement: the op itself is run on the ids.

Only reshapes, concatenation and padding are written out, because they can be done without
materialising the dimensions along which the ids do not vary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ops.ids import (
    KEPT,
    Layers,
    align,
    along,
    compact,
    move_layer,
    reshape_blocks,
    reshape_layer,
    spread,
    varying,
)
from graphprune.ops.rules.base import Walk, aten
from graphprune.ops.rules.registry import Value, register_rule


@register_rule(
    aten.permute,
    aten.transpose,
    aten.t,
    aten.unsqueeze,
    aten.movedim,
    aten.unsqueeze_,
    aten.transpose_,
    aten.t_,
)
def permuted(walk: Walk, node: fx.Node, x: Value, *args: Any) -> Layers:
    """Dimensions change places: the op is run on the layers as they are."""
    op: Any = node.target
    view = _VIEWS.get(op.overloadpacket, op.overloadpacket)
    return tuple(view(layer, *args) for layer in x.layers)


_VIEWS = {aten.unsqueeze_: aten.unsqueeze, aten.transpose_: aten.transpose, aten.t_: aten.t}


@register_rule(
    aten.squeeze,
    aten.flip,
    aten.repeat,
    aten.unfold,
    aten.pixel_shuffle,
    aten.pixel_unshuffle,
    aten.diagonal,
    aten.squeeze_,
    aten.unfold_copy,
)
def moved(walk: Walk, node: fx.Node, x: Value, *args: Any, **kwargs: Any) -> Layers:
    """Run the op on the ids."""
    op: Any = node.target
    return tuple(
        move_layer(layer, x.shape, lambda ids: op(ids, *args, **kwargs)) for layer in x.layers
    )


@register_rule(aten.expand, makes=True)
def expand(walk: Walk, node: fx.Node, x: Value, size: Any, **_: Any) -> Layers:
    """Copies of a single position can be cut anywhere: they get fresh ids."""
    shape = node.meta["shape"]
    new = len(shape) - x.ndim
    layers = [align(layer, len(shape)) for layer in x.layers]
    for dim, count in enumerate(shape):
        if count > 1 and (dim < new or x.shape[dim - new] == 1):
            layers.append(along(walk.copies(count), dim, len(shape)))
    return tuple(layers)


@register_rule(aten.channel_shuffle)
def channel_shuffle(walk: Walk, node: fx.Node, x: Value, groups: int) -> Layers:
    """Groups must stay equal: column j of each is tied to column j of all."""
    for layer in x.on(1):
        walk.align(spread(layer, x.shape, {1}).unflatten(1, (groups, -1)), {1})
    return moved(walk, node, x, groups)


@register_rule(aten.im2col)
def im2col(walk: Walk, node: fx.Node, x: Value, kernel: Any, *args: Any) -> Layers:
    """Patches: each channel once for every place of the kernel, padding included."""
    layers = walk.settle(x, (x.ndim - 2, x.ndim - 1), "patches over channels")
    times = math.prod(kernel)
    return tuple(
        (i.repeat_interleave(times, -3) if i.shape[-3] > 1 else i).squeeze(-1) for i in layers
    )


@register_rule(aten.col2im)
def col2im(walk: Walk, node: fx.Node, x: Value, size: Any, kernel: Any, *args: Any) -> Layers:
    """Sums of overlapping patches: a channel leaves with all places of the kernel."""
    layers = []
    for layer in walk.settle(x, (x.ndim - 1,), "patches over channels"):
        if layer.shape[-2] > 1:
            blocks = layer.unflatten(-2, (-1, math.prod(kernel)))
            layer = walk.collapse(blocks, {blocks.dim() - 2}).squeeze(-2)
        layers.append(layer.unsqueeze(-1))
    return tuple(layers)


@register_rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.view_copy)
def view(walk: Walk, node: fx.Node, x: Value, size: Any, *args: Any) -> Layers:
    """A reshape; ``view(dtype)`` is refused."""
    if not isinstance(size, list | tuple):
        return walk.refuse([x])
    shape = node.meta["shape"]
    return tuple(reshape_layer(layer, x.shape, shape) for layer in _without_copies(walk, x, shape))


def _without_copies(walk: Walk, x: Value, shape: Any) -> list[Tensor]:
    """Fresh ids that are about to share a dimension with others are not worth keeping."""
    kept = list(x.layers)
    for before, _ in reshape_blocks(x.shape, shape):
        inside = [layer for layer in kept if varying(layer) & set(before)]
        fresh = [layer for layer in inside if walk.is_fresh(layer)]
        shared = sum(x.shape[dim] > 1 for dim in before) > 1
        for layer in fresh:
            if shared and (len(inside) > len(fresh) or walk.is_copy(layer)):
                walk.freeze(layer, "copies merged with channels")
                kept = [other for other in kept if other is not layer]
    return kept


@register_rule(aten.as_strided_, aten.as_strided)
def as_strided(
    walk: Walk, node: fx.Node, x: Value, size: Any, stride: Any, offset: int | None = None
) -> Layers:
    """Only the form that leaves every element where it was is understood."""
    (source,) = (n.meta["stride"] for n in node.all_input_nodes)
    moves = [d for d, n in enumerate(x.shape) if n > 1 and source[d] != stride[d]]
    if tuple(size) != tuple(x.shape) or offset or moves:
        return walk.refuse([x], "as_strided that moves channels")
    return x.layers


@register_rule(aten.slice)
def slice_(
    walk: Walk,
    node: fx.Node,
    x: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Layers:
    """A slice; strided slices over channels would pick other channels after pruning."""
    dim %= x.ndim
    if step != 1:
        x = replace(x, layers=walk.settle(x, {dim}, "strided slice of channels"))
    _read(walk, x, dim, range(*slice(start, end).indices(x.shape[dim])))
    return tuple(_part(layer, dim, start, end, step) for layer in x.layers)


def _part(layer: Tensor, dim: int, start: Any, end: Any, step: int = 1) -> Tensor:
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


@register_rule(aten.roll)
def roll(walk: Walk, node: fx.Node, x: Value, shifts: Any, dims: Any = ()) -> Layers:
    """A cyclic shift (of windows, say); over channels its amount has no meaning after pruning."""
    dims = dims if isinstance(dims, list | tuple) else [dims]
    return walk.settle(x, {d % x.ndim for d in dims} or range(x.ndim), "roll over channels")


@register_rule(aten.select)
def select(walk: Walk, node: fx.Node, x: Value, dim: int, index: int) -> Layers:
    """One position of a dimension, which must then stay."""
    dim %= x.ndim
    _read(walk, x, dim, [index % x.shape[dim]])
    return _one(walk, x, dim, index)


def _one(walk: Walk, x: Value, dim: int, index: int) -> Layers:
    for layer in x.on(dim):
        if len(varying(layer)) > 1:
            walk.grids.append((layer, frozenset({dim})))
    return tuple(
        compact(layer.select(dim, index if layer.shape[dim] > 1 else 0)) for layer in x.layers
    )


@register_rule(aten.unbind)
def unbind(walk: Walk, node: fx.Node, x: Value, dim: int = 0) -> list[Layers]:
    """All positions of a dimension, one by one."""
    return [_one(walk, x, dim % x.ndim, index) for index in range(x.shape[dim])]


@register_rule(aten.split_with_sizes, aten.unsafe_split_with_sizes, aten.split_with_sizes_copy)
def split_with_sizes(walk: Walk, node: fx.Node, x: Value, sizes: Any, dim: int = 0) -> list[Layers]:
    """Parts of given sizes."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        tuple(_part(layer, dim % x.ndim, start, start + size) for layer in x.layers)
        for start, size in zip(starts, sizes, strict=True)
    ]


@register_rule(aten.split, aten.unsafe_split, aten.split_copy)
def split(walk: Walk, node: fx.Node, x: Value, size: Any, dim: int = 0) -> list[Layers]:
    """Equal parts, which must stay equal: column j of each part is tied to column j of all."""
    if isinstance(size, list | tuple):
        return split_with_sizes(walk, node, x, size, dim)
    dim %= x.ndim
    starts = range(0, x.shape[dim], size)
    for layer in x.on(dim):
        if x.shape[dim] % size:
            walk.freeze(layer, "split into parts of unequal size")
            continue
        parts = spread(layer, x.shape, {dim}).unflatten(dim, (len(starts), size))
        walk.align(parts, {dim})
    return [tuple(_part(layer, dim, n, n + size) for layer in x.layers) for n in starts]


@register_rule(aten.cat, aten.concat)
def cat(walk: Walk, node: fx.Node, tensors: Any, dim: int = 0) -> Layers:
    """Concatenation: ids are concatenated along ``dim`` and tied along all others."""
    ndim = len(node.meta["shape"])
    dim %= ndim
    parts = _whole_rows(walk, [value for value in tensors if value.ndim == ndim], dim)
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


def _whole_rows(walk: Walk, parts: list[Value], dim: int) -> list[Value]:
    """Grids beside a part that leaves by rows only do so too: heads of which a part was rotated."""
    rows = {varying(i) for value in parts if not value.on(dim) for i in value.layers}
    result = []
    for value in parts:
        layers = [
            walk.collapse(i, {dim}) if varying(i) - {dim} in rows else i for i in value.layers
        ]
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


@register_rule(aten.stack)
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


@register_rule(aten.constant_pad_nd)
def constant_pad_nd(walk: Walk, node: fx.Node, x: Value, pad: Any, value: float = 0) -> Layers:
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


@register_rule(
    aten.reflection_pad1d,
    aten.reflection_pad2d,
    aten.reflection_pad3d,
    aten.replication_pad1d,
    aten.replication_pad2d,
    aten.replication_pad3d,
)
def border_pad(walk: Walk, node: fx.Node, x: Value, pad: Any) -> Layers:
    """Padding with values of the border, over the last dimensions."""
    dims = range(x.ndim - len(pad) // 2, x.ndim)
    return walk.settle(x, dims, "padding over channels by reflection")
