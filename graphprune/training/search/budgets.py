"""Which budget to try next, from the losses at those that were tried."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

CLOSE = 0.01  # budgets are told apart from here on
_EDGE = 0.15  # of the interval, from either end: where a guess may fall


def next_budget(seen: Mapping[float, float], wanted: float, least: float) -> float | None:
    """A budget between the smallest that is good enough and the largest below that is not.

    Losses are taken to grow as budgets get smaller. They do so faster and faster: the curve is
    fitted to their logarithms (monotone cubics; Fritsch and Carlson, 1980), with no loss at the
    whole model.

    Args:
        seen: losses by budget, a fraction of the original's; infinite where no plan is.
        wanted: the loss that may be.
        least: no budget below is of interest.

    Returns:
        ``None`` when there is nothing left to find out.

    Example:
        >>> next_budget({}, 1.0, 0.2), next_budget({0.6: 3.0}, 1.0, 0.2)
        (0.6, 0.8)
    """
    high = min((budget for budget, loss in seen.items() if loss <= wanted), default=1.0)
    below = [budget for budget, loss in seen.items() if budget < high and loss > wanted]
    low = max(below, default=least)
    if high - low <= (CLOSE if below else 0):
        return None
    edge = _EDGE * (high - low)
    if below:
        guess = _crossing(seen, wanted, low, high)
    elif high == 1:
        guess = (low + high) / 2
    else:
        guess = _beyond(high, seen[high], wanted)
        if guess - edge <= least:
            return least
    return round(min(max(guess, low + edge), high - edge), 4)


def _crossing(seen: Mapping[float, float], wanted: float, low: float, high: float) -> float:
    """Where the curve through all losses meets the one wanted."""
    from scipy.interpolate import PchipInterpolator  # here: importing graphprune stays quick

    known = {budget: loss for budget, loss in seen.items() if math.isfinite(loss)}
    places = sorted({*known, 1.0}, reverse=True)
    if low not in known:
        return (low + high) / 2
    unit = wanted or min((loss for loss in known.values() if loss > 0), default=1.0)
    levels = [math.log1p(max(known.get(place, 0.0), 0.0) / unit) for place in places]
    rising = np.maximum.accumulate(levels)
    grid = np.linspace(low, high, 201)
    curve = PchipInterpolator(places[::-1], rising[::-1])(grid)
    return float(grid[np.argmin(np.abs(curve - math.log1p(wanted / unit)))])


def _beyond(high: float, loss: float, wanted: float) -> float:
    """Where the loss may be the one wanted, when it is less at the smallest budget tried."""
    if loss <= 0 or wanted <= 0:
        return high**2
    return float(high ** (math.log(2) / math.log1p(loss / wanted)))
