"""What zeroes in front of a LayerNorm become: a sum of what the other channels become.

A normalised row adds up to zero. All zeroes of a row become the same number t, so that q of them
are made up for by the others: ``q * t = -sum(normalised others)``. With a weight w and a bias b,
channel j then holds ``b[j] + w[j] * t``, and t is a weighted sum of the other channels. A linear
layer that reads them can take that up: into its weights of the others, and into its bias. Where a
weight all but hides one of the others, a zero that stays tells t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.ops.calls import args_of
from graphprune.ops.fact import Fact
from graphprune.ops.registry import packet_of

aten = torch.ops.aten
NORMS = {aten.native_layer_norm, torch.ops.graphprune.layer_norm}
_HIDDEN = 1e-3  # a weight that is so much smaller than that of a zero loses digits
_MOVES = {  # keep every value as it is
    getattr(aten, name)
    for name in ("permute", "transpose", "t", "movedim", "view", "_unsafe_view", "reshape",
                 "unsqueeze", "squeeze", "slice", "select", "expand", "clone", "detach", "alias")
}  # fmt: skip


@dataclass(frozen=True)
class Relation:
    """Channels behind a norm that are ``constants + factors * sum(shares * others)``.

    Attributes:
        zero: which channels these are: they are zero in front of the norm.
        factors: one for each channel.
        constants: one for each channel.
        shares: of the other channels; zero for these.
        keeps: the channel that all are a multiple of, apart from constants, if it is one alone.
    """

    zero: Tensor
    factors: Tensor
    constants: Tensor
    shares: Tensor
    keeps: int | None = None

    def filled(self, x: Fact, dim: int) -> Fact:
        """A value with the constants in the place of these channels, along a dimension."""
        shape = [-1 if d == dim % x.value.dim() else 1 for d in range(x.value.dim())]
        here = self.zero.reshape(shape)
        value = torch.where(here, self.constants.reshape(shape), x.value)
        return Fact(value, x.unknown & ~here)

    def equals(self, other: Relation | None) -> bool:
        """Whether another call of a layer sees the same."""
        if other is None or not torch.equal(self.zero, other.zero):
            return False
        mine, theirs = (
            torch.stack([one.factors, one.constants, one.shares]) for one in (self, other)
        )
        return torch.allclose(mine, theirs, 1e-11, 0)


def relation(node: fx.Node, known: Mapping[fx.Node, Any]) -> Relation | None:
    """What zeroes in front of a LayerNorm over one dimension become, if there are any."""
    args = args_of(node)
    source, shape = known[args[0]], list(args[1])
    weight, bias = (_vector(part, known, shape) for part in args[2:4])
    if packet_of(node) not in NORMS or len(shape) != 1 or weight is None or bias is None:
        return None
    zero = source.zero.reshape(-1, shape[0]).all(0)
    weight, others = (weight if args[2] is not None else weight + 1), ~zero
    if not bool((weight[zero] != 0).any()) or not bool(others.any()):
        return None  # nothing comes of them, or all of the row is known
    shares, keeps = torch.zeros_like(weight), None
    largest = (weight.abs() * zero).argmax()
    if bool((weight[others].abs() >= _HIDDEN * weight[largest].abs()).all()):
        count = int(zero.sum()) + (int(args[5]) - shape[0] if len(args) > 5 else 0)
        shares[others] = -1 / (count * weight[others])
    else:  # one of the zeroes stands for all
        keeps = int(largest)
        shares[keeps] = 1 / weight[keeps]
        zero[keeps] = False
    constants = torch.where(zero, bias - weight * (shares * bias).sum(), 0)
    return Relation(zero, torch.where(zero, weight, 0), constants, shares, keeps)


def _vector(part: Any, known: Mapping[fx.Node, Any], shape: list[int]) -> Tensor | None:
    """A weight or bias; zeroes where there is none; ``None`` where it is not known."""
    if part is None:
        return torch.zeros(shape, dtype=torch.float64)
    fact = known[part]
    return fact.value if fact.constant else None


def norm_before(node: fx.Node) -> fx.Node | None:
    """The norm whose result a value is, moved at most."""
    while packet_of(node) in _MOVES:
        node = node.all_input_nodes[0]
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    norm = node.args[0]
    first = packet_of(norm) in NORMS and norm.meta["items"].get(0) is node
    return norm if first else None


def aligned(inputs: np.ndarray, outputs: np.ndarray) -> bool:
    """Whether what a layer reads are the channels of a norm, in their order."""
    return inputs.shape == outputs.shape and bool((inputs == outputs).all())
