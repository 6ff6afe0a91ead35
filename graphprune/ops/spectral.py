"""Complex numbers and Fourier transforms."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from graphprune.ops.calls import Overload
from graphprune.ops.fact import Fact
from graphprune.ops.ids import Layers
from graphprune.ops.pointwise import pointwise_fact
from graphprune.ops.registry import declare as _declare
from graphprune.ops.registry import free
from graphprune.ops.samples import of, pairs
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten
declare = partial(_declare, macs=free)  # nothing is multiplied here


def view_as_complex_fact(op: Overload, x: Fact) -> Fact:
    """A complex number is known when both of its parts are."""
    return Fact(op(x.value), x.unknown.any(-1))


def view_as_real_fact(op: Overload, x: Fact) -> Fact:
    """Both parts of a complex number are known or none."""
    return Fact(op(x.value), x.unknown.unsqueeze(-1).expand(*x.unknown.shape, 2))


@declare(aten._conj_physical, fact=pointwise_fact, sample=of(pairs(2, 3)))
@declare(aten._conj, aten.resolve_conj, sample=of(pairs(2, 3)))
@declare(aten._neg_view, aten.resolve_neg, sample=of((2, 3)))
@declare(aten.real, aten.imag, sample=of(pairs(2, 3)))
def parts(walk: Walk, node: fx.Node, x: Value, *args: object) -> Layers:
    """A part of a complex number, or its conjugate, in its place."""
    return x.layers


@declare(aten._fft_r2c, sample=of((2, 3, 4), [2], 0, True))
@declare(aten._fft_c2c, sample=of(pairs(2, 3, 4), [2], 0, True))
@declare(aten._fft_c2r, sample=of(pairs(2, 3, 4), [2], 0, 6))
def transform(walk: Walk, node: fx.Node, x: Value, dim: Any, *args: Any) -> Layers:
    """A frequency is a sum over all positions of ``dim``; other dimensions pass."""
    return walk.settle(x, {d % x.ndim for d in dim}, "frequencies of channels")


@declare(aten.view_as_complex, fact=view_as_complex_fact, sample=of((3, 4, 2)))
@declare(aten.view_as_complex_copy, sample=of((3, 4, 2)))
def view_as_complex(walk: Walk, node: fx.Node, x: Value) -> Layers:
    """Pairs along the last dimension become one number and leave together."""
    layers = walk.settle(x, {x.ndim - 1}, "parts of complex numbers")
    return tuple(layer.squeeze(-1) for layer in layers)


@declare(aten.view_as_real, fact=view_as_real_fact, sample=of(pairs(3, 4)))
@declare(aten.view_as_real_copy, sample=of(pairs(3, 4)))
def view_as_real(walk: Walk, node: fx.Node, x: Value) -> Layers:
    """A new last dimension with the real and the imaginary part."""
    return tuple(layer.unsqueeze(-1) for layer in x.layers)
