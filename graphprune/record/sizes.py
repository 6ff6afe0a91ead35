"""Integers that remember where they came from.

A model computes sizes from module attributes (``self.num_heads``), from shapes of tensors
(``x.shape[1] // 2``) and from literals. While a model is recorded, the first two are replaced
by :class:`Size`, an ``int`` that carries the expression it was computed with, so that the
rewriter knows which attribute to change when channels leave.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from graphprune.errors import PACKAGE
from graphprune.record.sites import Site, in_cached_call


@dataclass(frozen=True)
class Attribute:
    """A module attribute: ``path`` leads to an int inside tuples, lists and dictionaries."""

    module: str
    name: str
    path: tuple[int | str, ...] = ()
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
UNKNOWN = Operation("mul", 0, 0)  # of a size that is never known to come out as it has to


@dataclass(frozen=True)
class Comparison:
    """A comparison of sizes that the model's code made, and how it came out."""

    op: str
    left: Expression
    right: Expression
    result: bool


Observer = Callable[[Comparison], None]

# Functions of ``math`` with one or two arguments that are followed while a model is recorded.
MATH = ("sqrt", "isqrt", "exp", "log", "log2", "log10", "pow", "gcd", "floor", "ceil", "trunc")
_SINGLE = {name: getattr(math, name) for name in MATH if name not in ("log", "pow", "gcd")}

_ARITHMETIC: dict[str, Callable[[object, object], object]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "truediv": operator.truediv,
    "pow": operator.pow,
}
_BITS: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, f"{name}_" if name in ("and", "or") else name)
    for name in ("and", "or", "xor", "lshift", "rshift")
}


def _of_one(function: Callable[[Any], Any]) -> Callable[[object, object], object]:
    return lambda number, _: function(number)


_OPS: dict[str, Callable[[Any, Any], Any]] = {
    **_ARITHMETIC,
    **_BITS,
    **{name: _of_one(single) for name, single in _SINGLE.items()},
    "log": lambda n, base: math.log(n, base) if base else math.log(n),
    "gcd": math.gcd,
    "abs": lambda n, _: abs(n),
    "round": lambda n, digits: round(n, digits) if digits else round(n),
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


CONTAINERS = frozenset({tuple, list, torch.Size, dict})  # attributes whose ints are followed


def plain(number: Any) -> Any:
    """The number behind a size or scale, without anyone noticing."""
    return int.__add__(number, 0) if isinstance(number, int) else float.__add__(number, 0.0)


def sizes_in(value: Any) -> Iterator[Size]:
    """The sizes in an attribute: itself, or inside tuples, lists and dictionaries."""
    if isinstance(value, Size):
        yield value
    elif type(value) in CONTAINERS:
        for item in value.values() if isinstance(value, dict) else value:
            yield from sizes_in(item)


def is_live(number: Size | Scale) -> bool:
    """Whether the recording that a size belongs to still runs, or has not begun."""
    return bool(getattr(getattr(number.observer, "__self__", None), "recording", True))


def _known(value: Any) -> Expression:
    """The expression behind an operand; sizes that a cache kept from an earlier run are numbers."""
    if not isinstance(value, Size | Scale):
        return value
    return value.expression if is_live(value) else plain(value)


def must_not_change(number: object) -> None:
    """Say that a size was used where no one sees what for: its value has to stay."""
    _tell(number, Comparison("is", expression(number), plain(number), True))


def _leaves(number: Size | Scale, value: int | None = None, op: str | None = None) -> None:
    """Say that a plain number was computed from a size, and which one, when that is known."""
    formula = Operation(op, number.expression, 0) if op else number.expression
    _tell(number, Comparison("leak", formula, 0 if value is None else value, value is not None))


def _tell(number: object, comparison: Comparison) -> None:
    observer = getattr(number, "observer", None)
    if observer is not None:
        observer(comparison)


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
        must_not_change(self)
        return int.__float__(self)

    def __int__(self) -> int:
        """A plain int: Python allows no other here."""
        _leaves(self, plain(self))
        return plain(self)

    def __bool__(self) -> bool:
        """Compared with zero."""
        _tell(self, Comparison("ne", self.expression, 0, int.__bool__(self)))
        return int.__bool__(self)

    def __hash__(self) -> int:
        """A key that must not change; in the cache of a function, one of this recording alone."""
        return _hash(self)

    def __neg__(self) -> Size:
        """Counted from the end."""
        return Size(-plain(self), Operation("sub", 0, self.expression), self.observer)

    def __floor__(self) -> Size:
        """Whole already."""
        return self

    __ceil__ = __trunc__ = __pos__ = __floor__

    def __deepcopy__(self, memo: object) -> Size:
        """Sizes are immutable."""
        return self

    def __reduce__(self) -> tuple[type, tuple[int]]:
        """A pickled size is a plain int."""
        return int, (plain(self),)


class Scale(float):
    """A float computed from sizes, with the expression that produced it."""

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

    def __neg__(self) -> Scale:
        """The other sign."""
        return Scale(-float.__add__(self, 0.0), Operation("sub", 0, self.expression), self.observer)

    def __float__(self) -> float:
        """A plain float that must not change."""
        must_not_change(self)
        return plain(self)

    def __int__(self) -> int:
        """A plain int: Python allows no other here."""
        value = math.trunc(plain(self))
        _leaves(self, value, "trunc")
        return value

    def __bool__(self) -> bool:
        """Compared with zero."""
        _tell(self, Comparison("ne", self.expression, 0, float.__bool__(self)))
        return float.__bool__(self)

    def __hash__(self) -> int:
        """As that of a size."""
        return _hash(self)

    def __deepcopy__(self, memo: object) -> Scale:
        """Scales are immutable."""
        return self

    def __reduce__(self) -> tuple[type, tuple[float]]:
        """A pickled scale is a plain float."""
        return float, (plain(self),)


def _hash(number: Size | Scale) -> int:
    if is_live(number):
        if in_cached_call(sys._getframe(2)):  # may not meet keys of other runs, or be met by them
            return hash((id(getattr(number.observer, "__self__", None)), number.expression))
        must_not_change(number)
    return hash(plain(number))


def _binary(name: str, reflected: bool) -> Callable[[Size, object], object]:
    op = _OPS[name]
    dunder = f"__r{name}__" if reflected else f"__{name}__"

    def method(self: Size | Scale, other: object) -> Any:
        plain = getattr(int if isinstance(self, int) else float, dunder)
        value = plain(self, other)
        if value is NotImplemented and isinstance(self, int) and isinstance(other, float):
            value = getattr(float, dunder)(int.__float__(self), other)
        if type(value) not in (int, float) or isinstance(other, bool) or not is_live(self):
            return value
        left, right = (other, self) if reflected else (self, other)
        return _computed(value, Operation(name, _known(left), _known(right)), self)

    method.__name__ = op.__name__
    return method


def _computed(value: int | float, formula: Expression, source: Size | Scale) -> Size | Scale:
    kind: Any = Size if isinstance(value, int) else Scale
    made: Size | Scale = kind(value, formula, source.observer)
    return made


def _unary(name: str, kind: type) -> Callable[..., object]:
    def method(self: Any, *digits: Any) -> Any:
        value = getattr(kind, f"__{name}__")(self, *digits)
        return _computed(value, Operation(name, self.expression, (digits or (0,))[0] or 0), self)

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow"):
    for _kind in (Size, Scale):
        setattr(_kind, f"__{_name}__", _binary(_name, reflected=False))
        setattr(_kind, f"__r{_name}__", _binary(_name, reflected=True))
for _name in _BITS:
    setattr(Size, f"__{_name}__", _binary(_name, reflected=False))
    setattr(Size, f"__r{_name}__", _binary(_name, reflected=True))
for _name in ("floor", "ceil", "trunc", "round", "abs"):
    setattr(Scale, f"__{_name}__", _unary(_name, float))
for _name in ("round", "abs"):
    setattr(Size, f"__{_name}__", _unary(_name, int))


def _divmod(reflected: bool) -> Callable[..., object]:
    def method(self: Any, other: Any) -> Any:
        left, right = (other, self) if reflected else (self, other)
        return left // right, left % right

    return method


def _leaking(kind: type, name: str) -> Callable[..., object]:
    """An operation whose result does not know its expression."""
    original = getattr(kind, name)

    def method(self: Any, *others: Any) -> Any:
        _leaves(self)
        return original(self, *others)

    return method


for _kind, _base in ((Size, int), (Scale, float)):
    for _name in ("divmod", "rdivmod"):
        setattr(_kind, f"__{_name}__", _divmod(_name == "rdivmod"))
    for _name in ("repr", "format", *(("invert",) if _base is int else ())):  # a text may be a key
        setattr(_kind, f"__{_name}__", _leaking(_base, f"__{_name}__"))


def _compared(name: str) -> Callable[[Size, object], object]:
    def method(self: Size | Scale, other: object) -> Any:
        kept = name in ("eq", "ne") and not is_live(self)  # by a cache of the user
        if kept and not sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
            return (self is other) == (name == "eq")  # equals nothing of today
        result = getattr(int if isinstance(self, int) else float, f"__{name}__")(self, other)
        if result is NotImplemented and isinstance(self, int) and isinstance(other, float):
            result = getattr(float, f"__{name}__")(int.__float__(self), other)
        if result is not NotImplemented:
            observed = self if self.observer is not None else other
            _tell(observed, Comparison(name, _known(self), _known(other), result))
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


def told_apart(sizes: Mapping[str, object], absent: set[str]) -> dict[str, Size | Scale]:
    """Sizes given to a function, as objects that can be told from all other numbers.

    Args:
        sizes: by the name of the argument that gives them.
        absent: those that the caller leaves to be computed, of which it has to give all if one
            that they are computed from is a number in the code, which may change.
    """
    literal = not all(isinstance(sizes[name], Size | Scale) for name in sizes.keys() - absent)

    def known(name: str, size: object) -> Size | Scale:
        kind: Any = Scale if isinstance(size, float) else Size
        formula = UNKNOWN if literal and name in absent else expression(size)
        made: Size | Scale = kind(plain(size), formula, getattr(size, "observer", None))
        return made

    return {name: known(name, size) for name, size in sizes.items()}


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
        try:
            return _OPS[expr.op](left, right)
        except (ArithmeticError, ValueError):
            return 0
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
