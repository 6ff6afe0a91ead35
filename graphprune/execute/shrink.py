"""Slice every parameter dimension that a plan touches, then bring remembered sizes in line."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.errors import GraphPruneError, PlanError
from graphprune.execute.emptied import empty, move_up, remaining, stood_for
from graphprune.execute.fold import fold, merged, recompute_masked
from graphprune.execute.forward import rewrite_forward
from graphprune.execute.ids import follow_ids
from graphprune.execute.rollback import replace_data, whole_or_not
from graphprune.plan.leaving import leaves_modules, left_of
from graphprune.plan.plan import IndexChange, Plan, SizeChange, carry, plan_of
from graphprune.record.attention import replace_attention
from graphprune.record.copying import copy_module
from graphprune.record.layers import refresh
from graphprune.record.norms import count_as_zero
from graphprune.record.skeleton import without_weights
from graphprune.record.tensors import held_tensors, named_modules

Kept = Mapping[int, Tensor]  # kept indices by dimension: [kept], or [blocks of rows, kept]
Selection = tuple[int, Tensor]
CHUNK = 1 << 22  # elements
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


@torch.inference_mode(False)
def shrink(model: nn.Module, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """Execute a plan.

    Args:
        model: a model of the architecture the plan was made for.
        plan: which channels stay.
        inplace: change ``model`` itself; its parameters stay the same objects.

    Returns:
        The small model, which carries the plan as ``graphprune_plan`` (composed with the plan
        that made ``model``, if one did).

    Raises:
        PlanError: the plan does not fit the model.

    Whatever is raised, an interruption included, the model is then as it was.
    """
    plan.check(model)
    with whole_or_not(model, written(plan)) if inplace else contextlib.nullcontext():
        try:
            return _carried_out(model, plan, inplace)
        except (GraphPruneError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # nothing that a plan made for this model leads to
            told = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise PlanError(
                f"the plan cannot be carried out on this model ({told}); trace this model anew"
            ) from error


def written(plan: Plan) -> set[str]:
    """The tensors whose values a plan changes, besides cutting them."""
    changed: tuple[Any, ...] = (plan.indices, plan.scales, plan.biases, plan.merges, plan.zeroed)
    masks = (change.mask for change in plan.merges if change.mask is not None)
    return {*(change.tensor for changes in changed for change in changes), *masks}


def _carried_out(model: nn.Module, plan: Plan, inplace: bool) -> nn.Module:
    earlier, whole = plan_of(model), plan
    plan = remaining(model, plan) if leaves_modules(plan) else plan
    kept, full = kept_indices(plan), merged(model, plan)
    if inplace:
        empty(model, plan)
        for name, tensor in held_tensors(model):
            if name in full:
                tensor.detach().copy_(full[name])
            if name in kept:
                _cut_in_place(tensor, kept[name])
    else:
        model = _cut_copy(model, plan, kept, full)
    for index in plan.indices:
        _renumber(model.get_buffer(index.tensor), index, kept.get(index.tensor, {}))
    _rescale(model, plan)
    fold(model, plan, kept)
    recompute_masked(model)
    _follow(model, plan)
    move_up(model, plan)
    carry(model, whole if earlier is None else earlier.then(whole))
    return model


def hollow(model: nn.Module, plan: Plan) -> nn.Module:
    """What :func:`shrink` makes, on ``meta``: quickly made, to see whether it would run."""
    plan = remaining(model, plan) if leaves_modules(plan) else plan
    left: dict[str, dict[int, int]] = {}
    for slot in plan.slots:
        left.setdefault(slot.tensor, {})[slot.dim] = slot.width
    shapes = {
        id(tensor): tuple(left[name].get(dim, size) for dim, size in enumerate(tensor.shape))
        for name, tensor in held_tensors(model)
        if name in left
    }
    clone = without_weights(model, shapes)
    empty(clone, plan)
    _follow(clone, plan)
    move_up(clone, plan)
    return clone


def _follow(model: nn.Module, plan: Plan) -> None:
    """Bring sizes in attributes and in the code in line with the tensors that were cut."""
    modules = dict(named_modules(model))

    def at(name: str) -> nn.Module:
        return modules[name] if name in modules else model.get_submodule(name)

    for owner in {slot.tensor.rpartition(".")[0] for slot in plan.slots}:
        replace_attention(at(owner))
    for norm in plan.norms:
        count_as_zero(at(norm.module), norm.of)
    for change in plan.sizes:
        _resize(at(change.module), change)
    for module in modules.values():
        refresh(module)
    follow_ids(model, plan)
    rewrite_forward(model, plan.literals)


def _cut_copy(
    model: nn.Module, plan: Plan, kept: Mapping[str, Kept], full: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of the model with smaller tensors, without the modules that leave."""
    memo: dict[int, object] = {**stood_for(model, plan)}
    left = left_of(model, plan)[1] if leaves_modules(plan) else None
    for name, tensor in held_tensors(model):
        if left is not None and name not in left:
            continue
        small = cut(full.get(name, tensor.detach()), kept.get(name, {}))
        if isinstance(tensor, nn.Parameter):
            small = _as_parameter(small, tensor)
        memo[id(tensor)] = small
    return copy_module(model, memo)


def _renumber(buffer: Tensor, change: IndexChange, kept: Kept) -> None:
    """Make a buffer of channel numbers name the channels that stay."""
    values = torch.tensor(change.values)
    size = max(int(values.max()), *change.kept) + 1
    places = torch.zeros(size, dtype=torch.int64)
    places[list(change.kept)] = torch.arange(len(change.kept))
    if not buffer.is_meta:
        buffer.copy_(places[values[kept[0]] if 0 in kept else values])


def kept_indices(plan: Plan) -> dict[str, dict[int, Tensor]]:
    """The kept indices of a plan by tensor name and dimension."""
    kept: dict[str, dict[int, Tensor]] = {}
    for slot in plan.slots:
        index = torch.tensor(slot.kept, dtype=torch.int64)
        index = index if slot.blocks == 1 else index.reshape(slot.blocks, -1)
        kept.setdefault(slot.tensor, {})[slot.dim] = index
    for change in plan.biases:  # new ones are as long as the outputs of their weight
        if change.like is not None and change.like[1] in kept.get(change.like[0], {}):
            kept[change.tensor] = {0: kept[change.like[0]][change.like[1]]}
    return kept


def cut(tensor: Tensor, kept: Kept) -> Tensor:
    """A copy of the kept slices, in the memory format of the original."""
    if not kept:
        return tensor.clone()
    for dim, index in kept.items():
        if index.dim() > 1:
            blocks = tensor.unflatten(0, (len(index), -1)).unbind()
            parts = [part.index_select(dim, i.to(part.device)) for part, i in zip(blocks, index)]
            return cut(torch.cat(parts), {d: i for d, i in kept.items() if d != dim})
    first, *rest = ((dim, index.to(tensor.device)) for dim, index in sorted(kept.items()))
    small = _select(tensor, first, rest) if rest else _taken(tensor, *first)
    for layout, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        plain = tensor.dim() != ndim or tensor.is_contiguous()
        if not plain and tensor.is_contiguous(memory_format=layout):
            return small.contiguous(memory_format=layout)
    return small


def _select(tensor: Tensor, first: Selection, rest: list[Selection]) -> Tensor:
    """Select along several dimensions, in chunks so that nothing large lies in between."""
    dim, index = first
    shape = list(tensor.shape)
    for other, kept in (first, *rest):
        shape[other] = len(kept)
    small = tensor.new_empty(shape)
    step = max(1, CHUNK * tensor.shape[dim] // max(tensor.numel(), 1))
    *others, last = rest
    for start in range(0, len(index), step):
        part = _taken(tensor, dim, index[start : start + step])
        for other, kept in others:
            part = _taken(part, other, kept)
        _take(part, *last, small.narrow(dim, start, part.shape[dim]))
    return small


def _taken(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """What ``index_select`` returns."""
    if dim == 0:
        return tensor.index_select(dim, index)
    shape = (*tensor.shape[:dim], len(index), *tensor.shape[dim + 1 :])
    small = tensor.new_empty(shape)
    _take(tensor, dim, index, small)
    return small


def _take(tensor: Tensor, dim: int, index: Tensor, into: Tensor) -> None:
    """What ``index_select`` does; NumPy is several times as fast along inner dimensions."""
    bits = _BITS.get(tensor.element_size())
    plain = all(type(t) is Tensor and t.is_contiguous() and not t.is_neg() for t in (tensor, into))
    if dim == 0 or bits is None or tensor.is_complex() or tensor.device.type != "cpu" or not plain:
        into.copy_(tensor.index_select(dim, index))
        return
    source, target = (t.view(bits).numpy() for t in (tensor, into))
    np.take(source, index.numpy(), axis=dim, out=target, mode="clip")


def _as_parameter(small: Tensor, original: nn.Parameter) -> nn.Parameter:
    parameter = nn.Parameter(small, requires_grad=original.requires_grad)
    for name, value in vars(original).items():
        setattr(parameter, name, value)
    return parameter


def _cut_in_place(tensor: Tensor, kept: Kept) -> None:
    grad = None if tensor.grad is None else cut(tensor.grad, kept)
    replace_data(tensor, cut(tensor.detach(), kept), grad)


def _rescale(model: nn.Module, plan: Plan) -> None:
    """Let weights and eps make up for statistics over fewer channels."""
    tensors = dict(held_tensors(model)) if plan.scales else {}
    for change in plan.scales:
        with torch.no_grad():
            tensors[change.tensor].mul_(change.factor)
        if change.attribute:
            setattr(model.get_submodule(change.module), change.attribute, change.new)


def _resize(module: nn.Module, change: SizeChange) -> None:
    value = getattr(module, change.name)
    for other in _sources(module, value):  # a copy of the module may be made from it again
        if len(change.path) == 2 and change.path[1] == 1:
            other[value[change.path[0]][0]] = change.new
    if change.path and isinstance(value, dict | list):
        key: Any = change.path[0]
        value[key] = _put(value[key], change.path[1:], change.new)
    else:
        setattr(module, change.name, _put(value, change.path, change.new))


def _sources(module: nn.Module, value: Any) -> list[dict[object, object]]:
    """The dictionaries of a module whose items an attribute holds."""
    if type(value) not in (tuple, list):
        return []
    known = [item for item in vars(module).values() if isinstance(item, dict) and item]
    return [item for item in known if len(item) == len(value) and [*item.items()] == [*value]]


def _put(value: Any, path: Sequence[Any], new: int) -> Any:
    """A copy of a container with another number in it."""
    if not path:
        return new
    first, *rest = path
    items: Any = dict(value) if isinstance(value, dict) else list(value)
    items[first] = _put(value[first], rest, new)
    return items if isinstance(value, dict) else type(value)(items)
