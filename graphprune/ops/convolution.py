"""Convolutions of any number of dimensions, grouped or transposed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.ops.calls import Overload, args_of
from graphprune.ops.contraction import contract, free
from graphprune.ops.fact import Fact, reached_nowhere
from graphprune.ops.factors import Factors
from graphprune.ops.given import Given, Pruned
from graphprune.ops.ids import Alternatives, Layers, Way, along, spread, varying
from graphprune.ops.made import made
from graphprune.ops.registry import declare
from graphprune.ops.samples import of
from graphprune.ops.values import Natural, Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten


def of_convolution(x: object, weight: object, bias: object, *how: object) -> Factors:
    """The kernel moves over the places."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = aten.convolution.default(x, weight, None, *how)
        return out

    return Factors((x, weight), product, bias, matrix=True, window=how)


def convolution_fact(op: Overload, x: Fact, weight: Fact, bias: Fact | None, *how: object) -> Fact:
    """The padding is a known zero."""
    transposed = how[3]
    if not transposed and reached_nowhere(x, weight):
        sides = [side.value.to("meta") for side in (x, weight)]
        return Fact.nothing(op(*sides, None, *how).shape, torch.float64)
    return of_convolution(x, weight, bias, *how).fact()


def groups_given(graph: Pruned, node: fx.Node, alive: np.ndarray) -> Iterator[Given]:
    """Groups that lose all of their channels leave."""
    groups = int(args_of(node)[8])
    if groups > 1:
        keep = graph.positions(node, 1, alive).reshape(groups, -1)
        yield Given([groups], [int(keep.any(1).sum())], "groups")


def convolution_meta(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> object:
    """The plain form, contiguous; torch checks all others."""
    places = x.shape[2:]
    rank = len(places)
    plain = not transposed and x.dim() == weight.dim() > 2 and x.is_contiguous()
    if not plain or not len(stride) == len(padding) == len(dilation) == rank:
        return NotImplemented
    if x.dtype != weight.dtype or x.shape[1] != weight.shape[1] * groups:
        return NotImplemented
    out = weight.shape[0]
    if out % groups or (bias is not None and tuple(bias.shape) != (out,)):
        return NotImplemented
    sides = tuple(
        (side + 2 * pad - step * (kernel - 1) - 1) // by + 1
        for side, kernel, by, pad, step in zip(places, weight.shape[2:], stride, padding, dilation)
    )
    if min(sides) < 1 or x.numel() == 0:
        return NotImplemented
    return made(x, (x.shape[0], out, *sides))


@declare(
    aten.convolution,
    factors=of_convolution,
    fact=convolution_fact,
    meta=convolution_meta,
    given=groups_given,
    layer=True,
    sample=of(*((2, 4, 5, 5), (6, 2, 3, 3), (6,)), *([2, 2], [1, 1], [1, 1], False, [0, 0], 2)),
    any_size=True,
)
def convolution(
    walk: Walk,
    node: fx.Node,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Layers:
    """A convolution of any number of dimensions, grouped or transposed.

    A kernel of one position is pointwise: channels may lie along the places as well.
    """
    ndim = x.ndim
    moves = any(s != 1 for s in stride) or any(padding) or any(output_padding)
    mixed = [dim for dim in range(2, ndim) if moves or weight.shape[dim] > 1]
    x = replace(x, layers=walk.settle(x, mixed, "convolution over channels"))
    weight = replace(weight, layers=walk.settle(weight, range(2, ndim), Natural.KERNEL))
    out_channels = node.meta["shape"][1]
    x = walk.read_along(x, 1) if groups == 1 else x
    rows = free(walk, x, 1)
    for layer in x.on(1):
        walk.collapse(layer, {1} if len(varying(layer)) > 1 else ())
    if groups == 1:
        in_dim = 0 if transposed else 1
        contract(walk, x, weight, 1, in_dim)
        own = [layer.reshape(-1) for layer in free(walk, weight, in_dim)]
    else:
        own = _grouped(walk, x, weight, groups, transposed, out_channels)
    product = Value(
        (x.shape[0], out_channels, *node.meta["shape"][2:]),
        tuple(rows) + tuple(along(ids, 1, ndim) for ids in own),
    )
    if bias is None:
        return product.layers
    shape = (1, out_channels, *[1] * (ndim - 2))
    shaped = Value(shape, tuple(along(ids, 1, ndim) for ids in bias.layers))
    return walk.broadcast([product, shaped], ndim)


def _grouped(
    walk: Walk, x: Value, weight: Value, groups: int, transposed: bool, out_channels: int
) -> list[Tensor]:
    """Ties of a grouped convolution; returns the ids of its output channels.

    ``[groups, in / groups]`` input ids meet ``[groups, out / groups]`` output ids. One of them
    lies along dimension 0 of the weight; the other dimension is shared by all groups. Either
    whole groups go, or equal columns of all groups.
    """
    walk.reading()
    inputs = [spread(i.reshape(-1, 1), (x.shape[1], 1)) for i in x.on(1) if varying(i) == {1}]
    walk.write(weight, [x], weight.layers)
    long = [layer.reshape(groups, -1) for layer in weight.on(0) if varying(layer) == {0}]
    short = [layer.reshape(1, -1) for layer in weight.on(1) if varying(layer) == {1}]
    entering = [layer.reshape(groups, -1) for layer in inputs]
    text = Natural.INPUT if x.given else "grouped convolution with a fixed side"
    if not long or not entering:
        for ids in (*long, *short, *entering):
            walk.freeze(ids, text)
    if transposed:
        for mine, other in zip(entering, long, strict=False):
            walk.tie(mine, other)
        walk.read(*long)
        width = out_channels // groups
        leaving = [walk.ties.fresh(out_channels).reshape(groups, width)]
        in_short, out_short = [], short
        if not entering:
            walk.freeze(leaving[0], text)
    else:
        leaving, in_short, out_short = long, short, []
        walk.read(*short)
    if not (entering and long):
        return [ids.reshape(-1) for ids in leaving]
    if not weight.linear:
        walk.mask(*entering)
    by_row = [ids for ids in entering if (ids != ids[:1]).any()] or entering[:1]
    by_column = [ids for ids in entering if (ids != ids[:, :1]).any()] or entering[:1]
    rows = [(ids[:, :1], ids) for ids in (*entering, *leaving)]
    rows += [(a[:, :1], b[:, :1]) for a in by_row for b in leaving]
    columns = [(ids[:1], ids) for ids in (*entering, *leaving)]
    columns += [(ids, other[:1]) for ids in in_short for other in by_column]
    columns += [(ids, leaving[0][:1]) for ids in out_short]
    everything = torch.cat([ids.reshape(-1) for ids in (*entering, *leaving)])
    if entering[0].shape[1] == 1:
        for a, b in rows:
            walk.tie(a, b)
        for ids in short:
            walk.freeze(ids, Natural.KERNEL)
    else:
        whole, equal = Way(tuple(rows), tuple(short)), Way(tuple(columns), aligns=True)
        walk.choose(Alternatives(everything, (whole, equal), lightest=True))
    return [ids.reshape(-1) for ids in leaving]


def deformed_macs(out: Any, x: Any, weight: Any, *_: Any) -> object:
    """Those of a convolution; places between pixels are not counted."""
    return math.prod(out) * math.prod(weight[1:])


@declare(
    "torchvision.deform_conv2d",
    macs=deformed_macs,
    layer=True,
    sample=of(
        *((1, 3, 4, 4), (5, 3, 2, 2), (1, 8, 3, 3), (1, 4, 3, 3), (5,)),
        *(1, 1, 0, 0, 1, 1, 1, 1, True),
    ),
)
def deform_conv2d(
    walk: Walk, node: fx.Node, x: Value, weight: Value, offset: Value, mask: Value, bias: Value,
    *how: Any,
) -> Layers:  # fmt: skip
    """A convolution whose kernel reads at places that are computed: all of these stay."""
    *_, groups, offset_groups, _ = how
    for places in (offset, mask):
        walk.freeze_value(places, walk.reason("places to read"))
    if groups > 1:
        return walk.refuse([x, weight, bias], "places to read by groups of channels")
    mixed = {0, 2, 3} if offset_groups == 1 else {0, 1, 2, 3}
    x = replace(x, layers=walk.settle(x, mixed, "convolution over channels"))
    weight = replace(weight, layers=walk.settle(weight, {2, 3}, "kernel size"))
    contract(walk, x, weight, 1, 1)
    own = [along(layer.reshape(-1), 1, 4) for layer in free(walk, weight, 1)]
    shaped = Value((1, *bias.shape, 1, 1), tuple(along(ids, 1, 4) for ids in bias.layers))
    return walk.broadcast([Value(node.meta["shape"], tuple(own)), shaped], 4)
