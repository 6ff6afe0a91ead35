"""What is changed in torch and in ``math`` while a model is recorded, and only then.

Some things can be seen only by taking the place of a function that belongs to the whole process.
The changes of this file are made when the first recording of the process begins and undone when
the last one ends. In between they act on the thread that records and hand everything else on, so
that threads can record at the same time, beside others that train.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
import math
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.modules.module as nn_module
from torch import Tensor, nn

from graphprune.record.sizes import MATH, Operation, Scale, Size, expression, must_not_change, plain

_lock = threading.RLock()
_undo = contextlib.ExitStack()
_call: Any = operator.call
_uses: set[int] = set()  # recordings that have begun and not ended, in all threads
_local = threading.local()


def current() -> Any:
    """The recorder of this thread; ``None`` when nothing is recorded in it."""
    running = getattr(_local, "running", ())
    return running[-1] if running else None


@contextlib.contextmanager
def recording(recorder: object) -> Iterator[None]:
    """Make a recorder the one of this thread, with all changes in place.

    Args:
        recorder: its ``enter`` and ``leave`` are called around the forward of every module that
            this thread runs, ``function`` instead of ``torch.autograd.Function.apply``, and
            ``reduce`` instead of ``Tensor.__reduce_ex__``. ``None`` for a run that only needs the
            fused paths off.
    """
    use = _Use(recorder)
    try:
        use.take()
        yield
    finally:
        use.give_back()


class _Use:
    """What a recording holds: the changes stay in place, and its recorder is that of the thread.

    It is given back at the latest when nobody knows of it any more: an interruption may come
    between any two lines. So whatever is changed can be undone before it is.
    """

    def __init__(self, recorder: object) -> None:
        self.recorder, self.running = recorder, _local.__dict__.setdefault("running", [])
        self.listed = False

    def take(self) -> None:
        with _lock:
            _uses.add(id(self))
            if len(_uses) == 1:
                _change()
        self.listed = True
        self.running.append(self.recorder)

    def give_back(self) -> None:
        if self.listed:
            with contextlib.suppress(ValueError):
                self.running.remove(self.recorder)
            self.listed = False
        with _lock:
            _uses.discard(id(self))
            if not _uses:
                _undo.close()

    __del__ = give_back


def _change() -> None:
    if torch.backends.mha.get_fastpath_enabled():  # the fused transformer path hides its ops
        _undo.callback(torch.backends.mha.set_fastpath_enabled, True)
        torch.backends.mha.set_fastpath_enabled(False)
    _undo.callback(nn_module.register_module_forward_pre_hook(_enter).remove)
    hook = partial(nn_module.register_module_forward_hook, with_kwargs=True, always_call=True)
    pop = nn_module._global_forward_hooks_with_kwargs.pop  # of what stays there when it is removed
    _undo.callback(list, map(_call, ((one := hook(_leave)).remove, partial(pop, one.id, None))))
    _put(torch.autograd.Function, "apply", classmethod(_apply))
    _put(Tensor, "__reduce_ex__", _reduce)
    for name in MATH:
        _put(math, name, _followed(name, getattr(math, name)))


@contextlib.contextmanager
def lengths() -> Iterator[None]:
    """Let ``len`` of a tensor be a size that knows where it comes from.

    It is a place that the whole process looks at often: only code that asks for it gets it.
    """
    user = object()
    try:
        with _lock:
            _measuring.add(id(user))
            builtins.len = _length
        yield
    finally:
        with _lock:
            _measuring.discard(id(user))
            if not _measuring:
                builtins.len = _len


_len = len
_measuring: set[int] = set()  # users of ``lengths``, in all threads


def _length(value: Any) -> int:
    if Tensor in type(value).__mro__ and current() is not None and value.dim():
        size: int = value.shape[0]
        return size
    return _len(value)


def _put(owner: object, name: str, value: object) -> None:
    before = vars(owner)[name]
    _originals[name] = before
    _undo.callback(setattr, owner, name, before)
    setattr(owner, name, value)


_originals: dict[str, Any] = {}


def _enter(module: nn.Module, args: object) -> None:
    recorder = current()
    if recorder is not None:
        recorder.enter(module)


def _leave(module: nn.Module, *passed: object) -> None:
    recorder = current()
    if recorder is not None:
        recorder.leave(*passed)


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    function = _originals["apply"].__get__(None, cls)
    recorder = current()
    return (
        function(*args, **kwargs) if recorder is None else recorder.function(function, args, kwargs)
    )


def _reduce(self: Tensor, protocol: Any) -> Any:
    recorder = current() if sys._getframe(1).f_code.co_filename == copy.__file__ else None
    found = None if recorder is None else recorder.reduce(self)
    return _originals["__reduce_ex__"](self, protocol) if found is None else found


def _followed(name: str, original: Callable[..., Any]) -> Callable[..., object]:
    """A function of ``math`` that remembers the sizes its result was computed from."""

    @functools.wraps(original)
    def function(*args: object) -> Any:
        if not any(isinstance(arg, Size | Scale) for arg in args):
            return original(*args)
        if len(args) > 2:
            for arg in args:
                must_not_change(arg)
            return original(*args)
        value = original(*(plain(arg) if isinstance(arg, Size | Scale) else arg for arg in args))
        left, right = (*map(expression, args), 0)[:2]
        observer = next(arg.observer for arg in args if isinstance(arg, Size | Scale))
        known: type[Size | Scale] = Size if isinstance(value, int) else Scale
        return known(value, Operation(name, left, right), observer)

    return function
