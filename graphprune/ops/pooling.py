"""Pooling and resampling: batch and channel pass, places are mixed."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx

from graphprune.ops.calls import Overload
from graphprune.ops.fact import Fact, along_unknown, moved_numbers_fact
from graphprune.ops.ids import Layers
from graphprune.ops.registry import declare as _declare
from graphprune.ops.registry import free, op_name
from graphprune.ops.samples import of, places, shares
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten
declare = partial(_declare, macs=free)  # nothing is multiplied here


def pooled_fact(op: Overload, x: Fact, *args: object, **kwargs: object) -> object:
    """Weights are never negative: what an unknown position reaches, a one reaches as well."""
    out = op(x.filled(), *args, **kwargs)
    marks = op(x.unknown.double(), *args, **kwargs)
    if isinstance(out, Tensor):
        return Fact.checked(out, marks > 0)
    unknown = marks[0] > 0
    return [Fact.checked(part, unknown.clone()) for part in out]


def resampled_fact(op: Overload, x: Fact, *args: object, **kwargs: object) -> Fact:
    """Weights of both signs: a map is known when all of it is."""
    out = op(x.filled(), *args, **kwargs)
    return Fact.checked(out, along_unknown(x.unknown, [2, 3]).expand(out.shape).clone())


_BOXES = torch.tensor([[0, 0, 0, 4, 4], [1, 1, 1, 5, 5]], dtype=torch.float64)
_WINDOWED = ("aten.avg_pool", "aten.max_pool")  # given kernel, stride and padding
_PLACES = {"1d": 1, "2d": 2, "3d": 3}  # dimensions that are pooled, by the name of an op


@declare(aten.avg_pool1d, sample=of((2, 3, 6), [2]), hull=True)
@declare(aten.adaptive_avg_pool1d, aten.adaptive_max_pool1d, sample=of((2, 3, 6), [2]), hull=True)
@declare(aten.max_pool1d, aten.max_pool1d_with_indices, sample=of((2, 3, 6), [2]), hull=True)
@declare(
    aten.upsample_nearest1d,
    aten._upsample_nearest_exact1d,
    fact=moved_numbers_fact,
    sample=of((2, 3, 6), [9]),
    hull=True,
)
@declare(aten.upsample_linear1d, fact=pooled_fact, sample=of((2, 3, 6), [9], False), hull=True)
@declare(
    aten.avg_pool2d,
    aten.max_pool2d_with_indices,
    fact=pooled_fact,
    sample=of((2, 3, 6, 6), [2, 2]),
    any_size=True,
    hull=True,
)
@declare(
    aten._adaptive_avg_pool2d,
    fact=pooled_fact,
    sample=of((2, 3, 6, 6), [2, 2]),
    any_size=True,
    hull=True,
)
@declare(aten.adaptive_max_pool2d, fact=pooled_fact, sample=of((2, 3, 6, 6), [2, 2]), hull=True)
@declare(aten.adaptive_avg_pool2d, aten.max_pool2d, sample=of((2, 3, 6, 6), [2, 2]), hull=True)
@declare(
    aten.upsample_nearest2d,
    fact=moved_numbers_fact,
    sample=of((2, 3, 6, 6), [9, 9]),
    any_size=True,
    hull=True,
)
@declare(
    aten._upsample_nearest_exact2d,
    fact=moved_numbers_fact,
    sample=of((2, 3, 6, 6), [9, 9]),
    hull=True,
)
@declare(
    aten.upsample_bilinear2d,
    fact=pooled_fact,
    sample=of((2, 3, 6, 6), [9, 9], False),
    any_size=True,
    hull=True,
)
@declare(
    aten._upsample_bilinear2d_aa,
    fact=pooled_fact,
    sample=of((2, 3, 6, 6), [9, 9], False),
    hull=True,
)
@declare(
    aten.upsample_bicubic2d,
    aten._upsample_bicubic2d_aa,
    fact=resampled_fact,
    sample=of((2, 3, 6, 6), [9, 9], False),
)
@declare(
    aten.avg_pool3d,
    aten.max_pool3d_with_indices,
    fact=pooled_fact,
    sample=of((1, 2, 4, 4, 4), [2, 2, 2]),
    hull=True,
)
@declare(
    aten._adaptive_avg_pool3d,
    aten.adaptive_max_pool3d,
    fact=pooled_fact,
    sample=of((1, 2, 4, 4, 4), [2, 2, 2]),
    hull=True,
)
@declare(
    aten.adaptive_avg_pool3d, aten.max_pool3d, sample=of((1, 2, 4, 4, 4), [2, 2, 2]), hull=True
)
@declare(
    aten.upsample_nearest3d,
    aten._upsample_nearest_exact3d,
    fact=moved_numbers_fact,
    sample=of((1, 2, 4, 4, 4), [5, 5, 5]),
    hull=True,
)
@declare(
    aten.upsample_trilinear3d,
    fact=pooled_fact,
    sample=of((1, 2, 4, 4, 4), [5, 5, 5], False),
    hull=True,
)
def spatial(walk: Walk, node: fx.Node, x: Value, *args: object, **kwargs: object) -> object:
    """The last dimensions are pooled or resampled; batch and channel pass."""
    for other in (*args, *kwargs.values()):
        if isinstance(other, Value):
            walk.freeze_value(other, walk.reason("positions to pool"))
    count = next(n for name, n in _PLACES.items() if name in op_name(node))
    dims = list(range(x.ndim - count, x.ndim))
    if any(name in op_name(node) for name in _WINDOWED):
        dims = [dim for dim, moves in zip(dims, _moving(count, *args)) if moves]
    kept = walk.settle(x, dims, "pooled or resampled channels")
    return [kept] * len(node.meta["items"]) if "items" in node.meta else kept


def _moving(
    count: int, kernel: object, stride: object = (), padding: object = 0, *_: object
) -> list[bool]:
    """Along which dimensions a window of a pool is wider than a position, or moves by more."""
    wide, step, pad = (
        list(given) * count if len(given) == 1 else list(given)
        for given in (part if isinstance(part, list | tuple) else [part] for part in
                      (kernel, stride or kernel, padding))
    )  # fmt: skip
    return [k != 1 or s != 1 or p != 0 for k, s, p in zip(wide, step, pad)]


@declare(
    aten.fractional_max_pool2d, sample=of((2, 3, 6, 6), [2, 2], [3, 3], shares(2, 3, 2)), hull=True
)
def fractional_max_pool(
    walk: Walk, node: fx.Node, x: Value, kernel: object, size: object, samples: Value
) -> list[Layers]:
    """Every map is pooled at places of its own."""
    maps = walk.settle(x, (2, 3), "pooled or resampled channels")
    own = walk.settle(samples, (2,), "positions to pool")
    sides = [
        Value((*x.shape[:2], 1, 1), maps),
        Value((*x.shape[:2], 1, 1), tuple(layer.unsqueeze(-1) for layer in own)),
    ]
    return [walk.broadcast(sides, 4, "positions to pool")] * 2


@declare(aten.grid_sampler_2d, sample=of((2, 3, 4, 4), (2, 5, 5, 2), 0, 0, False))
@declare(aten.grid_sampler_3d, sample=of((2, 3, 4, 4, 4), (2, 2, 2, 2, 3), 0, 0, False))
def grid_sampler(walk: Walk, node: fx.Node, x: Value, grid: Value, *args: object) -> Layers:
    """Each sample of the batch is read at its own positions, ``[batch, *places, 2 or 3]``."""
    shape, last = node.meta["shape"], grid.ndim - 1
    maps = walk.settle(x, range(2, x.ndim), "pooled or resampled channels")
    places = walk.settle(grid, {last}, "positions to sample")
    sides = [
        Value((*shape[:2], *[1] * (x.ndim - 2)), maps),
        Value((shape[0], 1, *shape[2:]), tuple(i.movedim(last, 1) for i in places)),
    ]
    return walk.broadcast(sides, x.ndim, "positions to sample")


@declare("torchvision.roi_align", sample=of((2, 3, 6, 6), _BOXES, 1.0, 2, 2, -1, False))
@declare("torchvision.roi_pool", sample=of((2, 3, 6, 6), _BOXES, 1.0, 2, 2))
def roi_pool(walk: Walk, node: fx.Node, x: Value, boxes: Value, *args: object) -> object:
    """Regions of a feature map, resampled: one per box, with the channels of the map."""
    walk.freeze_value(boxes, walk.reason("boxes"))
    kept = walk.settle(x, (0, 2, 3), "pooled or resampled channels")
    return [kept, ()] if "items" in node.meta else kept


@declare(aten.max_unpool2d, sample=of((2, 3, 1, 2), places(9, 2, 3, 1, 2), [3, 3]))
@declare(
    aten.max_unpool3d,
    sample=of((2, 3, 1, 1, 2), places(9, 2, 3, 1, 1, 2), [1, 3, 3], [1, 1, 1], [0, 0, 0]),
)
def max_unpool(walk: Walk, node: fx.Node, x: Value, indices: Value, *args: object) -> Layers:
    """Values go back to where their maxima were, channel by channel."""
    spatial = range(2, x.ndim)
    sides = [Value(v.shape, walk.settle(v, spatial, "unpooled channels")) for v in (x, indices)]
    return walk.broadcast(sides, x.ndim)
