"""The ATen ops of a running model: what they read of removed channels, what they draw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphprune.ops.calls import Args, Function, Kwargs, OpMode
from graphprune.ops.views import run_on_meta
from graphprune.verification.follow import Follower, Undecided

aten = torch.ops.aten


def masked(follower: Follower, node: fx.Node) -> bool:
    """Whether an op that sums over channels reads some that are removed."""
    reads = follower.walk.marks.sums(node)
    return reads and any(follower.mask(source) is not None for source in node.all_input_nodes)


def zeroed(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """Zero where the mask is false, whatever stood there."""
    if keep is None:
        return tensor
    return torch.where(keep.to(tensor.device), tensor, False if tensor.dtype is torch.bool else 0)


Draw = tuple[Any, Tensor, list[Tensor]]  # the op, its random numbers, what stays of them


class Dispatch(OpMode):
    """Sees the ATen ops: those that a function is made of, and those that no function ran."""

    def __init__(self, follower: Follower) -> None:
        super().__init__()
        self.follower = follower
        self.nodes: list[fx.Node] | None = None  # of the function that is taken apart
        self.known = False  # whether a function that was taken apart runs
        self.watched = False  # whether random numbers are remembered
        self.drawn: list[tuple[Any, Tensor]] = []

    def __torch_dispatch__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if self.nodes is None and self.known:
            out = func(*args, **kwargs)
            self._watch(func, args, out)
            return out
        on_meta = _on_meta((args, kwargs))
        moves = torch.Tag.inplace_view in getattr(func, "tags", ())
        before = self.follower.nodes_in(args) if moves else None  # it is read where it was
        out = run_on_meta(func, args, kwargs) if on_meta else func(*args, **kwargs)
        node = self.follower.op(func, args, kwargs, out, before)
        if not on_meta:
            self._watch(func, args, out)
        if self.nodes is not None:
            self.nodes.append(node)
        elif masked(self.follower, node):
            raise Undecided(f"{func} sums over removed channels in code that torch compiled")
        return out

    def _watch(self, func: object, args: object, out: object) -> None:
        if self.watched and random_op(func):
            self.drawn.append((func, numbers_of(func, args, out).detach().clone()))


def random_op(func: Any) -> bool:
    """Whether an op draws random numbers; attention without dropout draws none, despite its tag."""
    seeded = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
    return seeded and "attention" not in str(func)


def numbers_of(func: Any, args: Any, out: Any) -> Tensor:
    """The random numbers that an op has drawn."""
    if func in NOISY:
        found: Tensor = args[1]
        return found
    return out[-1] if isinstance(out, tuple) else out


NOISY = {aten.rrelu_with_noise.default, aten.rrelu_with_noise_.default}


def _on_meta(tree: object) -> bool:
    return any(leaf.is_meta for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
