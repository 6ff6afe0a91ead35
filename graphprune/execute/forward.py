"""Change numbers in the code of a module's ``forward`` and of the functions that it calls.

The functions are compiled anew from their source with other numbers in a few expressions; all
else stays: control flow, names, line numbers. The module keeps its class, children and names: only
its ``forward`` (and a method that it calls) is overridden on the instance.
"""

from __future__ import annotations

import ast
import copy
import functools
import pickle
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from graphprune.errors import PlanError, RewriteError
from graphprune.ops.calls import Function
from graphprune.ops.exact_norms import group_norm, layer_norm
from graphprune.ops.exact_shares import log_softmax, mean, softmax
from graphprune.plan.plan import LiteralChange
from graphprune.record.attention import INNER, multi_head_attention_forward
from graphprune.record.norms import exact_forward
from graphprune.record.sites import (
    OF,
    TIMES,
    Site,
    Step,
    counting_call,
    defined,
    digest,
    follow,
    forward_of,
    holders,
    is_attention,
    lacks,
    spans_of,
    start,
)

Edits = tuple[LiteralChange, ...]


_OWN = {  # what rewritten code may call besides
    "_attention": multi_head_attention_forward,
    "_layer_norm": layer_norm,
    "_group_norm": group_norm,
    "_softmax": softmax,
    "_log_softmax": log_softmax,
    "_mean": mean,
    "_forward": exact_forward,
}


class Rewritten:
    """A function of a module, compiled anew with other numbers.

    It sits in the module's ``__dict__``, where it takes the place of the method of the class; it
    can be copied and pickled with the module. ``function`` is the original.
    """

    free = False  # whether it is a function that the module holds, and is not given the module

    def __init__(
        self, module: nn.Module, function: Any, steps: tuple[Step, ...], edits: Edits
    ) -> None:
        self.module, self.function, self.steps, self.edits = module, function, steps, edits
        self.digest = digest(function.__code__)
        self.free = bool(steps) and steps[-1][0] == "attribute"
        self.run = compiled(function, steps, edits, module)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Run the rewritten function."""
        return self.run(*args, **kwargs) if self.free else self.run(self.module, *args, **kwargs)

    @property
    def __code__(self) -> Any:
        """That of the rewritten function: ``torch.export`` looks at it."""
        return self.run.__code__

    def __deepcopy__(self, memo: dict[int, object]) -> Rewritten:
        """A copy for the copy of the module."""
        module = copy.deepcopy(self.module, memo)
        return type(self)(module, self.function, self.steps, self.edits)

    def __getstate__(self) -> dict[str, object]:
        names = ("module", "function", "steps", "edits", "digest", "free")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self.run = compiled(self.function, self.steps, self.edits, self.module)
        if digest(self.function.__code__) != self.digest:
            raise RewriteError(
                f"the source of {self.function.__qualname__} is not the one that was rewritten "
                "when this model was made: rebuild it from the original"
            )


class RewrittenForward(Rewritten):
    """A rewritten ``forward``."""


def rewrite_forward(model: nn.Module, changes: Sequence[LiteralChange]) -> None:
    """Override the forward of every module that a plan changes numbers in."""
    for owner in dict.fromkeys(change.module for change in changes):
        module = model.get_submodule(owner)
        before = vars(module).get("forward")
        edits = before.edits if isinstance(before, Rewritten) else ()
        mine = {(edit.site, edit.path): edit for edit in edits}
        for new in [c for c in changes if c.module == owner]:
            key = new.site, new.path
            mine[key] = mine[key].then(new) if key in mine else new
        edits = tuple(mine.values())
        made: list[Rewritten] = [RewrittenForward(module, forward_of(module), (), edits)]
        made += [Rewritten(module, _at(module, way), way, edits) for way in _own(edits)]
        for item in made:
            setattr(module, item.steps[-1][1] if item.steps else "forward", item)


def _own(edits: Iterable[LiteralChange]) -> Iterable[tuple[Step, ...]]:
    """The ways to all functions of the module itself that lead to an edit."""
    ways = (edit.site.steps[:n] for edit in edits for n in range(1, len(edit.site.steps) + 1))
    return dict.fromkeys(way for way in ways if way[-1][0] in ("method", "attribute"))


def _at(module: nn.Module, steps: tuple[Step, ...]) -> object:
    function = forward_of(module)
    for step in steps:
        function = follow(function, step, module)
    return function


def compiled(function: Function, steps: tuple[Step, ...], edits: Edits, module: nn.Module) -> Any:
    """A function, and those that it calls or wraps, with the edits made."""
    names = {**function.__globals__, **_OWN}
    code: types.CodeType = function.__code__
    cells = dict(zip(code.co_freevars, function.__closure__ or ()))
    for way in dict.fromkeys(
        e.site.steps[: len(steps) + 1] for e in edits if _leads(steps, e.site)
    ):
        kind, name = way[-1]
        if kind == "global":
            names[name] = compiled(names[name], way, edits, module)
        elif kind == "closure":
            cells[name] = types.CellType(compiled(cells[name].cell_contents, way, edits, module))
    own = tuple(edit for edit in edits if edit.site.steps == steps)
    code = _edited(function, own) if own else code
    closure = tuple(cells[name] for name in code.co_freevars)
    made = types.FunctionType(code, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _edited(function: Function, edits: Edits) -> types.CodeType:
    """The code of a function, compiled from its source with the edits made."""
    definition, kind = _definition(function)
    first = start(function.__code__)
    attentions: list[ast.Call] = []
    norms: list[ast.Call] = []
    methods: dict[ast.Call, ast.expr] = {}  # what stands before the dot
    for edit in edits:
        if edit.digest != digest(function.__code__):
            raise PlanError(
                f"the source of {function.__qualname__} is not the one that the plan changes: "
                "make a new plan for this version"
            )
        node = change(definition, replace(edit.site, first=first), edit)
        if edit.path[0] in INNER and isinstance(node, ast.Call) and is_attention(node):
            attentions.append(node)
        if edit.path[0] == OF and isinstance(node, ast.Call):
            norms.append(node)
            if edit.site.method and isinstance(node.func, ast.Attribute):
                methods[node] = node.func.value
    for call in attentions:  # torch's own takes no such sizes
        call.func = ast.copy_location(ast.Name("_attention", ast.Load()), call.func)
    for call in norms:  # nor such a count
        name = counting_call(call)
        if name == "forward":  # of the class above, given the module
            call.args.insert(0, ast.Name(function.__code__.co_varnames[0], ast.Load()))
        elif call in methods:
            call.args.insert(0, methods[call])
        call.func = ast.copy_location(ast.Name(f"_{name}", ast.Load()), call.func)
    free = function.__code__.co_freevars
    body = ast.parse(f"def _factory({', '.join(free)}):\n    return {kind}")
    factory: Any = body.body[0]
    factory.body.insert(0, definition)
    ast.fix_missing_locations(body)
    names: dict[str, Any] = {}
    exec(compile(body, function.__code__.co_filename, "exec"), names)  # the model's own code
    made: types.FunctionType = names["_factory"](*free)
    return made.__code__


def _leads(steps: tuple[Step, ...], site: Site) -> bool:
    return len(site.steps) > len(steps) and site.steps[: len(steps)] == steps


def _definition(function: Function) -> tuple[Any, str]:
    """A copy of the syntax tree of a function, without decorators and defaults, and its name."""
    pickled = _syntax(function.__code__)
    if pickled is None:
        raise RewriteError(f"the source of {function.__qualname__} is not to be had")
    node = _bare(pickle.loads(pickled))
    if isinstance(node, ast.Lambda):
        return ast.Assign([ast.Name("function", ast.Store())], node), "function"
    node.decorator_list, node.returns = [], None
    return node, node.name


@functools.lru_cache(256)
def _syntax(code: types.CodeType) -> bytes | None:
    """The syntax tree of a function, pickled: the fastest way to copies of it."""
    found = defined(code)
    return found and pickle.dumps(found)


def _bare(node: Any) -> Any:
    """Without annotations and defaults, which the function has already."""
    for arg in ast.walk(node.args):
        if isinstance(arg, ast.arg):
            arg.annotation = None
    node.args.defaults = [ast.Constant(None) for _ in node.args.defaults]
    node.args.kw_defaults = [d and ast.Constant(None) for d in node.args.kw_defaults]
    return node


def change(definition: ast.AST, site: Site, edit: LiteralChange) -> ast.AST:
    """Put a number where an expression takes one from, and return that expression."""
    path, new = edit.path, edit.new
    for node in ast.walk(definition):
        if site.absolute not in spans_of(node):
            continue
        if isinstance(node, ast.Call) and lacks(node, site, path):
            node.keywords.append(ast.keyword(str(path[0]), ast.Constant(new)))
            return node
        for holder in holders(node, site, path):
            old = holder.expression
            value: ast.expr = ast.Constant(new)
            if holder.rest == (TIMES,):
                more = ast.BinOp(old, ast.Mult(), value)
                value = ast.BinOp(more, ast.FloorDiv(), ast.Constant(edit.old))
            elif holder.rest:
                name = ast.Name("_put", ast.Load())
                rest = ast.parse(repr(holder.rest), mode="eval").body
                value = ast.Call(name, [old, rest, value], [])
            holder.put(ast.copy_location(value, old))
            return node
    raise RewriteError(f"no expression at {site.span} takes a number")


def put(sequence: Any, path: Sequence[Any], value: float) -> Any:
    """A sequence (or a slice in one) with one number replaced: used by rewritten code."""
    if isinstance(sequence, slice):
        ends = {"start": sequence.start, "stop": sequence.stop, str(path[0]): value}
        return slice(ends["start"], ends["stop"], sequence.step)
    items = list(sequence)
    first, *rest = path
    items[first] = put(items[first], rest, value) if rest else value
    return tuple(items)


_OWN["_put"] = put
