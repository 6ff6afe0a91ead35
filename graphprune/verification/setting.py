"""The setting of a comparison: one precision, no dropout, the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from graphprune.execute.fold import recompute_masked
from graphprune.ops.calls import Args, Function, Kwargs, OpMode
from graphprune.ops.registry import WHOLE, op_of
from graphprune.plan.changes import ExpertsPlan
from graphprune.record.copying import copy_module
from graphprune.record.tensors import held_tensors
from graphprune.verification.dispatch import NOISY, Draw, random_op

aten = torch.ops.aten
_ATTENTION = {F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default}
_DROPOUT_OF_HEADS = 10  # the place of the argument of F.multi_head_attention_forward


def copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in one precision, with dropout off."""
    memo: dict[int, Any] = {}
    for _, tensor in held_tensors(model):
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        clone: Any = tensor.detach().to(kind, copy=True)
        if isinstance(tensor, nn.Parameter):
            clone = nn.Parameter(clone, requires_grad=tensor.requires_grad)
        for name, value in vars(tensor).items():
            setattr(clone, name, value)
        memo[id(tensor)] = clone
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.is_floating_point() and id(value) not in memo:
                memo[id(value)] = value.detach().to(dtype, copy=True)
    twin = copy_module(model, memo)
    for module in twin.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0
    with torch.no_grad():
        recompute_masked(twin)  # computed by torch.nn.utils.prune in the other precision
    return twin


class Precision(TorchFunctionMode):
    """Leaves dropout out, which draws other numbers for other shapes; computes in one precision.

    Code that computes parts in float32 (norms, softmax) does so in float64 when that is asked for.
    """

    names = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
                       "feature_alpha_dropout", "dropout_", "feature_dropout"})  # fmt: skip

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.dtype is torch.float64:
            func = torch.Tensor.double if func is torch.Tensor.float else func
            if any(arg is torch.float32 for arg in args):
                args = tuple(self.dtype if arg is torch.float32 else arg for arg in args)
            if kwargs:
                kwargs = {k: self.dtype if v is torch.float32 else v for k, v in kwargs.items()}
        if getattr(func, "__name__", "") in self.names:
            return args[0] if args else kwargs["input"]
        if func is F.multi_head_attention_forward:
            if len(args) > _DROPOUT_OF_HEADS:
                args = (*args[:_DROPOUT_OF_HEADS], 0.0, *args[_DROPOUT_OF_HEADS + 1 :])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        if func in WHOLE and (kernel := op_of(WHOLE[func]).kernel) is not None:
            return kernel(*args, **kwargs)
        if func in _ATTENTION:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


class Redrawn(OpMode):
    """Gives a small model the random numbers of the original, without the removed channels.

    Args:
        draws: of the original.
        experts: of its mixtures, without the numbers of those that leave.
    """

    def __init__(self, draws: Sequence[Draw], experts: Sequence[ExpertsPlan] = ()) -> None:
        super().__init__()
        self.draws, self.experts = list(draws), experts
        self.lost = ""  # a draw that is none of the original's

    def __torch_dispatch__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if not random_op(func):
            return func(*args, **kwargs)
        given = args[0].clone() if args and isinstance(args[0], Tensor) else None
        out = func(*args, **kwargs)
        mine = args[1] if func in NOISY else out[-1] if isinstance(out, tuple) else out
        numbers = self._next(func, mine)
        if numbers is None:
            return out
        mine.copy_(numbers)
        if func in NOISY and given is not None:
            out.copy_(torch.where(given > 0, given, given * mine))
        elif isinstance(out, tuple) and given is not None:  # dropout and its mask
            share = 1 - float(args[1])
            out[0].copy_(given * mine / share if share else out[0])
        return out

    def _next(self, func: object, mine: Tensor) -> Tensor | None:
        if not self.draws:
            self.lost = self.lost or str(func)
            return None
        other, numbers, kept = self.draws.pop(0)
        if other is func and numbers.shape != mine.shape:
            for dim, stays in enumerate(kept):
                index = stays.nonzero().flatten().to(numbers.device)
                numbers = numbers.index_select(dim, index)
        numbers = self._of_experts(numbers, mine)
        if other is not func or numbers.shape != mine.shape:
            self.lost = self.lost or str(func)
            return None
        return numbers

    def _of_experts(self, numbers: Tensor, mine: Tensor) -> Tensor:
        """The numbers of the experts that stay, where one dimension tells which these are."""
        pairs = [*enumerate(zip(numbers.shape, mine.shape))] if numbers.dim() == mine.dim() else []
        for dim, (before, after) in pairs:
            known = {
                plan.kept for plan in self.experts if (plan.size, len(plan.kept)) == (before, after)
            }
            if before != after and len(known) == 1:
                index = torch.tensor(known.pop(), device=numbers.device)
                numbers = numbers.index_select(dim, index)
        return numbers
