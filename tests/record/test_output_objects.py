"""Objects that torch's pytree does not know, in what a model returns."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import graphprune


class Cache:
    """Keys and values of one layer, as decoders hand them back for the next token."""

    def __init__(self):
        self.keys = self.values = None

    def update(self, keys, values):
        self.keys, self.values = keys, values
        return self.keys, self.values


class Box:
    def __init__(self, tensor):
        self.tensor = tensor


class Decoder(nn.Module):
    """One layer of attention with a cache, or with what nobody reads beside the result."""

    def __init__(self, cached):
        super().__init__()
        self.cached = cached
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.out = nn.Linear(8, 6)
        self.aside = None if cached else nn.Linear(6, 5)

    def forward(self, x):
        cache = Cache()
        q, k, v = (
            layer(x).unflatten(-1, (4, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        k, v = cache.update(k, v)
        y = (q @ k.mT).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).flatten(2))
        return y, cache if self.cached else Box(self.aside(x))


def test_a_cache_that_the_model_reads_is_no_output():
    model, x = Decoder(True).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    graph = graphprune.trace(model, x)
    assert [group.size for group in graph.groups] == [4]
    small = graphprune.rebuild(model, graph.plan(0.5))
    assert graphprune.verify(model, small, x).difference <= 1e-10
    y, cache = small(x)
    assert y.shape == (2, 3, 6)
    assert cache.keys.shape == (2, 2, 3, 2)


@pytest.mark.parametrize("cached", [True, False])
def test_what_only_the_caller_reads_is_an_output(cached):
    graph = graphprune.trace(Decoder(cached), torch.randn(2, 3, 6))
    kept = {m.slot.tensor for group in graph.frozen for m in group.members if m.slot.size == 5}
    assert kept == (set() if cached else {"aside.weight", "aside.bias"})


class Window(Cache):
    """Hands all keys and values out, and holds those of the last position for the next call."""

    def update(self, keys, values):
        self.keys, self.values = keys[:, :, -1:], values[:, :, -1:]
        return keys, values


class Layer(Decoder):
    def forward(self, x, state):
        q, k, v = (
            layer(x).unflatten(-1, (4, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        k, v = state.update(k, v)
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Stepping(nn.Module):
    """Returns its cache by a name, which its forward takes it back by, or does not."""

    def __init__(self, cached):
        super().__init__()
        self.cached, self.layer = cached, Layer(True)

    def forward(self, x, state=None):
        state = Window() if state is None else state
        y = self.layer(x, state)
        return {"y": y, ("state" if self.cached else "seen"): state}


class Boxes:
    def __init__(self, tensor):
        self.tensor = tensor


class Detector(nn.Module):
    """Takes true boxes by the name that it returns its own by."""

    def __init__(self):
        super().__init__()
        self.body, self.scores, self.boxes = nn.Linear(6, 32), nn.Linear(32, 5), nn.Linear(32, 4)

    def forward(self, x, boxes=None):
        y = self.body(x).relu()
        return {"scores": self.scores(y), "boxes": Boxes(self.boxes(y))}


@pytest.mark.parametrize(
    ("outputs", "kept"),
    [
        (None, 4),
        ("scores", 2),
        (["scores", "boxes"], 4),
        ([("boxes", "tensor"), "scores"], 4),
        ("boxes", 4),
        (lambda out: (out["scores"], out["boxes"].tensor), 4),
    ],
)
def test_what_is_made_to_be_returned_is_an_output(outputs, kept):
    model, x = Detector().eval(), torch.randn(2, 6)
    graph = graphprune.trace(model, x, outputs=outputs)
    small = graphprune.rebuild(model, graph.plan(0.5))
    assert (small.body.out_features, small.boxes.out_features) == (16, kept)


@pytest.mark.parametrize("back", [True, False])
def test_what_a_forward_takes_back_is_no_output(back):
    model, x = Stepping(True).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    model.cached = back
    graph = graphprune.trace(model, x)
    assert [group.size for group in graph.groups] == ([4] if back else [])
    if back:
        small = graphprune.rebuild(model, graph.plan(0.5))
        assert graphprune.verify(model, small, x).difference <= 1e-10
        assert small(x, state=small(x)["state"])["y"].shape == (2, 3, 6)


class Sample(dict):
    """A class that pytree is told of, but not what its parts are called."""


pytree.register_pytree_node(
    Sample, lambda out: ([*out.values()], [*out]), lambda values, keys: Sample(zip(keys, values))
)


def test_parts_without_names_are_outputs_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return Sample(sample=self.b(self.a(x)))

    model, x = Net().double(), torch.randn(2, 4, dtype=torch.float64)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.a.out_features == 4
    assert graphprune.verify(model, small, x).difference <= 1e-10


def test_anything_may_be_passed_between_modules():
    """An array is no tensor, and is not asked whether it is equal to anything."""

    class Scaled(nn.Module):
        def forward(self, x, by, extra):
            return x * float(by[0]) + extra["shift"][0]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.scaled, self.b = nn.Linear(4, 8), Scaled(), nn.Linear(8, 3)

        def forward(self, x):
            h = self.a(x)
            return self.b(self.scaled(h, np.array([2.0, 3.0]), {"shift": [h.mean(0)]}))

    x = torch.randn(2, 4)
    graph = graphprune.trace(Net(), x)
    assert graph.analysis.records[0].passed["scaled"] == [(2, 8), (8,), (2, 8)]
    assert graphprune.rebuild(Net(), 0.5, x)(x).shape == (2, 3)
