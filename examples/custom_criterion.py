"""An importance of your own: the scale of the BatchNorm behind a channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torchvision
from torch import Tensor

import graphprune
from graphprune.channels.analysis import Group


def batchnorm_scale(group: Group, tensors: Mapping[str, Tensor], _: torch.Generator) -> Tensor:
    """Mean absolute scale of all BatchNorm layers of a group (Liu et al., ICCV 2017).

    ``member.index[i]`` holds the positions in ``member.slot.tensor`` that belong to channel i.
    """
    total, count = torch.zeros(group.size), 0
    for member in group.members:
        tensor = tensors[member.slot.tensor]
        if member.slot.tensor.endswith(".weight") and tensor.dim() == 1:
            total += tensor.detach().abs()[torch.from_numpy(member.index)].mean(1)
            count += 1
    return total / max(count, 1)


torch.manual_seed(0)
model = torchvision.models.resnet18(weights=None).eval()
with torch.no_grad():
    model.layer1[0].bn1.weight[:] = torch.linspace(2, 1, 64)  # the last matter least

example = torch.randn(1, 3, 64, 64)
plan = graphprune.trace(model, example).plan(0.5, criterion=batchnorm_scale)
small = graphprune.rebuild(model, plan)
kept = next(group.kept for group in plan.groups if "layer1.0.bn1" in group.layers)

print(f"layer1.0.conv1 keeps channels {kept[0]} to {kept[-1]}")
assert kept == tuple(range(32))
assert graphprune.verify(model, small, example).difference < 1e-10
