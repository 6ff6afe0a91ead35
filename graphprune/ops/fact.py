"""Values of which it is known, position by position, whether they depend on the model's input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.ops.calls import Overload


class Unfollowed(RuntimeError):
    """A form of an op that a rule does not follow: its results are unknown."""


@dataclass(frozen=True)
class Fact:
    """A tensor of a recorded graph.

    Where ``unknown`` is false, ``value`` is what the model computes for every input; elsewhere
    ``value`` says nothing. Both have the shape of the tensor. Floating point is double precision.
    """

    value: Tensor
    unknown: Tensor

    @classmethod
    def known(cls, value: Tensor) -> Fact:
        """A tensor that is the same for every input."""
        return cls(value, torch.zeros_like(value, dtype=torch.bool))

    @classmethod
    def nothing(cls, shape: Iterable[int], dtype: torch.dtype) -> Fact:
        """A tensor of which nothing is known."""
        value = torch.ones(tuple(shape), dtype=double(dtype))
        return cls(value, torch.ones_like(value, dtype=torch.bool))

    @classmethod
    def checked(cls, value: Tensor, unknown: Tensor) -> Fact:
        """A result; what is not a number (0 times infinity) is not worth knowing."""
        if value.is_floating_point() or value.is_complex():
            unknown = unknown | value.isnan()
        return cls(value, unknown)

    @property
    def constant(self) -> bool:
        """Whether all of it is known."""
        return not bool(self.unknown.any())

    @property
    def nonzero(self) -> Tensor:
        """Where it is not known to be zero."""
        return self.unknown | (self.value != 0)

    @property
    def zero(self) -> Tensor:
        """Where it is known to be zero."""
        return ~self.nonzero

    def filled(self, number: float = 1) -> Tensor:
        """The values, with a harmless number where they are unknown."""
        return self.value.masked_fill(self.unknown, number)


def double(dtype: object) -> Any:
    """Double precision for a floating point dtype; everything else stays."""
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return torch.float64 if floating else dtype


def found(tree: object) -> list[Fact]:
    """All facts among arguments."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Fact)]


def values(tree: object, number: float = 1) -> Any:
    """Arguments with filled values in the place of facts."""
    return pytree.tree_map_only(Fact, lambda fact: fact.filled(number), tree)


def arguments(op: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments of an op by name, defaults included."""
    bound = {}
    for place, argument in enumerate(op._schema.arguments):
        if place < len(args):
            bound[argument.name] = args[place]
        else:
            bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound


def reached(product: Callable[..., Tensor], factors: Sequence[Fact]) -> Tensor:
    """Where an unknown product is added, as a boolean tensor."""
    marks = [fact.nonzero.double() for fact in factors]
    total: Tensor | None = None
    for place, fact in enumerate(factors):
        if fact.constant:
            continue
        open_ = [*marks[:place], fact.unknown.double(), *marks[place + 1 :]]
        part = product(*open_) > 0.5
        total = part if total is None else total | part
    return torch.zeros_like(product(*marks), dtype=torch.bool) if total is None else total


def contracted(
    product: Callable[..., Tensor], factors: Sequence[Fact], bias: Fact | None = None
) -> Fact:
    """A sum of products, and what is added to it afterwards (already in shape)."""
    value = product(*(fact.filled(0) for fact in factors))
    unknown = reached(product, factors)
    if bias is not None:
        value, unknown = value + bias.filled(0), unknown | bias.unknown
    return Fact.checked(value, unknown)


def reached_nowhere(x: Fact, weight: Fact) -> bool:
    """Whether plainly nothing comes out known: spares the work for layers without zeroes."""
    if weight.value.dim() < 2 or not bool(x.unknown.all()):
        return False
    whole = weight.nonzero.flatten(2).all(2) if weight.value.dim() > 2 else weight.nonzero
    return bool(whole.any(1).all())


def _unknown(tree: object) -> Any:
    if isinstance(tree, Fact):
        return tree.unknown
    return [_unknown(item) for item in tree] if isinstance(tree, list | tuple) else tree


def _value(tree: object) -> Any:
    if isinstance(tree, Fact):
        return tree.value
    return [_value(item) for item in tree] if isinstance(tree, list | tuple) else tree


def moved_fact(op: Overload, x: object, *args: object, **kwargs: object) -> Any:
    """Views stay views of the same memory, so that what is written into one is seen in all."""
    value = op(_value(x), *_value(args), **kwargs)
    unknown = op(_unknown(x), *_unknown(args), **kwargs)
    if isinstance(value, Tensor):
        return Fact(value, unknown)
    return list(map(Fact, value, unknown))


def moved_numbers_fact(op: Overload, x: Fact, *args: object, **kwargs: object) -> Fact:
    """Ops that want floating point; what they pad with is known."""
    value = op(x.value, *args, **kwargs)
    if op.overloadpacket is torch.ops.aten.constant_pad_nd:
        args = args[:1]  # the padding itself is known: zero
    return Fact(value, op(x.unknown.double(), *args, **kwargs) != 0)


def along_unknown(unknown: Tensor, dims: list[int]) -> Tensor:
    """Whether anything along ``dims`` is unknown; the dimensions stay, with size 1."""
    for dim in dims:
        unknown = unknown.any(dim, keepdim=True)
    return unknown
