"""Bounds of a mean loss, and which budget is tried next."""

import math

import numpy as np
import pytest

from graphprune.training.search.bounds import examples_for, unchanged, upper_bound
from graphprune.training.search.budgets import next_budget


def counts(worse, better, same):
    return np.array([1.0] * worse + [-1.0] * better + [0.0] * same)


@pytest.mark.parametrize(("worse", "better", "same"), [(12, 2, 54), (7, 7, 30), (1, 9, 90)])
def test_at_the_bound_the_score_test_is_on_the_edge(worse, better, same):
    """With the share of better pairs that is likeliest there, found by trying."""
    count = worse + better + same
    bound = upper_bound(counts(worse, better, same), 1.0, 0.975)
    won = np.linspace(max(0, -bound), min(1, (1 - bound) / 2), 200_002)[1:-1]
    likelihood = worse * np.log(won + bound) + better * np.log(won)
    won = won[np.argmax(likelihood + same * np.log(1 - bound - 2 * won))]
    variance = (2 * won + bound - bound**2) / count
    assert (bound - (worse - better) / count) / variance**0.5 == pytest.approx(1.96, abs=2e-3)
    doubled = upper_bound(100 * counts(worse, better, same), 100.0, 0.975)
    assert doubled == pytest.approx(100 * bound)


def test_where_all_examples_agree():
    assert upper_bound(counts(0, 0, 300), 1.0, 0.95) == pytest.approx(1.645**2 / 302.7, rel=1e-3)
    assert upper_bound(counts(5, 0, 0), 1.0, 0.95) == 1.0
    assert upper_bound(counts(30, 10, 60), 1.0, 0.5) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda rng: rng.random(300) < 0.06, 0.06),
        (lambda rng: (u := rng.random(300), (u < 0.05) * 1.0 - (u > 0.97))[1], 0.02),
        (lambda rng: rng.exponential(1, 300), 1.0),
        (lambda rng: rng.normal(0.2, 1, 300), 0.2),
    ],
)
def test_a_bound_covers_the_truth_as_often_as_it_says(draw, truth):
    rng = np.random.default_rng(0)
    covered = [upper_bound(np.asarray(draw(rng), float), 1.0, 0.95) >= truth for _ in range(1000)]
    assert 0.93 <= np.mean(covered) <= 0.98


def test_few_examples_that_lose_much_count():
    lost = np.concatenate([np.full(3, 0.9), np.linspace(0, 0.001, 997)])
    plain = lost.mean() + 1.645 * lost.std() / 1000**0.5
    assert upper_bound(lost, 1.0, 0.95) == pytest.approx(plain + 0.00097, abs=1e-4)
    assert upper_bound(np.full(50, 0.25), 1.0, 0.95) == pytest.approx(0.25 + unchanged(50, 0.95))


def test_more_examples_bring_the_bound_down_to_what_is_asked_for():
    for share in (0.5, 0.01, 1e-4):
        count = examples_for(share, 0.95)
        assert unchanged(count, 0.95) <= share < unchanged(count - 1, 0.95)


@pytest.mark.parametrize("power", [1, 2, 5])
@pytest.mark.parametrize("wanted", [0.01, 0.3, 1.0, 20.0])
def test_few_budgets_find_where_a_curve_crosses(power, wanted):
    def loss(budget):
        return 30 * ((1 / budget) - 1) ** power

    truth = max(0.2, 1 / (1 + (wanted / 30) ** (1 / power)))
    seen = {}
    while len(seen) < 9 and (budget := next_budget(seen, wanted, 0.2)) is not None:
        assert 0.2 <= budget < 1
        assert budget not in seen
        seen[budget] = loss(budget)
    good = [1.0, *(budget for budget in seen if loss(budget) <= wanted)]
    assert truth <= min(good) <= truth + 0.03


def test_budgets_without_a_plan_are_left_behind():
    seen = {}
    for _ in range(6):
        budget = next_budget(seen, 1.0, 0.2)
        seen[budget] = math.inf if budget < 0.8 else 0.5
    assert 0.8 <= min(budget for budget, loss in seen.items() if loss < 1) < 0.86


def test_nothing_is_left_to_find_out():
    assert next_budget({0.2: 0.5}, 1.0, 0.2) is None
    assert next_budget({0.6: 0.5, 0.595: 2.0}, 1.0, 0.2) is None
    assert next_budget({0.6: -0.5}, 0.0, 0.5) == 0.5
    assert 0.2 < next_budget({0.6: 0.0}, 0.0, 0.2) < 0.6
