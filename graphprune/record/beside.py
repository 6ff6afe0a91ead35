"""Modules that the values of the example inputs pass by, beside others of their kind that run.

An expert that no token of the example inputs chooses is read by nothing that is recorded, and by
the next inputs. Recorded once more, it runs beside one of its kind, on what this one is given, and
what it returns is added to the other's, times zero: its channels live and die with the stream.
That it reads the same stream is taken from those that run: two at least, which must agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphprune.ops.calls import Args, Kwargs
from graphprune.record.recorder import Recorder
from graphprune.record.tensors import named_modules

_LEAST = 2  # modules that must have run: one alone says nothing of what others read


@dataclass(frozen=True)
class Passed:
    """Modules of one kind in a container: those that ran, and those that did not."""

    ran: tuple[str, ...]
    others: tuple[str, ...]


def passed_by(model: nn.Module, used: set[str]) -> tuple[Passed, ...]:
    """The modules in containers that did not run, with several of their kind that did.

    Args:
        model: what was recorded.
        used: the names of modules that ran.
    """
    found: list[Passed] = []
    for name, container in named_modules(model):
        if not isinstance(container, nn.ModuleList | nn.ModuleDict):
            continue
        kinds: dict[tuple[object, ...], tuple[list[str], list[str]]] = {}
        for key, part in container._modules.items():
            kind = () if part is None else _kind(part)
            full = f"{name}.{key}".lstrip(".")
            ran, others = kinds.setdefault(kind, ([], []))
            if full in used:
                ran.append(full)
            elif not any(f"{each}.".startswith(f"{full}.") for each in used):
                others.append(full)
        found += [
            Passed(tuple(ran), tuple(others))
            for kind, (ran, others) in kinds.items()
            if kind and others and len(ran) >= _LEAST
        ]
    return tuple(found)


def _kind(module: nn.Module) -> tuple[object, ...]:
    """What modules have in common that the same code runs; nothing of those without parameters."""
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return (type(module), shapes) if shapes else ()


@contextlib.contextmanager
def running(model: nn.Module, recorder: Recorder, beside: Sequence[Passed]) -> Iterator[None]:
    """Inside, modules run beside others; once."""
    handles = [
        model.get_submodule(each.ran[0]).register_forward_hook(
            _adding(recorder, [model.get_submodule(other) for other in each.others]),
            with_kwargs=True,
        )
        for each in beside
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(recorder: Recorder, parts: list[nn.Module]) -> Callable[..., object]:
    def add(module: nn.Module, args: Args, kwargs: Kwargs, out: object) -> object:
        waiting, parts[:] = [*parts], []
        if not isinstance(out, Tensor):
            return None
        recorder.beside = True
        try:
            for part in waiting:
                other = part(*args, **kwargs)
                if isinstance(other, Tensor) and other.shape == out.shape:
                    with torch._C.DisableTorchFunction():  # it is no sum in the code of a model
                        out = out + other * 0
        finally:
            recorder.beside = False
        return out

    return add
