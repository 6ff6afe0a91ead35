"""Norms of the weights that write a channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from graphprune.criteria.registry import register_criterion
from graphprune.analysis import Group, Member


def slices(member: Member, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weights of every channel of a group along one slot.

    Returns:
        Float64 tensor of shape [channels, weights per channel].
    """
    weight = tensors[member.slot.tensor].detach().to("cpu", torch.float64)
    index = torch.from_numpy(member.index)
    rows = weight.movedim(member.slot.dim, 0).flatten(1) if weight.dim() > 1 else weight[:, None]
    return rows[index].flatten(1)


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
    return torch.stack([slices(m, tensors).abs().sum(1) for m in writers(group)]).sum(0)


@register_criterion("l2")
def l2(group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Euclidean norm of the filters that write a channel.

    He et al., "Soft Filter Pruning", IJCAI 2018.

    Returns:
        Shape [channels].
    """
    return torch.stack([slices(m, tensors).square().sum(1) for m in writers(group)]).sum(0).sqrt()


@register_criterion("random")
def random(group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Uniform random scores: the control of every comparison.

    Returns:
        Shape [channels].
    """
    return torch.rand(group.size, generator=generator, dtype=torch.float64)
