"""Data movement: the op itself is run on the values and on where they are unknown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphprune.ops.constants.fact import Fact, Unfollowed, found, register_fact, values

aten = torch.ops.aten


def _unknown(tree: Any) -> Any:
    if isinstance(tree, Fact):
        return tree.unknown
    return [_unknown(item) for item in tree] if isinstance(tree, list | tuple) else tree


def _value(tree: Any) -> Any:
    if isinstance(tree, Fact):
        return tree.value
    return [_value(item) for item in tree] if isinstance(tree, list | tuple) else tree


@register_fact(
    aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze,
    aten.unsqueeze_, aten.squeeze_, aten.transpose_, aten.t_, aten.expand, aten.slice,
    aten.select, aten.unbind, aten.split, aten.split_with_sizes, aten.unsafe_split,
    aten.unsafe_split_with_sizes, aten.diagonal, aten.unfold, aten.flip, aten.roll, aten.repeat,
    aten.stack, aten.detach, aten.alias, aten.lift_fresh,
    aten.channel_shuffle, aten.slice_scatter,
    aten.select_scatter, aten.view_as_complex, aten.tril, aten.triu,
)  # fmt: skip
def moved(op: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Views stay views of the same memory, so that what is written into one is seen in all."""
    if op.overloadpacket is aten.view_as_complex:
        return Fact(op(x.value), x.unknown.any(-1))
    value = op(_value(x), *_value(args), **kwargs)
    unknown = op(_unknown(x), *_unknown(args), **kwargs)
    if isinstance(value, Tensor):
        return Fact(value, unknown)
    return list(map(Fact, value, unknown))


@register_fact(aten.view_as_real)
def view_as_real(op: Any, x: Fact) -> Fact:
    """Both parts of a complex number are known or none."""
    return Fact(op(x.value), x.unknown.unsqueeze(-1).expand(*x.unknown.shape, 2))


@register_fact(aten.view, aten._unsafe_view, aten._reshape_alias)
def view(op: Any, x: Fact, size: Any, *args: Any) -> Fact:
    """A reshape; strides may differ from the recorded ones."""
    if not isinstance(size, list | tuple):
        raise Unfollowed("a view as another dtype")
    return Fact(x.value.reshape(size), x.unknown.reshape(size))


@register_fact(aten.cat)
def cat(op: Any, tensors: Any, dim: int = 0) -> Fact:
    """Concatenation, of one dtype as the op would make it."""
    value = torch.cat([fact.value for fact in tensors], dim)
    return Fact(value, torch.cat([fact.unknown for fact in tensors], dim))


@register_fact(
    aten.constant_pad_nd, aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d,
    aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d, aten.pixel_shuffle,
    aten.pixel_unshuffle, aten.im2col, aten.upsample_nearest1d, aten.upsample_nearest2d,
    aten.upsample_nearest3d, aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d,
    aten._upsample_nearest_exact3d,
)  # fmt: skip
def moved_as_numbers(op: Any, x: Fact, *args: Any, **kwargs: Any) -> Fact:
    """Ops that want floating point; what they pad with is known."""
    value = op(x.value, *args, **kwargs)
    if op.overloadpacket is aten.constant_pad_nd:
        args = args[:1]  # the padding itself is known: zero
    return Fact(value, op(x.unknown.double(), *args, **kwargs) != 0)


@register_fact(aten.index_select, aten.gather, aten.index)
def picked(op: Any, x: Fact, *args: Any, **kwargs: Any) -> Fact:
    """Positions picked by an index that does not depend on the input."""
    if not all(fact.constant for fact in found((args, kwargs))):
        raise Unfollowed("an index that depends on the input")
    args, kwargs = values((args, kwargs))
    return Fact(op(x.value, *args, **kwargs), op(x.unknown, *args, **kwargs))


@register_fact(aten.embedding)
def embedding(op: Any, table: Fact, index: Fact, *args: Any) -> Fact:
    """A column that is the same in all rows is known whatever row is read."""
    if index.constant:
        rows = index.value
        return Fact(op(table.value, rows), op(table.unknown.double(), rows) != 0)
    shape = (*index.value.shape, table.value.shape[1])
    same = (table.value == table.value[:1]).all(0) & ~table.unknown.any(0)
    return Fact(table.value[0].expand(shape).clone(), (~same).expand(shape).clone())
