"""Which outputs of a model count: the others may lose channels."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.arguments import is_int
from graphprune.errors import InputError

Name = str | int | tuple[str | int, ...]


@dataclass(frozen=True)
class Outputs:
    """What the user says of the outputs: names, or a function that reads them.

    Attributes:
        names: keys, attributes or places of the output; a tuple leads into nested ones.
        reads: a function of the output; what its result is made of counts.
    """

    names: tuple[Name, ...] = ()
    reads: Callable[[object], object] | None = None

    @classmethod
    def of(cls, spec: Any) -> Outputs | None:
        """What ``outputs=`` of ``trace`` may be.

        Raises:
            InputError: it is neither a name, nor names, nor a function.
        """
        if spec is None or isinstance(spec, cls):
            return spec
        if callable(spec):
            return cls(reads=spec)
        if isinstance(spec, str) or is_int(spec):
            return cls((spec,))
        names = tuple(spec) if isinstance(spec, list | tuple | set | frozenset) else ()
        if not names or not all(map(_is_name, names)):
            raise InputError(
                "outputs must be names or places of the model's outputs, such as 'logits', 0 or "
                f"['boxes', ('aux', 1)], or a function of the output; got {spec!r}"
            )
        return cls(names)

    def counted(self, out: object, leaves: list[Tensor]) -> frozenset[int]:
        """The places of the tensors that count among all tensors of an output.

        Raises:
            InputError: there is no output of a name, or the function reads none.
        """
        chosen = [self._named(out, name) for name in self.names]
        ids = {id(t) for t in pytree.tree_leaves([fields(part) for part in chosen])}
        found = {place for place, leaf in enumerate(leaves) if id(leaf) in ids}
        if self.reads is not None:
            found |= _read(self.reads, out, leaves)
        if not found and not self.inside(out, leaves):
            raise InputError("outputs names nothing of the output that is a tensor")
        return frozenset(found)

    def inside(self, out: object, leaves: list[Tensor], state: Container[int] = ()) -> list[Tensor]:
        """What counts besides, in objects that pytree does not know.

        That is what names lead to; of what a function reads all but ``state``, objects by ``id``.
        """
        parts = [out] if self.reads is not None else [self._named(out, name) for name in self.names]
        known = {id(leaf) for leaf in leaves}
        found: list[Tensor] = []
        for leaf in pytree.tree_leaves([fields(part) for part in parts]):
            if isinstance(leaf, Tensor):
                found += [leaf] if id(leaf) not in known else []
            elif self.reads is None or id(leaf) not in state:
                found += tensors_inside(leaf)
        return found

    def _named(self, out: Any, name: Name) -> Any:
        for key in name if isinstance(name, tuple) else (name,):
            try:
                known = isinstance(out, Mapping) or isinstance(key, int)
                out = out[key] if known else getattr(out, str(key))
            except (KeyError, IndexError, TypeError, AttributeError):
                raise InputError(
                    f"outputs names {name!r}, which the output lacks; it has {_names(out)}"
                ) from None
        return out


def fields(out: object) -> Any:
    """Outputs that pytree does not know (dataclasses, plain objects) as dictionaries."""
    if isinstance(out, Tensor | tuple | list | dict):
        return out
    return vars(out) if hasattr(out, "__dict__") else out


def tensors_inside(leaf: object) -> list[Tensor]:
    """The tensors in an output that is no tensor: in objects that pytree does not know."""
    return [*_tensors_in(leaf, set())]


def _tensors_in(value: object, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor) or id(value) in seen or isinstance(value, nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        items: Any = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        items = value
    else:
        slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
        items = (
            *getattr(value, "__dict__", {}).values(),
            *(getattr(value, n, None) for n in slots),
        )
    for item in items:
        if isinstance(item, Tensor):
            yield item
        yield from _tensors_in(item, seen)


def taken_back(model: nn.Module, out: object, handed: Mapping[int, object]) -> list[object]:
    """State: objects that go to the modules inside, and are returned by the name of an argument.

    Caches of keys and values for the next call are. Tensors, and those in tuples, lists and
    dictionaries, are outputs all the same, and so is what was made only to be returned.
    """
    named = fields(out)
    try:
        arguments = inspect.signature(type(model).forward).parameters
    except (TypeError, ValueError):  # of a callable without one
        return []
    if not isinstance(named, dict):
        return []
    found = [value for name, value in named.items() if name in arguments and id(value) in handed]
    return [value for value in found if not isinstance(value, Tensor | tuple | list | dict)]


def named_leaves(out: object) -> list[tuple[str, Tensor]]:
    """The tensors in an output, in order, each with the way to it: ``"['logits']"``."""
    tree = fields(out)
    try:
        found = [(pytree.keystr(way), leaf) for way, leaf in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError:  # of a class that pytree was told of, but not what its parts are called
        found = [(f"[{place}]", leaf) for place, leaf in enumerate(pytree.tree_leaves(tree))]
    return [(name, leaf) for name, leaf in found if isinstance(leaf, Tensor)]


def _is_name(value: object) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(map(_is_name, value))
    return isinstance(value, str) or is_int(value)


def _names(out: object) -> str:
    if isinstance(out, Tensor):
        return "no parts: it is a tensor"
    if isinstance(out, list | tuple) and not hasattr(out, "_fields"):
        return f"the places 0 to {len(out) - 1}"
    found: Iterable[object] = getattr(out, "_fields", None) or fields(out)
    return ", ".join(map(repr, found)) if isinstance(found, Mapping | tuple) else type(out).__name__


def _read(function: Callable[[object], object], out: object, leaves: list[Tensor]) -> set[int]:
    """Which tensors of an output the result of a function is made of, as autograd sees it.

    It is run on made-up values on the CPU: a loss may hold targets there.
    """
    generator = torch.Generator().manual_seed(0)
    copies: dict[int, Tensor] = {}
    for leaf in leaves:
        made = torch.rand(leaf.shape, generator=generator).to(leaf.dtype)
        smooth = leaf.is_floating_point() or leaf.is_complex()
        copies.setdefault(id(leaf), made.requires_grad_(smooth))

    def swap(leaf: Tensor) -> Tensor:
        return copies.get(id(leaf), leaf)

    if fields(out) is out:
        given = pytree.tree_map_only(Tensor, swap, out)
    else:
        given = copy.copy(out)
        state: dict[str, object] = given.__dict__
        state.update(pytree.tree_map_only(Tensor, swap, vars(out)))
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        try:
            result = function(given)
        except Exception as error:
            raise InputError(
                "the function given as outputs fails on the output: "
                f"{type(error).__name__}: {error}"
            ) from error
    results = [t for t in pytree.tree_leaves(fields(result)) if isinstance(t, Tensor)]
    places = {id(copies[id(leaf)]): place for place, leaf in enumerate(leaves)}
    found = {places[id(tensor)] for tensor in results if id(tensor) in places}
    computed = [t for t in results if t.requires_grad and id(t) not in places]
    smooth_ones = [tensor for tensor in copies.values() if tensor.requires_grad]
    if computed and smooth_ones:
        grads = torch.autograd.grad([t.sum() for t in computed], smooth_ones, allow_unused=True)
        found |= {places[id(t)] for t, grad in zip(smooth_ones, grads) if grad is not None}
    if not found:
        raise InputError("the function given as outputs returns nothing made of the outputs")
    return found
