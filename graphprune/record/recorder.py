"""Record what runs as a ``torch.fx`` graph of ATen ops."""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from graphprune.errors import PACKAGE
from graphprune.ops.calls import FUNCTORCH, Args, Function, Kwargs, target_of
from graphprune.ops.given import Number
from graphprune.ops.ids import Shape
from graphprune.ops.registry import op_of
from graphprune.ops.views import run_on_meta
from graphprune.record import scope
from graphprune.record.binding import tensors_given, unwrapped
from graphprune.record.identity import Identity, storage_key
from graphprune.record.modes import TORCH, Dispatch, EvalFlag, Functions, lost, on_one_device
from graphprune.record.sites import Site, computes_floats, find_site, forward_of
from graphprune.record.sizes import (
    CONTAINERS,
    Comparison,
    Expression,
    Extent,
    Scale,
    Size,
    extents,
    plain,
    sizes_in,
)
from graphprune.record.tensors import (
    held_tensors,
    named_modules,
    named_tensors,
    objects_in,
    shapes_in,
)

_RUNS = str(Path(__file__).with_name("recording.py"))
_EMPTY = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}
_SHAPES_ONLY = {  # read the shape of their input
    getattr(torch.ops.aten, name)
    for name in ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
                 "randint_like", "new_zeros", "new_ones", "new_full", "new_empty")
}  # fmt: skip


_made: Any = WeakTensorKeyDictionary()  # constants of all recordings, and the nodes behind them


@dataclass
class Record:
    """One recorded forward pass.

    Each node has ``meta``: ``shape``, ``dtype``, ``module`` (qualified name of the innermost
    module running), ``line`` (``file:line`` of the user's code), ``numbers`` (the ints given to
    the torch function that called it, and the floats computed from sizes) and ``transformed``
    (whether it ran inside ``torch.vmap`` or its kind, where dimensions are hidden); and ``beside``
    where the values of the inputs pass it by.
    """

    training: bool
    device: str = "meta"
    graph: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[fx.Node] = field(default_factory=list)
    state: list[fx.Node] = field(default_factory=list)  # tensors in objects that are returned
    counted: frozenset[int] | None = None  # places of those that count; all
    output_spec: object = None
    output_names: list[str] = field(default_factory=list)  # the ways to the tensors in the output
    output_leaves: list[object] = field(default_factory=list)  # the class Tensor where one goes
    calls: list[tuple[str, fx.Node]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    passed: dict[str, list[Shape]] = field(default_factory=dict)  # into modules and out of them
    comparisons: list[Comparison] = field(default_factory=list)
    leaks: bool = False  # whether sizes were turned into plain ints
    leaked: dict[float, set[Expression]] = field(default_factory=dict)  # from which, by their value
    lengths: bool = False  # whether ``len`` of a tensor was asked for
    doubts: bool = False  # whether floats in the code may have been computed from sizes
    beside: Sequence[Any] = ()  # what was passed by and ran beside others (``beside.Passed``)
    caches: bool = False  # whether the code may keep tensors outside of the model
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
        self.identity = Identity()
        self.attributes: dict[str, Tensor] = {}  # that are neither parameters nor buffers
        self.unasked: set[fx.Node] = set()  # what the code makes of nothing but numbers
        self.unwritten: set[int] = set()  # storages that hold what was in memory before
        self.inputs = 0
        self.stack: list[str] = []
        self.running: list[nn.Module] = []
        self.innermost: str | None = None
        self.numbers: list[Number] = []
        self.caller: FrameType | None = None  # who called the torch function that runs
        self.method, self.count = False, 0
        self.names_of_args: tuple[str, ...] = ()
        self.sizes: dict[str, Any] = {}  # given to a function that stands for torch's, by name
        self.opaque = False
        self.beside = False  # whether what runs is passed by otherwise
        self.handed: dict[int, object] = {}  # objects that modules gave to those inside them
        self.recording = True
        own = {name for name, _ in named_tensors(model)}
        for name, tensor in held_tensors(model):
            self.identity.put(tensor, name)
            if name not in own:
                self.attributes[name] = tensor
        for prefix, module in named_modules(model):
            for name, value in vars(module).items():
                if type(value) is Size or type(value) in CONTAINERS:
                    for size in sizes_in(value):
                        size.observer = self.notice
                elif isinstance(value, Tensor) and self.identity.find(value) is None:
                    full = f"{prefix}.{name}" if prefix else name
                    self.attributes[full] = value
                    self.identity.put(value, full)
        self.modes = (Functions(self), Dispatch(self))

    def placeholder(self, tensor: Tensor) -> None:
        """Register an input tensor."""
        self.register(self.record.graph.placeholder(f"input_{self.inputs}"), tensor)
        self.inputs += 1

    def register(self, node: fx.Node, tensor: Tensor) -> None:
        """Remember which node produced a tensor."""
        with torch._C.DisableTorchFunction():
            shape, stride = tuple(tensor.shape), _stride(tensor)
        node.meta.update(shape=shape, dtype=tensor.dtype, stride=stride)
        self.identity.put(tensor, node)
        if _is_pure(node) and self.unasked.issuperset(node.all_input_nodes):
            self.unasked.add(node)
            _made[tensor] = node
        elif _made:
            _made.pop(tensor, None)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor; parameters and constants become ``get_attr`` nodes."""
        tensor = unwrapped(tensor)
        source = self.identity.find(tensor)
        if source is None:
            return self.unknown(tensor)
        if isinstance(source, str):
            source = self._named(source, tensor)
        elif isinstance(source, tuple):
            source = self.part(tensor, *source)
        node: fx.Node = source
        return node

    def unknown(self, tensor: Tensor) -> fx.Node:
        """A tensor that no recorded op made: a constant, if nothing else can be in it."""
        neighbours = self.identity.neighbours(tensor)
        if neighbours:  # looked at by other ways than by views
            found = [other for other in neighbours if self.identity.find(other) is not None]
            return self.lost(tensor, [self.node_of(other) for other in found] or None)
        made = _made.get(tensor)
        if made is not None:
            node = self._again(made)
            self.register(node, tensor)
            return node
        if is_traceable_wrapper_subclass(tensor) or (self.device == "meta" and tensor.is_meta):
            return self.lost(tensor)
        name = f"constant_{len(self.record.constants)}"
        self.record.constants[name] = tensor
        node = self.record.graph.create_node("get_attr", name)
        self.register(node, tensor)
        return node

    def _again(self, made: fx.Node) -> fx.Node:
        """What made a constant in an earlier recording, which a cache of the user kept."""
        node = self.record.graph.node_copy(made, self._again)
        numbers = made.meta["numbers"]
        node.meta["numbers"] = [n._replace(value=plain(n.value)) for n in numbers]
        self.unasked.add(node)
        return node

    def lost(self, tensor: Tensor, sources: list[fx.Node] | None = None) -> fx.Node:
        """A tensor made where no one sees how: it may hold anything that was computed before."""
        if sources is None:
            sources = [node for node in self.record.graph.nodes if "shape" in node.meta]
        node = self.record.graph.call_function(lost, tuple(dict.fromkeys(sources)))
        self._mark(node, [], user_frame(self.caller)[0])
        self.register(node, tensor)
        return node

    def _named(self, name: str, tensor: Tensor) -> fx.Node:
        node = self.record.graph.create_node("get_attr", name)
        if name in self.attributes:
            self.record.constants[name] = self.attributes[name]
        self.register(node, tensor)
        return node

    def call(
        self,
        target: Callable[..., Any],
        args: Args,
        kwargs: Kwargs,
        out: object,
        before: Any = None,
    ) -> None:
        """Append an op that has just run; ``before`` are its arguments if it moved them."""
        self._check_written(target, args, kwargs, out)
        given, named = self.plain(args) if before is None else before, self.plain(kwargs)
        node = self.record.graph.call_function(target)
        node.args = (
            given  # handed over above, fx would look through them for symbols, which is slow
        )
        if named:
            node.kwargs = named
        line, frame = user_frame(self.caller)
        self._mark(node, self.numbers, line, frame)
        self.last = node
        if isinstance(out, Tensor):
            self.register(node, out)
        elif isinstance(out, list | tuple):
            node.meta["items"] = {}
            saves = op_of(target).saves
            for index, item in enumerate(out):
                if isinstance(item, Tensor):
                    self.identity.put(item, (node, index))
                    if index == 0 or not saves:
                        self.part(item, node, index)

    def _mark(
        self, node: fx.Node, numbers: list[Number], line: str | None, frame: object = None
    ) -> None:
        node.meta.update(
            module=self.stack[-1] if self.stack else "",
            line=line,
            numbers=numbers,
            site=self.site(frame) if numbers or op_of(node.target).scaled else None,
            transformed=FUNCTORCH.peek_interpreter_stack() is not None,
        )
        if self.beside:
            node.meta["beside"] = True

    def _check_written(self, target: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Memory that is read before any op wrote to it was filled by someone we do not see."""
        name = getattr(target, "overloadpacket", None)
        if name in _EMPTY:
            key = storage_key(out)
            if out.numel() and key is not None:
                self.unwritten.add(key)
        elif self.unwritten:
            for tensor, argument in tensors_given(target, args, kwargs):
                key = storage_key(tensor)
                alias = argument and argument.alias_info
                if key not in self.unwritten or name in _SHAPES_ONLY:
                    continue
                if alias is None or alias.is_write:
                    self.unwritten.discard(key)
                if alias is None:
                    self.lost(tensor)

    def whole(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a composite op and record it as one node."""
        schema: Any = target._schema
        tensors = [a.name for a in schema.arguments[len(args) : 3] if a.name in kwargs]
        args = (*args, *(kwargs[name] for name in tensors))
        kwargs = {name: value for name, value in kwargs.items() if name not in tensors}
        on_meta = self.device == "meta"
        if on_meta:
            args, kwargs = on_one_device(self, target, args, kwargs)
        self.opaque = True
        try:
            kernel = op_of(target).kernel or target
            out = run_on_meta(target, args, kwargs) if on_meta else kernel(*args, **kwargs)
        finally:
            self.opaque = False
        self.call(target, args, kwargs, out)
        return out

    def function(self, function: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run a ``torch.autograd.Function``: its forward is recorded, its backward stays its own.

        Where an input does not reach the outputs by recorded ops (a kernel may have read it), the
        function is one op that no one knows.
        """
        before = len(self.record.graph.nodes)
        out = function(*args, **kwargs)
        if self.opaque:
            return out
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        waiting = [self.node_of(tensor) for tensor in results]
        inside = {*list(self.record.graph.nodes)[before:]}
        reached: set[fx.Node] = set()
        while waiting:
            node = waiting.pop()
            if node not in reached:
                reached.add(node)
                packet = getattr(node.target, "overloadpacket", None)
                followed = node in inside and packet not in _SHAPES_ONLY
                waiting += node.all_input_nodes if followed else []
        if not {self.node_of(tensor) for tensor in given} <= reached:
            self.call(function, args, kwargs, out)
        return out

    def reduce(self, tensor: Tensor) -> Any:
        """What ``copy.copy`` makes of a recorded tensor: another of the same values."""
        return None if self.identity.find(tensor) is None else (_copied, (tensor,))

    def constant(self, real: Tensor) -> Tensor:
        """The meta version of values that the model's code makes."""
        name = f"constant_{len(self.record.constants)}"
        self.record.constants[name] = real
        tensor = torch.empty_like(real, device="meta")
        self.unwritten.discard(storage_key(tensor) or 0)  # it stands for values that are known
        self.register(self.record.graph.create_node("get_attr", name), tensor)
        return tensor

    def part(self, tensor: Tensor, node: fx.Node, index: int) -> fx.Node:
        """The node of one result of an op with several; most of them are never used."""
        getitem = node.meta["items"].get(index)
        if getitem is None:
            getitem = self.record.graph.call_function(operator.getitem)
            getitem.args = (node, index)
            node.meta["items"][index] = getitem
        self.register(getitem, tensor)
        found: fx.Node = getitem
        return found

    def plain(self, tree: object) -> Any:
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

    def enter(self, module: nn.Module) -> None:
        """Before the forward of every module."""
        name = self.names.get(id(module), self.stack[-1] if self.stack else "")
        self.stack.append(name)
        self.running.append(module)
        self.innermost = None
        self.record.used.add(name)

    def leave(self, *passed: object) -> None:
        """After the forward of every module: what went in, and last what came out."""
        out, name, module = passed[-1], self.stack.pop(), self.running.pop()
        if self.stack:
            self.handed.update((id(part), part) for part in objects_in(passed[:-1]))
        if id(module) in self.names:
            self.record.passed.setdefault(name, []).extend(shapes_in(passed))
        if out is None and self.innermost is None:
            self.innermost = name
        node = self.identity.find(out) if isinstance(out, Tensor) else None
        if isinstance(node, fx.Node):
            self.record.calls.append((name, node))

    def site(self, frame: Any) -> Site | None:
        """The expression that runs, seen from the forward of the innermost module."""
        frames: list[Any] = []
        module = self.running[-1] if self.running else None
        own = module is not None and not type(module).__module__.startswith("torch.nn.")
        forward = own and getattr(forward_of(module, "run"), "__code__", None)
        while frame is not None and forward is not None:
            name = frame.f_code.co_filename
            if not name.startswith((TORCH, PACKAGE)) or frame.f_code is forward:
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
        if not self.recording:
            return
        if comparison.op == "leak":
            self.record.leaks = True
            if comparison.result:
                self.record.leaked.setdefault(plain(comparison.right), set()).add(comparison.left)
        else:
            self.record.comparisons.append(comparison)

    def doubt_floats(self) -> None:
        """A function is given floats: those computed in Python may come from sizes, unseen."""
        caller = self.caller
        torch_own = caller is None or caller.f_code.co_filename.startswith((TORCH, PACKAGE))
        if caller is not None and not torch_own and not self.record.doubts:
            self.record.doubts = computes_floats(caller)

    def forget_looks(self) -> None:
        """Hooks may look at values outside of torch, if nothing can have come back from there."""
        for node in reversed(self.record.graph.nodes):
            if node.op == "get_attr" and str(node.target).startswith("constant_"):
                return
            if node.meta.get("looks"):
                self.record.graph.erase_node(node)

    def extents(self, tensor: Tensor) -> torch.Size:
        """The shape of a tensor, each size knowing where it comes from."""
        node = self.node_of(tensor)
        return torch.Size(
            [Size(n, Extent(node, dim), self.observe) for dim, n in enumerate(tensor.shape)]
        )

    def __enter__(self) -> Recorder:
        self.entered = contextlib.ExitStack()
        with contextlib.ExitStack() as entering:
            entering.enter_context(scope.recording(self))
            for mode in self.modes:
                entering.enter_context(mode)
            self.entered = entering.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.recording = False
        self.entered.__exit__(*exc)


def _copied(tensor: Tensor) -> Tensor:
    copied = tensor.view_as(tensor)
    if type(copied) is not type(tensor):
        copied = copied.as_subclass(type(tensor))
    vars(copied).update(vars(tensor))
    return copied


def _is_pure(node: fx.Node) -> bool:
    """Whether a value is made by an op of torch that changes nothing."""
    target = target_of(node)
    return isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable


def _stride(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout is torch.strided else ()


def user_frame(caller: FrameType | None = None) -> tuple[str | None, Any]:
    """``file:line`` of the innermost frame outside torch and graphprune, and the frame.

    ``caller`` is who called the torch function that runs, when that is known: the modes and
    tensor classes of the user, which see the call as well, lie in between.
    """
    frame: FrameType | None = caller or sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name == _RUNS:
            return None, None
        if not name.startswith((TORCH, PACKAGE, "<")):
            return f"{name}:{frame.f_lineno}", frame
        frame = frame.f_back
    return None, None
