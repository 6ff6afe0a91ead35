"""Schedules: how sparse a model is at each step of its training.

A schedule is called with a step and returns the fraction of channels (or weights) that are gone,
in [0, 1]. Any callable will do; those here can be printed, plotted and compared, and hit both of
their ends exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from graphprune.arguments import is_int, is_number
from graphprune.errors import InputError
from graphprune.record.batches import takes
from graphprune.text import BLUE, new_chart, save_figure

SparsityOf = Callable[[int], float]


@dataclass(frozen=True)
class Schedule:
    """Zero before ``begin``, ``initial`` at ``begin``, ``final`` from ``end`` on.

    Attributes:
        final: the fraction that is gone in the end.
        begin: the first step at which anything is removed.
        end: the first step at which ``final`` is reached.
        initial: the fraction at ``begin``.
        frequency: steps between two changes; in between, the schedule stands still.
    """

    final: float
    begin: int = 0
    end: int = 1
    initial: float = 0.0
    frequency: int = 1

    name: ClassVar[str] = "schedule"

    def __post_init__(self) -> None:
        for field in ("final", "initial"):
            _check_fraction(f"{field} sparsity of {self.name}", getattr(self, field))
        for field, least in (("begin", 0), ("end", 0), ("frequency", 1)):
            check_count(f"{field} of {self.name}", getattr(self, field), least)
        if self.initial > self.final:
            raise InputError(
                f"{self.name} goes from {self.initial} down to {self.final}: the initial sparsity "
                "must not exceed the final one"
            )
        self._check_range()

    def _check_range(self) -> None:
        if self.end <= self.begin:
            raise InputError(
                f"{self.name} ends at step {self.end}, but begins at step {self.begin}: "
                "end must come after begin"
            )
        if self.frequency > self.end - self.begin:
            raise InputError(
                f"{self.name} changes every {self.frequency} steps, but has only "
                f"{self.end - self.begin} from begin to end: lower the frequency"
            )

    def __call__(self, step: int) -> float:
        """The sparsity at a step."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return float(self.final)
        done = (step - self.begin) // self.frequency * self.frequency
        return self._between(done / (self.end - self.begin)) if done else float(self.initial)

    def _between(self, progress: float) -> float:
        """The sparsity at a progress in (0, 1); it stands still where a schedule has no curve."""
        return float(self.initial)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps at which the sparsity changes, ``begin`` and ``end`` included."""
        return (*range(self.begin, self.end, self.frequency), self.end)

    def plot(self, path: str | Path) -> Path:
        """Draw the sparsity over the steps; the suffix chooses the format (.svg, .png, .pdf)."""
        return plot(self, path, self.end + max(1, (self.end - self.begin) // 10), str(self))

    def __str__(self) -> str:
        """One line that says it all."""
        every = "step" if self.frequency == 1 else f"{self.frequency} steps"
        return (
            f"{self.name}: {self.initial:.1%} at step {self.begin}, {self.final:.1%} at step "
            f"{self.end}, changed every {every}"
        )


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at once; see :func:`one_shot`."""

    name: ClassVar[str] = "one shot"

    def _check_range(self) -> None:
        pass

    def __str__(self) -> str:
        """One line that says it all."""
        return f"{self.name}: {self.final:.1%} at step {self.end}"


@dataclass(frozen=True)
class Iterative(Schedule):
    """The same fraction of what is left in every round; see :func:`iterative`."""

    rounds: int = 1

    name: ClassVar[str] = "iterative"

    def _check_range(self) -> None:
        pass

    @property
    def amount(self) -> float:
        """The fraction of the remaining channels that leaves in one round."""
        return 1 - (1 - self.final) ** (1 / self.rounds)

    def _between(self, progress: float) -> float:
        number = 1 + round(progress * (self.rounds - 1))
        return 1 - (1 - self.final) ** (number / self.rounds)

    def __str__(self) -> str:
        """One line that says it all."""
        return (
            f"{self.name}: {self.rounds} rounds of {self.amount:.1%} of the rest, "
            f"{self.final:.1%} at step {self.end}"
        )


@dataclass(frozen=True)
class Polynomial(Schedule):
    """A polynomial; see :func:`polynomial`."""

    power: float = 3

    name: ClassVar[str] = "polynomial"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.power) or not 0 < self.power < math.inf:
            raise InputError(f"power of {self.name} must be a positive number, not {self.power!r}")

    def _between(self, progress: float) -> float:
        return self.final + (self.initial - self.final) * (1 - progress) ** self.power

    def __str__(self) -> str:
        """One line that says it all."""
        return f"{super().__str__()}, power {self.power:g}"


@dataclass(frozen=True)
class Exponential(Schedule):
    """A density that falls by the same factor; see :func:`exponential`."""

    name: ClassVar[str] = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final == 1:
            raise InputError("exponential never reaches a final sparsity of 1: use linear or cubic")

    def _between(self, progress: float) -> float:
        first, last = 1 - self.initial, 1 - self.final
        return 1 - first * (last / first) ** progress


def one_shot(sparsity: float, step: int = 0) -> OneShot:
    """Everything at one step.

    Args:
        sparsity: the fraction to remove, in [0, 1].
        step: when.

    Raises:
        InputError: a sparsity or step out of range.

    Example:
        >>> from graphprune.training import one_shot
        >>> schedule = one_shot(0.5, step=100)
        >>> schedule(99), schedule(100)
        (0.0, 0.5)
    """
    check_count("step of one shot", step, 0)
    return OneShot(sparsity, step, step, sparsity)


def iterative(sparsity: float, rounds: int, begin: int = 0, frequency: int = 1) -> Iterative:
    """The same fraction of what is left in every round: ``1 - (1 - sparsity) ** (1 / rounds)``.

    Args:
        sparsity: the fraction that is gone after all rounds.
        rounds: how many.
        begin: the step of the first round.
        frequency: steps from round to round.

    Raises:
        InputError: a number out of range.

    Example:
        >>> from graphprune.training import iterative
        >>> schedule = iterative(0.75, rounds=2)
        >>> schedule.amount, schedule(0), schedule(1)
        (0.5, 0.5, 0.75)
    """
    _check_fraction("sparsity of iterative", sparsity)
    check_count("rounds of iterative", rounds, 1)
    check_count("begin of iterative", begin, 0)
    check_count("frequency of iterative", frequency, 1)
    first = 1 - (1 - sparsity) ** (1 / rounds)
    end = begin + (rounds - 1) * frequency
    return Iterative(sparsity, begin, end, min(first, sparsity), frequency, rounds)


def linear(
    final: float, end: int, begin: int = 0, *, initial: float = 0.0, frequency: int = 1
) -> Polynomial:
    """Equal parts at equal distances: :func:`polynomial` of power 1.

    Example:
        >>> from graphprune.training import linear
        >>> [linear(0.5, end=4)(step) for step in range(5)]
        [0.0, 0.125, 0.25, 0.375, 0.5]
    """
    return polynomial(final, end, begin, initial=initial, frequency=frequency, power=1)


def cubic(
    final: float, end: int, begin: int = 0, *, initial: float = 0.0, frequency: int = 1
) -> Polynomial:
    """Much at first, little at last: :func:`polynomial` of power 3.

    Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression", 2017.

    Example:
        >>> from graphprune.training import cubic
        >>> cubic(0.5, end=4)(2)
        0.4375
        >>> print(cubic(0.5, begin=100, end=1000, frequency=100))
        polynomial: 0.0% at step 100, 50.0% at step 1000, changed every 100 steps, power 3
    """
    return polynomial(final, end, begin, initial=initial, frequency=frequency, power=3)


def polynomial(
    final: float,
    end: int,
    begin: int = 0,
    *,
    initial: float = 0.0,
    frequency: int = 1,
    power: float = 3,
) -> Polynomial:
    """``final + (initial - final) * (1 - progress) ** power``, with progress from begin to end.

    Args:
        final: the fraction that is gone in the end, in [0, 1].
        end: the first step at which ``final`` is reached.
        begin: the first step at which anything is removed.
        initial: the fraction at ``begin``.
        frequency: steps between two changes.
        power: 3 as in Zhu and Gupta, 2017; 1 is linear.

    Raises:
        InputError: an impossible range.

    Example:
        >>> from graphprune.training import polynomial
        >>> polynomial(0.5, end=2, power=2)(1)
        0.375
    """
    return Polynomial(final, begin, end, initial, frequency, power)


def exponential(
    final: float, end: int, begin: int = 0, *, initial: float = 0.0, frequency: int = 1
) -> Exponential:
    """A density that falls by the same factor over equal distances.

    Args:
        final: the fraction that is gone in the end, in [0, 1).
        end: the first step at which ``final`` is reached.
        begin: the first step at which anything is removed.
        initial: the fraction at ``begin``.
        frequency: steps between two changes.

    Raises:
        InputError: an impossible range.

    Example:
        >>> from graphprune.training import exponential
        >>> [round(exponential(0.75, end=2)(step), 6) for step in range(3)]
        [0.0, 0.5, 0.75]
    """
    return Exponential(final, begin, end, initial, frequency)


def as_schedule(schedule: Any) -> SparsityOf:
    """A schedule as it is, a number as :func:`one_shot` at step 0.

    Raises:
        InputError: neither, or nothing would be left in the end.
    """
    if is_number(schedule):
        schedule = one_shot(float(schedule))
    if isinstance(schedule, Schedule) and schedule.final == 1:
        raise InputError(f"nothing would be left, the final sparsity must be below 1: {schedule}")
    if callable(schedule) and not isinstance(schedule, type) and takes(schedule, 1):
        return schedule
    raise InputError(
        "schedule must be a sparsity, a schedule such as cubic(0.5, end=1000), or a function "
        f"step -> sparsity; not {schedule!r}"
    )


def sparsity_at(schedule: SparsityOf, step: int) -> float:
    """What a schedule says at a step.

    Raises:
        InputError: it is no fraction in [0, 1].
    """
    return _check_fraction(f"the schedule's sparsity at step {step}", schedule(step))


def plot(schedule: SparsityOf, path: str | Path, steps: int, title: str = "") -> Path:
    """Draw any schedule over the steps 0 to ``steps``.

    Args:
        schedule: any callable step -> sparsity.
        path: where to write; the suffix chooses the format (.svg, .png, .pdf).
        steps: the last step.
        title: above the picture.
    """
    figure, axes = new_chart(title, 6, 3.6)
    values = [100 * sparsity_at(schedule, step) for step in range(steps + 1)]
    axes.step(range(steps + 1), values, where="post", color=BLUE, linewidth=1.6)
    axes.annotate(
        f"{values[-1]:.3g} %", (steps, values[-1]), xytext=(6, 0), textcoords="offset points",
        va="center", fontsize=8.5, color=BLUE, annotation_clip=False,
    )  # fmt: skip
    axes.set(xlabel="step", ylabel="sparsity in %")
    axes.title.set_fontsize(9)
    return save_figure(figure, path)


def _check_fraction(what: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number <= 1:
        raise InputError(f"{what} must be a fraction in [0, 1], got {value!r}")
    return number


def check_count(what: str, value: object, least: int) -> None:
    """Raise unless a value is a whole number of at least ``least``.

    Raises:
        InputError: says what it is, and what it should be.
    """
    if not is_int(value, least):
        raise InputError(f"{what} must be an int of at least {least}, got {value!r}")
