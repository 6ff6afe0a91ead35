"""Where in the source of a model a number was given to an op.

While a model is recorded, the stack knows for every op which expression of which function ran it,
and through which functions the forward of the module got there. The rewriter changes that
expression.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import linecache
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphprune.ops.calls import Function
from graphprune.ops.ids import Path

Span = tuple[int, int, int, int]  # first line, last line, first column, last column
TIMES = "times"  # ends the path to a number that is multiplied, where it stands, by new / old
OF = "of"  # how many numbers a norm counts, which torch's own takes from what it is given
STATISTICS = ("layer_norm", "group_norm", "softmax", "log_softmax", "mean")
INNER_SIZES = ("head_dim", "value_dim")  # of attention, which torch computes from others
Step = tuple[str, str]  # ("global" | "method" | "attribute" | "closure", name)


@dataclass(frozen=True)
class Site:
    """An expression of the source that runs in the forward of a module.

    ``steps`` lead from the forward to the function that holds it; ``span`` is its place, with lines
    counted from the first one of the function (line ``first`` of ``file``). ``method`` tells that
    argument 0 stands before the dot, ``count`` how many there were (more in a later round, where a
    function was given another argument).
    """

    steps: tuple[Step, ...]
    span: Span
    method: bool = False
    count: int = field(default=0, compare=False)
    file: str = field(default="", compare=False)
    names: tuple[str, ...] = field(default=(), compare=False)  # of the arguments, when known
    first: int = field(default=0, compare=False)
    digest: str = field(default="", compare=False)

    @property
    def absolute(self) -> Span:
        """The place in the file."""
        return (self.span[0] + self.first, self.span[1] + self.first, *self.span[2:])


def find_site(
    frames: Sequence[tuple[types.CodeType, int]],
    module: object,
    method: bool,
    count: int,
    names: tuple[str, ...] = (),
) -> Site | None:
    """The site of the innermost of some frames, given as (code, last instruction), outermost first.

    ``None`` when the functions between the forward of ``module`` and the site have no names by
    which they can be replaced.
    """
    function = forward_of(module, "run")
    if function is None or function.__code__ is not frames[0][0]:
        return None
    steps: list[Step] = []
    place = 0
    while place < len(frames) - 1:
        (caller, instruction), (code, _) = frames[place : place + 2]
        farther = range(len(frames) - 1, place, -1)
        wrapped = ((n, enclosed(function, frames[n][0])) for n in farther)
        place, way = next(((n, way) for n, way in wrapped if way), (place + 1, ()))
        if not way and code in _inner(function.__code__):
            continue
        if not way:
            call = _index(caller.co_filename).spans.get(_spans(caller)[instruction // 2])
            way = _way(function, call, code, module)
        for step in way:
            steps.append(step)
            function = follow(function, step, module, "run")
        if not way:
            return None
    code, instruction = frames[-1]
    span = _spans(code)[instruction // 2]
    if None in span or not _editable(function.__code__):
        return None
    first = start(function.__code__)
    span = (span[0] - first, span[1] - first, *span[2:])
    known = code.co_filename, names, first, digest(function.__code__)
    return Site(tuple(steps), span, method, count, *known)


def enclosed(function: Function, code: types.CodeType, depth: int = 4) -> tuple[Step, ...]:
    """How a decorated function holds the one that runs ``code``: in variables of its closure."""
    found = {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ())
        if filled(cell) and isinstance(cell.cell_contents, types.FunctionType)
    }
    for name, inner in found.items():
        if inner.__code__ is code:
            return (("closure", name),)
    for name, inner in found.items() if depth else ():
        rest = enclosed(inner, code, depth - 1) if inner is not function else ()
        if rest:
            return (("closure", name), *rest)
    return ()


def filled(cell: types.CellType) -> bool:
    """Whether the variable of a closure has a value yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _way(function: Any, call: Any, code: types.CodeType, module: Any) -> tuple[Step, ...]:
    """How a call reaches the function that runs ``code``: by a global name, or from ``self``."""
    reached = call.func if isinstance(call, ast.Call) else None
    caller: types.CodeType = function.__code__
    if isinstance(reached, ast.Name):
        local = (*caller.co_varnames, *caller.co_cellvars, *caller.co_freevars)
        found = None if reached.id in local else function.__globals__.get(reached.id)
        return _reaches(("global", reached.id), found, code)
    if not isinstance(reached, ast.Attribute) or not isinstance(reached.value, ast.Name):
        return ()
    if reached.value.id not in caller.co_varnames[:1]:
        return ()
    own = vars(module).get(reached.attr)
    if own is not None:
        kind = "attribute" if getattr(own, "free", True) else "method"
        return _reaches((kind, reached.attr), getattr(own, "run", own), code)
    found = inspect.getattr_static(type(module), reached.attr, None)
    return _reaches(("method", reached.attr), found, code)


def _reaches(step: Step, found: object, code: types.CodeType) -> tuple[Step, ...]:
    """A step to a function that runs ``code``, itself or inside its decorators."""
    if not isinstance(found, types.FunctionType):
        return ()
    if found.__code__ is code:
        return (step,)
    way = enclosed(found, code)
    return (step, *way) if way else ()


@functools.cache
def _editable(code: types.CodeType) -> bool:
    """Whether a function can be compiled anew: there is a source, without private names."""
    node = defined(code)
    items = ast.walk(node) if node is not None else ()
    names = (item.attr for item in items if isinstance(item, ast.Attribute))
    private = any(name.startswith("__") and not name.endswith("__") for name in names)
    return node is not None and not private


def forward_of(module: Any, version: str = "function") -> Any:
    """The plain function behind the forward of a module.

    A rewritten one has two versions: the original ``function``, and the one that is ``run``.
    """
    own = vars(module).get("forward")
    if own is not None:
        return getattr(own, version, None)
    forward = type(module).forward
    return forward if isinstance(forward, types.FunctionType) else None


def follow(function: Any, step: Step, module: Any, version: str = "function") -> Any:
    """The function that a step leads to."""
    kind, name = step
    if kind == "global":
        return function.__globals__[name]
    if kind == "closure":
        return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
    own = vars(module).get(name)
    return getattr(type(module), name) if own is None else getattr(own, version, own)


@functools.cache
def _inner(code: types.CodeType) -> frozenset[types.CodeType]:
    """The code of comprehensions and functions inside a function."""
    own = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return frozenset(own).union(*map(_inner, own)) if own else frozenset()


@functools.cache
def _spans(code: types.CodeType) -> list[Any]:
    return [(a, b, c, d) for a, b, c, d in code.co_positions()]


@functools.lru_cache(maxsize=64)
def tree(file: str) -> ast.Module | None:
    """The source of a file, parsed; ``None`` when it is not to be had."""
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return None


@dataclass(frozen=True)
class _Index:
    """The expressions of a file by place, its functions by name and first line, its lambdas."""

    spans: dict[Span, ast.AST] = field(default_factory=dict)
    functions: dict[tuple[str, int], ast.FunctionDef] = field(default_factory=dict)
    lambdas: dict[Span, ast.Lambda] = field(default_factory=dict)


@functools.lru_cache(maxsize=64)
def _index(file: str) -> _Index:
    parsed, found = tree(file), _Index()
    for node in ast.walk(parsed) if parsed is not None else ():
        if isinstance(node, ast.Call | ast.BinOp | ast.Subscript | ast.AugAssign | ast.Compare):
            found.spans.update(dict.fromkeys(spans_of(node), node))
        elif isinstance(node, ast.Lambda):
            found.lambdas.setdefault(span_of(node.body), node)
        elif isinstance(node, ast.FunctionDef):
            for line in (_first(node), node.lineno):  # compiled anew, it has no decorators
                found.functions.setdefault((node.name, line), node)
    return found


def _first(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(item.lineno for item in node.decorator_list)])


def defined(code: types.CodeType) -> Any:
    """The definition that code was compiled from, if its source is to be had."""
    index = _index(code.co_filename)
    if code.co_name == "<lambda>":
        return next((index.lambdas[span] for span in _spans(code) if span in index.lambdas), None)
    return index.functions.get((code.co_name, code.co_firstlineno))


def start(code: types.CodeType) -> int:
    """The line of ``def``: decorators come before it, and not in code that was compiled anew."""
    node = defined(code)
    return node.lineno if isinstance(node, ast.FunctionDef) else code.co_firstlineno


@functools.cache
def digest(code: types.CodeType) -> str:
    """What tells one version of the source of a function from another."""
    node = defined(code)
    return "" if node is None else hashlib.sha256(ast.unparse(node).encode()).hexdigest()[:16]


def span_of(node: ast.AST) -> Any:
    """The place of a node in its file."""
    return tuple(
        getattr(node, name, None)
        for name in ("lineno", "end_lineno", "col_offset", "end_col_offset")
    )


def spans_of(node: ast.AST) -> Iterator[Any]:
    """The places that running code may name for a node.

    A call of a method whose object ends on an earlier line is placed at the name of the method.
    """
    yield span_of(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        method = node.func
        if method.lineno != method.end_lineno:
            start = (method.end_col_offset or 0) - len(method.attr)
            yield method.end_lineno, node.end_lineno, start, node.end_col_offset


def in_cached_call(frame: types.FrameType) -> bool:
    """Whether a frame is calling a function that ``functools.lru_cache`` made."""
    spans, place = _spans(frame.f_code), frame.f_lasti // 2
    call = _index(frame.f_code.co_filename).spans.get(spans[place]) if place < len(spans) else None
    called = _resolved(call.func, frame) if isinstance(call, ast.Call) else None
    return isinstance(getattr(called, "__func__", called), functools._lru_cache_wrapper)


def _resolved(node: ast.AST, frame: types.FrameType) -> Any:
    """What a name, or attributes of it, stand for in a frame; nothing of the user's is run."""
    if isinstance(node, ast.Name):
        for names in (frame.f_locals, frame.f_globals):
            if node.id in names:
                return names[node.id]
    if isinstance(node, ast.Attribute):
        return inspect.getattr_static(_resolved(node.value, frame), node.attr, None)
    return None


def computes_floats(frame: types.FrameType) -> bool:
    """Whether a float that a call in a frame is given may have been computed in Python."""
    spans, place = _spans(frame.f_code), frame.f_lasti // 2
    node = _index(frame.f_code.co_filename).spans.get(spans[place]) if place < len(spans) else None
    if isinstance(node, ast.Call):
        parts = [*node.args, *(keyword.value for keyword in node.keywords)]
    elif isinstance(node, ast.BinOp):
        parts = [node.left, node.right]
    else:
        return True
    return not all(_is_given(part, frame) for part in parts)


def _is_given(node: ast.expr, frame: types.FrameType) -> bool:
    """A number in the code, an attribute, or a variable that holds no float."""
    if isinstance(node, ast.Name):
        return not isinstance(_resolved(node, frame), float)
    return is_literal(node) or isinstance(node, ast.Attribute | ast.Constant)


def given(site: Site, path: Path) -> ast.expr | None:
    """The expression that gives a number, or a sequence with it; ``None`` if it cannot be told."""
    node = _index(site.file).spans.get(site.absolute)
    if node is None or (isinstance(path[0], str) and not isinstance(node, ast.Call)):
        return None
    holder = next(holders(node, site, path), None)
    return None if holder is None else holder.expression


@dataclass
class Holder:
    """A place in a syntax tree: ``rest`` leads from the expression there to the number."""

    parent: Any
    key: Any
    rest: Path

    @property
    def expression(self) -> Any:
        """What stands there."""
        return self.parent[self.key] if self.listed else getattr(self.parent, self.key)

    @property
    def listed(self) -> bool:
        """Whether the place is an item of a list."""
        return isinstance(self.parent, list)

    def put(self, new: ast.expr) -> None:
        """Replace the expression."""
        if self.listed:
            self.parent[self.key] = new
        else:
            setattr(self.parent, self.key, new)


def holders(node: object, site: Site, path: Path) -> Iterator[Holder]:
    """Where the number at ``path`` of the arguments of an expression stands (one or none)."""
    head, rest = path[0], path[1:]
    if isinstance(node, ast.Call):
        name = site.names[head] if isinstance(head, int) and head < len(site.names) else head
        for keyword in node.keywords:
            if keyword.arg == name:
                yield _inside(keyword, "value", rest)
                return
        if isinstance(head, int):
            yield from _argument(node.args, head - site.method, site.count - site.method, rest)
        elif head in site.names:  # given by place, passed on by name
            yield from _argument(node.args, site.names.index(head), len(node.args), rest)
    elif isinstance(node, ast.BinOp):
        yield Holder(node, "left" if site.count < 0 else "right", rest)
    elif isinstance(node, ast.AugAssign):
        yield Holder(node, "value", rest)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        first = is_literal(node.left) and not is_literal(node.comparators[0])
        yield Holder(node, "left", rest) if first else Holder(node.comparators, 0, rest)
    elif isinstance(node, ast.Subscript) and head == 1:
        yield _inside(node, "slice", rest)


def _argument(args: list[Any], index: int, count: int, rest: Path) -> Iterator[Holder]:
    stars = [place for place, arg in enumerate(args) if isinstance(arg, ast.Starred)]
    if not stars or index < stars[0]:
        yield from [_inside(args, index, rest)] if index < len(args) else ()
    elif len(stars) == 1:
        inside = count - (len(args) - 1)
        if index - stars[0] < inside:
            yield Holder(args[stars[0]], "value", (index - stars[0], *rest))
        else:
            yield _inside(args, index - inside + 1, rest)


def _inside(parent: object, key: object, rest: Path) -> Holder:
    """Descend into tuples, lists and slices that are written out."""
    holder = Holder(parent, key, rest)
    if not rest:
        return holder
    node, first = holder.expression, rest[0]
    if isinstance(node, ast.Tuple | ast.List) and isinstance(first, int):
        stars = [place for place, item in enumerate(node.elts) if isinstance(item, ast.Starred)]
        if not stars or first < stars[0]:
            return _inside(node.elts, first, rest[1:])
    if isinstance(node, ast.Slice) and first != TIMES:
        return _inside(node, {"start": "lower", "stop": "upper"}[str(first)], rest[1:])
    return holder


def whole(site: Site, path: Path) -> bool:
    """Whether the number at ``path`` of the arguments is all that one expression gives."""
    node = _index(site.file).spans.get(site.absolute)
    if node is None or (isinstance(path[0], str) and not isinstance(node, ast.Call)):
        return False
    holder = next(holders(node, site, path), None)
    return holder is not None and not holder.rest


def lacks(node: ast.Call, site: Site, path: Path) -> bool:
    """Whether a call leaves out a keyword argument."""
    if path[0] in INNER_SIZES and not is_attention(node):
        return False
    if path[0] == OF and not counting_call(node):
        return False
    names = {keyword.arg for keyword in node.keywords}
    named = isinstance(path[0], str) and path[0] not in names and None not in names
    return named and next(holders(node, site, path), None) is None


def is_attention(node: ast.Call) -> bool:
    """Whether a call is one of torch's attention as a function, which may get sizes of its own."""
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return bool(name == "multi_head_attention_forward")


def counting_call(node: ast.Call) -> str:
    """Which of torch's statistics a call may be of, that can count what left; empty for others.

    ``"forward"``: that of the class from which the class of the module is derived.
    """
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name != "forward":
        return name if name in STATISTICS else ""
    held = node.func.value if isinstance(node.func, ast.Attribute) else None
    if not isinstance(held, ast.Call) or held.args:
        return ""
    return name if getattr(held.func, "id", "") == "super" else ""


def changeable(site: Site, path: Path) -> bool:
    """Whether the number at ``path`` of the arguments can be changed in the source."""
    node = _index(site.file).spans.get(site.absolute)
    return given(site, path) is not None or (isinstance(node, ast.Call) and lacks(node, site, path))


def is_literal(node: ast.AST) -> bool:
    """Whether an expression is a number written in the code."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)
