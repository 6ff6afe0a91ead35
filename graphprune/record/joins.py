"""Where the code of a model adds two tensors, and what every call of a module was given.

A sum is named by the module whose code runs it and by its place among the sums of that code, so
that it is found again whenever the model runs, with whatever shapes and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from graphprune.ops.calls import Args, Function, Kwargs
from graphprune.record.recorder import Record, Recorder
from graphprune.record.tensors import named_modules

Place = tuple[str, int]  # the module, and which of the sums in its code
Seen = Callable[[Place, Function, Args, Kwargs], object]
_SUMS = frozenset(("add", "add_"))


class Sums(TorchFunctionMode):
    """Sees the sums of two tensors in the code of each module.

    Args:
        model: what runs; hooks are put on its modules while the mode is entered.
        seen: ``seen(place, function, args, kwargs)`` runs the function, or another in its stead.
    """

    def __init__(self, model: nn.Module, seen: Seen) -> None:
        super().__init__()
        self.model, self.seen = model, seen
        self.running: list[list[Any]] = []  # name of the module, and how many sums it has run
        self.counts: dict[str, set[int]] = {}
        self.handles: list[RemovableHandle] = []

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        plain = _both(args) and kwargs.get("alpha", 1) == 1
        if getattr(func, "__name__", "") not in _SUMS or not self.running or not plain:
            return func(*args, **kwargs)
        top = self.running[-1]
        place = (top[0], top[1])
        top[1] += 1
        return self.seen(place, func, args, kwargs)

    def __enter__(self) -> object:
        for name, module in named_modules(self.model):
            if isinstance(module, torch.jit.ScriptModule):
                continue
            self.handles += [
                module.register_forward_pre_hook(self._entering(name)),
                module.register_forward_hook(self._left, always_call=True),
            ]
        return TorchFunctionMode.__enter__(self)

    def __exit__(self, *exc: object) -> None:
        TorchFunctionMode.__exit__(self, *exc)
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.running.clear()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: object) -> None:
            self.running.append([name, 0])

        return enter

    def _left(self, module: nn.Module, args: object, out: object) -> None:
        name, count = self.running.pop()
        self.counts.setdefault(name, set()).add(count)


def at_zero(func: Function, args: Args, kwargs: Kwargs, side: int) -> object:
    """A sum of which one operand counts as zero; no gradient flows through it."""
    given = [*args]
    given[side] = torch.zeros_like(given[side].detach())
    return func(*given, **kwargs)


def _both(args: Args) -> bool:
    return len(args) == 2 and all(isinstance(arg, Tensor) for arg in args)


@dataclass
class Run:
    """One call of a module: trees of what it was given and returned, with nodes for tensors."""

    module: str
    args: Args
    kwargs: Kwargs
    begin: int
    out: Any = None
    end: int = 0


@dataclass
class Watched:
    """A recorded run with the calls of its modules and the sums in their code."""

    record: Record = field(default_factory=lambda: Record(False))
    nodes: list[fx.Node] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    sums: dict[Place, list[fx.Node]] = field(default_factory=dict)

    def watching(self, model: nn.Module, recorder: Recorder) -> Watching:
        """What to enter while a copy of the model runs under a recorder; the last run counts."""
        self.record = recorder.record
        self.runs, self.sums = [], {}
        return Watching(self, model, recorder)


class Watching:
    """Notes calls and sums while a model is recorded."""

    def __init__(self, watched: Watched, model: nn.Module, recorder: Recorder) -> None:
        self.watched, self.model, self.recorder = watched, model, recorder
        self.sums = Sums(model, self._sum)
        self.open: list[Run] = []
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> Watching:
        for name, module in named_modules(self.model):
            if isinstance(module, torch.jit.ScriptModule):
                continue
            self.handles += [
                module.register_forward_pre_hook(self._entering(name), with_kwargs=True),
                module.register_forward_hook(self._left),
            ]
        self.sums.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.sums.__exit__(*exc)
        for handle in self.handles:
            handle.remove()
        self.watched.nodes = list(self.recorder.record.graph.nodes)
        uneven = {name for name, counts in self.sums.counts.items() if len(counts) > 1}
        for place in [place for place in self.watched.sums if place[0] in uneven]:
            del self.watched.sums[place]  # the code of that module does not always run alike

    def _sum(self, place: Place, func: Function, args: Args, kwargs: Kwargs) -> object:
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and not self.recorder.beside:
            self.watched.sums.setdefault(place, []).append(self.recorder.node_of(out))
        return out

    def _nodes(self, tree: object) -> Any:
        return pytree.tree_map_only(Tensor, self.recorder.node_of, tree)

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: object, kwargs: object) -> None:
            given, named = self._nodes((args, kwargs))
            self.open.append(Run(name, given, named, len(self.recorder.record.graph.nodes)))

        return enter

    def _left(self, module: nn.Module, args: object, out: object) -> None:
        run = self.open.pop()
        run.out = self._nodes(out)
        run.end = len(self.recorder.record.graph.nodes)
        if not self.recorder.beside:
            self.watched.runs.append(run)
