"""Ops nobody wrote a rule for freeze what they touch, say so, and stay correct."""

import inspect

import pytest
import torch
from support.comparing import untouched
from support.zoo import randomise
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

import graphprune
from graphprune.errors import InputError, PruningWarning

X = torch.zeros(2, 3, 8, 8)


class Cube(torch.autograd.Function):
    """Its forward runs where no mode sees it, as a compiled kernel does."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        out = torch.zeros_like(x)
        with _disable_current_modes():
            return out.add_(x**3)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * grad * x**2


@torch.library.custom_op("graphprune_tests::mix", mutates_args=())
def mix(x: torch.Tensor) -> torch.Tensor:
    """Adds each channel's neighbour: not elementwise at all."""
    return x + x.roll(1, 1)


@mix.register_fake
def _(x):
    return torch.empty_like(x)


mix.register_autograd(lambda ctx, grad: grad + grad.roll(-1, 1))


class Net(nn.Module):
    """Five groups, of which the op in the middle touches one."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 7, 3), nn.BatchNorm2d(7)
        self.conv3, self.head = nn.Conv2d(7, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = self.middle(self.norm2(self.conv2(x)))
        return self.head(torch.relu(self.conv3(x)).mean((2, 3)))


class WithFunction(Net):
    def middle(self, x):
        return Cube.apply(x)


class WithCustomOp(Net):
    def middle(self, x):
        return torch.ops.graphprune_tests.mix(x)


class WithRareOp(Net):
    def middle(self, x):
        return x.renorm(2, 0, 1.0)


NETS = {
    WithFunction: "Cube",
    WithCustomOp: "graphprune_tests.mix",
    WithRareOp: "renorm",
}


@pytest.fixture(params=NETS, ids=lambda net: net.__name__)
def net(request):
    return randomise(request.param()).eval()


def line_of(net):
    """``file:line`` of the odd op in this file."""
    source, start = inspect.getsourcelines(type(net).middle)
    return f"{__file__}:{start + len(source) - 1}"


def test_only_what_the_op_touches_is_frozen(net):
    graph = graphprune.trace(net, X)
    assert graph.group_of("conv2").frozen
    assert [group.size for group in graph.groups] == [8, 6]
    assert not graph.group_of("conv1").frozen
    assert not graph.group_of("conv3").frozen


def test_the_report_names_op_and_source_line(net):
    graph = graphprune.trace(net, X)
    reason = str(graph.group_of("conv2").reason)
    for text in (reason, str(graph)):
        assert NETS[type(net)] in text
        assert line_of(net) in text


def test_the_rest_is_pruned_and_verifies(net):
    with untouched(net):
        small = graphprune.rebuild(net, 0.5, X)
        report = graphprune.verify(net, small, X)
    assert report.difference <= 1e-10
    widths = [layer.out_channels for layer in (small.conv1, small.conv2, small.conv3)]
    assert widths == [4, 7, 3]


def test_a_request_that_the_op_blocks_warns_with_its_name():
    class Blocked(Net):
        def middle(self, x):
            return torch.ops.graphprune_tests.mix(x)

        def forward(self, x):
            x = self.middle(torch.relu(self.norm1(self.conv1(x))))
            x = self.middle(self.norm2(self.conv2(x)))
            return self.head(torch.relu(self.conv3(x)).mean((2, 3)))

    with pytest.warns(PruningWarning, match=r"unknown op graphprune_tests\.mix"):
        graphprune.rebuild(Blocked(), 0.5, X)


def test_a_model_of_unknown_ops_only_is_refused_with_the_reason():
    class Hopeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(Cube.apply(self.a(x)))

    with pytest.raises(InputError, match=r"(?s)no channel .* can be removed.*Cube") as caught:
        graphprune.rebuild(Hopeless(), 0.5, torch.zeros(2, 4))
    assert __file__ in str(caught.value)


class Between(nn.Module):
    """A function of values, each for itself, between two layers."""

    def __init__(self, function):
        super().__init__()
        self.up, self.function, self.down = nn.Linear(3, 8), function, nn.Linear(8, 2)

    def forward(self, x):
        return self.down(self.function(self.up(x)))


UNTAGGED = {
    "leaky_relu": functional.leaky_relu,
    "leaky_relu_": functional.leaky_relu_,
    "ldexp": lambda x: torch.ldexp(x, torch.tensor(2)),
    "elu_": functional.elu_,
    "celu_": functional.celu_,
    "selu_": functional.selu_,
    "hardtanh_": functional.hardtanh_,
    "hardsigmoid_": lambda x: functional.hardsigmoid(x, inplace=True),
}


@pytest.mark.parametrize("name", UNTAGGED)
def test_ops_that_some_versions_of_torch_do_not_tag_as_pointwise(name):
    """Torch 2.8 does not say of these that they are; channels leave nevertheless."""
    model = Between(UNTAGGED[name]).eval()
    x = torch.randn(4, 3)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.up.out_features == 4
    graphprune.verify(model, small, x)
