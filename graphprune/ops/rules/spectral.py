"""Complex numbers and Fourier transforms."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphprune.ops.ids import Layers
from graphprune.ops.rules.base import Walk, aten
from graphprune.ops.rules.pointwise import pointwise, same
from graphprune.ops.rules.registry import Value, register_rule

register_rule(
    aten._conj, aten._conj_physical, aten.resolve_conj, aten._neg_view, aten.resolve_neg,
    aten.real, aten.imag,
)(same)  # fmt: skip
register_rule(aten.complex, aten.polar)(pointwise)


@register_rule(aten._fft_r2c, aten._fft_c2c, aten._fft_c2r)
def transform(walk: Walk, node: fx.Node, x: Value, dim: Any, *args: Any) -> Layers:
    """A frequency is a sum over all positions of ``dim``; other dimensions pass."""
    return walk.settle(x, {d % x.ndim for d in dim}, "frequencies of channels")


@register_rule(aten.view_as_complex, aten.view_as_complex_copy)
def view_as_complex(walk: Walk, node: fx.Node, x: Value) -> Layers:
    """Pairs along the last dimension become one number and leave together."""
    layers = walk.settle(x, {x.ndim - 1}, "parts of complex numbers")
    return tuple(layer.squeeze(-1) for layer in layers)


@register_rule(aten.view_as_real, aten.view_as_real_copy)
def view_as_real(walk: Walk, node: fx.Node, x: Value) -> Layers:
    """A new last dimension with the real and the imaginary part."""
    return tuple(layer.unsqueeze(-1) for layer in x.layers)
