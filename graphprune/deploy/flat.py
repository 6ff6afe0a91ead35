"""A model as engines see it: named tensors in, named tensors out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.errors import InputError
from graphprune.record.inputs import Call, parameter_names
from graphprune.record.outputs import Outputs, named_leaves


@dataclass(frozen=True)
class Port:
    """An input or output of a file: its name, dtype, and sizes, open ones by name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        """As ``input float32[batch, 3, 224, 224]``."""
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"


class Flat(nn.Module):
    """Takes the tensors of a call and returns the tensors of the output, as tuples.

    Everything else in the call (flags, ``None``) is part of this module, as it is of an exported
    program.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        leaves, self.tree = pytree.tree_flatten((call.args, call.kwargs))
        self.fixed = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self.chosen: tuple[int, ...] | None = None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model."""
        return self.tensors_of(self.whole(*tensors))

    def whole(self, *tensors: Tensor) -> Any:
        """What the model itself returns."""
        args, kwargs = self.call(tensors)
        return self.model(*args, **kwargs)

    def call(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the model that hold these tensors."""
        given = iter(tensors)
        leaves = [next(given) if fixed is None else fixed[0] for fixed in self.fixed]
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        return args, kwargs

    def tensors_of(self, out: object) -> tuple[Tensor, ...]:
        """The tensors of an output that are wanted, in order."""
        found = [leaf for _, leaf in named_leaves(out)]
        return tuple(found if self.chosen is None else (found[place] for place in self.chosen))

    def choose(self, out: object, outputs: Outputs | None) -> list[str]:
        """Settle which outputs are wanted; their names.

        Raises:
            InputError: there is no such output, or none that is a tensor.
        """
        named = named_leaves(out)
        if not named:
            raise InputError(f"the model returns {type(out).__name__}, without any tensor")
        if outputs is not None:
            self.chosen = tuple(sorted(outputs.counted(out, [leaf for _, leaf in named])))
            named = [named[place] for place in self.chosen]
        if isinstance(out, Tensor):
            return ["output"]
        return [_name(way, "output") for way, _ in named]


def input_names(model: nn.Module, call: Call) -> list[str]:
    """The names of the tensors of a call: those of the arguments that hold them."""
    arguments = parameter_names(model)
    names = []
    for place, value in enumerate(call.args):
        key = arguments[place] if place < len(arguments) else f"input_{place}"
        names += [_name(f"{key}{way}", "input") for way, _ in named_leaves(value)]
    for key, value in call.kwargs.items():
        names += [_name(f"{key}{way}", "input") for way, _ in named_leaves(value)]
    return names


def unique(names: Iterable[str], taken: Sequence[str] = ()) -> list[str]:
    """The names, with a number behind those that stand twice."""
    found: list[str] = []
    for name in names:
        other, number = name, 1
        while other in found or other in taken:
            number += 1
            other = f"{name}_{number}"
        found.append(other)
    return found


def chosen_names(given: Sequence[str] | str | None, own: list[str], what: str) -> list[str]:
    """The names that the user gives, or else those of the model's code.

    Raises:
        InputError: they are no texts, not as many, or not all different.
    """
    if given is None:
        return unique(own)
    names = [given] if isinstance(given, str) else given
    texts = isinstance(names, list | tuple) and all(isinstance(n, str) and n for n in names)
    if not texts or len(set(names)) != len(own) or len(names) != len(own):
        raise InputError(
            f"{what}_names must be {len(own)} different names, for {', '.join(own)}; got {given!r}"
        )
    return list(names)


def _name(way: str, kind: str) -> str:
    """The way to a tensor as a name: ``['logits'][0]`` is ``logits_0``."""
    name = re.sub(r"\W+", "_", way).strip("_")
    return name if name and not name[0].isdigit() else f"{kind}_{name}".rstrip("_")


def type_name(kind: torch.dtype) -> str:
    """A dtype without torch's prefix."""
    return str(kind).removeprefix("torch.")


def on_cpu(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors as engines take them: on the CPU, contiguous, without gradients."""
    return [tensor.detach().to("cpu").contiguous() for tensor in tensors]


def finite_range(tensor: Tensor) -> tuple[float, float]:
    """Mean and spread of the finite values of a tensor; those of a normal draw where it is flat."""
    values = tensor.detach().to("cpu", torch.float64)
    values = values[values.isfinite()]
    if values.numel() < 2 or float(values.std()) == 0:
        return 0.0, 1.0
    return float(values.mean()), float(values.std())
