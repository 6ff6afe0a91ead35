"""What the code of a model keeps outside of the model, and a run on ``meta`` must not change.

Tables that the first call makes and others find (in a global, a dictionary, a class, a closure, a
default argument) would be without values after a run on ``meta``, and so would the user's model.
What holds such a tensor after the run, and did not before, is put back.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn

from graphprune.record.tensors import named_modules

_DEPTH = 4  # from the code of a class to what is looked at
_MANY = 256  # items of a container that are looked into
_OWN = ("torch", "builtins", "numpy", "graphprune")
_PLAIN = (str, bytes, int, float, bool, type(None), Tensor, nn.Module, types.BuiltinFunctionType)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[list[object]]:
    """Around a run of a copy on ``meta``: what its code keeps elsewhere stays as it is.

    Yields:
        Afterwards, the places where something had to be put back.
    """
    before = [(place, _items(place)) for place in _places(model)]
    changed: list[object] = []
    try:
        yield changed
    finally:
        changed += [place for place, items in before if _put_back(place, items)]


def _places(model: nn.Module) -> Iterator[Any]:
    """Namespaces and containers that the code of a model may write to."""
    kinds = {kind: None for _, module in named_modules(model) for kind in type(module).__mro__}
    mine = [kind for kind in kinds if not _is_librarys(kind.__module__)]
    roots = {kind.__module__.partition(".")[0] for kind in mine}
    waiting: list[tuple[object, int]] = [(kind, 0) for kind in mine]
    waiting += [(vars(sys.modules[k.__module__]), 0) for k in mine if k.__module__ in sys.modules]
    seen: set[int] = set()
    while waiting:
        item, depth = waiting.pop()
        if id(item) in seen or isinstance(item, _PLAIN):
            continue
        seen.add(id(item))
        found, inside = _look(item, roots)
        yield from found
        if depth < _DEPTH:
            waiting += [(other, depth + 1) for other in inside]


def _is_librarys(module: str) -> bool:
    return module.partition(".")[0] in _OWN


def _look(item: object, roots: set[str]) -> tuple[list[Any], Iterable[Any]]:
    """The places of an object that can be written to, and what is in them."""
    own = isinstance(item, MutableMapping) and _is_of(type(item), roots)
    if isinstance(item, list | deque | dict) or (isinstance(item, MutableMapping) and not own):
        values = [*_items(item).values()] if isinstance(item, MutableMapping) else list(item)
        return [item], values if len(values) <= _MANY or "__name__" in item else ()
    if isinstance(item, types.CellType):
        return [item], _items(item).values()
    if isinstance(item, types.FunctionType | types.MethodType | staticmethod | classmethod):
        function = getattr(item, "__func__", item)
        if not isinstance(function, types.FunctionType) or not _is_of(function, roots):
            return [], ()
        held = [*(function.__closure__ or ()), *(function.__defaults__ or ())]
        return [vars(function)], [*held, vars(function), function.__globals__]
    if isinstance(item, types.ModuleType):
        return [], [vars(item)] if item.__name__.partition(".")[0] in roots else ()
    if isinstance(item, type):
        return ([item], vars(item).values()) if _is_of(item, roots) else ([], ())
    state = getattr(item, "__dict__", None)
    return [], [state] if type(state) is dict and _is_of(type(item), roots) else ()


def _is_of(item: object, roots: set[str]) -> bool:
    return str(item.__module__).partition(".")[0] in roots


def _items(place: Any) -> Any:
    """What is there, to compare with later."""
    if isinstance(place, list | deque):
        return list(place)
    if isinstance(place, types.CellType):
        try:
            return {"cell_contents": place.cell_contents}
        except ValueError:
            return {}
    if isinstance(place, dict):  # what is in it: a class of its own may make values when read
        return dict(dict.items(place))
    return dict(vars(place)) if isinstance(place, type) else dict(place)


def _put_back(place: Any, before: Any) -> bool:
    """Undo what a run has left in a place: tensors without values. Whether there were any."""
    now, changed = _items(place), False
    if isinstance(now, list):
        changed = any(map(_is_empty, now)) and not any(map(_is_empty, before))
        if changed:
            place.clear()
            place.extend(before)
        return changed
    for key, value in now.items():
        old = before.get(key, _ABSENT)
        if value is old or not _is_empty(value) or _is_empty(old):
            continue
        changed = True
        if isinstance(place, type | types.CellType):
            delattr(place, key) if old is _ABSENT else setattr(place, key, old)
        elif old is _ABSENT:
            del place[key]
        else:
            place[key] = old
    return changed


_ABSENT = object()


def _is_empty(value: object, depth: int = 2) -> bool:
    """Whether a value is a tensor on ``meta``, or holds some."""
    if isinstance(value, Tensor):
        return value.is_meta
    if depth and isinstance(value, tuple | list):
        return any(_is_empty(item, depth - 1) for item in value[:_MANY])
    if depth and type(value) is dict:
        return any(_is_empty(item, depth - 1) for item in [*value.values()][:_MANY])
    return False
