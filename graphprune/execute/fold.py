"""What a plan from masks does to numbers: constants into biases, masked slices to zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from graphprune.errors import PlanError
from graphprune.plan.plan import BiasChange, Plan
from graphprune.record.masked_names import mask_hooks
from graphprune.record.tensors import named_modules, named_tensors

Indices = dict[str, dict[int, Tensor]]


def fold(model: nn.Module, plan: Plan, kept: Indices) -> None:
    """Change the vectors of a model that was cut already.

    Raises:
        PlanError: a layer that needs a new bias has one, or is of another class.
    """
    tensors = dict(named_tensors(model)) if plan.zeroed or plan.biases else {}
    for slot in plan.zeroed:
        gone = torch.ones(slot.size, dtype=torch.bool)
        gone[list(slot.kept)] = False
        index = kept.get(slot.tensor, {}).get(slot.dim)
        gone = gone if index is None else gone[index]
        tensor = tensors[slot.tensor].detach()
        tensor.index_fill_(slot.dim, gone.nonzero().flatten().to(tensor.device), 0)
    for change in plan.biases:
        if change.like is not None and change.tensor not in tensors:
            _new_bias(model, change, tensors[change.like[0]])
            tensors = dict(named_tensors(model))
        values = _values(change, kept.get(change.tensor, {}).get(0))
        vector = tensors[change.tensor].detach()
        if not vector.is_meta:
            vector.copy_(vector.to("cpu", torch.float64) + values)  # rounded once


def merged(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Weights that take up others' slices before these are cut off, and their masks."""
    tensors = {name: t.detach() for name, t in named_tensors(model)} if plan.merges else {}
    found: dict[str, Tensor] = {}
    for change in plan.merges:
        weight = found.get(change.tensor, tensors[change.tensor]).clone()
        if weight.is_meta:
            continue
        masked, device = weight, weight.device
        targets = torch.tensor([target for target, _ in change.targets], device=device)
        if change.mask is not None:
            mask = found.get(change.mask, tensors[change.mask]).clone()
            masked = weight * mask
            found[change.mask] = mask.index_fill_(change.dim, targets, 1)
        sources = torch.tensor(change.sources, device=device)
        factors, shares = (
            torch.tensor(numbers, dtype=torch.float64, device=device)
            for numbers in (change.factors, [share for _, share in change.targets])
        )
        parts = masked.index_select(change.dim, sources).double().movedim(change.dim, -1)
        total = (parts @ factors)[..., None] * shares
        before = masked.index_select(change.dim, targets).double()
        added = before + total.movedim(-1, change.dim)
        found[change.tensor] = weight.index_copy_(change.dim, targets, added.to(weight.dtype))
    return found


def _values(change: BiasChange, index: Tensor | None) -> Tensor:
    values = torch.tensor(change.values, dtype=torch.float64)
    return values if index is None else values[index]


def _new_bias(model: nn.Module, change: BiasChange, weight: Tensor) -> None:
    owner, _, name = change.tensor.rpartition(".")
    layer = model.get_submodule(owner)
    if name not in layer._parameters or layer._parameters[name] is not None:
        raise PlanError(f"the plan gives {owner!r} a bias, which it has, or cannot have")
    assert change.like is not None
    zeros = weight.new_zeros(weight.shape[change.like[1]])
    layer.register_parameter(name, nn.Parameter(zeros, requires_grad=weight.requires_grad))


@torch.no_grad()
def recompute_masked(model: nn.Module) -> None:
    """Weights that hooks compute: of ``torch.nn.utils.prune``, of the old norms of weights.

    They are computed anew in every forward; until then they are leaves, which can be copied.
    """
    for _, module in named_modules(model):
        for hook in mask_hooks(module):
            setattr(module, hook._tensor_name, hook.apply_mask(module))
        for norm in module._forward_pre_hooks.values():
            if isinstance(norm, WeightNorm):
                setattr(module, norm.name, norm.compute_weight(module))
            elif isinstance(norm, SpectralNorm):
                weight = norm.compute_weight(module, do_power_iteration=False)
                setattr(module, norm.name, weight)
