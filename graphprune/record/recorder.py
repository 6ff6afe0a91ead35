"""Record what runs as a ``torch.fx`` graph of ATen ops."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.modules.module as nn_module
from torch import Tensor, fx, nn

from graphprune.errors import PACKAGE
from graphprune.ops.ids import Path as ArgumentPath
from graphprune.ops.registry import op_of
from graphprune.ops.views import run_on_meta
from graphprune.record.modes import Dispatch, EvalFlag, Functions
from graphprune.record.sites import Site, find_site, forward_of
from graphprune.record.sizes import Comparison, Extent, Scale, Size, extents, plain
from graphprune.record.skeleton import named_modules, named_tensors

_functorch: Any = torch._C._functorch
_TORCH = str(Path(torch.__file__).parent) + os.sep
_RUNS = str(Path(__file__).with_name("recording.py"))


@dataclass
class Record:
    """One recorded forward pass.

    Each node has ``meta``: ``shape``, ``dtype``, ``module`` (qualified name of the innermost
    module running), ``line`` (``file:line`` of the user's code), ``numbers`` (the ints given to
    the torch function that called it, and the floats computed from sizes) and ``transformed``
    (whether it ran inside ``torch.vmap`` or its kind, where dimensions are hidden).
    """

    training: bool
    device: str = "meta"
    graph: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[fx.Node] = field(default_factory=list)
    output_spec: Any = None
    output_leaves: list[Any] = field(default_factory=list)  # the class Tensor where one goes
    calls: list[tuple[str, fx.Node]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    comparisons: list[Comparison] = field(default_factory=list)
    leaks: bool = False  # whether sizes were turned into plain ints
    branches: bool = True  # whether code of the model may have looked at ``training``

    @property
    def ops(self) -> list[fx.Node]:
        """The op nodes in execution order."""
        return [
            node
            for node in self.graph.nodes
            if node.op == "call_function" and node.target is not operator.getitem
        ]


class Recorder:
    """Records what runs inside ``with recorder:`` into ``recorder.record``."""

    def __init__(self, model: nn.Module, device: str, training: bool) -> None:
        self.record = Record(training, device)
        self.device = device
        self.names = {id(module): name for name, module in named_modules(model)}
        self.params = {id(tensor): name for name, tensor in named_tensors(model)}
        self.nodes: dict[int, fx.Node] = {}
        self.parts: dict[int, tuple[fx.Node, int]] = {}
        self.alive: list[Any] = []  # tensors whose id() is a key of ``nodes``
        self.stack: list[str] = []
        self.running: list[nn.Module] = []
        self.innermost: str | None = None
        self.numbers: list[float] = []
        self.paths: list[ArgumentPath] = []
        self.method, self.count = False, 0
        self.names_of_args: tuple[str, ...] = ()
        self.opaque = False
        self.recording = True
        for _, module in named_modules(model):
            for value in vars(module).values():
                for size in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(size, Size):
                        size.observer = self.notice
        self.modes = (Functions(self), Dispatch(self))

    def placeholder(self, tensor: Tensor) -> None:
        """Register an input tensor."""
        node = self.record.graph.placeholder(f"input_{len(self.alive)}")
        self.register(node, tensor)

    def register(self, node: fx.Node, tensor: Tensor) -> None:
        """Remember which node produced a tensor."""
        node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype, stride=tensor.stride())
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor; parameters and unknown tensors become ``get_attr`` nodes."""
        while _functorch.is_functorch_wrapped_tensor(tensor):  # inside vmap or grad
            tensor = _functorch.get_unwrapped(tensor)
        node = self.nodes.get(id(tensor))
        if node is None and id(tensor) in self.parts:
            return self.part(tensor)
        if node is None:
            name = self.params.get(id(tensor))
            if name is None:
                name = f"constant_{len(self.record.constants)}"
                self.record.constants[name] = tensor
            node = self.record.graph.create_node("get_attr", name)
            self.register(node, tensor)
        return node

    def call(self, target: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        """Append an op that has just run."""
        node = self.record.graph.call_function(target, self.plain(args), self.plain(kwargs))
        line, frame = user_frame()
        node.meta.update(
            module=self.stack[-1] if self.stack else "",
            line=line,
            numbers=self.numbers,
            paths=self.paths,
            site=self.site(frame) if self.numbers or op_of(target).scaled else None,
            transformed=_functorch.peek_interpreter_stack() is not None,
        )
        if isinstance(out, Tensor):
            self.register(node, out)
        elif isinstance(out, list | tuple):
            node.meta["items"] = items = {}
            saves = op_of(target).saves
            for index, item in enumerate(out):
                if isinstance(item, Tensor):
                    self.parts[id(item)] = (node, index)
                    self.alive.append(item)
                    if index == 0 or not saves:
                        items[index] = self.part(item)

    def whole(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a composite op and record it as one node."""
        self.opaque = True
        tensors = [a.name for a in target._schema.arguments[len(args) : 3] if a.name in kwargs]
        args = (*args, *(kwargs[name] for name in tensors))
        kwargs = {name: value for name, value in kwargs.items() if name not in tensors}
        try:
            on_meta = self.device == "meta"
            kernel = op_of(target).kernel or target
            out = run_on_meta(target, args, kwargs) if on_meta else kernel(*args, **kwargs)
        finally:
            self.opaque = False
        self.call(target, args, kwargs, out)
        return out

    def constant(self, real: Tensor) -> Tensor:
        """The meta version of values that the model's code makes."""
        name = f"constant_{len(self.record.constants)}"
        self.record.constants[name] = real
        tensor = torch.empty_like(real, device="meta")
        self.register(self.record.graph.create_node("get_attr", name), tensor)
        return tensor

    def part(self, tensor: Tensor) -> fx.Node:
        """The node of one result of an op with several; most of them are never used."""
        node, index = self.parts.pop(id(tensor))
        getitem = self.record.graph.call_function(operator.getitem, (node, index))
        node.meta["items"][index] = getitem
        self.register(getitem, tensor)
        return getitem

    def plain(self, tree: Any) -> Any:
        """Arguments as fx holds them: tensors as nodes, sizes as plain ints."""
        if isinstance(tree, Tensor):
            return self.node_of(tree)
        if isinstance(tree, Size | Scale):
            return plain(tree)
        if isinstance(tree, tuple | list):
            items = [self.plain(item) for item in tree]
            return items if type(tree) is list else tuple(items)
        if isinstance(tree, dict):
            return {key: self.plain(value) for key, value in tree.items()}
        return tree

    def watch_mode(self, model: nn.Module) -> None:
        """From now on, notice code of the model that looks at ``training``, which is false."""
        self.record.branches = False
        flag = EvalFlag(self._look)
        for _, module in named_modules(model):
            vars(module)["training"] = flag

    def _look(self) -> None:
        self.record.branches = True

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of every module."""
        name = self.names.get(id(module), self.stack[-1] if self.stack else "")
        self.stack.append(name)
        self.running.append(module)
        self.innermost = None
        self.record.used.add(name)

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """Forward hook of every module."""
        name = self.stack.pop()
        self.running.pop()
        if out is None and self.innermost is None:
            self.innermost = name
        if isinstance(out, Tensor) and id(out) in self.nodes:
            self.record.calls.append((name, self.nodes[id(out)]))

    def site(self, frame: Any) -> Site | None:
        """The expression that runs, seen from the forward of the innermost module."""
        frames: list[Any] = []
        module = self.running[-1] if self.running else None
        own = module is not None and not type(module).__module__.startswith("torch.nn.")
        forward = own and getattr(forward_of(module, "run"), "__code__", None)
        while frame is not None and forward is not None:
            name = frame.f_code.co_filename
            if not name.startswith((_TORCH, PACKAGE)):
                frames.append((frame.f_code, frame.f_lasti))
            if frame.f_code is forward:
                return find_site(frames[::-1], module, self.method, self.count, self.names_of_args)
            frame = frame.f_back
        return None

    def notice(self, comparison: Comparison) -> None:
        """The model's own code took an attribute for a plain int, or compared it with a shape."""
        shaped = extents(comparison.left) or extents(comparison.right)
        if comparison.op in ("is", "leak") or shaped:
            self.observe(comparison)

    def observe(self, comparison: Comparison) -> None:
        """The model's own code compared two sizes."""
        if self.recording and comparison.op == "leak":
            self.record.leaks = True
        elif self.recording:
            self.record.comparisons.append(comparison)

    def extents(self, tensor: Tensor) -> torch.Size:
        """The shape of a tensor, each size knowing where it comes from."""
        node = self.node_of(tensor)
        return torch.Size(
            [Size(n, Extent(node, dim), self.observe) for dim, n in enumerate(tensor.shape)]
        )

    def __enter__(self) -> Recorder:
        self.handles = [
            nn_module.register_module_forward_pre_hook(self.enter),
            nn_module.register_module_forward_hook(self.leave, always_call=True),
        ]
        self.entered = contextlib.ExitStack()
        for mode in self.modes:
            self.entered.enter_context(mode)
        self.apply = torch.autograd.Function.__dict__["apply"]
        torch.autograd.Function.apply = classmethod(_opaque_apply(self))
        math.sqrt = _root
        return self

    def __exit__(self, *exc: Any) -> None:
        self.recording = False
        torch.autograd.Function.apply = self.apply
        math.sqrt = _sqrt
        self.entered.__exit__(*exc)
        for handle in self.handles:
            handle.remove()


_sqrt = math.sqrt


def _root(number: Any) -> float:
    """``math.sqrt`` that remembers where a size came from: scales of attention are spelt so."""
    known = isinstance(number, Size | Scale) and plain(number) > 0
    return number**0.5 if known else _sqrt(number)


def _opaque_apply(recorder: Recorder) -> Callable[..., Any]:
    """``Function.apply`` as one op: what its backward does to channels cannot be seen."""
    original = recorder.apply

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        function = original.__get__(None, cls)
        if recorder.opaque:
            return function(*args, **kwargs)
        recorder.opaque = True
        try:
            out = function(*args, **kwargs)
            recorder.call(function, args, kwargs, out)
        finally:
            recorder.opaque = False
        return out

    return apply


def user_frame() -> tuple[str | None, Any]:
    """``file:line`` of the innermost frame outside torch and graphprune, and the frame."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name == _RUNS:
            return None, None
        if not name.startswith((_TORCH, PACKAGE, "<")):
            return f"{name}:{frame.f_lineno}", frame
        frame = frame.f_back
    return None, None
