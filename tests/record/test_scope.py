"""What recording changes in torch: seen by the thread that records, undone at its end."""

import math
import random
import threading

import numpy as np
import pytest
import torch
from support.comparing import untouched
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import graphprune
from graphprune.errors import InputError, ModelError, TraceError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def state():
    """All that a recording puts something else in the place of."""
    hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    return (
        vars(torch.autograd.Function)["apply"],
        vars(torch.Tensor)["__reduce_ex__"],
        torch.backends.mha.get_fastpath_enabled(),
        [vars(math)[name] for name in ("sqrt", "log", "floor")],
        [dict(hook) for hook in hooks],
        torch.get_rng_state().tolist(),
    )


def blocks(count):
    torch.manual_seed(count)
    layers = [(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(count)]
    return nn.Sequential(*[layer for block in layers for layer in block]).eval().double()


def test_threads_trace_at_once():
    models = [blocks(count) for count in (2, 3, 4, 5)]
    wanted = [str(graphprune.trace(model, X)) for model in models]
    before, found, errors = state(), {}, []

    def work(number):
        try:
            found[number] = [str(graphprune.trace(models[number], X)) for _ in range(4)]
        except Exception as error:  # told below, in the thread of the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found == {number: [text] * 4 for number, text in enumerate(wanted)}
    assert state() == before


def test_another_thread_runs_as_ever_while_one_records():
    outside = {}

    class Waiting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            def run():
                outside["value"] = Square.apply(torch.ones(2)), math.sqrt(4)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            return self.b(self.a(x))

    graphprune.trace(Waiting().double(), X)
    value, root = outside["value"]
    assert type(root) is float
    assert torch.equal(value, torch.ones(2))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_changed_when_the_model_fails(error):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            self.a(x)
            raise error("inside the model")

    model = Failing().double()
    before = state()
    with pytest.raises(TraceError if error is ValueError else error, match="inside the model"):
        graphprune.trace(model, X)
    assert state() == before


def test_numbers_drawn_inside_are_not_taken_from_the_user():
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            noise = torch.randn(8).to(x) * random.random() * np.random.rand()
            return self.b(self.a(x) + noise + float(x.sum()))

    model = Drawing().double()
    states = state(), random.getstate(), str(np.random.get_state())
    graphprune.trace(model, X)
    assert states == (state(), random.getstate(), str(np.random.get_state()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_is_for_the_model(device):
    model = blocks(3)
    wanted = graphprune.trace(model, X).plan(0.34)
    with torch.device(device):
        assert graphprune.trace(model, X).plan(0.34) == wanted
        assert torch.empty(1).device.type == device


def test_fake_tensors_are_refused():
    model, mode = blocks(3), FakeTensorMode()
    with pytest.raises(InputError, match="fake tensors"):
        graphprune.trace(model, mode.from_tensor(X))
    with mode, pytest.raises(ModelError, match="FakeTensorMode is active"):
        graphprune.trace(model, X)
    with mode:
        fake = nn.Linear(8, 8)
    with pytest.raises(ModelError, match="fake tensor"):
        graphprune.trace(fake, X)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * grad * x


class Through(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class ChannelNorm(torch.autograd.Function):
    """LayerNorm over the channels of an image, as restoration networks write it."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        centre = x.mean(1, keepdim=True)
        y = (x - centre) / ((x - centre).pow(2).mean(1, keepdim=True) + eps).sqrt()
        ctx.save_for_backward(y, weight)
        return weight.view(1, -1, 1, 1) * y + bias.view(1, -1, 1, 1)

    @staticmethod
    def backward(ctx, grad):
        y, weight = ctx.saved_tensors
        by_weight, by_bias = (grad * y).sum((0, 2, 3)), grad.sum((0, 2, 3))
        return grad * weight.view(1, -1, 1, 1), by_weight, by_bias, None


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))

    def forward(self, x):
        return ChannelNorm.apply(x, self.weight, self.bias, 1e-6)


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return checkpoint(lambda y: self.inner(y).relu(), x, use_reentrant=True)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


MIDDLES = {
    "square": lambda: Call(Square),
    "through": lambda: Call(Through),
    "norm": Norm,
    "in place": lambda: Call(InPlace),
    "checkpoint": Recomputed,
}


@pytest.mark.parametrize("name", MIDDLES)
@pytest.mark.filterwarnings("ignore:.*requires_grad=True")
def test_the_forward_of_an_autograd_function_is_looked_into(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), MIDDLES[name](), nn.Conv2d(8, 4, 1)).double().eval()
    with untouched(model):
        small = graphprune.rebuild(model, 0.5, X)
        with torch.no_grad():
            found = small(X)
            assert torch.allclose(found, graphprune.mask(model, small.graphprune_plan)(X))
    assert small[0].out_channels == 4
    if name != "through":
        assert small(X).sum().backward() is None
        assert small[0].weight.grad is not None
