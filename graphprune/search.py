"""The smallest model that loses at most so much: budgets are tried, each planned and repaired."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.api import rebuild, trace
from graphprune.arguments import is_int, is_number
from graphprune.calibration import calibrate
from graphprune.errors import InputError
from graphprune.planning.naming import named
from graphprune.record.batches import check_data
from graphprune.text import bar, render

QUANTITIES = ("macs", "params", "bytes")
_INSIDE = 0.2  # of the bracket, from either end: where a guess may fall


@dataclass(frozen=True)
class Tried:
    """One budget that was tried.

    Attributes:
        budget: the fraction of the original's that was allowed.
        reached: what the plan came to.
        drop: of the evaluation, in its unit.
        most: below which the drop is with the confidence asked for, over other items of the kind;
            ``None`` where the evaluation returns a single number.
    """

    budget: float
    reached: float
    drop: float
    most: float | None = None


@dataclass(frozen=True)
class Smallest:
    """The smallest model found; ``print`` it to see the curve.

    Attributes:
        model: it carries its plan. The original itself where nothing smaller will do.
        quantity: that was made small.
        max_drop: that was allowed.
        base: the evaluation of the original.
        chosen: the budget of the model; ``None`` for the original.
        curve: all budgets that were tried, the largest first.
        items: how many items each evaluation came from, when it told.
        confidence: of the limits.
    """

    model: nn.Module
    quantity: str
    max_drop: float
    base: float
    chosen: Tried | None
    curve: tuple[Tried, ...]
    items: int | None
    confidence: float

    def __str__(self) -> str:
        """The choice, and the curve."""
        if self.chosen is None:
            title = f"no budget that was tried loses at most {self.max_drop:g}: the original stays"
        else:
            told = f"{100 * self.chosen.reached:.1f} % of the {self.quantity} lose"
            title = f"{told} {self.chosen.drop:.3g} of {self.base:.4g}{self._limit(self.chosen)}"
        rows = [
            (
                f"{100 * tried.reached:.1f} %",
                f"{tried.drop:.3g}",
                "" if tried.most is None else f"{tried.most:.3g}",
                "chosen" if tried is self.chosen else "",
            )
            for tried in self.curve
        ]
        limit = f"at most, with {100 * self.confidence:.0f} %"
        return render(title, (self.quantity, "drop", limit, ""), rows)

    def _limit(self, tried: Tried) -> str:
        if tried.most is None:
            return ""
        return (
            f" (at most {tried.most:.3g} with {100 * self.confidence:.0f} %, from "
            f"{self.items:,} items)"
        )


def smallest(
    model: nn.Module,
    evaluate: Callable[[nn.Module], object],
    data: Iterable[object],
    max_drop: float,
    *,
    example_inputs: object = None,
    quantity: str = "macs",
    least: float = 0.2,
    evaluations: int = 6,
    sure: bool = False,
    confidence: float = 0.95,
    calibration: Mapping[str, Any] | None = None,
    progress: bool = False,
    **options: Any,
) -> Smallest:
    """Find the smallest model whose evaluation drops by at most so much, without training.

    Every budget that is tried is planned (``criterion="auto"`` unless another one is named),
    rebuilt, calibrated on ``data``, and evaluated. The next one is guessed from a line through the
    drops on both sides, which are taken to grow as models get smaller.

    Args:
        model: the trained model; it is not touched.
        evaluate: called with a model; returns a number, larger for better ones, or a tensor of one
            number for each item (whether it was right, say), always for the same items: then
            limits on the drop are told.
        data: batches without labels, gone through several times; items that ``evaluate`` does not
            look at.
        max_drop: in the unit of the evaluation: 0.01 where that is a fraction of right answers.
        example_inputs: as for :func:`trace`; inferred from the first layer when absent.
        quantity: ``"macs"``, ``"params"`` or ``"bytes"``.
        least: the smallest budget that is tried, as a fraction of the original's.
        evaluations: how many small models are evaluated, at most.
        sure: the limit on the drop must not be above ``max_drop``, not just the drop.
        confidence: of that limit; the spread of the drops over the items tells it.
        calibration: further arguments of :func:`calibrate`.
        progress: show a progress bar, if the error stream is a terminal.
        options: as for ``graph.plan``, but for its target and data.

    Returns:
        The model, and the curve.

    Raises:
        InputError: an argument is wrong, or an evaluation is not finite or of other items.

    Example:
        >>> import torch, graphprune
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
        >>> x, data = torch.randn(64, 4), [torch.randn(64, 4)]
        >>> y = net(x).argmax(1)
        >>> found = graphprune.smallest(net, lambda m: (m(x).argmax(1) == y).float(), data, 0.05)
        >>> found.chosen is None or found.chosen.drop <= 0.05
        True
    """
    if not callable(evaluate):
        raise InputError(
            "evaluate must be a function of a model that returns a number, larger for better ones; "
            f"got {type(evaluate).__name__}"
        )
    _check(max_drop, quantity, least, evaluations, confidence, options)
    batches = list(check_data(data))
    graph = trace(model, example_inputs)
    base = _scores(evaluate, model, None)
    asked = {"criterion": "auto", **named(options, model), "data": batches}
    found: dict[float, tuple[Tried, nn.Module]] = {}

    def attempt(budget: float) -> bool:
        plan = graph.plan(target={quantity: budget}, **asked)
        small = rebuild(model, plan)
        calibrate(small, model, batches, **(calibration or {}))
        lost = base - _scores(evaluate, small, base)
        most = _limit(lost, confidence) if len(lost) > 1 else None
        reached = getattr(plan.after, quantity) / getattr(plan.before, quantity)
        found[budget] = Tried(budget, reached, float(lost.mean()), most), small
        return _drop(found[budget][0], sure) <= max_drop

    low, high = least, 1.0  # the drop at low is too large, once it was tried; at high it is not
    with bar("budgets", evaluations, progress) as tick:
        if attempt(least):
            high = least
        tick()
        while len(found) < evaluations and high - low > 0.01:
            drops = {budget: _drop(tried, sure) for budget, (tried, _) in found.items()}
            budget = _guess(low, high, drops[low], drops.get(high, 0.0), max_drop)
            low, high = (low, budget) if attempt(budget) else (budget, high)
            tick()
    chosen, small = found.get(high, (None, model))
    curve = tuple(tried for tried, _ in sorted(found.values(), key=lambda pair: -pair[0].budget))
    items = len(base) if len(base) > 1 else None
    number = float(base.mean())
    return Smallest(small, quantity, max_drop, number, chosen, curve, items, confidence)


def _drop(tried: Tried, sure: bool) -> float:
    return tried.most if sure and tried.most is not None else tried.drop


def _guess(low: float, high: float, worse: float, better: float, wanted: float) -> float:
    """Where a line through two drops, the first too large, meets the one wanted."""
    share = (worse - wanted) / (worse - better) if worse > better else 0.5
    share = min(max(share, _INSIDE), 1 - _INSIDE)
    return round(low + share * (high - low), 4)


def _scores(
    evaluate: Callable[[nn.Module], object], model: nn.Module, like: Tensor | None
) -> Tensor:
    """What an evaluation says, [items] or [1], in float64."""
    with torch.no_grad():
        returned: Any = evaluate(model)
    try:
        value = torch.as_tensor(returned).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            "evaluate must return a number, or a tensor of one number for each item; got "
            f"{type(returned).__name__}"
        ) from None
    if value.dim() > 1 or not value.numel() or not bool(value.isfinite().all()):
        raise InputError(
            "evaluate must return a finite number, or a tensor of one number for each item; got "
            f"shape {list(value.shape)}" + ("" if value.dim() > 1 else f": {value.tolist()}"[:80])
        )
    if like is not None and value.numel() != like.numel():
        raise InputError(
            f"evaluate returned {like.numel()} numbers for the original and {value.numel()} for a "
            "small model: they must be of the same items"
        )
    return value.reshape(-1)


def _limit(lost: Tensor, confidence: float) -> float:
    """Below which the mean over other items of the kind is, with some confidence."""
    mean, spread = float(lost.mean()), float(lost.std())
    if spread == 0:  # no item tells how others would differ: the rule of three
        return mean - math.log(1 - confidence) / len(lost)
    return mean + NormalDist().inv_cdf(confidence) * spread / len(lost) ** 0.5


def _check(
    max_drop: Any, quantity: Any, least: Any, evaluations: Any, confidence: Any, options: Any
) -> None:
    if not is_number(max_drop, 0) or math.isinf(max_drop):
        raise InputError(f"max_drop must be a number of at least 0, got {max_drop!r}")
    if quantity not in QUANTITIES:
        raise InputError(f"quantity must be one of {', '.join(QUANTITIES)}, not {quantity!r}")
    if not is_number(least) or not 0 < least < 1:
        raise InputError(f"least must be a fraction in (0, 1), got {least!r}")
    if not is_int(evaluations, 1):
        raise InputError(f"evaluations must be a positive int, got {evaluations!r}")
    if not is_number(confidence) or not 0.5 <= confidence < 1:
        raise InputError(f"confidence must be in [0.5, 1), such as 0.95; got {confidence!r}")
    for name in ("target", "ratio", "data"):
        if name in options:
            raise InputError(f"{name} is what the search itself says to graph.plan: leave it out")
