"""Record one forward pass as a ``torch.fx`` graph of ATen ops.

The model is copied without its weights to the ``meta`` device and run once; nothing is computed
and nothing of the user's model is touched. A model that reads values of tensors (``.item()``,
non-maximum suppression) is run on the CPU with its real weights instead.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.modules.module as nn_module
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphprune import shapes
from graphprune.copying import copy_module
from graphprune.errors import TraceError
from graphprune.inputs import Call
from graphprune.sizes import Attribute, Extent, Size

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_SHAPES = {torch.Tensor.shape.__get__, torch.Tensor.size}  # type: ignore[attr-defined]
_LEAKS = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}


def leak(tensor: Tensor) -> None:
    """Stands in the graph for a tensor whose values leave torch."""


@dataclass
class Record:
    """One recorded forward pass.

    Each node has ``meta``: ``shape``, ``dtype``, ``module`` (qualified name of the innermost
    module running), ``line`` (``file:line`` of the user's code) and ``ints`` (the ints given to
    the torch function that called it).
    """

    training: bool
    device: str = "meta"
    graph: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[fx.Node] = field(default_factory=list)
    output_spec: Any = None
    output_leaves: list[Any] = field(default_factory=list)  # None where a tensor goes
    calls: list[tuple[str, fx.Node]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    equal: list[tuple[Size, Size]] = field(default_factory=list)

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
        self.names = {id(module): name for name, module in model.named_modules()}
        self.params = {id(tensor): name for name, tensor in named_tensors(model)}
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Any] = []  # tensors whose id() is a key of ``nodes``
        self.stack: list[str] = []
        self.innermost: str | None = None
        self.ints: list[int] = []
        self.opaque = False
        self.modes = (_Functions(self), _Dispatch(self))

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
        node = self.nodes.get(id(tensor))
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
        args, kwargs = pytree.tree_map_only(Tensor, self.node_of, (args, kwargs))
        node = self.record.graph.call_function(target, _plain(args), _plain(kwargs))
        node.meta.update(
            module=self.stack[-1] if self.stack else "", line=user_line(), ints=self.ints
        )
        if isinstance(out, Tensor):
            self.register(node, out)
        elif isinstance(out, list | tuple):
            node.meta["items"] = items = {}
            for index, item in enumerate(out):
                if isinstance(item, Tensor):
                    items[index] = getitem = self.record.graph.call_function(
                        operator.getitem, (node, index)
                    )
                    self.register(getitem, item)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of every module."""
        name = self.names.get(id(module), self.stack[-1] if self.stack else "")
        self.stack.append(name)
        self.innermost = None
        self.record.used.add(name)

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """Forward hook of every module."""
        name = self.stack.pop()
        if out is None and self.innermost is None:
            self.innermost = name
        if isinstance(out, Tensor) and id(out) in self.nodes:
            self.record.calls.append((name, self.nodes[id(out)]))

    def observe(self, left: Size, right: Size) -> None:
        """Two sizes were found equal by the model's own code."""
        self.record.equal.append((left, right))

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
        for mode in self.modes:
            mode.__enter__()
        self.apply = torch.autograd.Function.__dict__["apply"]
        torch.autograd.Function.apply = classmethod(_opaque_apply(self))  # type: ignore
        return self

    def __exit__(self, *exc: Any) -> None:
        torch.autograd.Function.apply = self.apply  # type: ignore[method-assign]
        for mode in reversed(self.modes):
            mode.__exit__(*exc)
        for handle in self.handles:
            handle.remove()


class _Functions(TorchFunctionMode):
    """Sees torch functions with the ints that the user's code gave them."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        recorder, kwargs = self.recorder, kwargs or {}
        if func in _SHAPES and isinstance(args[0], Tensor):
            shape = recorder.extents(args[0])
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return shape if dim is None else shape[dim]
        if func is torch.Tensor.numel or func is torch.Tensor.nelement:
            product: int = 1
            for size in recorder.extents(args[0]):
                product = product * size
            return product
        recorder.ints = list(_ints((args, kwargs)))
        try:
            out = func(*args, **kwargs)
        finally:
            recorder.ints = []
        if func is torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            recorder.call(torch.ops.aten.detach.default, args, {}, out)
        elif func in _LEAKS:
            recorder.call(leak, args[:1], {}, None)
        return out


class _Dispatch(TorchDispatchMode):
    """Sees the ATen ops."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        recorder, kwargs = self.recorder, kwargs or {}
        if recorder.device == "meta" and _mixed((args, kwargs)):
            args, kwargs = pytree.tree_map_only(Tensor, recorder_to_meta(recorder), (args, kwargs))
        if recorder.device == "meta":
            out = shapes.run(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        if not recorder.opaque:
            recorder.call(func, args, kwargs, out)
        return out


def recorder_to_meta(recorder: Recorder) -> Callable[[Tensor], Tensor]:
    """Moves constants that live on another device to meta, keeping their node."""

    def move(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        moved = torch.empty_like(tensor, device="meta")
        node = recorder.node_of(tensor)
        recorder.nodes[id(moved)] = node
        recorder.alive.append(moved)
        return moved

    return move


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
        finally:
            recorder.opaque = False
        recorder.call(cls.apply, args, kwargs, out)
        return out

    return apply


def _mixed(tree: Any) -> bool:
    kinds = {leaf.is_meta for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)}
    return len(kinds) == 2


def _plain(tree: Any) -> Any:
    """Sizes as plain ints, and everything that fx cannot hold as its name."""
    if isinstance(tree, fx.Node) or tree is None:
        return tree
    if isinstance(tree, Size):
        return int(tree)
    if isinstance(tree, tuple | list):
        return type(tree)(map(_plain, tree)) if type(tree) in (tuple, list) else tuple(
            map(_plain, tree)
        )
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return tree


def _ints(tree: Any) -> Iterator[int]:
    if isinstance(tree, int) and not isinstance(tree, bool):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _ints(item)
    elif isinstance(tree, dict):
        yield from _ints(tuple(tree.values()))
    elif isinstance(tree, slice):
        yield from _ints((tree.start, tree.stop, tree.step))


def user_line() -> str | None:
    """``file:line`` of the innermost frame outside torch and graphprune."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _HERE, "<")):
            return f"{name}:{frame.f_lineno}"
        if frame.f_code is record.__code__:
            return None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, tied ones once, by their first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def aliases(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first name (tied parameters share it)."""
    first: dict[int, str] = {}
    names = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names[name] = first.setdefault(id(tensor), name)
    return names


def skeleton(model: nn.Module, device: str) -> nn.Module:
    """A copy without weights on ``meta`` (with weights for any other device)."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        members = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in members:
            if not isinstance(tensor, Tensor) or id(tensor) in memo:
                continue
            copied = tensor.detach()
            copied = torch.empty_like(copied, device="meta") if device == "meta" else copied.clone()
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = copied
    clone = copy_module(model, memo)
    for name, module in clone.named_modules():
        for key, value in vars(module).items():
            marked = _mark(value, Attribute(name, key))
            if marked is not value:
                vars(module)[key] = marked
    return clone


def _mark(value: Any, leaf: Attribute) -> Any:
    if type(value) is int:
        return Size(value, replace(leaf, value=value))
    if type(value) in (tuple, list, torch.Size) and value:
        if not all(type(item) is int for item in value):
            return value
        marked = [
            Size(item, Attribute(leaf.module, leaf.name, (index,), item))
            for index, item in enumerate(value)
        ]
        return type(value)(marked)
    return value


def record(
    model: nn.Module,
    call: Call,
    training: bool,
    prepare: Callable[[nn.Module], None] | None = None,
    devices: Sequence[str] = ("meta", "cpu"),
) -> Record:
    """Run a copy of the model on the inputs and record it.

    Args:
        model: the user's model; it is not touched.
        call: the inputs.
        training: record in train mode instead of eval mode.
        prepare: called with the copy before it runs.
        devices: where to run it, in this order, until it works.

    Raises:
        TraceError: the model does not run on these inputs.
    """
    failure: TraceError | None = None
    for device in devices:
        try:
            return _record(model, call, training, device, prepare)
        except TraceError as error:
            error.__cause__ = error.__cause__ or failure
            failure = error
    assert failure is not None
    raise failure


def _record(
    model: nn.Module,
    call: Call,
    training: bool,
    device: str,
    prepare: Callable[[nn.Module], None] | None,
) -> Record:
    clone = skeleton(model, device).to(device).train(training)
    if prepare is not None:
        prepare(clone)
    return run(clone, call, device)


def run(clone: nn.Module, call: Call, device: str) -> Record:
    """Record a model that may be marked and changed by running."""
    args, kwargs = call.on(device)
    recorder = Recorder(clone, device, clone.training)
    for tensor in pytree.tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor):
            recorder.placeholder(tensor)
    grad = torch.no_grad()
    try:
        with grad, _safe_attention(), recorder:
            out = clone(*args, **kwargs)
    except Exception as error:
        failed = TraceError(
            f"the model does not run on the example inputs ({call}): "
            f"{type(error).__name__}: {error}\n"
            f"  inside module {recorder.innermost or '(root)'!r}; "
            "pass example_inputs that model(*example_inputs) accepts"
        )
        failed.record = recorder.record  # type: ignore[attr-defined]
        raise failed from error
    result = recorder.record
    leaves, result.output_spec = pytree.tree_flatten(_fields(out))
    for leaf in leaves:
        result.output_leaves.append(None if isinstance(leaf, Tensor) else leaf)
        if isinstance(leaf, Tensor):
            result.outputs.append(recorder.node_of(leaf))
    result.graph.output(tuple(result.outputs))
    result.graph.lint()
    return result


def _fields(out: Any) -> Any:
    """Outputs that pytree does not know (dataclasses, plain objects) as dictionaries."""
    if isinstance(out, Tensor) or isinstance(out, tuple | list | dict):
        return out
    return vars(out) if hasattr(out, "__dict__") else out


@contextlib.contextmanager
def _safe_attention() -> Iterator[None]:
    """Switch off the fused transformer path, which hides its ops."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
