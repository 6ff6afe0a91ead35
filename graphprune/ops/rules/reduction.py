"""Reductions, pooling and resampling: other dimensions pass their ids on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from graphprune.ops.ids import Layers, varying
from graphprune.ops.rules.base import Walk, aten
from graphprune.ops.rules.registry import Value, register_rule


def dims_of(dim: Any, ndim: int) -> set[int]:
    """Normalise a ``dim`` argument; nothing means all dimensions."""
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return set(range(ndim))
    return {d % ndim for d in (dim if isinstance(dim, list | tuple) else (dim,))}


def drop(layers: Iterable[Tensor], dims: set[int], shape: tuple[int, ...]) -> Layers:
    """Layers of size 1 along ``dims`` as layers of the reduced shape."""
    out = []
    for layer in layers:
        if layer.dim() != len(shape):
            layer = layer.reshape([n for d, n in enumerate(layer.shape) if d not in dims])
        out.append(layer)
    return tuple(out)


def summed(walk: Walk, x: Value, dims: set[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Split layers into those that pass a reduction and the ids that are summed away."""
    kept, gone = [], []
    for layer in x.layers:
        over = dims & varying(layer)
        if not over:
            kept.append(layer)
        elif varying(layer) - dims:
            kept.append(walk.collapse(layer, dims))
        else:
            gone.append(layer)
    return kept, gone


@register_rule(aten.sum)
def sum_(
    walk: Walk, node: fx.Node, x: Value, dim: Any = None, keepdim: bool = False, **_: Any
) -> Layers:
    """A sum over channels is exact: removed channels would add zero."""
    dims = dims_of(dim, x.ndim)
    kept, gone = summed(walk, x, dims)
    walk.mask(*gone)
    return drop(kept, dims, node.meta["shape"])


@register_rule(aten.mean)
def mean(
    walk: Walk, node: fx.Node, x: Value, dim: Any = None, keepdim: bool = False, **_: Any
) -> Layers:
    """A mean over channels is taken over the kept ones."""
    return statistics(walk, node, x, dim, "mean over channels")


@register_rule(aten.var, aten.std, aten.var_mean, aten.std_mean)
def var(walk: Walk, node: fx.Node, x: Value, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Statistics over channels are taken over the kept ones."""
    kept = statistics(walk, node, x, dim, "variance over channels")
    return [kept, kept] if "items" in node.meta else kept


@register_rule(aten.linalg_vector_norm)
def vector_norm(
    walk: Walk, node: fx.Node, x: Value, ord: float = 2, dim: Any = None, *args: Any, **kwargs: Any
) -> Layers:
    """A norm over channels sums over the kept ones."""
    if not 0 < ord < float("inf"):
        return extremum(walk, node, x, dim)
    return statistics(walk, node, x, dim, "norm over channels")


@register_rule(aten.norm)
def norm(walk: Walk, node: fx.Node, x: Value, p: Any = None, dim: Any = None, *args: Any) -> Layers:
    """The older spelling of the vector norm."""
    return statistics(walk, node, x, dim, "norm over channels")


def statistics(walk: Walk, node: fx.Node, x: Value, dim: Any, text: str) -> Layers:
    """Statistics over channels: renormalising, evaluated over the kept channels."""
    dims = dims_of(dim, x.ndim)
    kept, gone = summed(walk, x, dims)
    for layer in gone:
        walk.renormalise(layer, text)
    walk.mask(*gone)
    first = node if "shape" in node.meta else next(iter(node.meta["items"].values()))
    return drop(kept, dims, first.meta["shape"])


@register_rule(aten._weight_norm_interface)
def weight_norm(walk: Walk, node: fx.Node, v: Value, g: Value, dim: int = 0) -> list[Layers]:
    """``g * v / norm(v)``, the norm over all dimensions but ``dim``."""
    for layer in v.layers:
        if not layer.shape[dim] > 1:
            walk.renormalise(layer, "norm over channels")
    walk.mask(*(layer for layer in v.layers if layer.shape[dim] == 1))
    walk.spare(*(layer for layer in v.layers if layer.shape[dim] > 1))  # 0 / 0
    return [walk.broadcast([v, g], v.ndim), g.layers]


@register_rule(aten._softmax, aten._log_softmax, aten._safe_softmax, aten.softmax, aten.log_softmax)
def softmax(walk: Walk, node: fx.Node, x: Value, dim: int, *args: Any) -> Layers:
    """A softmax over channels shares out one unit among the kept ones."""
    kept, gone = summed(walk, x, {dim % x.ndim})
    for layer in gone:
        walk.share(layer, "softmax over channels")
    return (*kept, *gone)


@register_rule(aten.logsumexp)
def logsumexp(walk: Walk, node: fx.Node, x: Value, dim: Any, *args: Any, **_: Any) -> Layers:
    """The logarithm of the sum that a softmax divides by."""
    dims = dims_of(dim, x.ndim)
    kept, gone = summed(walk, x, dims)
    for layer in gone:
        walk.share(layer, "logsumexp over channels")
    return drop(kept, dims, node.meta["shape"])


@register_rule(aten.argmax, aten.argmin, aten.prod, aten.any, aten.all)
def extremum(walk: Walk, node: fx.Node, x: Value, dim: Any = None, *args: Any, **_: Any) -> Layers:
    """Reductions that a removed channel would change."""
    dims = dims_of(dim, x.ndim)
    name = str(getattr(node.target, "_opname", "reduction"))
    return drop(walk.settle(x, dims, f"{name} over channels"), dims, node.meta["shape"])


def _largest(walk: Walk, x: Value, dims: set[int], shape: tuple[int, ...], text: str) -> Layers:
    kept, gone = summed(walk, x, dims)
    for layer in gone:
        walk.share(layer, text)
    return drop(kept, dims, shape)


@register_rule(aten.amax, aten.amin)
def amax(walk: Walk, node: fx.Node, x: Value, dim: Any = None, *args: Any, **_: Any) -> Layers:
    """The largest or smallest of the kept channels."""
    dims = dims_of(dim, x.ndim)
    return _largest(walk, x, dims, node.meta["shape"], "maximum over channels")


@register_rule(aten.max, aten.min)
def max_(walk: Walk, node: fx.Node, x: Value, dim: Any = None, *args: Any) -> Any:
    """The largest or smallest of the kept channels; where it is has no meaning after pruning."""
    dims = dims_of(dim, x.ndim)
    if "items" not in node.meta:
        return _largest(walk, x, dims, node.meta["shape"], "maximum over channels")
    value, place = (node.meta["items"].get(index) for index in range(2))
    if value is None or (place is not None and place.users):
        kept = walk.settle(x, dims, "place of the maximum over channels")
        return [drop(kept, dims, node.meta["items"][i].meta["shape"]) for i in node.meta["items"]]
    return [_largest(walk, x, dims, value.meta["shape"], "maximum over channels")]


@register_rule(aten.cumsum, aten.cumprod, aten.sort, aten.topk)
def ordered(walk: Walk, node: fx.Node, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Ops along one dimension whose result depends on all of its positions."""
    op: Any = node.target
    position = 1 if op.overloadpacket is aten.topk else 0
    numbers = [a for a in args if isinstance(a, int) and not isinstance(a, bool)]
    dim = kwargs.get("dim", numbers[position] if len(numbers) > position else -1)
    kept = walk.settle(x, {dim % x.ndim}, "order of channels")
    return [kept] * len(node.meta["items"]) if "items" in node.meta else kept


def _spatial(count: int) -> Any:
    def rule(walk: Walk, node: fx.Node, x: Value, *args: Any, **kwargs: Any) -> Any:
        """The last dimensions are pooled or resampled; batch and channel pass."""
        for other in (*args, *kwargs.values()):
            if isinstance(other, Value):
                walk.freeze_value(other, walk.reason("positions to pool"))
        kept = walk.settle(x, range(x.ndim - count, x.ndim), "pooled or resampled channels")
        return [kept] * len(node.meta["items"]) if "items" in node.meta else kept

    return rule


@register_rule(aten.grid_sampler_2d, aten.grid_sampler_3d)
def grid_sampler(walk: Walk, node: fx.Node, x: Value, grid: Value, *args: Any) -> Layers:
    """Each sample of the batch is read at its own positions, ``[batch, *places, 2 or 3]``."""
    shape, last = node.meta["shape"], grid.ndim - 1
    maps = walk.settle(x, range(2, x.ndim), "pooled or resampled channels")
    places = walk.settle(grid, {last}, "positions to sample")
    sides = [
        Value((*shape[:2], *[1] * (x.ndim - 2)), maps),
        Value((shape[0], 1, *shape[2:]), tuple(i.movedim(last, 1) for i in places)),
    ]
    return walk.broadcast(sides, x.ndim, "positions to sample")


def roi_pool(walk: Walk, node: fx.Node, x: Value, boxes: Value, *args: Any) -> Any:
    """Regions of a feature map, resampled: one per box, with the channels of the map."""
    walk.freeze_value(boxes, walk.reason("boxes"))
    kept = walk.settle(x, (0, 2, 3), "pooled or resampled channels")
    return [kept, ()] if "items" in node.meta else kept


register_rule("torchvision.roi_align", "torchvision.roi_pool")(roi_pool)
register_rule(
    aten.max_pool2d_with_indices, aten.avg_pool2d, aten.adaptive_max_pool2d,
    aten._adaptive_avg_pool2d, aten.adaptive_avg_pool2d, aten.upsample_nearest2d,
    aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa,
    aten._upsample_bicubic2d_aa, aten.fractional_max_pool2d, aten._upsample_nearest_exact2d,
    aten.max_pool2d,
)(_spatial(2))  # fmt: skip
register_rule(
    aten.avg_pool1d, aten.adaptive_avg_pool1d, aten.upsample_nearest1d, aten.upsample_linear1d,
    aten.adaptive_max_pool1d, aten.max_pool1d, aten.max_pool1d_with_indices,
    aten._upsample_nearest_exact1d,
)(_spatial(1))  # fmt: skip
register_rule(
    aten.max_pool3d_with_indices, aten.avg_pool3d, aten.adaptive_max_pool3d,
    aten._adaptive_avg_pool3d, aten.adaptive_avg_pool3d, aten.upsample_nearest3d,
    aten.upsample_trilinear3d, aten._upsample_nearest_exact3d, aten.max_pool3d,
)(_spatial(3))  # fmt: skip
