"""Rewrite ints that are written in the code of a module's ``forward``.

The module that owns the line is traced symbolically with its children as leaves; the ints in
the arguments of its calls are then replaced. The module keeps its class, children and names: only
its ``forward`` is overridden on the instance.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphprune.errors import RewriteError
from graphprune.plan import LiteralChange
from graphprune.signatures import Given, entry, specialised
from graphprune.sizes import Literal, Override, Scale, Size, expression


class _Leaves(fx.Tracer):
    """Keeps every child module as a leaf, and buffers as what they are."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


_FACTORIES = frozenset(
    {torch.zeros, torch.ones, torch.full, torch.empty, torch.rand, torch.randn, torch.arange}
)


class _Factories(TorchFunctionMode):
    """Makes a tensor factory a call of the graph instead of a constant."""

    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTORIES:
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def symbolic(module: nn.Module, training: bool, given: Given = ()) -> fx.Graph:
    """The forward of one module as a graph, its children as leaves, for given arguments.

    Raises:
        RewriteError: the forward branches on values or converts sizes.
    """
    before = module.training
    modes = {child: child.training for child in module.modules()}
    module.train(training)
    tracer = _Leaves()
    kind = type(module)
    rewritten = vars(module).get("forward")
    try:
        forward: Callable[..., Any]
        if isinstance(rewritten, RewrittenForward):  # torch.fx traces the forward of the class
            forward = rewritten.functions[training]
        else:
            forward = specialised(kind.forward, given)
        if forward is not kind.forward:
            module.__class__ = type(kind.__name__, (kind,), {"forward": forward})
        with _Factories(tracer):
            graph = tracer.trace(module)
    except Exception as error:
        raise RewriteError(
            f"the forward of {type(module).__name__} cannot be rewritten: {error}"
        ) from error
    finally:
        module.__class__ = kind
        for child, mode in modes.items():
            child.training = mode
        module.training = before
    return graph


def replaced(value: Any, path: tuple[int | str, ...], new: float) -> Any:
    """Nested arguments with one int replaced."""
    if not path:
        return new
    head, *rest = path
    if isinstance(value, slice):
        parts = {key: getattr(value, key) for key in ("start", "stop", "step")}
        parts[str(head)] = new
        return slice(parts["start"], parts["stop"], parts["step"])
    if isinstance(value, Mapping):
        return {**value, head: replaced(value.get(head), tuple(rest), new)}
    items = list(value)
    items[head] = replaced(items[head], tuple(rest), new)  # type: ignore[index]
    return tuple(items) if isinstance(value, tuple) else items


def set_literal(graph: fx.Graph, name: str, path: tuple[int | str, ...], new: float) -> None:
    """Replace one int in a graph."""
    node = next((node for node in graph.nodes if node.name == name), None)
    if node is None:
        raise RewriteError(f"the rewritten forward has no call {name!r}")
    if isinstance(path[0], int):
        node.args = replaced(node.args, path, new)
    else:
        node.kwargs = replaced(node.kwargs, path, new)


def mark_literals(owners: Mapping[str, Given]) -> Callable[[nn.Module], None]:
    """A preparation for recording: the ints in the forward of these modules become sizes."""

    def prepare(model: nn.Module) -> None:
        for name, given in owners.items():
            module = model.get_submodule(name)
            module.forward = _Marked(module, name, given)  # type: ignore[assignment]

    return prepare


class _Marked(fx.Interpreter):
    """Runs the forward of a module, marking the ints given to ops as literals.

    Ints that are computed in the forward are marked as well: they can be replaced by a literal.
    """

    def __init__(self, module: nn.Module, name: str, given: Given) -> None:
        graph = symbolic(module, module.training, given)
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.owner, self.training, self.given = name, module.training, given
        rewritten = vars(module).get("forward")
        if isinstance(rewritten, RewrittenForward):
            self.entry = rewritten.entry
        else:
            self.entry = compiled(*entry(type(module).forward, given, name), "entry")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*self.entry(self.module, *args, **kwargs)[1:])

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            kwargs = {**kwargs, "scale": args[0].shape[-1] ** -0.5}  # as the op itself does
        leaves = pytree.tree_leaves((args, kwargs))
        reads = any(isinstance(leaf, Tensor) for leaf in leaves) and n.target != "size"
        if reads or n.target in _FACTORIES:
            args = tuple(self._mark(n, (i,), arg) for i, arg in enumerate(args))
            kwargs = {key: self._mark(n, (key,), arg) for key, arg in kwargs.items()}
        return getattr(self, n.op)(n.target, args, kwargs)

    def _literal(self, node: fx.Node, path: Any, value: float, computed: bool) -> Literal:
        return Literal(self.owner, node.name, path, self.training, value, computed, self.given)

    def _mark(self, node: fx.Node, path: tuple[int | str, ...], value: Any) -> Any:
        computed = isinstance(_at(node, path), fx.Node)
        if isinstance(value, Scale):
            literal = self._literal(node, path, float(value), computed)
            return Scale(value, Override(literal, value.expression) if computed else literal)
        if isinstance(value, int) and not isinstance(value, bool):
            literal = self._literal(node, path, int(value), computed)
            return Size(value, Override(literal, expression(value)) if computed else literal)
        if isinstance(value, tuple | list) and not isinstance(_at(node, path), fx.Node):
            return type(value)([self._mark(node, (*path, i), item) for i, item in enumerate(value)])
        if isinstance(value, slice) and not isinstance(_at(node, path), fx.Node):
            start, stop = (self._mark(node, (*path, k), getattr(value, k)) for k in _ENDS)
            return slice(start, stop, value.step)
        return value


_ENDS = ("start", "stop")


def _at(node: fx.Node, path: tuple[int | str, ...]) -> Any:
    """What stands at a path in the arguments of a node."""
    value: Any = node.args if isinstance(path[0], int) else node.kwargs
    for key in path:
        if isinstance(value, Mapping) and key not in value:
            return node  # left out, and computed by the op
        value = getattr(value, str(key)) if isinstance(value, slice) else value[key]
    return value


def compiled(source: str, names: Mapping[str, Any], name: str) -> Callable[..., Any]:
    """A function from source that torch.fx or ``signatures`` wrote."""
    namespace = dict(names)
    exec(source, namespace)
    return namespace[name]  # type: ignore[no-any-return]


class RewrittenForward:
    """The forward of one module as code that torch.fx generated, one version per mode.

    It sits in the module's ``__dict__``, where it takes the place of the class's ``forward``;
    it can be copied and pickled with the module. ``sources`` by mode, and of ``entry``, which has
    the signature of the original.
    """

    def __init__(
        self, module: nn.Module, sources: Mapping[Any, str], names: Mapping[str, Any]
    ) -> None:
        self.module, self.sources, self.names = module, dict(sources), dict(names)
        self._compile()

    def _compile(self) -> None:
        self.functions = {
            training: compiled(self.sources[training], self.names, "forward")
            for training in (False, True)
        }
        self.train, self.eval = self.functions[True], self.functions[False]
        self.entry = compiled(self.sources["entry"], self.names, "entry")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the version of the module's mode."""
        args = self.entry(self.module, *args, **kwargs)
        return self.train(*args) if self.module.training else self.eval(*args)

    def __getstate__(self) -> dict[str, Any]:
        names = {
            name: _Imported(value.__name__) if isinstance(value, types.ModuleType) else value
            for name, value in self.names.items()
        }
        return {"module": self.module, "sources": self.sources, "names": names}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.module, self.sources = state["module"], state["sources"]
        self.names = {
            name: importlib.import_module(value.name) if isinstance(value, _Imported) else value
            for name, value in state["names"].items()
        }
        self._compile()


@dataclass(frozen=True)
class _Imported:
    """A Python module by name, which pickle cannot hold itself."""

    name: str


def rewrite_forward(model: nn.Module, changes: Sequence[LiteralChange]) -> None:
    """Override the forward of every module that a plan changes literals in."""
    for owner in dict.fromkeys(change.module for change in changes):
        module = model.get_submodule(owner)
        mine = [change for change in changes if change.module == owner]
        given = mine[0].given
        graphs = {training: symbolic(module, training, given) for training in (False, True)}
        same = str(graphs[False]) == str(graphs[True])
        rewritten = vars(module).get("forward")
        sources: dict[Any, str] = {}
        if isinstance(rewritten, RewrittenForward):
            names = {**rewritten.names}
            sources["entry"] = rewritten.sources["entry"]
        else:
            sources["entry"], names = entry(type(module).forward, given, type(module).__name__)
        for training, graph in graphs.items():
            for change in mine:
                if change.training == (training and not same):
                    set_literal(graph, change.node, change.path, change.new)
            code = graph.python_code("self")
            sources[training] = code.src
            names.update(code.globals)
        module.forward = RewrittenForward(module, sources, names)  # type: ignore[assignment]
