"""Records to JSON and back: decoded by the types of their fields, in bounded memory.

A file may come from a stranger. Whatever it says, what is made of it is a record of the types that
it declares, no larger than a multiple of the text; anything else is a ``PlanError``.
"""

from __future__ import annotations

import functools
import json
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from graphprune.errors import PlanError

Runs = Annotated[tuple[int, ...], "runs"]  # increasing indices, written as "0-3,7,9-12"
_ALWAYS, _EACH = 1 << 20, 16  # indices that runs may stand for: in any text, by its characters
_RUN = re.compile(r"\d{1,15}(-\d{1,15})?", re.ASCII)
_DEPTH = 200  # of what is nested in a request
_LARGEST = 1 << 53  # ints beyond it are no sizes


def encode(record: object) -> Any:
    """A record, or nested data of records, as what JSON can write."""
    if is_dataclass(record):
        return {
            field.name: runs(value) if hint == Runs else encode(value)
            for field in fields(record)
            for hint, value in [(_hints(_kind(record))[field.name], getattr(record, field.name))]
        }
    if isinstance(record, Mapping):
        return {key: encode(value) for key, value in record.items()}
    return [encode(item) for item in record] if isinstance(record, list | tuple) else record


def runs(indices: Iterable[int]) -> str:
    """Increasing indices as text: ``0-3,7,9-12``."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and parts[-1][1] == index - 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def loads(text: str, name: str) -> Any:
    """What JSON text holds.

    Raises:
        PlanError: it is not JSON, too deeply nested, or holds numbers that are none.
    """
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise PlanError(f"{name} is nested too deeply to be a plan") from None
    except (ValueError, TypeError) as error:
        raise PlanError(f"{name} is not JSON ({error}): pass what Plan.to_json wrote") from None


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no finite number")


def decode(kind: object, body: object, name: str, length: int) -> Any:
    """A record of some class from what JSON holds.

    Args:
        kind: a dataclass.
        body: what :func:`loads` returned for its part of a text.
        name: what the text is called in errors.
        length: how many characters the text has, which bounds what is made of it.

    Raises:
        PlanError: names the first field that is not of its type.
    """
    return _Reader(name, _ALWAYS + _EACH * length).record(kind, body, "")


def _kind(record: object) -> Any:
    return type(record)


@functools.cache
def _hints(kind: object) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


class _Reader:
    """Turns JSON into records, as long as there is room left."""

    def __init__(self, name: str, room: int) -> None:
        self.name, self.room = name, room
        self.known: dict[str, tuple[int, ...]] = {}  # the same runs are one tuple

    def damaged(self, what: str) -> PlanError:
        return PlanError(f"{self.name} is damaged: {what}")

    def wrong(self, where: str, expected: str, value: object) -> PlanError:
        found = "nothing" if value is None else f"a {type(value).__name__}"
        shown = f" {value!r}"[:40] if isinstance(value, str | int | float) else ""
        return self.damaged(f"{where}: expected {expected}, got {found}{shown}")

    def record(self, kind: Any, body: Any, where: str) -> Any:
        """An instance of a dataclass."""
        if not isinstance(body, dict):
            raise self.wrong(where or "the plan", "an object", body)
        hints = _hints(kind)
        unknown = sorted(map(str, body.keys() - hints.keys()))
        if unknown:
            raise PlanError(
                f"{self.name} is damaged: {where or 'it'} has unknown field {unknown[0]!r}"
            )
        values = {}
        for field in fields(kind):
            place = f"{where}.{field.name}".lstrip(".")
            if field.name in body:
                values[field.name] = self.value(hints[field.name], body[field.name], place)
            elif field.default is MISSING and field.default_factory is MISSING:
                raise self.damaged(f"{place} is missing")
        return kind(**values)

    def value(self, hint: object, value: object, where: str) -> Any:
        """A value of a type."""
        if hint == Runs:
            return self.indices(value, where)
        if is_dataclass(hint):
            return self.record(hint, value, where)
        origin, args = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            return self.one_of(args, value, where)
        if origin is tuple:
            return self.sequence(args, value, where)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return self.mapping(value, where)
        return self.atom(hint, value, where)

    def one_of(self, hints: tuple[object, ...], value: object, where: str) -> Any:
        """A value of one of some types; of two classes at most one is not an atom."""
        if value is None and type(None) in hints:
            return None
        atoms = [hint for hint in hints if hint in (int, str, float, bool)]
        others = [hint for hint in hints if hint not in (*atoms, type(None))]
        for hint in atoms:
            if type(value) is hint or (hint is float and type(value) is int):
                return self.atom(hint, value, where)
        return self.value((others or atoms)[0], value, where)

    def sequence(self, hints: tuple[object, ...], value: object, where: str) -> tuple[Any, ...]:
        """A tuple."""
        if not isinstance(value, list):
            raise self.wrong(where, "a list", value)
        if hints[-1] is Ellipsis:
            hints = (hints[0],) * len(value)
        if len(hints) != len(value):
            raise self.wrong(where, f"a list of {len(hints)}", len(value))
        return tuple(
            self.value(hint, item, f"{where}[{place}]")
            for place, (hint, item) in enumerate(zip(hints, value))
        )

    def mapping(self, value: object, where: str) -> dict[str, Any]:
        """Plain data, of bounded depth."""
        if not isinstance(value, dict):
            raise self.wrong(where, "an object", value)
        level: list[Any] = [value]
        for _ in range(_DEPTH):
            level = [
                item
                for holder in level
                for item in (holder.values() if isinstance(holder, dict) else holder)
                if isinstance(item, dict | list)
            ]
            if not level:
                return value
        raise self.damaged(f"{where} is nested more than {_DEPTH} deep")

    def atom(self, hint: Any, value: Any, where: str) -> Any:
        """A text, a truth or a finite number."""
        if hint is float and type(value) in (int, float):
            if abs(value) <= 1 << 64 or (math.isfinite(value) and type(value) is float):
                return value
            raise self.wrong(where, "a finite number", value)
        if type(value) is not hint:
            expected = {int: "an int", float: "a number", str: "a text", bool: "true or false"}
            raise self.wrong(where, expected[hint], value)
        if hint is int and abs(value) > _LARGEST:
            raise self.damaged(f"{where} is too large for a size")
        return value

    def indices(self, text: Any, where: str) -> tuple[int, ...]:
        """What :func:`runs` wrote."""
        if not isinstance(text, str):
            raise self.wrong(where, "runs of indices such as '0-3,7'", text)
        if text in self.known:
            return self.known[text]
        found: list[int] = []
        for part in filter(None, text.split(",")):
            ends = part.split("-")
            if len(ends) > 2 or not all(
                end.isascii() and end.isdigit() and len(end) < 16 for end in ends
            ):
                raise self.wrong(where, "runs of indices such as '0-3,7'", part)
            start, stop = int(ends[0]), int(ends[-1])
            self.room -= stop + 1 - start
            if stop < start or self.room < 0:
                what = "an increasing run" if stop < start else "no more indices than fit this text"
                raise self.wrong(where, what, part)
            found.extend(range(start, stop + 1))
        self.known[text] = tuple(found)
        return self.known[text]
