"""Losses that mixtures make of their own, such as those that spread tokens evenly over experts.

They count the experts, so that with fewer they are other ones, whatever the experts compute. Which
outputs of a model depend on them is found out by what becomes NaN when they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.errors import InputError
from graphprune.measurement import drawn
from graphprune.parts.mixtures import Experts
from graphprune.record.batches import at_rest, device_of
from graphprune.record.inputs import Call
from graphprune.verification.models import tensors_of


def without_losses(
    model: nn.Module, call: Call, mixtures: Sequence[Experts]
) -> dict[str, list[int]]:
    """The places of outputs that no loss of a mixture is part of, by mode; empty where all are.

    Args:
        model: it is not touched.
        call: inputs that it runs on.
        mixtures: those of which experts may leave.

    Raises:
        InputError: in eval mode all are.
    """
    found: dict[str, list[int]] = {}
    args, kwargs = drawn(call, device_of(model))
    for mode in ("eval", "train"):
        try:
            with at_rest(model), torch.no_grad():
                model.train(mode == "train")
                with _unknown(model, mixtures, mode):
                    outputs = tensors_of(model(*args, **kwargs))
        except Exception:  # it does not train on these inputs, say
            continue
        found[mode] = [
            place
            for place, out in enumerate(outputs)
            if out.numel() != 1 or not out.is_floating_point() or not bool(out.isnan().any())
        ]
        if len(found[mode]) == len(outputs):
            del found[mode]
    if found.get("eval") == []:
        raise InputError(
            "experts cannot leave: the output is a loss that counts them; let the model return "
            "what it computes as well"
        )
    return found


@contextlib.contextmanager
def _unknown(model: nn.Module, mixtures: Sequence[Experts], mode: str) -> Iterator[None]:
    """Inside, what counts experts of what mixtures return is not a number.

    In train mode any number that is returned beside a tensor may; and any that is left in an
    attribute.
    """
    handles, before = [], []
    for mixture in mixtures:
        module = model.get_submodule(mixture.name)
        state = {id(part): dict(vars(part)) for part in module.modules()}
        before += [(part, state[id(part)]) for part in module.modules()]
        apart = None if mode == "train" else mixture.apart
        handles.append(module.register_forward_hook(_hiding(apart, state)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for part, known in before:
            vars(part).clear()
            vars(part).update(known)


def _hiding(
    apart: Sequence[int] | None, before: Mapping[int, Mapping[str, object]]
) -> Callable[[nn.Module, object, object], object]:
    def hide(module: nn.Module, args: object, out: object) -> object:
        for part in module.modules():
            for name, value in list(vars(part).items()):
                new = value is not before[id(part)].get(name)
                if new and isinstance(value, Tensor) and value.numel() == 1:
                    vars(part)[name] = _nan(value)
        tensors = tensors_of(out)
        wide = any(tensor.numel() > 1 for tensor in tensors)
        hidden = {id(tensors[place]) for place in apart or () if place < len(tensors)}
        if apart is None and wide:
            hidden |= {id(tensor) for tensor in tensors if tensor.numel() == 1}
        if not hidden:
            return None
        return pytree.tree_map_only(Tensor, lambda t: _nan(t) if id(t) in hidden else t, out)

    return hide


def _nan(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor
