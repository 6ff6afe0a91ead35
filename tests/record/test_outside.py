"""Tables that the first call of a model makes and keeps: a recording leaves none behind."""

import collections
import functools

import pytest
import torch
from torch import nn

import graphprune

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
RAMP = None
RAMPS = {}


def ramp(x):
    return torch.arange(1.0, x.shape[1] + 1, device=x.device)[:, None]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x) * self.table(x))


class InGlobal(Net):
    def table(self, x):
        global RAMP  # what this is about
        if RAMP is None:
            RAMP = ramp(x)
        return RAMP


class InDictionary(Net):
    def table(self, x):
        if len(x) not in RAMPS:
            RAMPS[len(x)] = [ramp(x)]
        return RAMPS[len(x)][0]


class InClass(Net):
    known = None

    def table(self, x):
        if InClass.known is None:
            InClass.known = ramp(x)
        return InClass.known


class InDefault(Net):
    def table(self, x, memo=[]):  # noqa: B006
        if not memo:
            memo.append(ramp(x))
        return memo[0]


class OnFunction(Net):
    def table(self, x):
        if not hasattr(once, "ramp"):
            once.ramp = ramp(x)
        return once.ramp


def once():
    """Its attribute is a cache."""


class Holder:
    """Some object of the user's."""

    found = None

    def get(self, x):
        self.found = ramp(x) if self.found is None else self.found
        return self.found


HOLDER = Holder()


class InObject(Net):
    def table(self, x):
        return HOLDER.get(x)


def in_closure():
    kept, last = {}, None

    class InClosure(Net):
        def table(self, x):
            nonlocal last
            last = kept.setdefault("ramp", ramp(x))
            return last

    return InClosure


class Remembering(Net):
    """Keeps what it has computed last."""

    def forward(self, x):
        RAMPS["last"] = self.a(x)
        return self.b(RAMPS["last"] * ramp(x))


KINDS = [InGlobal, InDictionary, InClass, InDefault, OnFunction, InObject, Remembering]


@pytest.mark.parametrize("kind", [*KINDS, in_closure()], ids=lambda kind: kind.__name__)
def test_a_recording_leaves_no_table_without_values(kind):
    torch.manual_seed(0)
    model = kind().eval()
    plan = graphprune.trace(model, X).plan(0.5)
    out = model(X)
    assert not out.is_meta
    small = graphprune.rebuild(model, 0.5, X)
    assert small(X).shape == (2, 5, 3)
    assert graphprune.verify(model, small, X).difference < 1e-10
    assert graphprune.trace(model, X).plan(0.5).groups == plan.groups, "whether it ran or not"
    assert torch.equal(model(X), out)


def test_what_was_there_before_is_there_afterwards():
    torch.manual_seed(0)
    model = Remembering().eval()
    model(X)
    before = RAMPS["last"]
    graphprune.trace(model, X)
    assert RAMPS["last"] is before


def test_what_else_a_run_has_written_stays():
    counted = {"calls": 0}

    class Counting(Net):
        @functools.wraps(Net.forward)
        def forward(self, x):
            counted["calls"] += 1
            counted["table"] = ramp(x)
            return self.b(self.a(x) * counted["table"])

    graphprune.trace(Counting().eval(), X)
    assert counted["calls"] > 0
    assert "table" not in counted


def test_a_table_that_was_there_is_not_made_anew_without_values():
    """It fits the model as it is; the small one wants another."""
    known = {}

    class AsWide(Net):
        def table(self, x):
            width = int(self.a.weight.shape[0])
            if "ramp" not in known or len(known["ramp"]) != width:
                known["ramp"] = torch.arange(1.0, width + 1, device=x.device)
            return known["ramp"].mean()

    torch.manual_seed(0)
    model = AsWide().eval()
    out = model(X)
    small = graphprune.rebuild(model, 0.5, X)
    assert small.a.out_features == 4
    assert not known["ramp"].is_meta
    assert torch.equal(model(X), out)


class Lazy(dict):
    """Makes its values when they are read, of which some cannot be made here."""

    def __getitem__(self, key):
        raise ImportError(f"{key} is not installed")

    def values(self):
        return [self[key] for key in ("a", "b")]

    def keys(self):
        return ["a", "b"]

    def __iter__(self):
        return iter(self.keys())

    def items(self):
        return [(key, self[key]) for key in self]

    def __len__(self):
        return 2


class Counting(collections.UserDict):
    """A mapping of the model's own library, which holds its data in an attribute."""


LAZY = Lazy()
COUNTING = Counting()


class InMapping(Net):
    def table(self, x):
        if len(x) not in COUNTING:
            COUNTING[len(x)] = ramp(x)
        return COUNTING[len(x)]


def test_mappings_are_not_asked_for_values_that_they_would_make():
    torch.manual_seed(0)
    graph = graphprune.trace(Net2().eval(), X)
    assert [(group.layers, group.size) for group in graph] == [(("a", "b"), 8)]


class Net2(Net):
    def table(self, x):
        assert len(LAZY) == 2
        return ramp(x)


def test_what_a_mapping_holds_is_put_back():
    torch.manual_seed(0)
    model = InMapping().eval()
    graphprune.trace(model, X)
    assert not any(value.is_meta for value in COUNTING.data.values())
    assert torch.isfinite(model(X)).all()
