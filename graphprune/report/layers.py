"""Layers of a model before and after: widths, parameters, multiply-accumulates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from graphprune.ops.views import macs_of
from graphprune.plan.leaving import in_what_left, names_before
from graphprune.plan.plan import Plan
from graphprune.record.cost import recorded_shape
from graphprune.record.recorder import Record
from graphprune.record.tensors import named_modules
from graphprune.training.history import widths_of


@dataclass(frozen=True)
class Layer:
    """A module with parameters or multiply-accumulates of its own.

    Attributes:
        name: of the module; empty for the model itself.
        kind: its class.
        before: output channels of the original; 0 where that says nothing.
        after: those that are left.
        params: parameters of its own, before and after.
        macs: multiply-accumulates of its own ops, before and after.
        left: whether the whole module left.
    """

    name: str
    kind: str
    before: int
    after: int
    params: tuple[int, int]
    macs: tuple[int, int]
    left: bool = False

    @property
    def kept(self) -> float:
        """The share of the output channels that is left; else of parameters, else of MACs."""
        pairs = ((self.before, self.after), self.params, self.macs)
        return next((after / before for before, after in pairs if before), 1.0)


def layers_of(
    model: nn.Module, record: Record, small: nn.Module, small_record: Record, plan: Plan
) -> list[Layer]:
    """The layers of a model and of what a plan made of it, in the order in which they run.

    Args:
        model: the original.
        record: its forward pass.
        small: the small model.
        small_record: its forward pass.
        plan: what leads from one to the other.
    """
    name_before = names_before(plan)
    left = in_what_left(model, plan)
    before, after = _macs(record), _macs(small_record, name_before)
    own, own_after = _params(model), {name_before(n): c for n, c in _params(small).items()}
    widths = _widths(model)
    widths_after = {name_before(n): width for n, width in _widths(small).items()}
    kinds = {name: type(module).__name__ for name, module in named_modules(model)}
    order = dict.fromkeys([*_order(record), *kinds])
    found = []
    for name in order:
        if not own.get(name) and not before.get(name):
            continue
        gone = left(f"{name}.")
        found.append(
            Layer(
                name,
                kinds.get(name, ""),
                widths.get(name, 0),
                0 if gone else widths_after.get(name, 0),
                (own.get(name, 0), 0 if gone else own_after.get(name, 0)),
                (before.get(name, 0), 0 if gone else after.get(name, 0)),
                gone,
            )
        )
    return found


def _order(record: Record) -> Iterable[str]:
    return (str(node.meta.get("module", "")) for node in record.ops)


def _macs(record: Record, name_of: object = None) -> dict[str, int]:
    """Multiply-accumulates by the module that ran them."""
    found: dict[str, int] = {}
    for node in record.ops:
        name = str(node.meta.get("module", ""))
        name = name_of(name) if callable(name_of) else name
        found[name] = found.get(name, 0) + int(macs_of(node, recorded_shape))
    return found


def _params(model: nn.Module) -> dict[str, int]:
    """Parameters by the module that holds them first."""
    seen: set[int] = set()
    found: dict[str, int] = {}
    for name, module in named_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[name] = found.get(name, 0) + parameter.numel()
    return found


def _widths(model: nn.Module) -> Mapping[str, int]:
    """Output channels, of norms as well."""
    vectors = {
        name: module._parameters["weight"]
        for name, module in named_modules(model)
        if module._parameters.get("weight") is not None
    }
    alone = {name: len(w) for name, w in vectors.items() if w is not None and w.dim() == 1}
    return {**alone, **widths_of(model)}
