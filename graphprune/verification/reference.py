"""Copies of a model that a plan from masks is compared with: as it is given, and with constants.

The rewriting does the same in its own way: the two share no code, so that one checks the other.
"""

from __future__ import annotations

import torch
from torch import nn

from graphprune.plan.plan import Plan
from graphprune.record.copying import copy_module
from graphprune.record.tensors import held_tensors
from graphprune.verification.sums import hold


def as_given(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model in which only what a plan from masks turns off is zero."""
    copied = copy_module(model, {})
    tensors = dict(held_tensors(copied))
    with torch.no_grad():
        for slot in plan.zeroed:
            gone = sorted(set(range(slot.size)) - set(slot.kept))
            tensor = tensors[slot.tensor]
            tensor.index_fill_(slot.dim, torch.tensor(gone, device=tensor.device), 0)
    return copied


def with_constants(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model that holds the constants of a plan from masks where the plan says."""
    copied = as_given(model, plan)
    tensors = dict(held_tensors(copied))
    with torch.no_grad():
        for merge in plan.merges:
            weight = tensors[merge.tensor].transpose(0, merge.dim)
            mask = None if merge.mask is None else tensors[merge.mask].transpose(0, merge.dim)
            whole = weight if mask is None else weight * mask
            total = torch.zeros_like(whole[0], dtype=torch.float64)
            for source, factor in zip(merge.sources, merge.factors):
                total = total + factor * whole[source].double()
            for target, share in merge.targets:
                weight[target] = (whole[target].double() + share * total).to(weight)
                if mask is not None:
                    mask[target] = 1
    for change in plan.biases:
        vector = tensors.get(change.tensor)
        if vector is None and change.like is not None:
            weight = tensors[change.like[0]]
            owner, _, name = change.tensor.rpartition(".")
            vector = nn.Parameter(weight.new_zeros(len(change.values)), weight.requires_grad)
            copied.get_submodule(owner).register_parameter(name, vector)
        assert vector is not None
        with torch.no_grad():
            vector += torch.tensor(change.values, dtype=torch.float64).to(vector)
    if plan.cuts or plan.experts:
        hold(copied, plan)
    return copied
