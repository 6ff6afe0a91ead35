"""Modules that the values of the example inputs pass by, beside others of their kind that run.

An expert that no token of the example inputs chooses is read by nothing that is recorded, and by
the next inputs. Recorded once more, it runs beside one of its kind, on what this one is given, and
what it returns is added to the other's, times zero: its channels live and die with the stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from graphprune.ops.calls import Args, Kwargs
from graphprune.record.recorder import Recorder
from graphprune.record.tensors import named_modules

Beside = Mapping[str, Sequence[str]]  # a module that runs, and those that do not


def passed_by(model: nn.Module, used: set[str]) -> dict[str, list[str]]:
    """For modules in a container that ran, those of the same kind in it that did not.

    Args:
        model: what was recorded.
        used: the names of modules that ran.
    """
    found: dict[str, list[str]] = {}
    for name, container in named_modules(model):
        if not isinstance(container, nn.ModuleList | nn.ModuleDict):
            continue
        held = {
            f"{name}.{key}".lstrip("."): _kind(part)
            for key, part in container._modules.items()
            if part is not None
        }
        ran = {kind: part for part, kind in held.items() if part in used and kind}
        for part, kind in held.items():
            if kind in ran and not any(f"{each}.".startswith(f"{part}.") for each in used):
                found.setdefault(ran[kind], []).append(part)
    return found


def _kind(module: nn.Module) -> tuple[object, ...]:
    """What modules have in common that the same code runs; nothing of those without parameters."""
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return (type(module), shapes) if shapes else ()


@contextlib.contextmanager
def running(model: nn.Module, recorder: Recorder, beside: Beside) -> Iterator[None]:
    """Inside, modules run beside others; once."""
    handles = [
        model.get_submodule(name).register_forward_hook(
            _adding(recorder, [model.get_submodule(other) for other in others]), with_kwargs=True
        )
        for name, others in beside.items()
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
