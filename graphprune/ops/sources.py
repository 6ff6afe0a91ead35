"""Ops that make tensors out of nothing: constants of one value can be cut anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import fx

from graphprune.ops.calls import args_of
from graphprune.ops.given import Given, Pruned
from graphprune.ops.ids import Layers
from graphprune.ops.pointwise import made_fact
from graphprune.ops.registry import declare as _declare
from graphprune.ops.registry import free
from graphprune.ops.reshaping import sizes_given
from graphprune.ops.samples import of, shares
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten
declare = partial(_declare, macs=free)  # nothing is multiplied here


def factory_given(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Given]:
    """All sizes; some of them may have been tensors."""
    given = list(args_of(node)[0])
    places = [(node, dim) for dim in range(len(given))]
    yield Given(given, list(graph.shape(node, alive)), "size", places=places)


@declare(aten.zeros, aten.ones, given=factory_given, makes=True, sample=of([2, 3]))
@declare(aten.rand, aten.randn, given=factory_given, makes=True, sample=of([2, 3]))
@declare(aten.full, given=factory_given, makes=True, fills=True, sample=of([2, 3], 0.5))
@declare(
    aten.new_zeros,
    aten.new_ones,
    fact=made_fact,
    given=sizes_given,
    makes=True,
    sample=of((2, 3), [4, 3]),
)
@declare(
    aten.new_full,
    fact=made_fact,
    given=sizes_given,
    makes=True,
    fills=True,
    sample=of((2, 3), [4, 3], 0.5),
)
def uniform(walk: Walk, node: fx.Node, *args: object, **kwargs: object) -> Layers:
    """All positions hold the same value (or the same distribution)."""
    return walk.extents(node.meta["shape"])


def normal_given(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Given]:
    """The sizes, where neither the mean nor the deviation is a tensor."""
    args = args_of(node)
    if len(args) > 2 and isinstance(args[2], list | tuple):
        yield Given(list(args[2]), list(graph.shape(node, alive)), "size")


@declare(aten.normal, given=normal_given, makes=True, sample=of((2, 3), shares(2, 3)))
def normal(walk: Walk, node: fx.Node, *args: object, **kwargs: object) -> Layers:
    """As mean and deviation are, where these are tensors."""
    operands = [arg for arg in args if isinstance(arg, Value)]
    shape = node.meta["shape"]
    return walk.broadcast(operands, len(shape)) if operands else walk.extents(shape)


@declare(aten.empty, given=factory_given, makes=True, sample=of([2, 3]))
@declare(aten.new_empty, given=sizes_given, makes=True, sample=of((2, 3), [4, 3]))
@declare(aten.empty_strided, makes=True, sample=of([2, 3], [3, 1]))
@declare(aten.new_empty_strided, makes=True, sample=of((2, 3), [4, 3], [3, 1]))
def empty(walk: Walk, node: fx.Node, *args: object, **kwargs: object) -> Layers:
    """Uninitialised memory, to be filled by a later in-place op."""
    return walk.extents(node.meta["shape"])


@declare(aten.sym_size, sample=of((2, 3), 1))
@declare(aten.sym_numel, sample=of((2, 3)))
@declare(aten.is_same_size, sample=of((2, 3), (2, 3)))
@declare(aten.scalar_tensor, fills=True, sample=of(0.5))
def nothing(walk: Walk, node: fx.Node, *args: Value, **kwargs: object) -> Layers:
    """No values are read."""
    return ()
