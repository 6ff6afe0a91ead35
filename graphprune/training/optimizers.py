"""Optimizers that follow: their state is sliced with the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from graphprune.errors import InputError
from graphprune.execute.shrink import cut, kept_indices
from graphprune.plan.plan import Plan
from graphprune.record.tensors import named_tensors

Kept = Mapping[int, Tensor]  # kept indices by dimension: [kept], or [blocks of rows, kept]
Sliced = tuple[dict[str, Any], str, Tensor]


def follow(
    optimizer: object, model: nn.Module, plan: Plan, *, small: nn.Module | None = None
) -> Optimizer:
    """Slice the state of an optimizer as a plan slices the parameters.

    Momentum, the moments of Adam, and every other state of a parameter's shape (or of its shape
    with ones, as Adafactor keeps) lose the removed channels. Parameter groups, their options and
    the learning-rate schedulers that hold the optimizer stay what they are.

    Args:
        optimizer: holds parameters of ``model``; changed in place.
        model: the model that the plan is for, before or after ``rebuild(..., inplace=True)``,
            which keeps the parameters the same objects.
        plan: which channels stay.
        small: the result of a ``rebuild`` that was not in place: its parameters take the place of
            the model's.

    Returns:
        The optimizer (without wrappers such as Accelerate's).

    Raises:
        InputError: the optimizer has no parameter of the model, or keeps state that cannot be
            sliced; nothing was changed.

    Example:
        >>> import torch, graphprune
        >>> from graphprune.training import follow
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> adam = torch.optim.Adam(net.parameters())
        >>> net(torch.ones(1, 4)).sum().backward()
        >>> adam.step()
        >>> plan = graphprune.trace(net).plan(0.5)
        >>> small = graphprune.rebuild(net, plan, inplace=True)
        >>> follow(adam, net, plan).state[net[0].weight]["exp_avg"].shape
        torch.Size([4, 4])
    """
    optimizer = check_optimizer(optimizer, model)
    for state, key, value in sliced_state(optimizer, model, plan):
        state[key] = value
    if small is not None:
        names = {id(tensor): name for name, tensor in named_tensors(model)}
        _replace(optimizer, names, dict(named_tensors(small)))
    return optimizer


def sliced_state(optimizer: Optimizer, model: nn.Module, plan: Plan) -> list[Sliced]:
    """What :func:`follow` puts where: a dict of states, a key, and the sliced value.

    Raises:
        InputError: a state cannot be sliced.
    """
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    kept = kept_indices(plan)
    sizes = {(slot.tensor, slot.dim): slot.size for slot in plan.slots}
    sliced = []
    for parameter, state in optimizer.state.items():
        name = names.get(id(parameter)) if isinstance(parameter, Tensor) else None
        if name is None or name not in kept:
            continue
        before = tuple(sizes.get((name, dim), size) for dim, size in enumerate(parameter.shape))
        where = f"{type(optimizer).__name__} keeps for {name!r} of shape {list(before)} a state"
        for key, value in state.items():
            dims = _dims(value, before, kept[name], f"{where} {key!r}")
            if dims:
                sliced.append((state, key, cut(value, dims)))
    return sliced


def _dims(value: object, before: tuple[int, ...], kept: Kept, where: str) -> dict[int, Tensor]:
    """Along which dimensions a state is to be sliced."""
    if not isinstance(value, Tensor):
        nested = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        if any(leaf.numel() > 1 for leaf in nested):
            raise InputError(f"{where} that is a {type(value).__name__} of tensors; {_ADVICE}")
        return {}
    if value.numel() == 1:  # a step
        return {}
    after = tuple(kept[d].shape[-1] if d in kept else size for d, size in enumerate(before))
    if _fits(value, before):
        dims = {dim: index for dim, index in kept.items() if value.shape[dim] == before[dim]}
        if value.shape[0] == before[0] or all(index.dim() == 1 for index in dims.values()):
            return dims
    elif _fits(value, after):  # has followed already
        return {}
    raise InputError(f"{where} of shape {list(value.shape)}; {_ADVICE}")


def _fits(value: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a state has a shape, or that shape with ones in some places."""
    return value.dim() == len(shape) and all(n in (1, m) for n, m in zip(value.shape, shape))


_ADVICE = (
    "it cannot be sliced with the channels: make a new optimizer for the small model, and pass "
    "none here"
)


def _replace(optimizer: Optimizer, names: Mapping[int, str], small: Mapping[str, Tensor]) -> None:
    """Put the parameters of the small model in the place of the original's."""
    for group in optimizer.param_groups:
        for number, parameter in enumerate(group["params"]):
            name = names.get(id(parameter))
            if name is not None:
                group["params"][number] = small[name]
                if parameter in optimizer.state:
                    optimizer.state[small[name]] = optimizer.state.pop(parameter)


def check_optimizer(optimizer: object, model: nn.Module) -> Optimizer:
    """The optimizer under its wrappers, if it trains the model.

    Raises:
        InputError: it is no optimizer, or has none of the model's parameters.
    """
    found = unwrapped(optimizer)
    if not isinstance(found, Optimizer):
        raise InputError(f"optimizer must be a torch.optim.Optimizer, not {type(found).__name__}")
    known = {id(parameter) for parameter in model.parameters()}
    foreign = [p for p in parameters_of(found) if id(p) not in known]
    if not known.intersection(map(id, parameters_of(found))):
        raise InputError(
            f"none of the {len(foreign)} parameters of the {type(found).__name__} is one of "
            f"{type(model).__name__}: was it made for a copy of the model, or before the model was "
            "changed? Make it from model.parameters()"
        )
    return found


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """All parameters of all groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


def unwrapped(optimizer: object) -> object:
    """The optimizer inside the wrappers of Accelerate and Lightning."""
    while hasattr(optimizer, "optimizer") and isinstance(optimizer.optimizer, Optimizer):
        optimizer = optimizer.optimizer
    return optimizer
