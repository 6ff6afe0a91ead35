"""What ops do to whole numbers, which may be places of rows: move, compare, write others."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten

# Ops whose result holds values of some arguments, by the places of these.
MOVES: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys(
        (aten.view, aten._unsafe_view, aten.reshape, aten.slice, aten.select, aten.clone,
         aten._to_copy, aten.expand, aten.unsqueeze, aten.squeeze, aten.t, aten.transpose,
         aten.permute, aten.detach, aten.alias, aten.lift_fresh, aten.cat, aten.stack, aten.split,
         aten.split_with_sizes, aten.chunk, aten.unbind, aten.repeat, aten.roll, aten.flip,
         aten.unfold, aten.index, aten.index_select, aten.gather, aten.constant_pad_nd,
         aten.masked_fill, aten.masked_fill_, aten.fill, aten.fill_, aten.masked_select, aten.amax,
         aten.amin, aten.max, aten.min, aten.sort, aten.topk, aten.cummax, aten.repeat_interleave,
         aten.copy, aten.as_strided, aten.zero_, aten.contiguous, aten.movedim, aten.view_as),
        (0,),
    ),
    **dict.fromkeys((aten.copy_, aten.slice_scatter, aten.select_scatter, aten.maximum,
                     aten.minimum), (0, 1)),
    **dict.fromkeys((aten.masked_scatter, aten.masked_scatter_), (0, 2)),
    **dict.fromkeys((aten.index_put, aten.index_put_, aten._unsafe_index_put), (0, 2)),
    **dict.fromkeys((aten.scatter, aten.scatter_, aten.index_copy, aten.index_copy_), (0, 3)),
    **dict.fromkeys((aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_min_, aten.clamp_max,
                     aten.clamp_max_), (0,)),
    aten.where: (1, 2),
}  # fmt: skip
FILLED = {aten.masked_fill, aten.masked_fill_, aten.fill, aten.fill_}  # by a tensor, last
# Ops that put a number among values, by the place of the number.
PUTS: dict[Any, tuple[int, ...]] = {
    aten.masked_fill: (2,), aten.masked_fill_: (2,), aten.fill: (1,), aten.fill_: (1,),
    aten.full: (1,), aten.full_like: (1,), aten.new_full: (2,), aten.constant_pad_nd: (2,),
    aten.scalar_tensor: (0,), aten.scatter: (3,), aten.scatter_: (3,), aten.where: (1, 2),
    aten.clamp: (1, 2), aten.clamp_: (1, 2), aten.clamp_min: (1,), aten.clamp_min_: (1,),
    aten.clamp_max: (1,), aten.clamp_max_: (1,),
}  # fmt: skip
PADS = {aten.constant_pad_nd: 0}  # what they put where no number is given
ADDS = {aten.index_put, aten.index_put_, aten._unsafe_index_put}  # where they accumulate
MADE = {
    **dict.fromkeys((aten.zeros, aten.zeros_like, aten.new_zeros, aten.zero_), 0),
    **dict.fromkeys((aten.ones, aten.ones_like, aten.new_ones), 1),
}
EMPTY = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
LIKE = {  # read the shape of their input
    getattr(aten, name)
    for name in ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
                 "randint_like", "new_zeros", "new_ones", "new_full", "new_empty")
}  # fmt: skip
EQUAL = {aten.eq, aten.ne, aten.isin}
ORDER = {aten.lt: 0, aten.ge: 0, aten.le: 1, aten.gt: 1}  # what to add to be a bound from below
PLACES = {aten.argmax, aten.argmin, aten.argsort}  # depend on the order of values alone
INDICES = {aten.max, aten.min, aten.sort, aten.topk, aten.cummax}  # with their results' second
THROUGH = {aten.detach, aten.alias, aten._to_copy, aten.clone, aten.view, aten.mul}
