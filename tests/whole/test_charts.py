"""What people look at: what charts of matplotlib and of the report have in common, and bars."""

import itertools
import random
import sys

from hypothesis import given
from hypothesis import strategies as st

from graphprune.text import apart, bar

PLACES = st.lists(st.floats(0, 100), max_size=12)


@given(PLACES, st.floats(0.5, 20))
def test_labels_keep_their_order_and_their_distance(places, gap):
    named = dict(enumerate(places))
    found = apart(named, gap)
    assert found.keys() == named.keys()
    order = sorted(named, key=lambda name: named[name])
    rows = [found[name] for name in order]
    assert all(b - a >= gap * (1 - 1e-9) - 1e-9 for a, b in itertools.pairwise(rows))


@given(PLACES)
def test_labels_that_are_apart_stay_where_they_are(places):
    even = {number: 30.0 * number + place / 10 for number, place in enumerate(places)}
    assert apart(even, 10.0) == {name: even[name] for name in even}


def test_a_bar_draws_none_of_the_users_random_numbers(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)  # it draws one when it is imported
    before = random.getstate()
    with bar("steps", 2, True) as step:
        step()
    assert random.getstate() == before
