"""What may leave: kinds of parts, and what is said of channels alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from graphprune.errors import InputError

PARTS = ("channels", "branches", "blocks", "experts")
_OF_CHANNELS = (
    "ratios", "min_kept", "max_kept", "round_to", "uniform", "exact_only", "columns", "aggregate",
    "normalise", "scope",
)  # fmt: skip


def parts_of(given: Any) -> tuple[str, ...]:
    """The kinds that a user names.

    Raises:
        InputError: there is no such kind.
    """
    several = isinstance(given, Iterable) and not isinstance(given, str)
    parts = tuple(given) if several else (given,)
    if not parts or not all(isinstance(part, str) and part in PARTS for part in parts):
        raise InputError(f"parts must be one or several of {', '.join(PARTS)}, not {given!r}")
    return tuple(dict.fromkeys(parts))


def check_parts(request: Any, plain: Any) -> None:
    """Raise where something is said of channels, and none may leave.

    Args:
        request: what is asked for.
        plain: a request that says nothing.

    Raises:
        InputError: names the option.
    """
    if request.expressible and request.parts != ("channels",):
        raise InputError(
            f"expressible={request.expressible!r} is about channels: let parts leave first, by "
            "rebuild(model, ratio, parts=...), whose config follows by itself, then the channels "
            "of what that returns"
        )
    if "channels" in request.parts:
        return
    for name in _OF_CHANNELS:
        if getattr(request, name) != getattr(plain, name):
            raise InputError(
                f"{name} says something of channels, and with parts={request.parts!r} none leave: "
                "leave it out, or add 'channels' to parts"
            )
    if not isinstance(request.criterion, str):
        raise InputError(
            "a callable scores channels, and none leave: name a criterion for parts, such as "
            "'reconstruction', 'taylor' or 'random'"
        )


def check_channels_alone(options: Mapping[str, Any]) -> None:
    """Raise where schedules are asked for parts.

    Args:
        options: as for ``graph.plan``.

    Raises:
        InputError: says what to do instead.
    """
    if parts_of(options.get("parts", "channels")) != ("channels",):
        raise InputError(
            "channels leave round by round, and parts do not: let them leave first by "
            "rebuild(model, ratio, parts=...), and train what that returns"
        )
