"""Where a number stands in the code, and how the code got there, does not matter."""

import functools
import math

import numpy as np
import pytest
import torch
from support.comparing import untouched
from torch import nn
from torch.overrides import TorchFunctionMode

import graphprune

WIDTH, HEADS = 32, 4
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def renamed(name):
    """A decorator as libraries have them, for arguments that were renamed."""

    def outer(function):
        @functools.wraps(function)
        def inner(*args, **kwargs):
            kwargs.pop(name, None)
            return function(*args, **kwargs)

        return inner

    return outer


def handed_on(function):
    """A decorator that calls by way of another function."""

    @functools.wraps(function)
    def inner(*args):
        return call_with(function, args)

    return inner


def call_with(function, args):
    return function(*args)


class Attention(nn.Module):
    """Heads that are split and merged in one way or another."""

    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.first, self.qkv = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.last(self.attend(self.first(x)).relu())

    def attend(self, x):
        q, k, v = self.split(x)
        return self.out(self.join((q @ k.transpose(-2, -1)).softmax(-1) @ v, x.size()))

    def split(self, x):
        b, n, c = x.shape
        return self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)

    def join(self, x, size):
        return x.transpose(1, 2).reshape(size)


class OverLines(Attention):
    def split(self, x):
        b, n, c = x.shape
        return (
            self.qkv(x)
            .reshape(
                b,
                n,
                3,
                self.heads,
                c // self.heads,
            )
            .permute(2, 0, 3, 1, 4)
        )


class Decorated(Attention):
    @renamed("old")
    def forward(self, x):
        b, n, _ = x.size()
        q, k, v = self.split(self.first(x))
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.last(self.out(y.transpose(1, 2).reshape(b, n, WIDTH)).relu())


class DecoratedTwice(Attention):
    @handed_on
    @renamed("old")
    def join(self, x, size):
        return x.transpose(1, 2).reshape(size[0], size[1], WIDTH)


class UnderNoGrad(Attention):
    @torch.no_grad()
    def forward(self, x):
        y = self.attend(self.first(x))
        return self.last(y.reshape(y.shape[0], 5, WIDTH).relu())


@functools.lru_cache(32)
def heads_of(shape, heads):
    b, n, c = shape
    return b, n, 3, heads, c // (3 * heads)


class Cached(Attention):
    def split(self, x):
        y = self.qkv(x)
        return y.reshape(heads_of(y.shape, self.heads)).permute(2, 0, 3, 1, 4)


class OwnCache(Attention):
    @functools.lru_cache(8)  # noqa: B019
    def sizes(self, b, n, c):
        return b, n, 3, self.heads, c // self.heads

    def split(self, x):
        return self.qkv(x).reshape(self.sizes(*x.shape)).permute(2, 0, 3, 1, 4)


class InContainers(Attention):
    def __init__(self):
        super().__init__()
        self.setting = {"axes": [("three", 3), ("heads", HEADS)]}

    def split(self, x):
        (_, three), (_, heads) = self.setting["axes"]
        return self.qkv(x).unflatten(-1, (three, heads, -1)).permute(2, 0, 3, 1, 4)


class Rounded(Attention):
    def split(self, x):
        b, n, c = x.shape
        width = round(math.floor(c * 1.0) / self.heads)
        return self.qkv(x).reshape(b, n, 3, self.heads, width).permute(2, 0, 3, 1, 4)


MODELS = [Attention, OverLines, Decorated, DecoratedTwice, UnderNoGrad]
MODELS += [Cached, OwnCache, InContainers, Rounded]


class Quiet(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def build(kind):
    torch.manual_seed(0)
    return kind().eval().double()


def checked(model, original=None):
    """The widths that are left, of a small model that is right."""
    with untouched(model), torch.no_grad():
        small = graphprune.rebuild(model, 0.5, X)
        graphprune.verify(original or model, small, X)
    return small.first.out_features, small.qkv.out_features, small.out.out_features


@pytest.mark.parametrize("kind", MODELS)
def test_the_way_it_is_written_does_not_matter(kind):
    assert checked(build(kind)) == (16, 48, 16)


@pytest.mark.parametrize("kind", [OverLines, Decorated, DecoratedTwice, UnderNoGrad])
def test_it_can_be_pruned_again(kind):
    model = build(kind)
    assert checked(graphprune.rebuild(model, 0.5, X), model) == (8, 24, 8)


@pytest.mark.parametrize("kind", [Cached, OwnCache])
def test_caches_neither_leak_into_a_recording_nor_out_of_it(kind):
    model = build(kind)
    fresh = graphprune.trace(model, X).plan(0.5)
    wanted = model(X)
    for _ in range(2):
        assert graphprune.trace(model, X).plan(0.5) == fresh
        assert torch.equal(model(X), wanted)
    kept = [kind.sizes(model, 2, 5, 32)] if kind is OwnCache else [heads_of((2, 5, 96), 4)]
    assert all(type(number) is int for sizes in kept for number in sizes)


def test_a_table_by_shape_that_a_recording_filled_is_not_read_afterwards():
    tables = {}

    class Remembering(Attention):
        def forward(self, x):
            if x.shape not in tables:
                tables[x.shape] = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
            return self.last(self.attend(self.first(x * tables[x.shape])).relu())

    model = build(Remembering)
    graphprune.trace(model, X)
    assert model(X).shape == (2, 5, 4)
    graphprune.verify(model, graphprune.rebuild(model, 0.5, X), X)


def test_a_table_that_a_cache_kept_from_an_earlier_recording_means_the_same():
    @functools.lru_cache(8)
    def ramp(count, device):
        return torch.arange(count, device=device).double() / count

    class Ramped(Attention):
        def forward(self, x):
            y = self.attend(self.first(x))
            return self.last((y * ramp(5, x.device)[:, None]).relu())

    model = build(Ramped)
    plans = [graphprune.trace(model, X).plan(0.5) for _ in range(3)]
    assert plans[0].removed > 0
    assert plans == plans[:1] * 3
    assert checked(model) == (16, 48, 16)


def test_a_mode_of_the_user_may_be_active():
    model = build(OverLines)
    with Quiet():
        assert checked(model) == (16, 48, 16)


class Cut(nn.Module):
    """Two parts of one stream, cut at a place that is computed in Python."""

    def __init__(self, place):
        super().__init__()
        self.place = place
        self.a, self.branch, self.b = nn.Linear(4, 16), nn.Linear(8, 8), nn.Linear(16, 3)

    def forward(self, x):
        y = self.a(x)
        cut = self.place(y)
        return self.b(torch.cat([y[..., :cut], self.branch(y[..., cut:])], -1))


PLACES = [
    lambda y: int(y.size(-1) * 0.5),
    lambda y: y.size(-1) >> 1,
    lambda y: round(y.size(-1) / 2),
    lambda y: math.ceil(y.size(-1) / 2),
    lambda y: divmod(y.shape[-1], 2)[0],
    lambda y: int(math.sqrt(4 * y.shape[-1])),
]


@pytest.mark.parametrize("place", PLACES)
def test_a_place_computed_from_a_size_follows(place):
    torch.manual_seed(0)
    model, x = Cut(place).double().eval(), torch.randn(3, 4, dtype=torch.float64)
    graph = graphprune.trace(model, x)
    assert not graph.group_of("a").frozen
    small = graphprune.rebuild(model, 0.5, x)
    graphprune.verify(model, small, x)
    assert small.a.out_features == 8


def test_a_place_that_does_not_follow_is_not_trusted():
    torch.manual_seed(0)
    model = Cut(lambda y: int(str(8 + 0 * y.size(-1)))).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    assert graphprune.trace(model, x).group_of("a").frozen


class Scaled(nn.Module):
    """A number that is computed from a width meets values: it must stay."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x):
        y = self.a(x)
        return self.b(y * self.factor(y.shape[-1]))


FACTORS = [
    lambda n: math.log(n),
    lambda n: math.sqrt(n),
    lambda n: math.log2(n),
    lambda n: math.exp(-n),
    lambda n: math.pow(n, 0.5),
]


@pytest.mark.parametrize("factor", FACTORS)
def test_a_number_computed_from_a_width_keeps_its_value(factor):
    torch.manual_seed(0)
    model, x = Scaled(factor).double().eval(), torch.randn(3, 4, dtype=torch.float64)
    small = graphprune.rebuild(model, 0.5, x)
    graphprune.verify(model, small, x)
    assert small.a.out_features == 8


@pytest.mark.parametrize("factor", [math.log, np.sqrt, lambda n: float(np.log(n)), str])
def test_a_number_computed_where_no_one_sees_stays_with_the_width(factor):
    model = Scaled(lambda n: float(factor(n))).double().eval()
    assert graphprune.trace(model, torch.randn(3, 4, dtype=torch.float64)).group_of("a").frozen


def test_parts_of_unequal_size_stay_so():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 16)
            self.readers = nn.ModuleList(nn.Linear(size, 5) for size in (6, 6, 4))

        def forward(self, x):
            parts = self.a(x).relu().chunk(3, 1)
            return sum(reader(part) for reader, part in zip(self.readers, parts))

    torch.manual_seed(0)
    model, x = Parts().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    graph = graphprune.trace(model, x)
    for ratio in (0.25, 0.5, 0.75):
        small = graphprune.rebuild(model, graph.plan(ratio))
        graphprune.verify(model, small, x)
        assert small.a.out_features < 16
    assert not graph.group_of("a").frozen
