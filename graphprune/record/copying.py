"""Copy modules fast: what ``copy.deepcopy`` does, without its cost per empty dictionary."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.record.sizes import Scale, Size

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
        torch.dtype,
        torch.device,
    }
)
_DICTIONARIES = frozenset({dict, OrderedDict})
_HOOKS_OF_COPY = ("__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")


def copy_module(module: nn.Module, memo: Memo) -> nn.Module:
    """A deep copy of a module.

    Args:
        module: what to copy.
        memo: copies by the ``id`` of their original, as for ``copy.deepcopy``; map tensors here
            to what shall take their place.
    """
    known = memo.get(id(module))
    if known is not None:
        return known
    if _copies_itself(type(module)):
        return copy.deepcopy(module, memo)
    clone = type(module).__new__(type(module))
    memo[id(module)] = clone
    state = vars(clone)
    for name, value in vars(module).items():
        if name != "_compiled_call_impl":  # bound to the original; torch's copies lose it as well
            state[name] = _copy(value, memo)
    return clone


def _copies_itself(kind: type) -> bool:
    """Whether a class outside torch says how it is copied."""
    for base in kind.__mro__:
        if base is nn.Module:
            return False
        ours = base.__module__.startswith("torch.nn.modules")
        if not ours and any(name in vars(base) for name in _HOOKS_OF_COPY):
            return True
    return False


def _copy(value: Any, memo: Memo) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind in _DICTIONARIES and not value:
        return kind()
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        return copy_module(value, memo)
    if kind in _DICTIONARIES and all(type(key) in _ATOMS for key in value):
        clone = memo[id(value)] = kind()
        for key, item in value.items():
            clone[key] = _copy(item, memo)
        return clone
    if kind is tuple and all(type(item) in _ATOMS for item in value):
        return value
    if isinstance(value, Tensor) and not value.is_leaf:
        value = memo[id(value)] = value.detach().clone()
        return value
    return copy.deepcopy(value, memo)
