"""Try a declaration on a tiny graph of one op: remove channels, and compare with what was claimed.

This is brute force: unit after unit is cut out of the operands, the op runs on what is left, and
its result must be that of the whole operands at the positions that stay. Nothing of the engine
but the walk is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from graphprune.errors import OpError
from graphprune.ops.calls import Function
from graphprune.ops.claims import CLAIMS
from graphprune.ops.given import numbers_for
from graphprune.ops.registry import REGISTRY, Op, name_of
from graphprune.ops.samples import Random, Sample
from graphprune.ops.tiny import Cut, Tiny, close, overload_of, run

_MOST = 12  # units that are tried one by one


def check(op: object) -> None:
    """Try what is declared of an op with its sample, and say what is wrong.

    Args:
        op: as for :func:`declare`.

    Raises:
        OpError: it is not declared or has no sample, or a view does not hold; names each of them.

    Example:
        >>> import torch
        >>> from graphprune.ops import check
        >>> check(torch.ops.aten.mm)
    """
    name = name_of(op)
    known = REGISTRY.get(name)
    if known is None:
        raise OpError(f"{name} is not declared: see graphprune.ops.declare")
    if known.sample is None and known.refused is None:
        raise OpError(f"{name} has no sample to be tried with: pass sample=of((2, 3), ...)")
    faults = [f"  {fault}" for fault in dict.fromkeys(_faults(name, known))]
    if faults:
        raise OpError("\n".join([f"what is declared of {name} does not hold:", *faults]))


def _faults(name: str, op: Op) -> Iterator[str]:
    if op.sample is not None:
        target = overload_of(name, op.sample)
        for view, claim in {"channels": _channels, **CLAIMS}.items():
            yield from _raised(view, claim, target, op, op.sample)
    if op.refused is not None:
        target = overload_of(name, op.refused)
        yield from _raised("refused", _refusal, target, op, op.refused)


def _raised(view: str, claim: Any, target: Any, op: Op, sample: Sample) -> Iterator[str]:
    """What is wrong with a view; a rule that raises is."""
    try:
        yield from claim(target, op, sample)
    except Exception as error:
        yield f"{view}: raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _channels(target: Function, op: Op, sample: Sample) -> Iterator[str]:
    """Remove units one by one, from activations and from parameters."""
    removable = 0
    for constant in (False, True):
        tiny = Tiny(target, op, sample, constant)
        for way in range(2 if tiny.walk.marks.choices else 1):
            for units in tiny.removals(way, _MOST):
                removable += 1
                yield from _removal(tiny, tiny.cut(units))
    if not removable and any(isinstance(part, Random) for part in sample.leaves):
        yield "channels: none can leave with this sample"


def _refusal(target: Function, op: Op, sample: Sample) -> Iterator[str]:
    tiny = Tiny(target, op, sample, constant=False)
    if next(tiny.removals(0, 1), None) is not None:
        yield "refused: channels can leave with this sample"


def _removal(tiny: Tiny, cut: Cut) -> Iterator[str]:
    """Compare the op on what is left with the whole one at the positions that stay."""
    what = f"without {cut.text}"
    try:
        small_args = cut.sliced()
        wanted = cut.reference()
    except ValueError as error:
        yield f"channels: {what}: {error}"
        return
    try:
        args = _adapted(tiny, cut, small_args)
        found = run(tiny.target, *args)
    except (RuntimeError, IndexError, ValueError) as error:
        text = str(error).splitlines()[0]
        yield f"channels or given: {what} the op does not run: {text}"
        return
    for index, (small, whole) in enumerate(zip(found, wanted)):
        if isinstance(whole, ValueError):
            yield f"channels: {what}: {whole}"
        elif whole is not None and small.shape != whole.shape:
            shapes = f"{list(small.shape)}, not {list(whole.shape)}"
            yield f"channels or given: {what} result {index} has the shape {shapes}"
        elif whole is not None and not tiny.random and not close(small, whole):
            yield f"channels, given or masked: {what} result {index} has other values"


def _adapted(tiny: Tiny, cut: Cut, args: tuple[Any, Any]) -> tuple[Any, Any]:
    """The arguments with the sizes that the op needs."""
    rule: Callable[..., Any] | None = tiny.op.given
    if rule is None:
        return args
    positional, named = list(args[0]), dict(args[1])
    for given in rule(cut, tiny.node, cut.alive):
        for place, number in numbers_for(tiny.node, given).items():
            first, *rest = number.path
            holder: Any = positional if isinstance(first, int) else named
            if isinstance(holder[first], list):
                holder[first] = list(holder[first])
                holder, first = holder[first], rest[0]
            holder[first] = given.new[place]
    return positional, named
