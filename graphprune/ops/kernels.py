"""Ops for which torch lacks a kernel in double precision, computed by others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def grouped_mm(x: Tensor, weight: Tensor, offs: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """One product for each group of rows; group n of the rows ends at ``offs[n]``."""
    if x.is_meta or x.dtype is not torch.float64 or x.dim() != 2 or weight.dim() != 3:
        return aten._grouped_mm.default(x, weight, offs, *args, **kwargs)
    ends = offs.tolist()
    rows = zip([0, *ends[:-1]], ends)
    product = torch.cat([x[a:b] @ weight[n] for n, (a, b) in enumerate(rows)])
    return torch.cat([product, product.new_zeros(x.shape[0] - len(product), product.shape[1])])


KERNELS = {aten._grouped_mm.default: grouped_mm}
GROUPED_MM = {
    getattr(torch, "_grouped_mm", None),
    getattr(torch.nn.functional, "grouped_mm", None),
    aten._grouped_mm.default,
} - {None}
