"""Checks of what a search is asked for, and what it means."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphprune.api import ChannelGraph
from graphprune.arguments import is_int, is_number
from graphprune.calibration import calibrate
from graphprune.errors import InputError, warn
from graphprune.plan.plan import Plan
from graphprune.planning.targets import targets_of
from graphprune.training.search.bounds import examples_for, unchanged
from graphprune.training.search.evaluating import right_or_wrong, span_of

_MOST = 10**9  # examples that anyone would pass
LEAST = 0.2  # of the original, where a user does not say how small is small enough


def quantity_of(target: object) -> str:
    """What is made small.

    Raises:
        InputError: it is none of the known quantities, or several.
    """
    found = list(targets_of({target: 0.5} if isinstance(target, str) else target))
    if len(found) > 1:
        raise InputError(
            f"one quantity is made small by a search, target names {', '.join(found)}: name one, "
            'such as "macs"'
        )
    return found[0]


def least_of(target: str | Mapping[str, float | str], graph: ChannelGraph) -> float:
    """The smallest budget of interest, as a fraction of the original's.

    Raises:
        InputError: it is no limit, or above what the original has.
    """
    if isinstance(target, str):
        return LEAST
    ((name, limit),) = targets_of(target).items()
    if limit.fraction:
        share = limit.amount
    elif name == "latency":
        raise InputError("a search wants a latency as a fraction of the original's, such as 0.5")
    else:
        before = graph.memory if name == "memory" else getattr(graph.cost, name)
        share = limit.of(before) / before
    if share >= 1:
        raise InputError(
            f"target={dict(target)!r} is not below what the original has: there is nothing to do"
        )
    return round(share, 6)


def further_of(
    calibration: Mapping[str, Any] | bool, batches: Sequence[object] | None
) -> dict[str, Any] | None:
    """Arguments of a calibration; ``None`` without one.

    Raises:
        InputError: they are none, or there is no data.
    """
    if not isinstance(calibration, bool | Mapping):
        raise InputError(
            "calibration must be a mapping of arguments of calibrate, such as "
            f'{{"method": "batchnorm"}}, or False; got {type(calibration).__name__}'
        )
    if isinstance(calibration, Mapping) and batches is None:
        raise InputError("calibration needs data: pass batches, or leave it out")
    known = inspect.signature(calibrate).parameters.values()
    names = [one.name for one in known if one.kind is one.KEYWORD_ONLY]
    wrong = [] if isinstance(calibration, bool) else [n for n in calibration if n not in names]
    if wrong:
        raise InputError(
            f"calibration has no option {wrong[0]!r}; those of calibrate are {', '.join(names)}"
        )
    if calibration is False or batches is None:
        return None
    return {} if calibration is True else dict(calibration)


def check_call(amount: object, inplace: bool, max_drop: object, evaluate: object) -> None:
    """Raise unless ``rebuild`` was asked for a search and for nothing else.

    Raises:
        InputError: says what to leave out, or what is missing.
    """
    if max_drop is None or evaluate is None:
        missing, other = ("max_drop", "evaluate") if max_drop is None else ("evaluate", "max_drop")
        raise InputError(
            f"{other} was given without {missing}: a search needs evaluate=, a function of a model "
            "that returns how good it is, and max_drop=, by how much less it may be"
        )
    if amount is not None:
        kind = "a plan" if isinstance(amount, Plan) else f"a ratio ({amount!r})"
        raise InputError(f"both {kind} and max_drop were given: leave one of them out")
    if inplace:
        raise InputError(
            "max_drop tries several small models, none of them in place: leave inplace out"
        )


def check_arguments(
    evaluate: Any,
    max_drop: Any,
    evaluations: Any,
    sure: Any,
    confidence: Any,
    options: Mapping[str, Any],
) -> None:
    """Raise unless the numbers of a search are such.

    Raises:
        InputError: one is not.
    """
    if not callable(evaluate):
        raise InputError(
            "evaluate must be a function of a model that returns a number, larger for better ones; "
            f"got {type(evaluate).__name__}"
        )
    if not is_number(max_drop, 0) or math.isinf(max_drop):
        raise InputError(f"max_drop must be a finite number of at least 0, got {max_drop!r}")
    if not is_int(evaluations, 1):
        raise InputError(f"evaluations must be a positive int, got {evaluations!r}")
    if not isinstance(sure, bool):
        raise InputError(f"sure must be True or False, not {sure!r}")
    if not is_number(confidence) or not 0.5 <= confidence < 1:
        raise InputError(f"confidence must be in [0.5, 1), such as 0.95; got {confidence!r}")
    if "ratio" in options:
        raise InputError("the search finds the ratio: leave it out")


def check_unit(base: np.ndarray, max_drop: float) -> None:
    """Tell of a drop that is allowed in another unit than that of the evaluation."""
    mean = float(base.mean())
    if not 0 < mean <= max_drop:
        return
    text = f"max_drop={max_drop:g} is in the unit of evaluate, which is {mean:.4g} for the original"
    if right_or_wrong(base):
        raise InputError(f"{text}: any model would do; 1 point of 100 is {span_of(base) / 100:g}")
    warn(f"{text}: models that evaluate to {mean - max_drop:.4g} will do")


def check_examples(base: np.ndarray, max_drop: float, confidence: float) -> None:
    """Raise where not even a model that answers alike could be shown to be good enough."""
    if not right_or_wrong(base):
        return
    if not span_of(base):
        return  # none is right: nothing can be lost
    share, count = max_drop / span_of(base), len(base)
    if unchanged(count, confidence) > share:
        needed = examples_for(share, confidence) if share else _MOST
        more = f"{needed:,} examples or more, or " if needed < _MOST else ""
        raise InputError(
            f"{count:,} examples cannot show with {100 * confidence:g} % that at most {max_drop:g} "
            f"is lost: where none changes, it may still be "
            f"{span_of(base) * unchanged(count, confidence):.2g}. Pass {more}sure=False, which "
            "goes by the drop on these examples alone"
        )
