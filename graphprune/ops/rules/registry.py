"""What rules are about and where they are kept: values, reasons, and the table of rules."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ops.ids import Layers, Shape

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}
MAKERS: set[Rule] = set()  # rules whose ops make channels that no input has


@dataclass(frozen=True)
class Reason:
    """Why channels are frozen: the op, the module that ran it and the user's source line."""

    text: str
    module: str = ""
    line: str | None = None

    def __str__(self) -> str:
        """For tables."""
        where = f" in {self.module}" if self.module else ""
        return f"{self.text}{where}" + (f" ({self.line})" if self.line else "")


@dataclass(frozen=True)
class Value:
    """A tensor of the recorded graph.

    ``constant`` values are made of parameters alone; ``given`` ones of model inputs alone. A value
    is ``linear`` in a parameter when zeroing the parameter zeroes it as well.
    """

    shape: Shape
    layers: Layers = ()
    constant: bool = False
    given: bool = False
    linear: bool = False

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def on(self, dim: int) -> list[Tensor]:
        """The layers that vary along ``dim``."""
        return [layer for layer in self.layers if layer.shape[dim] > 1]


def register_rule(*targets: Any, makes: bool = False) -> Callable[[Rule], Rule]:
    """Register the rule of ops, given as ``torch.ops.namespace.op`` packets or functions.

    Args:
        *targets: the ops; a text names an op that may be absent from this version of torch.
        makes: the ops make channels that can be cut even where no input has any.

    Raises:
        KeyError: an op has a rule already.

    Example:
        >>> import torch
        >>> from graphprune.ops.rules import register_rule, registered
        >>> registered(torch.ops.aten.bmm)
        True
    """

    def decorate(rule: Rule) -> Rule:
        for target in targets:
            if target in RULES:
                raise KeyError(f"{target} has a rule already")
            RULES[target] = rule
        if makes:
            MAKERS.add(rule)
        return rule

    return decorate


def registered(target: Any) -> bool:
    """Whether an op has a rule of its own."""
    return target in RULES


def op_name(node: fx.Node) -> str:
    """The name of an op or of a custom autograd function, for reports."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target} (inside vmap)" if node.meta.get("transformed") else str(target)
    if isinstance(getattr(target, "__self__", None), type):
        return f"{target.__self__.__name__} (autograd function)"
    return getattr(target, "__name__", str(target))


def unused(graph: fx.Graph) -> set[fx.Node]:
    """Ops whose results nothing reads in the end."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        changes = node.target is not operator.getitem and (schema is None or schema.is_mutable)
        if node.op == "call_function" and not changes and all(u in found for u in node.users):
            found.add(node)
    return found


def unruly(node: fx.Node) -> bool:
    """Whether an op is not what its rule is about.

    It writes into a tensor given as ``out``, and is not pointwise; or ``torch.vmap`` hides
    dimensions from it.
    """
    op: Any = node.target
    out = getattr(op, "_overloadname", "").endswith("out") and torch.Tag.pointwise not in op.tags
    return out or bool(node.meta.get("transformed"))
