"""What becomes of the ops that sum over channels when channels leave.

A reader knows which of its removed inputs must stay, because what they contribute to a kept
output is neither zero nor a constant that can be added to a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.masks.dead.affine import Affine
from graphprune.ops.fact import Fact
from graphprune.ops.values import Value

aten = torch.ops.aten
NONE: np.ndarray = np.zeros(0, np.int64)


@dataclass
class Blame:
    """Ids that must stay, each with the reason."""

    ids: np.ndarray
    why: list[str]


def stays(value: Value, alive: np.ndarray) -> Tensor:
    """Which positions of a value stay, broadcast to its shape."""
    keep = torch.ones((1,) * value.ndim, dtype=torch.bool)
    for layer in value.layers:
        keep = keep & torch.from_numpy(alive[layer.numpy()])
    return keep.expand(value.shape)


def ids_at(value: Value, places: Tensor, alive: np.ndarray) -> np.ndarray:
    """The removed ids of a value at some of its positions."""
    found = [NONE]
    for layer in value.layers:
        dims = [dim for dim, size in enumerate(layer.shape) if size == 1]
        here = places.any(dims[0], keepdim=True) if dims else places
        for dim in dims[1:]:
            here = here.any(dim, keepdim=True)
        found.append(np.unique(layer[here].numpy()))
    ids = np.unique(np.concatenate(found))
    return ids[~alive[ids]]


class AffineReader:
    """A convolution or linear layer with known weights."""

    def __init__(self, node: fx.Node, affine: Affine, inputs: np.ndarray, outputs: np.ndarray):
        self.node, self.affine = node, affine
        self.inputs, self.outputs = inputs, outputs  # ids [layers, channels]

    def kept(self, alive: np.ndarray) -> Tensor:
        """The outputs that stay and that someone reads."""
        return torch.from_numpy(alive[self.outputs].all(0)) & self.affine.needed

    def gone(self, alive: np.ndarray) -> Tensor:
        """The inputs that leave."""
        return torch.from_numpy(~alive[self.inputs].all(0))

    def blamed(self, alive: np.ndarray) -> Blame:
        """Inputs whose contribution cannot be made up for."""
        gone = self.gone(alive)
        if not bool(gone.any()):
            return Blame(NONE, [])
        hit = gone & self.affine.blocked(self.kept(alive))
        return self.refuse(hit, alive)

    def refuse(self, hit: Tensor, alive: np.ndarray, text: str = "") -> Blame:
        """Blame for some inputs."""
        places = hit.nonzero().flatten()
        ids, why = [], []
        for place in places.tolist():
            own = self.inputs[:, place]
            own = own[~alive[own]]
            ids.append(own)
            reason = text or self.affine.reason(place)
            why.extend([f"{reason}{_where(self.node)}"] * len(own))
        return Blame(np.concatenate(ids) if ids else NONE, why)


class ProductReader:
    """Any other sum of products: contributions must be zero."""

    def __init__(
        self,
        node: fx.Node,
        product: Callable[..., Tensor],
        factors: Sequence[tuple[Value, Fact]],
        out: Value,
    ) -> None:
        self.node, self.product, self.out = node, product, out
        self.factors = [(value, fact.nonzero) for value, fact in factors]

    def blamed(self, alive: np.ndarray) -> Blame:
        """Positions whose products with anything that is not zero reach a kept output."""
        gone = [mark & ~stays(value, alive) for value, mark in self.factors]
        if not any(bool(part.any()) for part in gone):
            return Blame(NONE, [])
        marks = [mark.double() for _, mark in self.factors]
        ids = [NONE]
        for place, (value, _) in enumerate(self.factors):
            if not bool(gone[place].any()):
                continue
            leaf = gone[place].double().requires_grad_()
            with torch.enable_grad():
                total = self.product(*marks[:place], leaf, *marks[place + 1 :])
            wanted = stays(self.out, alive).to(total.dtype)
            (grad,) = torch.autograd.grad(total, leaf, wanted)
            ids.append(ids_at(value, gone[place] & (grad > 0), alive))
        found = np.unique(np.concatenate(ids))
        why = f"not zero{_where(self.node)} in a sum without a bias"
        return Blame(found, [why] * len(found))


class StatisticsReader:
    """Statistics over channels: those that leave must be zero, as the masked model has them."""

    def __init__(self, node: fx.Node, value: Value, fact: Fact, summed: np.ndarray) -> None:
        self.node, self.value, self.mark, self.summed = node, value, fact.nonzero, summed

    def blamed(self, alive: np.ndarray) -> Blame:
        """Channels of the statistics that are not zero."""
        hit = self.mark & ~stays(self.value, alive)
        ids = ids_at(self.value, hit, alive) if bool(hit.any()) else NONE
        ids = ids[np.isin(ids, self.summed)]
        return Blame(ids, [f"not zero{_where(self.node)} for statistics"] * len(ids))


class GroupReader:
    """Statistics over groups of channels: of those that do not leave whole."""

    def __init__(self, node: fx.Node, value: Value, fact: Fact, groups: int) -> None:
        self.node, self.value, self.mark, self.groups = node, value, fact.nonzero, groups

    def blamed(self, alive: np.ndarray) -> Blame:
        """Channels that are not zero, of groups of which some stay."""
        keep = stays(self.value, alive)
        by_group = keep.transpose(0, 1).reshape(self.groups, -1).any(1)
        counts = by_group.repeat_interleave(keep.shape[1] // self.groups)
        hit = self.mark & ~keep & counts.reshape(1, -1, *[1] * (keep.dim() - 2))
        ids = ids_at(self.value, hit, alive) if bool(hit.any()) else NONE
        return Blame(ids, [f"not zero{_where(self.node)} for statistics"] * len(ids))


class OtherReader:
    """An op of which nothing is known but that zeroes may leave."""

    def __init__(self, node: fx.Node, factors: Sequence[tuple[Value, Fact]]) -> None:
        self.node = node
        self.factors = [(value, fact.nonzero) for value, fact in factors]

    def blamed(self, alive: np.ndarray) -> Blame:
        """Whatever is not zero."""
        ids = [NONE]
        for value, mark in self.factors:
            hit = mark & ~stays(value, alive)
            if bool(hit.any()):
                ids.append(ids_at(value, hit, alive))
        found = np.unique(np.concatenate(ids))
        why = f"not zero{_where(self.node)} for {_name(self.node)}"
        return Blame(found, [why] * len(found))


Reader = AffineReader | ProductReader | StatisticsReader | GroupReader | OtherReader


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target))


def _where(node: fx.Node) -> str:
    module = node.meta.get("module")
    return f" where {module!r} reads them" if module else " where they are read"
