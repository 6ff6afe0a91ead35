"""Plans from masked models: remove what is dead, with the same output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import InputError, TraceError
from graphprune.masks.dead import Pass, Search, agree
from graphprune.plan.plan import BiasChange, Cost, Plan, SlotPlan
from graphprune.planning.make import assemble
from graphprune.planning.rescaling import Rescaling
from graphprune.planning.settle import Settled, follow, rehearse
from graphprune.record.copying import copy_module
from graphprune.record.inputs import Call, resized
from graphprune.record.masked_names import masked_names
from graphprune.record.tensors import aliases, mark, named_modules, named_tensors
from graphprune.text import shorten

FOLDS = ("exact", "approximate", "none")
_FEW = 0.01  # of the weights: fewer zeros than these say nothing of pruning


def check_request(masks: object, fold: str) -> None:
    """Raise ``InputError`` for a wrong ``fold``, or masks that are no mapping."""
    if fold not in FOLDS:
        raise InputError(f"fold must be one of {', '.join(FOLDS)}, not {fold!r}")
    if masks is not None and not isinstance(masks, Mapping):
        raise InputError(
            'masks must map layers to boolean vectors of their output channels, such as {"conv1": '
            f"keep}}; got {type(masks).__name__}"
        )


def dead_channels(
    model: nn.Module,
    call: Call,
    settled: Settled,
    masks: Mapping[str, object],
    fold: str,
    attention: str,
) -> Plan:
    """A plan that removes what is dead; see :meth:`graphprune.Plan.from_masks`."""
    zeroed = _zeroed(model, masks)
    masked = _apply(model, zeroed) if zeroed else model
    passes = _passes(masked, call, attention, fold)
    agree(passes, fold)
    used = frozenset(
        str(n.target) for n in settled.analysis.records[0].graph.nodes if n.op == "get_attr"
    )
    while True:
        rescaling = Rescaling.of(settled.analysis, model)
        search = Search(settled.analysis, passes, used, rescaling.covers)
        biases, merges = search.run()
        kept = search.kept()
        finding = follow(model, call, settled, kept)
        settled = finding.settled
        if not finding.possible:
            continue
        plan = assemble(call, settled, kept, {"masks": True, "fold": fold}, rescaling)
        finding = rehearse(model, call, settled, plan, settled.analysis.alive(kept))
        settled = finding.settled
        if finding.possible:
            break
    return replace(
        plan,
        biases=biases,
        merges=merges,
        zeroed=tuple(zeroed),
        weights=mark(model) if biases or merges or zeroed else None,
        notes=(*search.notes(), *search.approximated()),
        after=_with_biases(plan, biases, model),
    )


def told_of_nothing(model: nn.Module, plan: Plan) -> Plan:
    """A plan that removes nothing, and names no channel that stays, with a note that says so."""
    if plan.slots or plan.zeroed or plan.notes:
        return plan
    tensors, masked = dict(named_tensors(model)), masked_names(model)
    masks = [tensors[f"{name}_mask"] for name in masked if f"{name}_mask" in tensors]
    looked = masks or [tensor for tensor in tensors.values() if tensor.dim() > 1]
    zeros = sum(int((tensor == 0).sum()) for tensor in looked)
    part = zeros / max(sum(tensor.numel() for tensor in looked), 1)
    note = (
        "no channel of this model is dead: its weights are not zero, and no mask hides them. Pass "
        "a pruned model, or masks= by layer; graphprune.rebuild(model, ratio) chooses by itself"
    )
    if part >= _FEW:
        note = (
            f"no channel of this model is dead: {part:.0%} of its weights are zero, one by one, "
            "but no whole filter is: no layer becomes smaller. Prune whole channels instead: "
            "graphprune.rebuild(model, ratio), or prune.ln_structured with dim=0 before from_masks"
        )
    return replace(plan, notes=(note,))


def _passes(model: nn.Module, call: Call, attention: str, fold: str) -> list[Pass]:
    """A few of the example inputs, and inputs of another shape, where constants must be the same.

    A constant that reaches the border of a map, or the mean of one, may depend on its size.
    """
    few = _few(call)
    try:
        found = [Pass(model, few, attention, fold)]
    except TraceError:
        few = call
        found = [Pass(model, few, attention, fold)]
    for side in (True, False):
        other = _changed(few, side)
        if str(other) == str(few):
            continue
        try:
            return [*found, Pass(model, other, attention, fold)]
        except TraceError:  # this model runs on the size of the example only
            continue
    return found


def _few(call: Call) -> Call:
    """The first two of a batch."""
    sizes = {tensor.shape[0] for tensor in call.tensors() if tensor.dim()}
    if len(sizes) != 1 or max(sizes) <= 2:
        return call
    return call.map(lambda tensor: tensor[:2] if tensor.dim() else tensor)


def _changed(call: Call, side: bool) -> Call:
    return call.map(lambda tensor: _other(tensor, call, side))


def _other(tensor: Tensor, call: Call, side: bool) -> Tensor:
    """A tensor at another batch size and, with ``side``, at another resolution."""
    shape = resized(tensor, call, batch=True, side=side)
    if shape is None or shape == tuple(tensor.shape):
        return tensor
    for dim, size in enumerate(shape):
        index = torch.arange(size, device=tensor.device) % tensor.shape[dim]
        tensor = tensor.index_select(dim, index)
    return tensor


def _zeroed(model: nn.Module, masks: Mapping[str, Any]) -> list[SlotPlan]:
    """The slices of weights and biases that boolean vectors by layer turn off.

    Raises:
        InputError: no such layer, or a mask of another length or kind.
    """
    first, tensors = aliases(model), dict(named_tensors(model))
    found: dict[tuple[str, int], SlotPlan] = {}
    for layer, mask in masks.items():
        own = {
            key: first[name]
            for key in ("weight", "bias")
            for name in (f"{layer}.{key}", f"{layer}.{key}_orig")
            if name in first
        }
        if "weight" not in own:
            layers = [name for name, module in named_modules(model) if hasattr(module, "weight")]
            raise InputError(f"no layer {layer!r} with a weight; layers: {shorten(layers, 12)}")
        module: Any = model.get_submodule(layer)
        turned = isinstance(module, nn.modules.conv._ConvTransposeNd)
        if turned and module.groups > 1:
            raise InputError(f"{layer!r} is transposed and grouped: zero its weights instead")
        size = tensors[own["weight"]].shape[int(turned)]
        keep = _vector(layer, mask, size)
        for key, name in own.items():
            dim = int(turned and key == "weight")
            kept = tuple(keep.nonzero().flatten().tolist())
            if len(kept) < size:
                found[name, dim] = SlotPlan(name, dim, size, kept)
    return list(found.values())


def _vector(layer: str, mask: object, size: int) -> Tensor:
    try:
        vector = torch.as_tensor(mask).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the mask of {layer!r} is no vector: {error}") from None
    if vector.dim() != 1 or len(vector) != size:
        raise InputError(
            f"the mask of {layer!r} has shape {list(vector.shape)}; expected [{size}], one entry "
            "for each output channel (for masks of single weights use "
            "torch.nn.utils.prune.custom_from_mask)"
        )
    if vector.dtype != torch.bool and not bool(((vector == 0) | (vector == 1)).all()):
        raise InputError(f"the mask of {layer!r} holds other values than true and false")
    return vector.bool()


def _apply(model: nn.Module, zeroed: list[SlotPlan]) -> nn.Module:
    """A copy in which the slices are zero."""
    masked = copy_module(model, {})
    tensors = dict(named_tensors(masked))
    for slot in zeroed:
        gone = sorted(set(range(slot.size)) - set(slot.kept))
        tensor = tensors[slot.tensor].detach()
        tensor.index_fill_(slot.dim, torch.tensor(gone, dtype=torch.int64, device=tensor.device), 0)
    return masked


def _with_biases(plan: Plan, biases: tuple[BiasChange, ...], model: nn.Module) -> Cost:
    """The cost of the small model, new biases included."""
    kept = {(slot.tensor, slot.dim): len(slot.kept) for slot in plan.slots}
    tensors = dict(named_tensors(model))
    params = size = 0
    for change in biases:
        if change.like is not None:
            count = kept.get(change.like, len(change.values))
            params += count
            size += count * tensors[change.like[0]].element_size()
    return replace(plan.after, params=plan.after.params + params, bytes=plan.after.bytes + size)
