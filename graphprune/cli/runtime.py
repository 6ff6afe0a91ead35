"""``shrink --runtime``: a latency is that of the engine that will serve."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from graphprune.api import rebuild
from graphprune.deploy.engines import ENGINES
from graphprune.deploy.meeting import meet_latency
from graphprune.errors import InputError
from graphprune.planning.options import Options

_RUNTIMES = ("pytorch", *ENGINES)


def smaller(
    runtime: str,
    original: nn.Module,
    ratio: float | None,
    example: object,
    attention: str,
    options: Options,
) -> nn.Module:
    """The small model, whose latency is met in a runtime.

    Raises:
        InputError: an unknown runtime, or one without a latency to meet in it.
    """
    if runtime not in _RUNTIMES:
        raise InputError(f"--runtime is {' or '.join(_RUNTIMES)}; got {runtime!r}")
    if runtime == "pytorch":
        return rebuild(original, ratio, example, attention=attention, **options)
    target = options.get("target", {})
    if not isinstance(target, Mapping) or set(target) != {"latency"} or ratio is not None:
        raise InputError(
            f"--runtime {runtime} needs --target latency=0.5, say, and no other target or ratio"
        )
    del options["target"]
    if options.get("round_to") is None:
        options.pop("round_to", None)  # the engine's own width
    if options.get("threads") is None:
        options["threads"] = 1
    latency = target["latency"]
    return meet_latency(
        original, latency, example, runtime=runtime, attention=attention, **options
    ).small
