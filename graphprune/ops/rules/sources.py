"""Ops that make tensors out of nothing: constants of one value can be cut anywhere."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphprune.ops.ids import Layers
from graphprune.ops.rules.base import Walk, aten
from graphprune.ops.rules.registry import Value, register_rule


@register_rule(
    aten.zeros,
    aten.ones,
    aten.full,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.rand,
    aten.randn,
    makes=True,
)
def uniform(walk: Walk, node: fx.Node, *args: Any, **kwargs: Any) -> Layers:
    """All positions hold the same value (or the same distribution)."""
    return walk.extents(node.meta["shape"])


@register_rule(aten.empty, aten.new_empty, aten.empty_strided, aten.new_empty_strided, makes=True)
def empty(walk: Walk, node: fx.Node, *args: Any, **kwargs: Any) -> Layers:
    """Uninitialised memory, to be filled by a later in-place op."""
    return walk.extents(node.meta["shape"])


@register_rule(aten.sym_size, aten.sym_numel, aten.is_same_size)
def nothing(walk: Walk, node: fx.Node, *args: Value, **kwargs: Any) -> Layers:
    """No values are read."""
    return ()
