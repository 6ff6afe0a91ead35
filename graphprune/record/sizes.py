"""Integers that remember where they came from.

A model computes sizes from module attributes (``self.num_heads``), from shapes of tensors
(``x.shape[1] // 2``) and from literals. While a model is recorded, the first two are replaced
by :class:`Size`, an ``int`` that carries the expression it was computed with, so that the
rewriter knows which attribute to change when channels leave.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphprune.record.sites import Site


@dataclass(frozen=True)
class Attribute:
    """A module attribute: ``path`` holds the indices when it is a tuple or list of ints."""

    module: str
    name: str
    path: tuple[int, ...] = ()
    value: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Extent:
    """The size of dimension ``dim`` of a recorded value."""

    node: Any
    dim: int


@dataclass(frozen=True)
class Literal:
    """A number given to an op in the code of ``module``: ``path`` of the arguments at a site."""

    module: str
    site: Site
    path: tuple[int | str, ...]
    value: float = field(default=0, compare=False)


@dataclass(frozen=True)
class Operation:
    """An arithmetic operation on two expressions."""

    op: str
    left: Expression
    right: Expression


Settable = Attribute | Literal
Expression = Attribute | Extent | Operation | int | float


@dataclass(frozen=True)
class Comparison:
    """A comparison of sizes that the model's code made, and how it came out."""

    op: str
    left: Expression
    right: Expression
    result: bool


Observer = Callable[[Comparison], None]

_OPS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "truediv": operator.truediv,
    "pow": operator.pow,
}
_INVERSES: dict[tuple[str, str], Callable[[int, int], int | None]] = {
    ("add", "left"): lambda want, other: want - other,
    ("add", "right"): lambda want, other: want - other,
    ("sub", "left"): lambda want, other: want + other,
    ("sub", "right"): lambda want, other: other - want,
    ("mul", "left"): lambda want, other: want // other if other and want % other == 0 else None,
    ("mul", "right"): lambda want, other: want // other if other and want % other == 0 else None,
    ("floordiv", "left"): lambda want, other: want * other,
    ("floordiv", "right"): lambda want, other: other // want if want else None,
}


def plain(number: Any) -> Any:
    """The number behind a size or scale, without anyone noticing."""
    return int.__add__(number, 0) if isinstance(number, int) else float.__add__(number, 0.0)


class Size(int):
    """An int with the expression that produced it."""

    expression: Expression
    observer: Observer | None

    def __new__(cls, value: int, expression: Expression, observer: Observer | None = None) -> Size:
        """Make an int that equals ``value`` and remembers ``expression``."""
        self = super().__new__(cls, value)
        self.expression = expression
        self.observer = observer
        return self

    def __float__(self) -> float:
        """A float of a size is a number that must not change."""
        if self.observer is not None:
            self.observer(Comparison("is", self.expression, plain(self), True))
        return int.__float__(self)

    def __int__(self) -> int:
        """An int that is no size any more: it may be anything computed from one."""
        if self.observer is not None:
            self.observer(Comparison("leak", self.expression, 0, True))
        return plain(self)

    def __bool__(self) -> bool:
        """Compared with zero."""
        if self.observer is not None:
            self.observer(Comparison("ne", self.expression, 0, int.__bool__(self)))
        return int.__bool__(self)

    def __hash__(self) -> int:
        """A key that must not change."""
        if self.observer is not None:
            self.observer(Comparison("is", self.expression, plain(self), True))
        return int.__hash__(self)

    def __neg__(self) -> Size:
        """Counted from the end."""
        return Size(-plain(self), Operation("sub", 0, self.expression), self.observer)

    def __deepcopy__(self, memo: object) -> Size:
        """Sizes are immutable."""
        return self

    def __reduce__(self) -> tuple[type, tuple[int]]:
        """A pickled size is a plain int."""
        return int, (plain(self),)


class Scale(float):
    """A float computed from sizes, with the expression that produced it."""

    def __neg__(self) -> Scale:
        """The other sign."""
        return Scale(-float.__add__(self, 0.0), Operation("sub", 0, self.expression), self.observer)

    def __float__(self) -> float:
        """A plain float that must not change."""
        if self.observer is not None:
            self.observer(Comparison("is", self.expression, plain(self), True))
        return plain(self)

    def __hash__(self) -> int:
        """A key that must not change."""
        return hash(float(self))

    expression: Expression
    observer: Observer | None

    def __new__(
        cls, value: float, expression: Expression, observer: Observer | None = None
    ) -> Scale:
        """Make a float that equals ``value`` and remembers ``expression``."""
        self = super().__new__(cls, value)
        self.expression = expression
        self.observer = observer
        return self

    def __reduce__(self) -> tuple[type, tuple[float]]:
        """A pickled scale is a plain float."""
        return float, (plain(self),)


def _binary(name: str, reflected: bool) -> Callable[[Size, Any], Any]:
    op = _OPS[name]
    dunder = f"__r{name}__" if reflected else f"__{name}__"

    def method(self: Size | Scale, other: Any) -> Any:
        plain = getattr(int if isinstance(self, int) else float, dunder)
        value = plain(self, other)
        if value is NotImplemented and isinstance(self, int) and isinstance(other, float):
            value = getattr(float, dunder)(int.__float__(self), other)
        if type(value) not in (int, float) or isinstance(other, bool):
            return value
        left, right = (other, self) if reflected else (self, other)
        formula = Operation(name, expression(left), expression(right))
        if isinstance(value, int):
            return Size(value, formula, self.observer)
        return Scale(value, formula, self.observer)

    method.__name__ = op.__name__
    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow"):
    for _kind in (Size, Scale):
        setattr(_kind, f"__{_name}__", _binary(_name, reflected=False))
        setattr(_kind, f"__r{_name}__", _binary(_name, reflected=True))


def _leaking(kind: type, name: str) -> Callable[..., Any]:
    """An operation whose result does not know its expression."""
    original = getattr(kind, name)

    def method(self: Any, *others: Any) -> Any:
        if self.observer is not None:
            self.observer(Comparison("leak", self.expression, 0, True))
        return original(self, *others)

    return method


_BOTH = ("round", "floor", "ceil", "trunc", "abs", "divmod", "rdivmod")
_BITS = ("and", "or", "xor", "lshift", "rshift")
for _kind, _base, _names in (
    (Size, int, (*_BOTH, *_BITS, *(f"r{name}" for name in _BITS), "invert")),
    (Scale, float, (*_BOTH, "int")),
):
    for _name in _names:
        setattr(_kind, f"__{_name}__", _leaking(_base, f"__{_name}__"))


def _compared(name: str) -> Callable[[Size, Any], Any]:
    def method(self: Size | Scale, other: Any) -> Any:
        result = getattr(int if isinstance(self, int) else float, f"__{name}__")(self, other)
        if result is NotImplemented and isinstance(self, int) and isinstance(other, float):
            result = getattr(float, f"__{name}__")(int.__float__(self), other)
        observer = self.observer or getattr(other, "observer", None)
        if observer is not None and result is not NotImplemented:
            observer(Comparison(name, expression(self), expression(other), result))
        return result

    return method


COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
for _name in COMPARISONS:
    setattr(Size, f"__{_name}__", _compared(_name))
    setattr(Scale, f"__{_name}__", _compared(_name))
COMPARISONS["is"] = operator.eq  # a value that left the sizes: nothing may change it


def expression(value: Any) -> Expression:
    """The expression behind an int."""
    return value.expression if isinstance(value, Size | Scale) else value


def evaluate(
    expr: Expression, known: Mapping[Settable, float], extent: Callable[[Extent], int]
) -> int | float:
    """The value of an expression.

    Args:
        expr: what to evaluate.
        known: the attributes and literals that have a new value.
        extent: the new size of a dimension of a value.
    """
    if isinstance(expr, Operation):
        left, right = evaluate(expr.left, known, extent), evaluate(expr.right, known, extent)
        if not right and expr.op in ("floordiv", "mod", "truediv"):
            return 0
        return _OPS[expr.op](left, right)
    if isinstance(expr, Extent):
        return extent(expr)
    if isinstance(expr, Attribute):
        return known.get(expr, expr.value)
    return expr


def attributes(expr: Expression) -> list[Attribute]:
    """The attributes in an expression."""
    if isinstance(expr, Operation):
        return attributes(expr.left) + attributes(expr.right)
    return [expr] if isinstance(expr, Attribute) else []


def extents(expr: Expression) -> list[Extent]:
    """The sizes of values that an expression depends on."""
    if isinstance(expr, Operation):
        return extents(expr.left) + extents(expr.right)
    return [expr] if isinstance(expr, Extent) else []


def solve(
    expr: Expression,
    want: int,
    leaf: Attribute,
    known: Mapping[Settable, float],
    extent: Callable[[Extent], int],
) -> int | None:
    """The value of ``leaf`` that makes ``expr`` equal ``want``, if there is one."""
    if leaf == expr:
        return want
    if not isinstance(expr, Operation):
        return None
    side = "left" if leaf in attributes(expr.left) else "right"
    inner, other = (expr.left, expr.right) if side == "left" else (expr.right, expr.left)
    if leaf in attributes(other) or (expr.op, side) not in _INVERSES:
        return None
    value = _INVERSES[expr.op, side](want, int(evaluate(other, known, extent)))
    return None if value is None else solve(inner, value, leaf, known, extent)
