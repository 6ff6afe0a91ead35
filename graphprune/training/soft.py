"""Masks that are held while a model trains: zeroes in the place of channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graphprune.plan.plan import Plan
from graphprune.record.tensors import named_tensors


class SoftMasks:
    """Zeroes on both sides of the channels that a plan removes, while the model trains.

    What stood there is set aside, and comes back when the masks are lifted. Gradients of masked
    weights are zeroed as they arrive, before they are accumulated, clipped or averaged over
    ranks; weights are zeroed again by :meth:`hold`. So nothing of a masked channel reaches the
    others, and training goes on as if it had been removed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.plan: Plan | None = None
        self.aside: dict[str, Tensor] = {}
        self._tensors: dict[str, Tensor] = {}
        self._gone: dict[str, Tensor] = {}  # boolean masks of the same shapes
        self._hooks: list[RemovableHandle] = []

    def put(self, plan: Plan, aside: Mapping[str, Tensor] | None = None) -> None:
        """Mask the channels that a plan removes, in the place of those masked before.

        Args:
            plan: which channels stay; zeroed parameters must be enough to mask the others.
            aside: weights to come back later; the present ones by default.

        Raises:
            PlanError: the plan does not fit the model.
        """
        plan.check(self.model)
        self.lift()
        tensors = dict(named_tensors(self.model))
        for slot in plan.slots:
            tensor = tensors[slot.tensor]
            if not tensor.is_floating_point() and not tensor.is_complex():
                continue  # numbers of channels
            gone = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
            gone = self._gone.setdefault(slot.tensor, gone)
            gone |= ~slot.stays(tensor.shape).to(tensor.device)
        self._tensors = {name: tensors[name] for name in self._gone}
        self.aside = {
            name: (tensor if aside is None else aside[name]).detach().to(tensor.device, copy=True)
            for name, tensor in self._tensors.items()
        }
        self.plan = plan
        for name, tensor in self._tensors.items():
            _zero(tensor, self._gone[name])
            if tensor.requires_grad:
                self._hooks.append(tensor.register_hook(partial(_masked, self._gone[name])))
            if tensor.grad is not None:
                _zero(tensor.grad, self._gone[name])

    def hold(self) -> None:
        """Zero the masked weights again, after an optimizer changed them.

        Buffers are left alone: running statistics of masked channels reach nothing.
        """
        for name, tensor in self._tensors.items():
            if isinstance(tensor, nn.Parameter):
                _zero(tensor, self._gone[name])

    def lift(self) -> None:
        """Put back what was set aside, and mask nothing."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                gone = self._gone[name].to(tensor.device)
                tensor.copy_(torch.where(gone, self.aside[name].to(tensor.device), tensor))
        self.drop()

    def drop(self) -> None:
        """Forget what was set aside: the masked channels are about to be removed."""
        for hook in self._hooks:
            hook.remove()
        self.plan = None
        self._hooks, self._tensors, self._gone, self.aside = [], {}, {}, {}

    def stays(self) -> Iterator[tuple[str, Tensor]]:
        """For every masked parameter by name a boolean mask of its shape, true where it stays."""
        for name, tensor in self._tensors.items():
            if isinstance(tensor, nn.Parameter):
                yield name, ~self._gone[name]


def _zero(tensor: Tensor, gone: Tensor) -> None:
    if tensor.is_sparse:  # the gradient of a table, by rows; its weights are zeroed all the same
        return
    with torch.no_grad():
        tensor.masked_fill_(gone.to(tensor.device), 0)


def _masked(gone: Tensor, grad: Tensor) -> Tensor:
    grad = grad.clone()
    _zero(grad, gone)
    return grad
