"""From scores to counts: levels, allowed counts, and the search along a path."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.planning.select import Lane, Path, allowed, kept, levels

SCORES = {"a": torch.tensor([3.0, 1.0, 2.0, 1.0]), "b": torch.tensor([10.0, 0.5])}


def test_levels_by_hand():
    found = levels(SCORES)
    assert found["a"].tolist() == [0.25, 0.5, 0.75, np.inf]
    assert found["b"].tolist() == [0.5, np.inf]
    pooled = levels(SCORES, dict.fromkeys(SCORES, "all"))
    assert pooled["a"].tolist() == [2 / 6, 3 / 6, 4 / 6, np.inf]
    assert pooled["b"].tolist() == [1 / 6, np.inf]
    assert levels({}) == {}


def test_equal_scores_keep_the_earlier_channel():
    assert kept({"a": torch.tensor([1.0, 2.0, 1.0, 1.0])}, {"a": 2}) == {"a": (0, 1)}
    assert kept(SCORES, {"a": 2, "b": 1}) == {"a": (0, 2), "b": (0,)}


def test_allowed_counts_by_hand():
    assert allowed(6, 0.0, 1.0, 1) == (6, 5, 4, 3, 2, 1)
    assert allowed(20, 0.0, 1.0, 8) == (20, 16, 8)
    assert allowed(20, 0.5, 1.0, 8) == (20, 16)
    assert allowed(32, 0.25, 0.75, 8) == (24, 16, 8)
    assert allowed(6, 0.0, 1.0, 8) == (6,), "no such width: the group stays whole"
    assert allowed(10, 0.3, 0.3, 1) == (3,)


@given(st.integers(1, 70), st.floats(0, 1), st.floats(0, 1), st.sampled_from([1, 2, 8, 16]))
def test_allowed_counts(size, one, two, multiple):
    least, most = sorted((one, two))
    counts = allowed(size, least, most, multiple)
    assert counts
    assert list(counts) == sorted(set(counts), reverse=True)
    assert all(1 <= n <= size for n in counts)
    assert all(n % multiple == 0 or n == size for n in counts)
    if counts != (size,):
        assert min(counts) >= least * size - 1e-6


def path_of(sizes, multiples, seed):
    """A path over groups of random scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.rand(n, generator=generator) for i, n in enumerate(sizes)}
    turns = levels(scores, dict.fromkeys(scores))
    lanes = [
        Lane((i,), allowed(n, 0.0, 1.0, multiple), turns[str(i)])
        for i, (n, multiple) in enumerate(zip(sizes, multiples))
    ]
    return Path(tuple(lanes), np.array(sizes, float))


def chained(counts):
    """The cost of a chain of layers."""
    widths = np.concatenate([[3.0], counts, [5.0]])
    return float((widths[:-1] * widths[1:]).sum())


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@given(SIZES, st.lists(st.sampled_from([1, 1, 2, 8]), min_size=5, max_size=5), st.data())
@settings(max_examples=60)
def test_a_budget_is_never_exceeded_and_monotone(sizes, multiples, data):
    path = path_of(sizes, multiples, data.draw(st.integers(0, 9)))
    whole = chained(path.full)
    reached = []
    for share in sorted(data.draw(st.lists(st.floats(0.02, 1.1), min_size=2, max_size=6))):
        limit = share * whole
        counts = path.fit(lambda n, limit=limit: chained(n) / limit)
        if counts is None:
            smallest = path.counts([len(lane.counts) - 1 for lane in path.lanes])
            assert chained(smallest) > limit
            continue
        assert chained(counts) <= limit
        for lane in path.lanes:
            assert all(counts[group] in lane.counts for group in lane.groups)
        reached.append(chained(counts))
    assert reached == sorted(reached)


@given(SIZES, st.floats(0.1, 1.0), st.integers(0, 9))
@settings(max_examples=40)
def test_nothing_more_fits_by_one_step(sizes, share, seed):
    path = path_of(sizes, [1] * len(sizes), seed)
    limit = share * chained(path.full)
    counts = path.fit(lambda n: chained(n) / limit)
    if counts is None:
        return
    for group, size in enumerate(sizes):
        if counts[group] < size:
            more = counts.copy()
            more[group] += 1
            assert chained(more) > limit


def test_the_search_is_near_the_best_of_all_combinations():
    sizes = [9, 8, 7, 9]
    path = path_of(sizes, [1, 1, 1, 1], 0)
    every = [
        chained(np.array(n, float)) for n in itertools.product(*(range(1, s + 1) for s in sizes))
    ]
    for share in (0.3, 0.45, 0.6, 0.8):
        limit = share * chained(path.full)
        best = max(cost for cost in every if cost <= limit)
        found = chained(path.fit(lambda n, limit=limit: chained(n) / limit))
        assert found >= 0.97 * best


def test_groups_of_a_lane_stay_equal():
    turns = np.array([0.2, 0.4, 0.6, np.inf])
    path = Path((Lane((0, 2), (4, 3, 2, 1), turns),), np.array([4.0, 9.0, 4.0]))
    counts = path.fit(lambda n: n.sum() / 14)
    assert counts.tolist() == [2.0, 9.0, 2.0]


@pytest.mark.parametrize(
    ("ratio", "left"), [(0.0, 20), (0.09, 20), (0.1, 16), (0.39, 16), (0.45, 8)]
)
def test_a_ratio_takes_the_nearest_allowed_count(ratio, left):
    path = path_of([20], [8], 0)
    assert path.level(ratio).tolist() == [left]
