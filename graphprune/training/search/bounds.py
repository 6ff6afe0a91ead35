"""What a mean loss is at most, with some confidence, from the losses of single examples."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np


def upper_bound(lost: np.ndarray, span: float, confidence: float) -> float:
    """Below which the mean loss over other examples of the kind lies, as often as is asked for.

    Where every example was lost, won or neither (right or wrong answers), by the score test of
    Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 1998. Else by Student's t with the correction for
    skewness of Johnson, "Modified t tests and confidence intervals for asymmetrical populations",
    JASA 1978, where that is upwards: few examples that lose much are easily missed.

    Args:
        lost: of each example, the score of the original minus that of the small model [examples].
        span: by how much one example can lose.
        confidence: of the bound, which has one side.

    Example:
        >>> round(upper_bound(np.array([1.0] * 10 + [0.0] * 990), 1.0, 0.95), 4)
        0.0167
    """
    parts = lost / span if span > 0 else lost
    if np.isin(parts, (-1, 0, 1)).all():
        return span * _paired(int((parts > 0).sum()), int((parts < 0).sum()), len(lost), confidence)
    mean, spread, count = float(lost.mean()), float(lost.std(ddof=1)), len(lost)
    if spread <= 1e-12 * abs(mean):  # no example tells how others would differ
        return mean + span * _paired(0, 0, count, confidence)
    from scipy.special import stdtrit  # here: importing graphprune stays quick

    quantile = float(stdtrit(count - 1, confidence))
    third = float(((lost - mean) ** 3).mean())
    skewed = max(third, 0.0) / (6 * spread**2 * count) * (1 + 2 * quantile**2)
    return mean + quantile * spread / math.sqrt(count) + skewed


def unchanged(count: int, confidence: float) -> float:
    """The share that may be lost although none of so many examples is.

    Example:
        >>> round(unchanged(1000, 0.95), 5)
        0.0027
    """
    return _paired(0, 0, count, confidence)


def examples_for(share: float, confidence: float) -> int:
    """How many examples, none of them lost, show that at most such a share is.

    Example:
        >>> examples_for(0.01, 0.95)
        268
    """
    return math.ceil(NormalDist().inv_cdf(confidence) ** 2 * (1 / share - 1))


def _paired(worse: int, better: int, count: int, confidence: float) -> float:
    """The bound of a difference of two shares, of pairs of which some differ."""
    from scipy.optimize import brentq

    z = NormalDist().inv_cdf(confidence)
    if worse == better == 0:
        return z**2 / (count + z**2)

    def excess(share: float) -> float:
        """The test at a share: negative below the bound."""
        b = -worse - better + (2 * count - worse + better) * share
        c = -better * share * (1 - share)
        won = (math.sqrt(max(b * b - 8 * count * c, 0.0)) - b) / (4 * count)
        variance = max(2 * won + share * (1 - share), 0.0) / count
        return share - (worse - better) / count - z * math.sqrt(variance)

    found = (worse - better) / count
    if excess(found) >= 0:  # a confidence of a half, or nothing left that could be lost
        return found
    return float(brentq(excess, found, 1))
