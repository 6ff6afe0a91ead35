"""Rewrite ints that are written in the code of a module's ``forward``.

The module that owns the line is traced symbolically with its children as leaves; the ints in
the arguments of its calls are then replaced. The module keeps its class, children and names: only
its ``forward`` is overridden on the instance.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from graphprune.errors import RewriteError
from graphprune.plan import LiteralChange
from graphprune.sizes import Literal, Size


class _Leaves(fx.Tracer):
    """Keeps every child module as a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def symbolic(module: nn.Module, training: bool) -> fx.Graph:
    """The forward of one module as a graph, its children as leaves.

    Raises:
        RewriteError: the forward branches on values or converts sizes.
    """
    before = module.training
    modes = {child: child.training for child in module.modules()}
    module.train(training)
    try:
        graph = _Leaves().trace(module)
    except Exception as error:
        raise RewriteError(
            f"the forward of {type(module).__name__} cannot be rewritten: {error}"
        ) from error
    finally:
        for child, mode in modes.items():
            child.training = mode
        module.training = before
    return graph


def literals(graph: fx.Graph) -> Iterator[tuple[fx.Node, tuple[int | str, ...], int]]:
    """All plain ints in the arguments of calls, with their paths."""
    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            for index, arg in enumerate(node.args):
                yield from _paths(node, (index,), arg)
            for key, arg in node.kwargs.items():
                yield from _paths(node, (key,), arg)


def _paths(
    node: fx.Node, path: tuple[int | str, ...], value: Any
) -> Iterator[tuple[fx.Node, tuple[int | str, ...], int]]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield node, path, int(value)
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _paths(node, (*path, index), item)
    elif isinstance(value, slice):
        for key in ("start", "stop"):
            yield from _paths(node, (*path, key), getattr(value, key))


def replaced(value: Any, path: tuple[int | str, ...], new: int) -> Any:
    """Nested arguments with one int replaced."""
    if not path:
        return new
    head, *rest = path
    if isinstance(value, slice):
        parts = {key: getattr(value, key) for key in ("start", "stop", "step")}
        parts[str(head)] = new
        return slice(parts["start"], parts["stop"], parts["step"])
    if isinstance(value, Mapping):
        return {**value, head: replaced(value[head], tuple(rest), new)}
    items = list(value)
    items[head] = replaced(items[head], tuple(rest), new)  # type: ignore[index]
    return tuple(items) if isinstance(value, tuple) else items


def set_literal(graph: fx.Graph, name: str, path: tuple[int | str, ...], new: int) -> None:
    """Replace one int in a graph."""
    node = next((node for node in graph.nodes if node.name == name), None)
    if node is None:
        raise RewriteError(f"the rewritten forward has no call {name!r}")
    if isinstance(path[0], int):
        node.args = replaced(node.args, path, new)
    else:
        node.kwargs = replaced(node.kwargs, path, new)


def mark_literals(owners: Sequence[str]) -> Callable[[nn.Module], None]:
    """A preparation for recording: the ints in the forward of these modules become sizes."""

    def prepare(model: nn.Module) -> None:
        for name in owners:
            module = model.get_submodule(name)
            graph = symbolic(module, module.training)
            for node, path, value in list(literals(graph)):
                leaf = Literal(name, node.name, path, module.training, value)
                set_literal(graph, node.name, path, Size(value, leaf))
            module.forward = _Marked(module, graph)  # type: ignore[assignment]

    return prepare


class _Marked:
    """Runs a graph whose arguments hold sizes (code generation would print them as ints)."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.names = [node.target for node in graph.nodes if node.op == "placeholder"]
        self.interpreter = fx.Interpreter(module, graph=graph, garbage_collect_values=False)
        self.defaults = {
            node.target: node.args[0]
            for node in graph.nodes
            if node.op == "placeholder" and node.args
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args))
        values = {**self.defaults, **given, **kwargs}
        return self.interpreter.run(*(values[name] for name in self.names))


def rewrite_forward(model: nn.Module, changes: Sequence[LiteralChange]) -> None:
    """Override the forward of every module that a plan changes literals in."""
    for owner in dict.fromkeys(change.module for change in changes):
        module = model.get_submodule(owner)
        mine = [change for change in changes if change.module == owner]
        graphs = {training: symbolic(module, training) for training in (False, True)}
        same = str(graphs[False]) == str(graphs[True])
        for training, graph in graphs.items():
            for change in mine:
                if change.training == (training and not same):
                    set_literal(graph, change.node, change.path, change.new)
        module.forward = types.MethodType(_switch(graphs), module)  # type: ignore[assignment]


def _switch(graphs: Mapping[bool, fx.Graph]) -> Callable[..., Any]:
    functions = {training: _function(graph) for training, graph in graphs.items()}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return functions[self.training](self, *args, **kwargs)

    return forward


def _function(graph: fx.Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(code.src, namespace)  # the code that torch.fx generated from the module's own forward
    return namespace["forward"]  # type: ignore[no-any-return]
