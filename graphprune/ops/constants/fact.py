"""Values of which it is known, position by position, whether they depend on the model's input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Rule = Callable[..., Any]
FACTS: dict[Any, Rule] = {}


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


def double(dtype: Any) -> Any:
    """Double precision for a floating point dtype; everything else stays."""
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return torch.float64 if floating else dtype


def register_fact(*targets: Any) -> Callable[[Rule], Rule]:
    """Register what ops do to facts; a rule is called as ``rule(op, *args, **kwargs)``.

    Tensors among the arguments are facts; the rule returns a fact, or a list of them.

    Raises:
        KeyError: an op has a rule already.
    """

    def decorate(rule: Rule) -> Rule:
        for target in targets:
            if target in FACTS:
                raise KeyError(f"{target} has a rule for facts already")
            FACTS[target] = rule
        return rule

    return decorate


def found(tree: Any) -> list[Fact]:
    """All facts among arguments."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Fact)]


def values(tree: Any, number: float = 1) -> Any:
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
