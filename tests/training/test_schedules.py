"""Schedules: exact at both ends, never falling, printable, plottable, refusing the impossible."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import InputError
from graphprune.training import cubic, exponential, iterative, linear, one_shot, polynomial
from graphprune.training.schedules import as_schedule, plot, sparsity_at

SHAPES = (linear, cubic, exponential)


@pytest.mark.parametrize("shape", SHAPES)
@given(
    final=st.floats(0, 0.99),
    fraction=st.floats(0, 1),
    begin=st.integers(0, 50),
    length=st.integers(1, 200),
    frequency=st.integers(1, 200),
)
def test_exact_at_both_ends_and_never_falling(shape, final, fraction, begin, length, frequency):
    initial = fraction * final
    schedule = shape(
        final, begin + length, begin, initial=initial, frequency=min(frequency, length)
    )
    values = [schedule(step) for step in range(begin, begin + length + 3)]
    assert all(schedule(step) == 0 for step in range(begin))
    assert values[0] == initial
    assert values[length:] == [final] * 3
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))


@given(sparsity=st.floats(0, 1), rounds=st.integers(1, 20), begin=st.integers(0, 9))
def test_iterative_removes_the_same_amount_of_the_rest_in_each_round(sparsity, rounds, begin):
    schedule = iterative(sparsity, rounds, begin, frequency=3)
    left = 1.0
    for number in range(rounds):
        left *= 1 - schedule.amount
        step = begin + 3 * number
        assert schedule(step) == pytest.approx(1 - left, abs=1e-12)
        assert schedule(step + 2) == schedule(step)
    assert schedule(step) == sparsity
    assert schedule.amount == pytest.approx(1 - (1 - sparsity) ** (1 / rounds))
    assert begin == 0 or schedule(begin - 1) == 0


def test_cubic_is_the_formula_of_zhu_and_gupta():
    begin, count, frequency, initial, final = 100, 9, 50, 0.1, 0.8
    schedule = cubic(final, begin + count * frequency, begin, initial=initial, frequency=frequency)
    for step in range(begin, begin + count * frequency + 1, frequency):
        share = 1 - (step - begin) / (count * frequency)
        assert schedule(step) == pytest.approx(final + (initial - final) * share**3, abs=1e-15)


def test_a_schedule_stands_still_between_its_steps():
    schedule = linear(0.5, end=10, frequency=4)
    assert schedule.steps == (0, 4, 8, 10)
    assert [schedule(step) for step in range(4)] == [0.0] * 4
    assert [schedule(step) for step in range(4, 11)] == [0.2] * 4 + [0.4] * 2 + [0.5]


def test_exponential_multiplies_what_is_left():
    schedule = exponential(0.9, end=5, initial=0.2)
    left = [1 - schedule(step) for step in range(6)]
    ratios = [b / a for a, b in itertools.pairwise(left)]
    assert ratios == pytest.approx([ratios[0]] * 5)


def test_schedules_are_values():
    assert cubic(0.5, end=10) == polynomial(0.5, end=10, power=3)
    assert len({cubic(0.5, end=10), polynomial(0.5, 10), linear(0.5, end=10)}) == 2
    with pytest.raises(AttributeError):
        cubic(0.5, end=10).final = 1.0


def test_schedules_print_themselves():
    assert str(one_shot(0.3, 5)) == "one shot: 30.0% at step 5"
    assert str(iterative(0.75, 2, begin=7)) == (
        "iterative: 2 rounds of 50.0% of the rest, 75.0% at step 8"
    )
    assert "50.0% at step 9, changed every 2 steps, power 1" in str(linear(0.5, 9, frequency=2))
    assert "changed every step" in str(exponential(0.5, 9))


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_schedules_are_drawn(tmp_path, suffix):
    for number, schedule in enumerate((one_shot(0.3, 5), iterative(0.5, 3), cubic(0.5, 20))):
        path = schedule.plot(tmp_path / f"{number}.{suffix}")
        assert path.stat().st_size > 1000
    assert plot(lambda step: step / 10, tmp_path / f"own.{suffix}", 9).exists()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: cubic(1.2, end=5), "final sparsity of polynomial must be a fraction in [0, 1]"),
        (lambda: cubic(-0.1, end=5), "got -0.1"),
        (lambda: cubic(math.nan, end=5), "got nan"),
        (lambda: cubic("half", end=5), "got 'half'"),
        (lambda: cubic(True, end=5), "got True"),
        (lambda: cubic(0.5, end=5, begin=5), "ends at step 5, but begins at step 5"),
        (lambda: linear(0.5, end=3, begin=7), "end must come after begin"),
        (lambda: linear(0.5, end=3, begin=-1), "begin of polynomial must be an int of at least 0"),
        (lambda: linear(0.5, end=3.5), "end of polynomial must be an int"),
        (lambda: linear(0.5, end=3, frequency=0), "frequency of polynomial must be an int of at"),
        (lambda: linear(0.5, end=3, frequency=4), "has only 3 from begin to end"),
        (lambda: linear(0.3, end=3, initial=0.5), "from 0.5 down to 0.3"),
        (lambda: polynomial(0.3, end=3, power=0), "power of polynomial must be a positive number"),
        (lambda: exponential(1.0, end=3), "never reaches a final sparsity of 1"),
        (lambda: iterative(0.5, 0), "rounds of iterative must be an int of at least 1"),
        (lambda: iterative(1.5, 2), "sparsity of iterative must be a fraction"),
        (lambda: iterative(0.5, 2, frequency=0), "frequency of iterative"),
        (lambda: one_shot(0.5, -1), "step of one shot must be an int of at least 0"),
        (lambda: one_shot(2), "final sparsity of one shot"),
        (lambda: as_schedule("cubic"), "a function step -> sparsity; not 'cubic'"),
        (lambda: as_schedule(None), "not None"),
        (lambda: as_schedule(1), "must be below 1: one shot: 100.0% at step 0"),
        (lambda: sparsity_at(lambda step: 2.0, 7), "sparsity at step 7 must be a fraction"),
        (lambda: sparsity_at(lambda step: None, 7), "got None"),
    ],
)
def test_impossible_schedules_are_refused(make, text):
    with pytest.raises(InputError) as error:
        make()
    assert text in str(error.value)


def test_any_function_and_any_number_is_a_schedule():
    def function(step):
        return 0.1 * step

    assert as_schedule(function) is function
    assert sparsity_at(function, 3) == pytest.approx(0.3)
    assert as_schedule(0.4)(0) == 0.4
