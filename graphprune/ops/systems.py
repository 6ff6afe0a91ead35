"""Systems of linear equations: unknowns stay, what lies beside them passes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphprune.ops.ids import Layers
from graphprune.ops.registry import declare
from graphprune.ops.samples import of
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten


def solve_macs(out: Any, matrix: Any, right: Any, **_: Any) -> object:
    """As many as a product with the whole matrix, of which half is zero."""
    return math.prod(out) * matrix[-1]


@declare(
    aten.linalg_solve_triangular,
    macs=solve_macs,
    sample=of((2, 3, 3), (2, 3, 4), upper=False, unitriangular=True),
)
def solve_triangular(
    walk: Walk, node: fx.Node, matrix: Value, right: Value, *, left: bool = True, **_: object
) -> Layers:
    """``matrix @ out = right``, batch by batch; columns of the right side are solved one by one."""
    ndim = right.ndim
    unknown = ndim - (2 if left else 1)
    matrix = replace(
        matrix,
        shape=(*matrix.shape[:-2], 1, 1),
        layers=walk.settle(matrix, (matrix.ndim - 2, matrix.ndim - 1), "unknowns of a system"),
    )
    right = replace(right, layers=walk.settle(right, {unknown}, "unknowns of a system"))
    return walk.broadcast([matrix, right], ndim)
