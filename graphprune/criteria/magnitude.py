"""Norms of the weights that write a channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from graphprune.analysis import Group, Member
from graphprune.criteria.registry import register_criterion


def slice_norms(member: Member, tensors: Mapping[str, Tensor], order: float) -> Tensor:
    """The norm of the weights of every channel of a group along one slot.

    Returns:
        Float64 tensor of shape [channels, positions per channel].
    """
    weight = tensors[member.slot.tensor].detach()
    weight = weight.abs() if weight.is_complex() else weight
    weight = weight if weight.dtype == torch.float64 else weight.float()
    others = [dim for dim in range(weight.dim()) if dim != member.slot.dim]
    norms = torch.linalg.vector_norm(weight, order, others) if others else weight.abs()
    return norms.to("cpu", torch.float64)[torch.from_numpy(member.index)]


def writers(group: Group) -> Iterator[Member]:
    """The weights whose output the channels are; all slots when there are none."""
    found = [member for member in group.members if member.slot.weight and not member.reads]
    found = found or [member for member in group.members if member.slot.weight]
    yield from found or group.members


@register_criterion("l1")
def l1(group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Sum of the absolute weights of the filters that write a channel.

    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017.

    Returns:
        Shape [channels].
    """
    return torch.stack([slice_norms(m, tensors, 1).sum(1) for m in writers(group)]).sum(0)


@register_criterion("l2")
def l2(group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Euclidean norm of the filters that write a channel.

    He et al., "Soft Filter Pruning", IJCAI 2018.

    Returns:
        Shape [channels].
    """
    squares = [slice_norms(m, tensors, 2).square().sum(1) for m in writers(group)]
    return torch.stack(squares).sum(0).sqrt()


@register_criterion("random")
def random(group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Uniform random scores: the control of every comparison.

    Returns:
        Shape [channels].
    """
    return torch.rand(group.size, generator=generator, dtype=torch.float64)
