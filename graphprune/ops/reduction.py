"""Reductions over some dimensions; others pass their ids on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ops.calls import Overload, target_of
from graphprune.ops.fact import Fact, Unfollowed, along_unknown, arguments
from graphprune.ops.factors import Factors
from graphprune.ops.heads import over_heads
from graphprune.ops.ids import Layers, varying
from graphprune.ops.made import made, softmax_meta
from graphprune.ops.registry import between, free, zeroes
from graphprune.ops.registry import declare as _declare
from graphprune.ops.samples import bits, of
from graphprune.ops.values import FLOATING, Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten
declare = partial(_declare, macs=free)  # nothing is multiplied here


def dims_of(dim: object, ndim: int) -> set[int]:
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


def reduced_fact(op: Any, x: Fact, *args: Any, **kwargs: Any) -> object:
    """Known where all that goes into it is known."""
    bound = arguments(op, (x, *args), kwargs)
    if any(isinstance(value, Fact) for value in (*args, *kwargs.values())):
        raise Unfollowed("the larger of two tensors")
    dims = sorted(dims_of(bound.get("dim"), x.value.dim()))
    unknown = along_unknown(x.unknown, dims)
    out = op(x.filled(), *args, **kwargs)
    if isinstance(out, Tensor):
        return Fact.checked(out, unknown.reshape(out.shape))
    return [Fact.checked(part, unknown.reshape(part.shape)) for part in out]


def along_fact(op: Overload, x: Fact, dim: int, *args: object, **kwargs: object) -> object:
    """Every position depends on all others along a dimension."""
    out = op(x.filled(), dim, *args, **kwargs)
    several = isinstance(out, tuple)
    unknown = along_unknown(x.unknown, [dim]).expand((out[0] if several else out).shape)
    facts = [Fact.checked(part, unknown.clone()) for part in (out if several else (out,))]
    return facts if several else facts[0]


def of_sum(x: object, *args: object, **kwargs: object) -> Factors:
    """Products of a single factor."""
    named = {key: value for key, value in kwargs.items() if key != "dtype"}
    return Factors((x,), lambda x: aten.sum(x, *args, **named))


def sum_fact(op: Overload, x: Fact, *args: object, **kwargs: object) -> Fact:
    """Known where all that is added is known."""
    marks = of_sum(x, *args, **kwargs).product(x.unknown.double())
    return Fact.checked(op(x.filled(0), *args, **kwargs), marks > 0.5)


def kept_zero(tensor: Tensor, keep: Tensor) -> Tensor:
    """Zero where the mask is false, whatever stood there."""
    return torch.where(keep.to(tensor.device), tensor, tensor.new_zeros(()))


def count_of(keep: Tensor, x: Tensor, dims: list[int]) -> Tensor:
    """How many positions along ``dims`` stay; one where none does, as nobody reads that."""
    return keep.expand(x.shape).to(x.dtype).sum(dims, keepdim=True).clamp_min(1)


def mean_masked(
    keep: Tensor, x: Tensor, dim: object = None, keepdim: bool = False, **_: object
) -> Tensor:
    """The mean of what stays."""
    dims = sorted(dims_of(dim, x.dim()))
    mean = x.sum(dims, keepdim=True) / count_of(keep, x, dims)
    return mean if keepdim else mean.squeeze(dims)


def moments(keep: Tensor, x: Tensor, dims: list[int], correction: float) -> tuple[Tensor, Tensor]:
    """Variance and mean of what stays; a variance of one where nothing does.

    Nobody reads that, but a gradient of zero times infinity is none.
    """
    count = count_of(keep, x, dims)
    mean = x.sum(dims, keepdim=True) / count
    square = kept_zero((x - mean).square(), keep).sum(dims, keepdim=True)
    none = ~keep.to(x.device).expand(x.shape)
    for dim in dims:
        none = none.all(dim, keepdim=True)
    return torch.where(none, 1, square / torch.where(none, 1, count - correction)), mean


def variance_masked(finish: Callable[[Tensor], Tensor], both: bool) -> Callable[..., object]:
    """The variance of what stays, or its root; with the mean."""

    def rule(
        keep: Tensor, x: Tensor, dim: Any = None, unbiased: Any = None, keep_dim: Any = None,
        *, correction: Any = None, keepdim: bool = False,
    ) -> Any:  # fmt: skip
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        dims = sorted(dims_of(dim, x.dim()))
        if isinstance(unbiased, bool):
            correction = int(unbiased)
        var, mean = moments(keep, x, dims, 1 if correction is None else correction)
        if not (keepdim or keep_dim):
            var, mean = var.squeeze(dims), mean.squeeze(dims)
        return (finish(var), mean) if both else finish(var)

    return rule


def _without(keep: Tensor, x: Tensor, dims: list[int], value: float = -torch.inf) -> Tensor:
    """Removed positions at minus infinity, where others along ``dims`` stay."""
    stays = keep.to(x.device).expand(x.shape)
    for dim in dims:
        stays = stays.any(dim, keepdim=True)
    return x.masked_fill(~keep.to(x.device) & stays, value)


def softmax_masked(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One unit shared out among what stays."""

    def rule(keep: Tensor, x: Tensor, dim: int, *args: object, **_: object) -> Tensor:
        return kept_zero(op(_without(keep, x, [dim]), dim), keep)

    return rule


def logsumexp_masked(keep: Tensor, x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """The sum of what stays."""
    return torch.logsumexp(_without(keep, x, sorted(dims_of(dim, x.dim()))), dim, keepdim)


def largest_masked(op: Any, value: float) -> Callable[..., object]:
    """The largest or smallest of what stays."""

    def rule(keep: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        dim = args[0] if args else kwargs.get("dim")
        return op(_without(keep, x, sorted(dims_of(dim, x.dim())), value), *args, **kwargs)

    return rule


def mean_meta(x: Tensor, dim: object = None, keepdim: bool = False, **kwargs: object) -> object:
    """The plain form."""
    if not dim or kwargs or x.dtype not in FLOATING or not isinstance(dim, list | tuple):
        return NotImplemented
    gone = {d % x.dim() for d in dim}
    shape = [1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone]
    return made(x, shape) if len(gone) == len(dim) else NotImplemented


@declare(aten.sum, factors=of_sum, fact=sum_fact, sample=of((2, 3, 4), [1]), any_size=True)
def sum_(
    walk: Walk, node: fx.Node, x: Value, dim: object = None, keepdim: bool = False, **_: object
) -> Layers:
    """A sum over channels is exact: removed channels would add zero."""
    dims = dims_of(dim, x.ndim)
    kept, gone = summed(walk, over_heads(walk, x, dims), dims)
    walk.mask(*gone)
    return drop(kept, dims, node.meta["shape"])


@declare(
    aten.mean,
    fact=reduced_fact,
    masked=mean_masked,
    meta=mean_meta,
    sample=of((2, 3, 4), [1]),
    any_size=True,
)
def mean(
    walk: Walk, node: fx.Node, x: Value, dim: object = None, keepdim: bool = False, **_: object
) -> Layers:
    """A mean over channels is taken over the kept ones."""
    return statistics(walk, node, x, dim, "mean over channels")


@declare(
    aten.var,
    fact=reduced_fact,
    masked=variance_masked(lambda var: var, both=False),
    sample=of((2, 5), [1]),
)
@declare(
    aten.std,
    fact=reduced_fact,
    masked=variance_masked(torch.sqrt, both=False),
    sample=of((2, 5), [1]),
)
@declare(
    aten.var_mean,
    fact=reduced_fact,
    masked=variance_masked(lambda var: var, both=True),
    sample=of((2, 5), [1]),
)
@declare(
    aten.std_mean,
    fact=reduced_fact,
    masked=variance_masked(torch.sqrt, both=True),
    sample=of((2, 5), [1]),
)
def var(
    walk: Walk, node: fx.Node, x: Value, dim: object = None, *args: object, **kwargs: object
) -> Any:
    """Statistics over channels are taken over the kept ones."""
    kept = statistics(walk, node, x, dim, "variance over channels")
    return [kept, kept] if "items" in node.meta else kept


@declare(
    aten.linalg_vector_norm,
    fact=reduced_fact,
    masked=zeroes,
    sample=of((2, 5), 2, [1]),
    refused=of((5,), float("inf"), [0]),
)
def vector_norm(
    walk: Walk,
    node: fx.Node,
    x: Value,
    ord: float = 2,
    dim: object = None,
    *args: object,
    **kwargs: object,
) -> Layers:
    """A norm over channels sums over the kept ones."""
    if not 0 < ord < float("inf"):
        return extremum(walk, node, x, dim)
    return statistics(walk, node, x, dim, "norm over channels")


@declare(aten.norm, fact=reduced_fact, masked=zeroes, sample=of((2, 5), 2, [1]))
def norm(
    walk: Walk, node: fx.Node, x: Value, p: object = None, dim: object = None, *args: object
) -> Layers:
    """The older spelling of the vector norm."""
    return statistics(walk, node, x, dim, "norm over channels")


def statistics(walk: Walk, node: fx.Node, x: Value, dim: object, text: str) -> Layers:
    """Statistics over channels: renormalising, evaluated over the kept channels."""
    dims = dims_of(dim, x.ndim)
    kept, gone = summed(walk, over_heads(walk, x, dims), dims)
    for layer in gone:
        walk.renormalise(layer, text)
    walk.mask(*gone)
    first = node if "shape" in node.meta else next(iter(node.meta["items"].values()))
    return drop(kept, dims, first.meta["shape"])


@declare(aten._weight_norm_interface, masked=zeroes, sample=of((4, 3, 2), (4, 1, 1)))
def weight_norm(walk: Walk, node: fx.Node, v: Value, g: Value, dim: int = 0) -> list[Layers]:
    """``g * v / norm(v)``, the norm over all dimensions but ``dim``."""
    for layer in v.layers:
        if not layer.shape[dim] > 1:
            walk.renormalise(layer, "norm over channels")
    walk.mask(*(layer for layer in v.layers if layer.shape[dim] == 1))
    walk.spare(*(layer for layer in v.layers if layer.shape[dim] > 1))  # 0 / 0
    return [walk.broadcast([v, g], v.ndim), g.layers]


@declare(
    aten._softmax,
    fact=along_fact,
    meta=softmax_meta,
    masked=softmax_masked(torch.softmax),
    sample=of((2, 5), 1, False),
    any_size=True,
    bounds=between(0.0, 1.0),
)
@declare(
    aten._safe_softmax,
    fact=along_fact,
    meta=softmax_meta,
    masked=softmax_masked(torch.softmax),
    sample=of((2, 5), 1),
    any_size=True,
)
@declare(
    aten.softmax,
    fact=along_fact,
    meta=softmax_meta,
    masked=softmax_masked(torch.softmax),
    sample=of((2, 5), 1),
    any_size=True,
    bounds=between(0.0, 1.0),
)
@declare(
    aten._log_softmax,
    fact=along_fact,
    meta=softmax_meta,
    masked=softmax_masked(torch.log_softmax),
    sample=of((2, 5), 1, False),
    any_size=True,
)
@declare(
    aten.log_softmax,
    fact=along_fact,
    meta=softmax_meta,
    masked=softmax_masked(torch.log_softmax),
    sample=of((2, 5), 1),
)
def softmax(walk: Walk, node: fx.Node, x: Value, dim: int, *args: object) -> Layers:
    """A softmax over channels shares out one unit among the kept ones."""
    kept, gone = summed(walk, x, {dim % x.ndim})
    for layer in gone:
        walk.share(layer, "softmax over channels")
    return (*kept, *gone)


@declare(aten.logsumexp, fact=reduced_fact, masked=logsumexp_masked, sample=of((2, 5), [1]))
def logsumexp(
    walk: Walk, node: fx.Node, x: Value, dim: object, *args: object, **_: object
) -> Layers:
    """The logarithm of the sum that a softmax divides by."""
    dims = dims_of(dim, x.ndim)
    kept, gone = summed(walk, x, dims)
    for layer in gone:
        walk.share(layer, "logsumexp over channels")
    return drop(kept, dims, node.meta["shape"])


@declare(aten.argmax, fact=reduced_fact, chooses=True, sample=of((2, 5), 1), refused=of((5,), 0))
@declare(
    aten.argmin,
    aten.prod,
    fact=reduced_fact,
    sample=of((2, 5), 1),
    refused=of((5,), 0),
)
@declare(
    aten.any, aten.all, fact=reduced_fact, sample=of((2, 5), 1), refused=of((5,), 0), any_size=True
)
def extremum(
    walk: Walk, node: fx.Node, x: Value, dim: object = None, *args: object, **_: object
) -> Layers:
    """Reductions that a removed channel would change."""
    dims = dims_of(dim, x.ndim)
    name = str(getattr(node.target, "_opname", "reduction"))
    return drop(walk.settle(x, dims, f"{name} over channels"), dims, node.meta["shape"])


@declare(aten._is_all_true, sample=of(bits(2, 3)))
def valid(walk: Walk, node: fx.Node, x: Value) -> Layers:
    """Whether arguments of a distribution are allowed: without those that leave they still are."""
    return ()


def _largest(walk: Walk, x: Value, dims: set[int], shape: tuple[int, ...], text: str) -> Layers:
    kept, gone = summed(walk, x, dims)
    for layer in gone:
        walk.share(layer, text)
    return drop(kept, dims, shape)


@declare(
    aten.amax,
    fact=reduced_fact,
    masked=largest_masked(aten.amax, -torch.inf),
    sample=of((2, 5), [1]),
    any_size=True,
)
@declare(
    aten.amin,
    fact=reduced_fact,
    masked=largest_masked(aten.amin, torch.inf),
    sample=of((2, 5), [1]),
    any_size=True,
)
def amax(
    walk: Walk, node: fx.Node, x: Value, dim: object = None, *args: object, **_: object
) -> Layers:
    """The largest or smallest of the kept channels."""
    dims = dims_of(dim, x.ndim)
    return _largest(walk, x, dims, node.meta["shape"], "maximum over channels")


@declare(
    aten.max,
    fact=reduced_fact,
    masked=largest_masked(aten.max, -torch.inf),
    chooses=True,
    sample=of((2, 5), 1),
)
@declare(
    aten.min, fact=reduced_fact, masked=largest_masked(aten.min, torch.inf), sample=of((2, 5), 1)
)
def max_(walk: Walk, node: fx.Node, x: Value, dim: object = None, *args: object) -> object:
    """The largest or smallest of the kept channels; where it is has no meaning after pruning."""
    dims = dims_of(dim, x.ndim)
    if "items" not in node.meta:
        return _largest(walk, x, dims, node.meta["shape"], "maximum over channels")
    value, place = (node.meta["items"].get(index) for index in range(2))
    if value is None or (place is not None and place.users):
        kept = walk.settle(x, dims, "place of the maximum over channels")
        return [drop(kept, dims, node.meta["items"][i].meta["shape"]) for i in node.meta["items"]]
    return [_largest(walk, x, dims, value.meta["shape"], "maximum over channels")]


@declare(aten.cummax, aten.cummin, fact=along_fact, sample=of((2, 5), 1), refused=of((5,), 0))
@declare(aten.logcumsumexp, fact=along_fact, sample=of((2, 5), 1), refused=of((5,), 0))
def running(walk: Walk, node: fx.Node, x: Value, dim: int) -> Any:
    """Every position along one dimension depends on all before it."""
    kept = walk.settle(x, {dim % x.ndim}, "order of channels")
    return [kept] * len(node.meta["items"]) if "items" in node.meta else kept


@declare(
    aten.median,
    aten.nanmedian,
    aten.mode,
    fact=reduced_fact,
    sample=of((2, 5), 1),
    refused=of((5,), 0),
)
@declare(aten.kthvalue, fact=reduced_fact, sample=of((2, 5), 2, 1), refused=of((5,), 2, 0))
@declare(aten.aminmax, fact=reduced_fact, sample=of((2, 5), dim=1), refused=of((5,), dim=0))
def ranked(walk: Walk, node: fx.Node, x: Value, *args: object, **kwargs: object) -> object:
    """One of the values along a dimension is picked, by its rank among the others."""
    dims = dims_of(arguments(node.target, (x, *args), kwargs).get("dim"), x.ndim)
    kept = walk.settle(x, dims, "rank among channels")
    results = list(node.meta.get("items", {0: node}).values())
    layers = [drop(kept, dims, result.meta["shape"]) for result in results]
    return layers if "items" in node.meta else layers[0]


@declare(aten.cumsum, fact=along_fact, sample=of((2, 5), 1), refused=of((5,), 0), any_size=True)
@declare(aten.cumprod, fact=along_fact, sample=of((2, 5), 1), refused=of((5,), 0))
@declare(aten.sort, rows="ordered", chooses=True, sample=of((2, 5), 1), refused=of((5,), 0))
@declare(
    aten.topk,
    rows="ordered",
    chooses=True,
    sample=of((2, 5), 2, 1),
    refused=of((5,), 2, 0),
)
def ordered(walk: Walk, node: fx.Node, x: Value, *args: Any, **kwargs: Any) -> object:
    """Ops along one dimension whose result depends on all of its positions."""
    op = target_of(node)
    position = 1 if op.overloadpacket is aten.topk else 0
    numbers = [a for a in args if isinstance(a, int) and not isinstance(a, bool)]
    dim = kwargs.get("dim", numbers[position] if len(numbers) > position else -1)
    kept = walk.settle(x, {dim % x.ndim}, "order of channels")
    return [kept] * len(node.meta["items"]) if "items" in node.meta else kept
