"""Products of several tensors, summed over some dimensions; products by groups of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ops.contraction import contract, free
from graphprune.ops.fact import Fact, Unfollowed
from graphprune.ops.factors import Factors
from graphprune.ops.heads import inward, queries
from graphprune.ops.ids import Layers, varying
from graphprune.ops.registry import declare
from graphprune.ops.samples import of
from graphprune.ops.values import Natural, Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten


def summed_product(walk: Walk, operands: Sequence[Value], dims: set[int]) -> Layers:
    """The product of operands of equal rank, summed over ``dims``, which are dropped."""
    walk.reading()
    operands = queries(walk, operands, set(range(operands[0].ndim)) - dims)
    moving = [value for value in operands if not value.constant]
    if len(moving) == 1 and len(dims) == 1 and len(operands) > 1:  # weights read along a dimension
        read = walk.read_along(moving[0], *dims)
        operands = [read if value is moving[0] else value for value in operands]
    for value in operands:
        rest = [layer for layer in value.layers if not varying(layer) & dims]
        walk.write(value, [other for other in operands if other is not value], rest)
        if value.constant:
            walk.read(*(layer for dim in dims for layer in value.on(dim)))
    text = Natural.INPUT if any(v.given for v in operands) else "multiplied with a fixed tensor"
    if not any(value.linear for value in operands):
        walk.mask(*(layer for value in operands for dim in dims for layer in value.on(dim)))
    kept = []
    operands = [inward(walk, value, dims) for value in operands]
    for layer in walk.broadcast(operands, operands[0].ndim, text):
        if varying(layer) & dims:
            if not varying(layer) - dims:
                continue
            layer = walk.collapse(layer, dims)
        kept.append(layer.reshape([n for d, n in enumerate(layer.shape) if d not in dims]))
    return tuple(kept)


def spaced(value: Value, places: Sequence[int], ndim: int) -> Value:
    """A value with its dimensions at ``places`` of ``ndim``, all others of size 1."""
    order = sorted(range(value.ndim), key=lambda dim: places[dim])

    def wide(sizes: Sequence[int]) -> list[int]:
        shape = [1] * ndim
        for place, size in zip(places, sizes):
            shape[place] = size
        return shape

    layers = tuple(layer.permute(order).reshape(wide(layer.shape)) for layer in value.layers)
    return replace(value, shape=tuple(wide(value.shape)), layers=layers)


def of_einsum(equation: str, tensors: Sequence[object], **_: object) -> Factors:
    """Any number of operands."""

    def product(*operands: Tensor) -> Tensor:
        out: Tensor = torch.einsum(equation, *operands)
        return out

    return Factors(tuple(tensors), product)


def einsum_macs(out: object, equation: str, tensors: Any, **kwargs: Any) -> object:
    """As if all operands were multiplied at once: the product of the sizes of all letters."""
    sizes: dict[str, Any] = {}
    dotted: Any = ()
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    for term, extents in zip(terms, tensors):
        head, _, tail = term.partition("...")
        end = len(extents) - len(tail)
        dotted = max(dotted, extents[len(head) : end], key=math.prod)
        sizes.update(zip(head + tail, extents[: len(head)] + extents[end:]))
    return math.prod(sizes.values()) * math.prod(dotted)


@declare(
    aten.einsum,
    factors=of_einsum,
    macs=einsum_macs,
    sample=of("bik,bkj->bij", [(2, 3, 4), (2, 4, 5)]),
    any_size=True,
)
def einsum(walk: Walk, node: fx.Node, equation: str, tensors: Sequence[Value]) -> Layers:
    """Every letter is a dimension of the product; those that the result lacks are summed."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    dots = max(v.ndim - len(t.replace("...", "")) for v, t in zip(tensors, terms) if "..." in t) \
        if "..." in left else 0  # fmt: skip

    def letters(term: str, count: int) -> list[str]:
        head, dotted, tail = term.partition("...")
        middle = [f".{n}" for n in range(dots - count, dots)] if dotted else []
        return [*head, *middle, *tail]

    named = [letters(t, v.ndim - len(t.replace("...", ""))) for t, v in zip(terms, tensors)]
    if not arrow:  # the letters that occur once, in alphabetical order
        text = left.replace(",", "").replace(".", "")
        right = ("..." if dots else "") + "".join(
            sorted(c for c in set(text) if text.count(c) == 1)
        )
    result = letters(right, dots)
    if any(len(set(names)) < len(names) for names in named):
        return walk.refuse(tensors, "einsum over a diagonal")
    every = [*result, *dict.fromkeys(n for names in named for n in names if n not in result)]
    wide = [
        spaced(v, [every.index(n) for n in names], len(every)) for v, names in zip(tensors, named)
    ]
    return summed_product(walk, wide, set(range(len(result), len(every))))


_GROUPED = tuple(
    function
    for function in (
        getattr(torch, "_grouped_mm", None),
        getattr(torch.nn.functional, "grouped_mm", None),
        aten._grouped_mm.default,
    )
    if function is not None
)


def of_groups(
    x: object, weight: object, offs: object = None, bias: object = None, *_: object, **__: object
) -> Factors:
    """Rows times the matrix of their group."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return grouped(x, weight, offs)

    return Factors((x, weight), product, bias, needs=(offs,))


def groups_fact(
    op: object, x: Fact, weight: Fact, offs: object = None, *args: object, **_: object
) -> Fact:
    """Known where the groups are."""
    if not (isinstance(offs, Fact) and offs.constant) or any(arg is not None for arg in args):
        raise Unfollowed("groups of rows that depend on the input")
    return of_groups(x, weight, offs.value).fact()


def grouped(x: Tensor, weight: Tensor, offs: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """One product for each group of rows; group n of the rows ends at ``offs[n]``."""
    if x.is_meta or x.dtype is not torch.float64 or x.dim() != 2 or weight.dim() != 3:
        return aten._grouped_mm.default(x, weight, offs, *args, **kwargs)
    ends = offs.tolist()
    rows = zip([0, *ends[:-1]], ends)
    product = torch.cat([x[a:b] @ weight[n] for n, (a, b) in enumerate(rows)])
    return torch.cat([product, product.new_zeros(x.shape[0] - len(product), product.shape[1])])


def grouped_meta(x: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    """The shape in double precision, in which torch has none."""
    if x.dtype is not torch.float64 or x.dim() != 2 or weight.dim() != 3:
        return NotImplemented
    return x.new_empty(x.shape[0], weight.shape[2])


@declare(
    "transformers.grouped_mm_fallback",
    factors=of_groups,
    fact=groups_fact,
    sample=of((5, 4), (2, 4, 3), torch.tensor([2, 5], dtype=torch.int32)).single(),
)
@declare(
    aten._grouped_mm,
    factors=of_groups,
    fact=groups_fact,
    kernel=grouped,
    meta=grouped_meta,
    functions=_GROUPED,
    sample=of((5, 8), (2, 8, 12), torch.tensor([2, 5], dtype=torch.int32)).single(),
)
def grouped_mm(
    walk: Walk, node: fx.Node, x: Value, weight: Value, offs: Value | None = None,
    bias: Value | None = None, *args: object, **_: object,
) -> Layers:  # fmt: skip
    """Rows sorted by expert times the matrix of their expert: ``[n, k]`` and ``[experts, k, m]``.

    Which rows belong to an expert is known only at run time, so all experts stay. The kernel wants
    rows of a multiple of 16 bytes: channels leave in blocks.
    """
    if (x.ndim, weight.ndim) != (2, 3) or bias is not None:
        return walk.refuse([v for v in (x, weight, bias) if v is not None])
    x = replace(x, layers=walk.settle(x, {0}, "rows of experts"))
    weight = replace(weight, layers=walk.settle(weight, {0}, "experts"))
    contract(walk, x, weight, 1, 1)
    if node.target is aten._grouped_mm.default:
        wide = 16 // node.meta["dtype"].itemsize
        for layer in (*x.layers, *weight.layers):
            _in_blocks(walk, layer.flatten(), wide)
    return tuple(layer.squeeze(0) for layer in free(walk, weight, 1))


def _in_blocks(walk: Walk, ids: Tensor, width: int) -> None:
    """Channels that leave ``width`` at a time."""
    if len(ids) % width:
        walk.freeze(ids, "rows of a number of bytes that the kernel wants")
    else:
        walk.collapse(ids.reshape(-1, width), {1})


def of_trilinear(
    a: object,
    b: object,
    c: object,
    expand_a: object,
    expand_b: object,
    expand_c: object,
    summed: object,
    *_: object,
) -> Factors:
    """Three operands with dimensions inserted."""

    def product(*operands: Tensor) -> Tensor:
        out: Tensor = aten._trilinear.default(*operands, expand_a, expand_b, expand_c, summed)
        return out

    return Factors((a, b, c), product)


def trilinear_macs(
    out: object, a: Any, b: Any, c: Any, expand_a: Any, expand_b: Any, expand_c: Any, *_: Any
) -> object:
    """As if all three were multiplied at once: the product of the sizes of all dimensions."""
    ndim = len(a) + len(expand_a)
    sizes: dict[int, Any] = {}
    for shape, inserted in ((a, expand_a), (b, expand_b), (c, expand_c)):
        own = [dim for dim in range(ndim) if dim not in inserted]
        for dim, size in zip(own, shape):
            sizes[dim] = max(sizes.get(dim, 1), size)
    return math.prod(sizes.values())


@declare(
    aten._trilinear,
    factors=of_trilinear,
    macs=trilinear_macs,
    sample=of(*((3, 4), (5, 4, 6), (3, 6)), *([1, 3], [0], [1, 2], [2, 3])),
)
def trilinear(
    walk: Walk, node: fx.Node, a: Value, b: Value, c: Value,
    expand_a: Any, expand_b: Any, expand_c: Any, summed: Any, *args: Any,
) -> Layers:  # fmt: skip
    """The product of three tensors with dimensions inserted: ``nn.Bilinear``."""
    ndim = a.ndim + len(expand_a)
    wide = [
        spaced(value, [dim for dim in range(ndim) if dim not in inserted], ndim)
        for value, inserted in ((a, expand_a), (b, expand_b), (c, expand_c))
    ]
    return summed_product(walk, wide, set(summed))
