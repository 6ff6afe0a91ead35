"""The slots of a group as criteria see them: sides, and slices of weights by channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from graphprune.channels.analysis import Group, Member
from graphprune.criteria.registry import Unseen
from graphprune.errors import InputError

SIDES = ("writes", "reads", "both")


def check_side(side: str) -> None:
    """Raise unless ``side`` is one of the sides.

    Raises:
        InputError: names the sides.
    """
    if side not in SIDES:
        raise InputError(f"side must be one of {', '.join(SIDES)}, not {side!r}")


def members(group: Group, side: str) -> list[Member]:
    """The slots of one side of a group.

    Args:
        group: whose channels are scored.
        side: ``"writes"``: the weights whose outputs the channels are (where there are none, all
            weights, and where there are no weights, all parameters). ``"reads"``: the weights that
            sum over the channels. ``"both"``: all parameters but biases.

    Raises:
        Unseen: no weight sums over the channels.
    """
    if side == "both":
        found = [m for m in group.members if m.slot.parameter]
        unbiased = [m for m in found if m.slot.weight or not own_name(m).startswith("bias")]
        return unbiased or members(group, "writes")
    weights = [m for m in group.members if m.slot.weight]
    if side == "reads":
        found = [m for m in weights if m.reads]
        if not found:
            raise Unseen("no weight sums over its channels")
        return found
    parameters = [m for m in group.members if m.slot.parameter]
    return [m for m in weights if not m.reads] or weights or parameters or list(group.members)


def own_name(member: Member) -> str:
    """The name of a tensor in its module."""
    return member.slot.tensor.rpartition(".")[2]


def real(tensor: Tensor) -> Tensor:
    """A detached tensor of real numbers in single or double precision."""
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def magnitudes(tensor: Tensor) -> Tensor:
    """Absolute values in single or double precision."""
    tensor = tensor.detach().abs()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def along(tensor: Tensor, dim: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce each slice along a dimension to a number.

    Args:
        tensor: any shape.
        dim: the dimension that stays.
        reduce: [slices, values] -> [slices].

    Returns:
        Float64 tensor of shape [slices] on the CPU.
    """
    rows = tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
    return reduce(rows).to("cpu", torch.float64)


def by_channel(member: Member, values: Tensor) -> Tensor:
    """The values of every channel of a group along one slot.

    Args:
        member: whose ``index`` says which positions belong to which channel.
        values: one per position of the slot, shape [size].

    Returns:
        Shape [channels, positions per channel].
    """
    return values[torch.from_numpy(np.ascontiguousarray(member.index))]


def slice_norms(member: Member, tensors: Mapping[str, Tensor], order: float) -> Tensor:
    """The norm of the weights of every channel along one slot.

    Returns:
        Float64 tensor of shape [channels].
    """
    norms = along(
        magnitudes(tensors[member.slot.tensor]),
        member.slot.dim,
        lambda rows: torch.linalg.vector_norm(rows, order, 1),
    )
    return torch.linalg.vector_norm(by_channel(member, norms), order, 1)
