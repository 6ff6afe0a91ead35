"""Criteria of the weights alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from graphprune.channels.analysis import Group, Member
from graphprune.criteria.registry import Unseen, register_criterion
from graphprune.criteria.slots import by_channel, check_side, members, own_name, real, slice_norms
from graphprune.errors import InputError


@dataclass(frozen=True)
class Magnitude:
    """The norm of the weights that write a channel: ``l1``, ``l2``, ``lp``, ``linf``.

    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (order 1); He et al., "Soft
    Filter Pruning", IJCAI 2018 (order 2 and p); order infinity is the largest weight. Several
    slots, as on a residual stream, count as one vector for orders 1, 2 and infinity.

    Attributes:
        order: of the norm, positive; ``math.inf`` for the maximum.
        side: ``"writes"``, ``"reads"`` or ``"both"`` sides of the channels.

    Raises:
        InputError: an order that is not positive, or an unknown side.

    Example:
        >>> import torch, graphprune
        >>> from graphprune.criteria import Magnitude
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> graphprune.rebuild(net, 0.5, criterion=Magnitude(order=3))[0].out_features
        4
    """

    order: float = 2
    side: str = "writes"

    def __post_init__(self) -> None:
        check_side(self.side)
        if not self.order > 0:
            raise InputError(f"order must be positive, not {self.order}")

    @property
    def aggregate(self) -> str:
        """How slots are aggregated by default."""
        return {1: "sum", math.inf: "max"}.get(self.order, "norm")

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [slots, channels]."""
        return torch.stack([slice_norms(m, tensors, self.order) for m in members(group, self.side)])


l1 = register_criterion("l1")(Magnitude(1))
l2 = register_criterion("l2")(Magnitude(2))
lp = register_criterion("lp")(Magnitude(3))
linf = register_criterion("linf")(Magnitude(math.inf))


@dataclass(frozen=True)
class GroupNorm:
    """The norm of all weights that leave with a channel: ``group_norm``.

    Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023: the whole coupled group
    counts, the weights that write a channel, those that read it, and the scales of norms between.
    Biases do not.

    Attributes:
        order: of the norm.
    """

    order: float = 2
    aggregate: ClassVar[str] = "norm"

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [slots, channels]."""
        return torch.stack([slice_norms(m, tensors, self.order) for m in members(group, "both")])


group_norm = register_criterion("group_norm")(GroupNorm())


@dataclass(frozen=True)
class BatchNormScale:
    """The absolute scale of the batch norms of a channel: ``bn_scale``.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017. A
    batch norm is known by its running variance; a group without one cannot be seen.
    """

    aggregate: ClassVar[str] = "mean"
    comparable: ClassVar[bool] = True

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [slots, channels]."""
        normed = {m.slot.module for m in group.members if m.slot.tensor.endswith("running_var")}
        scales = [
            m
            for m in group.members
            if m.slot.module in normed and own_name(m) in ("weight", "weight_orig")
        ]
        if not scales:
            raise Unseen("no batch norm scales its channels")
        rows = [by_channel(m, _vector(m, tensors).abs()).mean(1) for m in scales]
        return torch.stack(rows)


bn_scale = register_criterion("bn_scale")(BatchNormScale())


def _vector(member: Member, tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors[member.slot.tensor].detach().to("cpu", torch.float64).reshape(-1)


@dataclass(frozen=True)
class GeometricMedian:
    """The summed distance from all other channels of the group: ``geometric_median``.

    He et al., "Filter Pruning via Geometric Median for Deep Neural Networks Acceleration", CVPR
    2019 (FPGM): filters close to the geometric median are those that others can replace.

    Attributes:
        side: ``"writes"``, ``"reads"`` or ``"both"`` sides of the channels.
    """

    side: str = "writes"

    def __post_init__(self) -> None:
        check_side(self.side)

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [slots, channels]."""
        rows = [self._distances(member, tensors) for member in members(group, self.side)]
        return torch.stack(rows)

    def _distances(self, member: Member, tensors: Mapping[str, Tensor]) -> Tensor:
        squares: float | Tensor = 0.0
        for block in _blocks(member, real(tensors[member.slot.tensor])):
            squares = squares + _square_distances(block)
        assert isinstance(squares, Tensor)
        return squares.clamp(min=0).sqrt().sum(1).cpu()


geometric_median = register_criterion("geometric_median")(GeometricMedian())


def _blocks(member: Member, weight: Tensor, most: int = 1 << 22) -> Iterator[Tensor]:
    """The weights of every channel along a slot in blocks of columns, [channels, columns]."""
    rows = weight.movedim(member.slot.dim, 0).reshape(weight.shape[member.slot.dim], -1)
    channels = len(member.index)
    width = max(1, most // channels)
    for places in member.index.T:
        own = rows[torch.from_numpy(np.ascontiguousarray(places)).to(rows.device)]
        for start in range(0, rows.shape[1], width):
            yield own[:, start : start + width].double()


def _square_distances(rows: Tensor) -> Tensor:
    """The squared distances between all rows, exactly 0 between equal ones only up to rounding."""
    rows = rows - rows.mean(0)
    products = rows @ rows.T
    lengths = products.diagonal()
    return lengths[:, None] + lengths[None, :] - 2 * products


@dataclass(frozen=True)
class Lamp:
    """The squared norm of a channel relative to all that are at least as large: ``lamp``.

    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, with channels
    for weights. Local ranks are those of the norm; the scale tells between groups.

    Attributes:
        side: ``"writes"``, ``"reads"`` or ``"both"`` sides of the channels.
    """

    side: str = "writes"
    comparable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_side(self.side)

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [channels]."""
        slots = [slice_norms(m, tensors, 2).square() for m in members(group, self.side)]
        ordered, order = torch.stack(slots).sum(0).sort(stable=True)
        remaining = ordered.flip(0).cumsum(0).flip(0)
        shares = torch.where(remaining > 0, ordered / remaining.clamp(min=1e-300), 0.0)
        return torch.empty_like(shares).scatter_(0, order, shares)


lamp = register_criterion("lamp")(Lamp())


@dataclass(frozen=True)
class Random:
    """Uniform random scores: the control of every comparison, ``random``."""

    blind: ClassVar[bool] = True  # looks at no weight
    comparable: ClassVar[bool] = True

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [channels]."""
        return torch.rand(group.size, generator=generator, dtype=torch.float64)


random = register_criterion("random")(Random())
