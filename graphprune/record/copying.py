"""Copy modules fast: what ``copy.deepcopy`` does, without its cost per empty dictionary."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import ModelError
from graphprune.record.sizes import Scale, Size
from graphprune.record.tensors import named_modules

Memo = dict[int, Any]
_ATOMS = frozenset(
    {
        int,
        float,
        bool,
        str,
        bytes,
        complex,
        type(None),
        Scale,
        Size,
        torch.Size,
        torch.jit.ScriptFunction,
        torch.dtype,
        torch.device,
    }
)
_DICTIONARIES = frozenset({dict, OrderedDict})
_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_HOOKS_OF_COPY = ("__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")


class _NotCopied(Exception):
    """An attribute of a module for which Python knows no copy."""

    def __init__(self, owner: nn.Module, name: str, cause: Exception) -> None:
        super().__init__(cause)
        self.owner, self.name, self.cause = owner, name, cause


def copy_module(module: nn.Module, memo: Memo) -> nn.Module:
    """A deep copy of a module.

    Hooks and other functions that hold parts of the original in their closure hold the copies.

    Args:
        module: what to copy.
        memo: copies by the ``id`` of their original, as for ``copy.deepcopy``; map tensors here
            to what shall take their place.

    Raises:
        ModelError: names an attribute that cannot be copied.
    """
    if id(module) in memo:
        return _copy_module(module, memo)
    try:
        clone = _copy_module(module, memo)
    except _NotCopied as error:
        names = {id(part): name for name, part in module.named_modules()}
        owner = names.get(id(error.owner))
        path = f"{owner}.{error.name}" if owner else error.name
        raise ModelError(
            f"attribute {path!r} of {type(error.owner).__name__} cannot be copied "
            f"({type(error.cause).__name__}: {error.cause}): models are analysed on a copy; keep "
            "it outside of the model, or give its class a __deepcopy__"
        ) from error.cause
    for _, part in named_modules(clone):
        state = vars(part)
        for name, value in state.items():
            if isinstance(value, types.FunctionType):
                state[name] = rebound(value, memo)
            elif name in _HOOKS and value:
                for key, hook in value.items():
                    value[key] = rebound(hook, memo)
    return clone


def _copy_module(module: nn.Module, memo: Memo) -> nn.Module:
    known = memo.get(id(module))
    if known is not None:
        return known
    if _copies_itself(type(module)):
        return copy.deepcopy(module, memo)
    clone = type(module).__new__(type(module))
    memo[id(module)] = clone
    state = vars(clone)
    for name, value in vars(module).items():
        if name == "_compiled_call_impl":  # bound to the original; torch's copies lose it as well
            continue
        kind = type(value)
        if kind in _ATOMS:
            state[name] = value
            continue
        if kind in _DICTIONARIES and not value:
            state[name] = memo.setdefault(id(value), kind())  # handles of hooks refer to it
            continue
        try:
            state[name] = _copy(value, memo)
        except _NotCopied:
            raise
        except Exception as error:  # whatever a class raises that is not made for copies
            raise _NotCopied(module, name, error) from error
    return clone


def rebound(function: object, memo: Memo) -> Any:
    """A function with copies in the place of the originals that its closure and defaults hold."""
    if not isinstance(function, types.FunctionType):
        return function
    held = [*(function.__closure__ or ()), *(function.__defaults__ or ())]
    new = [_rebound_cell(item, memo) for item in held]
    if all(one is other for one, other in zip(new, held)):
        return function
    cells, code = new[: len(function.__closure__ or ())], function.__code__
    made = types.FunctionType(code, function.__globals__, function.__name__, None, tuple(cells))
    made.__defaults__ = tuple(new[len(cells) :]) or None
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(vars(function))
    return made


def _rebound_cell(item: Any, memo: Memo) -> Any:
    cell = isinstance(item, types.CellType)
    try:
        held = item.cell_contents if cell else item
    except ValueError:  # not filled yet
        return item
    if type(held) in _ATOMS:
        return item
    new = memo[id(held)] if id(held) in memo else rebound(held, memo)
    return item if new is held else types.CellType(new) if cell else new


def _copies_itself(kind: type) -> bool:
    """Whether a class outside torch says how it is copied."""
    for base in kind.__mro__:
        if base is nn.Module:
            return False
        ours = base.__module__.startswith("torch.nn.modules")
        if not ours and any(name in vars(base) for name in _HOOKS_OF_COPY):
            return True
    return False


def _copy(value: Any, memo: Memo) -> object:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in _DICTIONARIES and not value:
        return memo.setdefault(id(value), kind())
    if isinstance(value, nn.Module):
        return _copy_module(value, memo)
    if kind in _DICTIONARIES and all(type(key) in _ATOMS for key in value):
        clone = memo[id(value)] = kind()
        for key, item in value.items():
            clone[key] = _copy(item, memo)
        return clone
    if kind is list:
        items = memo[id(value)] = []
        items.extend(_copy(item, memo) for item in value)
        return items
    if kind is tuple:
        copied = tuple(_copy(item, memo) for item in value)
        return value if all(a is b for a, b in zip(copied, value)) else copied
    if isinstance(value, Tensor) and not value.is_leaf:
        value = memo[id(value)] = value.detach().clone()
        return value
    return copy.deepcopy(value, memo)
