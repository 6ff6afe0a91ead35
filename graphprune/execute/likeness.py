"""Whether what a config builds is the small model: shapes, attributes, values, outputs."""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import itertools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.execute.building import untouched
from graphprune.record.copying import copy_module
from graphprune.record.inputs import Call
from graphprune.record.tensors import named_modules, named_tensors
from graphprune.text import shorten

Key = tuple[str, str]  # a module and its attribute
Shapes = dict[tuple[str, int], int]
Plain = dict[Key, Any]
_ATOMS = (int, float, str, bool, type(None), torch.dtype)
_OF_TORCH = frozenset(vars(nn.Module()))  # what every module has
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def shapes_of(model: nn.Module) -> Shapes:
    """The sizes of all parameters and buffers."""
    return {
        (name, dim): size
        for name, tensor in named_tensors(model)
        for dim, size in enumerate(tensor.shape)
    }


def plain_of(model: nn.Module) -> Plain:
    """The attributes of all modules that are numbers, texts, or sequences and dicts of such."""
    return {
        (name, key): copy.deepcopy(value)
        for name, module in named_modules(model)
        for key, value in vars(module).items()
        if key not in _OF_TORCH and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _ATOMS)


@dataclass
class Likeness:
    """What differs between a small model and one built from a config."""

    problem: str = ""
    follow: Plain = field(default_factory=dict)  # ints that no forward seems to read


def compare(small: nn.Module, built: nn.Module, before: Plain, base: Plain) -> Likeness:
    """Compare everything that a file of the weights does not hold.

    Args:
        small: the small model.
        built: what the changed config builds.
        before: the plain attributes of the model that ``small`` was made of.
        base: those of what the config built before it was changed.
    """
    problem = _tensors_differ(small, built)
    found = Likeness(problem)
    if problem:
        return found
    mine, theirs = plain_of(small), plain_of(built)
    for key, value in theirs.items():
        if mine.get(key, value) == value or (
            mine[key] == before.get(key) and value == base.get(key)
        ):
            continue
        if mine[key] == before.get(key) and _ints(value) and _ints(mine[key]):
            found.follow[key] = value
            continue
        name = ".".join(filter(None, key))
        found.problem = f"it makes {name} {_text(value)}, which is {_text(mine[key])} in this model"
        return found
    for key in mine.keys() - theirs.keys():
        if key not in before or mine[key] != before[key]:
            found.problem = f"it does not make {'.'.join(filter(None, key))}"
            return found
    return found


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:80]


def _ints(value: object) -> bool:
    items = value if isinstance(value, list | tuple) else (value,)
    return all(type(item) is int for item in items)


def _tensors_differ(small: nn.Module, built: nn.Module) -> str:
    """What tensors the two do not have alike; of those that no file holds, values count."""
    mine, theirs = shapes_of(small), shapes_of(built)
    if mine.keys() != theirs.keys():
        odd = sorted({name for name, _ in mine.keys() ^ theirs.keys()})
        return f"it builds other tensors: {shorten(odd, 3)}"
    for (name, dim), size in mine.items():
        if theirs[name, dim] != size:
            return (
                f"it gives {name} the size {theirs[name, dim]} in dimension {dim}, which is {size} "
                "in this model"
            )
    kept = small.state_dict(keep_vars=True).keys() & built.state_dict(keep_vars=True).keys()
    others = dict(loose(built))
    for name, tensor in loose(small):
        other = others.get(name)
        if name in kept or other is None or tensor.is_meta:
            continue
        if other.shape != tensor.shape or not _equal(tensor, other.to(tensor), 0.0):
            return f"it computes other values for {name}, which no file holds"
    return ""


def loose(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, and tensors that are plain attributes."""
    for prefix, module in named_modules(model):
        for name, value in (*module._buffers.items(), *vars(module).items()):
            if isinstance(value, Tensor):
                yield (f"{prefix}.{name}" if prefix else name), value


def filled(built: nn.Module, small: nn.Module) -> nn.Module:
    """Give what was built the weights of the small model, which it shares, and its buffers."""
    state = small.state_dict(keep_vars=True)
    values = {
        name: value.detach() if isinstance(value, nn.Parameter) else copy.deepcopy(value)
        for name, value in state.items()
    }
    built.load_state_dict(values, assign=True)
    mine = dict(loose(small))
    for prefix, module in named_modules(built):
        for store in (module._buffers, vars(module)):
            for name, value in store.items():
                like = mine.get(f"{prefix}.{name}" if prefix else name)
                if isinstance(value, Tensor) and like is not None:
                    store[name] = value.to(like)
    return built.train(small.training)


@dataclass
class Seen:
    """What parts of a model were given and returned in one forward pass of the whole."""

    inputs: dict[str, Call] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


def watch(model: nn.Module, parts: list[str], call: Call, training: bool = False) -> Seen:
    """Run a copy of a model, and keep what goes into some of its modules and comes out."""
    clone = copy_module(model, {id(p): p for p in model.parameters()}).train(training)
    seen, handles = Seen(), []

    def before(name: str, args: Any, kwargs: Any) -> None:
        if name not in seen.inputs:
            seen.inputs[name] = Call(*copy.deepcopy((args, kwargs)))

    def after(name: str, out: object) -> None:
        seen.outputs.setdefault(name, _leaves(out))

    for name in parts:
        module = clone.get_submodule(name)
        handles += [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
            ),
            module.register_forward_hook(lambda _, args, out, name=name: after(name, out)),
        ]
    with untouched(), torch.no_grad():
        torch.manual_seed(0)
        args, kwargs = call.on(_device(model))
        clone(*args, **kwargs)
    return seen


def same_outputs(built: nn.Module, inputs: Call, outputs: list[Tensor], training: bool) -> str:
    """Why what was built is another function on these inputs; empty when it is the same one."""
    try:
        with untouched(), torch.no_grad():
            torch.manual_seed(0)
            found = _leaves(built.train(training)(*inputs.args, **inputs.kwargs))
    except Exception as error:
        return f"a model built from it does not run on the example inputs ({_first_line(error)})"
    return _differ(outputs, found)


def alike(outputs: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two runs returned the same."""
    return not _differ(outputs, others)


def _differ(outputs: list[Tensor], found: list[Tensor]) -> str:
    if len(found) != len(outputs):
        return f"a model built from it returns {len(found)} tensors, this one {len(outputs)}"
    for mine, other in zip(outputs, found):
        if mine.shape != other.shape:
            return (
                f"a model built from it returns {list(other.shape)} where this one returns "
                f"{list(mine.shape)}"
            )
        if not _equal(mine, other, _TOLERANCE.get(mine.dtype, 3e-2)):
            return "a model built from it computes something else on the example inputs"
    return ""


def _leaves(out: object) -> list[Tensor]:
    if not isinstance(out, Tensor | tuple | list | dict) and hasattr(out, "__dict__"):
        out = vars(out)
    leaves = pytree.tree_leaves(out)
    return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]


def _equal(mine: Tensor, other: Tensor, tolerance: float) -> bool:
    if not (mine.is_floating_point() or mine.is_complex()):
        return torch.equal(mine, other.to(mine))
    bound = tolerance * float(mine.detach().abs().nan_to_num(0, 0, 0).max()) if mine.numel() else 0
    return torch.allclose(mine, other.to(mine), rtol=0.0, atol=bound, equal_nan=True)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:200]


# --- what code says, where there are no inputs ------------------------------------------------


def reader(model: nn.Module, attribute: str, names: set[str]) -> str:
    """A method that reads an attribute of what is called by one of some names, if there is one."""
    kinds: dict[object, None] = dict.fromkeys(type(m) for _, m in named_modules(model))
    for kind in kinds:
        for function in () if kind.__module__.startswith("torch.nn") else _methods(kind):
            if any((name, attribute) in _attributes_read(function) for name in names):
                return str(function.__qualname__)
    return ""


@functools.cache
def used(kind: object) -> frozenset[str]:
    """The names that the methods of a class read, apart from its constructor."""
    return frozenset(name for f in _methods(kind) for name in f.__code__.co_names)


@functools.cache
def _methods(kind: Any) -> tuple[types.FunctionType, ...]:
    """The methods of a class, constructors aside, and the functions beside it that they call."""
    waiting: list[Any] = []
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)] if nn.Module in kind.__mro__ else ():
        items = [v for k, v in vars(base).items() if k not in ("__init__", "extra_repr")]
        waiting += [inspect.unwrap(v) if callable(v) else getattr(v, "fget", v) for v in items]
    found: dict[types.FunctionType, None] = {}
    while waiting:
        function = waiting.pop()
        if not isinstance(function, types.FunctionType) or function in found:
            continue
        found[function] = None
        named = (function.__globals__.get(name) for name in function.__code__.co_names)
        waiting += [f for f in named if getattr(f, "__module__", "") == function.__module__]
    return tuple(found)


@functools.cache
def _attributes_read(function: types.FunctionType) -> frozenset[tuple[str, str]]:
    """What a function reads: the name of a thing, and the attribute."""
    steps = itertools.pairwise(dis.get_instructions(function))
    return frozenset(
        (str(thing.argval), str(step.argval))
        for thing, step in steps
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD")
    )
