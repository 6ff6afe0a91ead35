"""A value is followed however the code of a model hands it on, or else it stays whole."""

import copy

import pytest
import torch
from support.comparing import untouched
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

import graphprune
from graphprune.errors import PruningWarning

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Tagged(torch.Tensor):
    """A tensor with a label, as image libraries have them."""


class Wrapped(torch.Tensor):
    """A tensor that is not where its values are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = tree_map_only(cls, lambda t: t.inner, args)
        return cls(func(*args, **(kwargs or {})))


def data_assigned(t):
    z = torch.zeros(1)
    z = t.new_zeros(t.shape)
    z.data = t
    return z


def data_of_the_old_object(t):
    z = t.new_zeros(t.shape)
    z.data = t
    return t * 1 + z


def set_to(t):
    return t.new_empty(0).set_(t)


def parameter_holding(t):
    layer = nn.Module()
    layer.weight = nn.Parameter(t, requires_grad=False)
    return layer.weight * 2


def through_memory(t):
    out = torch.empty_like(t)
    with _disable_current_modes():
        out.copy_(t)
    return out


def out_of_nowhere(t):
    with _disable_current_modes():
        return t * 2


def set_to_a_part(t):
    return t.new_empty(0).set_(t.untyped_storage(), 0, t.shape, t.stride())


def copied_tag(t):
    tagged = t.as_subclass(Tagged)
    tagged.label = "x"
    twin = copy.copy(tagged)
    assert twin.label == "x"
    return twin.as_subclass(torch.Tensor)


FOLLOWED = [
    copy.copy,
    copy.deepcopy,
    lambda t: t.as_subclass(Tagged) * 2,
    lambda t: nn.Parameter(t, requires_grad=False),
    lambda t: torch.Tensor._make_subclass(Tagged, t).as_subclass(torch.Tensor),
    data_assigned,
    data_of_the_old_object,
    set_to,
    parameter_holding,
    copied_tag,
    set_to_a_part,
]
KEPT = [
    through_memory,
    out_of_nowhere,
    lambda t: (Wrapped(t) * 2).inner,
    lambda t: torch.from_numpy(t.numpy()) * 1,
    lambda t: torch.from_dlpack(t),
]


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.middle = middle

    def forward(self, x):
        return self.c(self.b(self.middle(self.a(x).relu())).relu())


def net(middle):
    torch.manual_seed(0)
    return Net(middle).eval().double()


@pytest.mark.parametrize("middle", FOLLOWED)
def test_a_copy_or_another_class_of_a_value_is_that_value(middle):
    model, x = net(middle), X.double()
    with untouched(model), torch.no_grad():
        small = graphprune.rebuild(model, 0.5, x)
        assert small.a.out_features == small.b.in_features == 8
        graphprune.verify(model, small, x)


@pytest.mark.parametrize("middle", KEPT)
def test_what_cannot_be_followed_stays_and_is_said(middle):
    model, x = net(middle), X.double()
    with untouched(model), torch.no_grad():
        graph = graphprune.trace(model, x)
        group = graph.group_of("a")
        assert group.frozen
        assert group.reason.text
        with pytest.warns(PruningWarning):
            small = graphprune.rebuild(model, 0.5, x)
        assert small.a.out_features == small.b.in_features == 16
        assert small.b.out_features == 6
        graphprune.verify(model, small, x)


class Turned(nn.Module):
    """Pooling whose kernel rewrites the strides of its result: channels come last in memory."""

    def __init__(self, pool):
        super().__init__()
        self.fc, self.pool, self.head = nn.Linear(3, 8), pool, nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.pool(self.fc(x).transpose(1, 2)).flatten(1))


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool1d(1), nn.AdaptiveMaxPool1d(1)])
def test_strides_along_a_single_place_say_nothing(pool):
    graph = graphprune.trace(Turned(pool), torch.randn(2, 5, 3))
    assert [group.size for group in graph.groups] == [8]


class Placed(nn.Module):
    """A table of positions that is a plain attribute, read in one way or another."""

    def __init__(self, read):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        self.table, self.read = torch.randn(1, 5, 16, dtype=torch.float64), read

    def forward(self, x):
        y = self.a(x)
        return self.b((y + self.read(self.table, y)).relu())


READS = [
    lambda t, y: t,
    lambda t, y: t.detach(),
    lambda t, y: t.type_as(y),
    lambda t, y: t.to(device=y.device, copy=True),
    lambda t, y: t.clone().detach(),
    lambda t, y: t[:, : y.shape[1]],
]


@pytest.mark.parametrize("read", READS)
def test_a_plain_tensor_is_cut_like_a_buffer(read, tmp_path):
    torch.manual_seed(0)
    model, x = Placed(read).eval().double(), X.double()[:, None].expand(2, 5, 6)
    with untouched(model), torch.no_grad():
        small = graphprune.rebuild(model, 0.5, x)
        graphprune.verify(model, small, x)
        assert small.table.shape == (1, 5, 8)
        graphprune.save(small, tmp_path / "small.safetensors")
        loaded = graphprune.load(tmp_path / "small.safetensors", model)
        assert torch.equal(loaded(x), small(x))
        inplace = copy.deepcopy(model)
        graphprune.rebuild(inplace, small.graphprune_plan, inplace=True)
        assert torch.equal(inplace(x), small(x))


def coordinates(count):
    line = torch.arange(count, dtype=torch.float64) / count
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).flatten(0, 1)


class Biased(nn.Module):
    """A bias from coordinates, which are made anew for other sizes."""

    def __init__(self, features=None):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.inner, self.outer = nn.Linear(2, 32), nn.Linear(32, 8)
        self.register_buffer("table", coordinates(4))

    def forward(self, x):
        size = x.shape[-1]
        table = self.table if size == 4 else coordinates(size)
        bias = self.outer(self.inner(table).relu()).sum(0)
        return self.b(self.a(x) + bias[:, None, None])


def test_coordinates_stay():
    torch.manual_seed(0)
    model, x = Biased().eval().double(), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        small = graphprune.rebuild(model, 0.5, x)
        graphprune.verify(model, small, x)
    assert small.table.shape == (16, 2)
    assert small.inner.out_features == 16
    small(torch.randn(1, 3, 7, 7, dtype=torch.float64))


def test_a_constant_that_is_used_as_a_weight_is_cut_like_one():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("matrix", torch.randn(6, 16))
            self.b = nn.Linear(16, 3)

        def forward(self, x):
            return self.b((x @ self.matrix).sin())

    torch.manual_seed(0)
    model = Features().eval().double()
    small = graphprune.rebuild(model, 0.5, X.double())
    assert small.matrix.shape == (6, 8)


class Holder:
    """An output of a class that nobody registered."""

    def __init__(self, value):
        self.value = value


def test_outputs_inside_objects_keep_their_shape():
    class Returning(Net):
        def forward(self, x):
            y = self.a(x)
            return super().forward(x), (Holder([y]),)

    model = Returning(lambda t: t).eval().double()
    assert graphprune.trace(model, X.double()).group_of("a").frozen
