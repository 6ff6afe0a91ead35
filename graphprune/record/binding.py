"""Which argument of an op a number is that the user's code gave to a function of torch.

A function and the ops it is made of name the same argument alike, or by names that stand here. A
place of a dimension (of a slice, say) is told by that dimension, as ops see it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.ops.calls import FUNCTORCH, Args, Function, Kwargs
from graphprune.ops.given import Number, meant
from graphprune.ops.ids import Path
from graphprune.record.sizes import Scale, plain

INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class Argument(NamedTuple):
    """An argument of a function or op, and a place in it when it is a list."""

    name: str
    place: int = 0


_NONE = Argument("")
_NAMES = {"new": "new_empty"}  # methods by another name than the op whose arguments they take


def numbers_given(
    function: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> list[Number]:
    """The numbers among the arguments of a call, each bound to an argument of the op it is for."""
    found = [*_numbers(args, ()), *_numbers(kwargs, ())]
    if not found:
        return []
    paths = tuple(path for _, path in found)
    if function in INDEXING:
        arguments = dict(_indexed(args[0], args[1]))
        return [Number(n, path, *arguments.get(path, _NONE)) for n, path in found]
    bound = _named(function, paths)
    dim = next((plain(n) for (n, _), (name, _) in zip(found, bound) if name == "dim"), 0)
    if dim < 0:
        tensor = args[0] if args else kwargs.get("input", kwargs.get("self"))
        dim += tensor.dim() if isinstance(tensor, Tensor) else 0
    pairs = zip(found, bound)
    return [Number(n, path, *meant(name, place, dim)) for (n, path), (name, place) in pairs]


def _numbers(tree: object, path: Path) -> Iterator[tuple[float, Path]]:
    if isinstance(tree, Scale) or (isinstance(tree, int) and not isinstance(tree, bool)):
        yield tree, path
    elif isinstance(tree, np.integer):
        yield int(tree), path
    elif isinstance(tree, tuple | list):
        for index, item in enumerate(tree):
            yield from _numbers(item, (*path, index))
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from _numbers(item, (*path, key))
    elif isinstance(tree, slice):
        for key in ("start", "stop", "step"):
            yield from _numbers(getattr(tree, key), (*path, key))


class _Parameter(NamedTuple):
    """A parameter of a function: whether it takes a single int, a list of them, all that follow."""

    name: str
    single: bool = True
    several: bool = True
    rest: bool = False


@functools.lru_cache(maxsize=4096)
def _named(function: Callable[..., object], paths: tuple[Path, ...]) -> tuple[Argument, ...]:
    """The arguments that stand at the paths of a call of a function."""
    ways = [tuple(_argument(form, path) for path in paths) for form in _forms(function)]
    return max(ways, key=lambda way: sum(bool(argument.name) for argument in way))


@functools.cache
def _forms(function: Callable[..., object]) -> Sequence[Sequence[_Parameter]]:
    """The parameters of a function, for each of its forms."""
    code = getattr(function, "__code__", None)
    if code is not None:  # written in Python
        form = [_Parameter(name) for name in code.co_varnames[: code.co_argcount]]
        if code.co_flags & inspect.CO_VARARGS:
            name = code.co_varnames[code.co_argcount + code.co_kwonlyargcount]
            form.append(_Parameter(name, rest=True))
        return [form]
    name = getattr(function, "__name__", "")
    op = getattr(torch.ops.aten, _NAMES.get(name, name), None)
    if not isinstance(op, torch._ops.OpOverloadPacket):
        return [[]]
    return [list(_declared(getattr(op, name)._schema)) for name in op.overloads()]


def _declared(schema: torch.FunctionSchema) -> Iterator[_Parameter]:
    """A list that is the only argument by place may be given number by number."""
    by_place = [a.name for a in schema.arguments if not a.kwarg_only and a.name != "self"]
    for argument in schema.arguments:
        kind = str(argument.type)
        several = "List[int]" in kind
        single = not several and ("int" in kind or "number" in kind)
        yield _Parameter(argument.name, single, several, several and by_place == [argument.name])


def _argument(form: Sequence[_Parameter], path: Path) -> Argument:
    """What stands at a path of a call."""
    head, *inside = path
    place = inside[0] if inside and isinstance(inside[0], int) else 0
    if isinstance(head, str):
        return Argument(head, place)
    if not inside:
        for start, parameter in enumerate(form[: head + 1]):
            if parameter.rest:
                return Argument(parameter.name, head - start)
    if head >= len(form) or not (form[head].several if inside else form[head].single):
        return _NONE
    return Argument(form[head].name, place)


def _indexed(tensor: object, index: object) -> Iterator[tuple[Path, Argument]]:
    """The numbers of an index, each with the dimension that it is a place of when its op runs."""
    assert isinstance(tensor, Tensor)
    items = index if isinstance(index, tuple) else (index,)
    dim = 0
    for place, item in enumerate(items):
        path: Path = (1, place) if isinstance(index, tuple) else (1,)
        if isinstance(item, slice):
            yield (*path, "start"), Argument("start", dim)
            yield (*path, "stop"), Argument("end", dim)
        elif type(item) is not bool and isinstance(item, int):
            yield path, Argument("index", dim)
            continue  # the dimension goes
        elif item is Ellipsis:
            dim += tensor.dim() - sum(map(_dims_of, items))
            continue
        dim += 1 if item is None or isinstance(item, bool) else _dims_left(item)


def _dims_of(item: object) -> int:
    """How many dimensions an item of an index takes."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    mask = isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8)
    return item.dim() if mask and isinstance(item, Tensor) else 1


def _dims_left(item: object) -> int:
    """How many dimensions it leaves until all others have been looked at."""
    alone = isinstance(item, Tensor) and not item.dim() and item.dtype not in (torch.bool,)
    return 0 if alone else _dims_of(item)


def tensors_given(target: Function, args: Args, kwargs: Kwargs) -> Iterator[tuple[Tensor, Any]]:
    """The tensors that an op is given, each with what its schema says of the argument."""
    schema: Any = getattr(target, "_schema", None)
    named = {} if schema is None else {argument.name: argument for argument in schema.arguments}
    pairs = [*zip([*named.values()] or [None] * len(args), args)]
    pairs += [(named.get(name), value) for name, value in kwargs.items()]
    for argument, value in pairs:
        for tensor in pytree.tree_leaves(value):
            if isinstance(tensor, Tensor):
                yield unwrapped(tensor), argument


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside those of ``torch.vmap`` and its kind."""
    while FUNCTORCH.is_functorch_wrapped_tensor(tensor):
        tensor = FUNCTORCH.get_unwrapped(tensor)
    return tensor
