"""The model with zeroes in place of what a plan removes: the oracle of exact statistics."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

import graphprune
from graphprune.record.tensors import named_tensors

M = TypeVar("M", bound=nn.Module)


def zeroed(model: M, plan: graphprune.Plan) -> M:
    """A copy with zeroes in place of the slices that leave, and nothing else changed."""
    model = copy.deepcopy(model)
    tensors = dict(named_tensors(model))
    with torch.no_grad():
        for slot in plan.slots:
            gone = [index for index in range(slot.size) if index not in slot.kept]
            tensors[slot.tensor].index_fill_(slot.dim, torch.tensor(gone), 0)
    return model


def drawn(model: M, seed: int = 0) -> M:
    """The model in float64 with random weights, biases and weights of norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + 0.1)
    return model.eval()
