"""Models whose forward was rewritten: copied, pickled, exported, shrunk again; scales are kept."""

import copy
import dataclasses
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import PlanError
from graphprune.execute.forward import RewrittenForward


class Padded(nn.Module):
    """A parameter-free shortcut that pads channels by a literal amount."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + F.pad(x, (0, 0, 0, 0, 4, 4)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), Padded(), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.block(torch.relu(self.stem(x))).mean((2, 3)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = Net().eval()
    small = graphprune.rebuild(model, 0.5, X)
    assert isinstance(small.block.forward, RewrittenForward)
    assert isinstance(small.block, Padded)
    return model, small


def test_a_copy_has_a_forward_of_its_own(pair):
    _, small = pair
    clone = copy.deepcopy(small)
    assert clone.block.forward.module is clone.block
    assert torch.equal(clone(X), small(X))


def test_it_can_be_pickled(pair):
    _, small = pair
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(X), small(X))
    assert torch.equal(loaded.train()(X), small.train()(X))


def test_it_can_be_exported(pair):
    _, small = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(small, (X,)).module()
    assert torch.allclose(exported(X), small(X), atol=1e-6)


def test_it_can_be_shrunk_again(pair):
    model, small = pair
    smaller = graphprune.rebuild(small, 0.5, X)
    assert smaller.stem.out_channels == 2
    assert graphprune.verify(model, smaller, X).difference <= 1e-10


class Attention(nn.Module):
    """Self-attention whose scale and sizes are computed from the width of its input."""

    def __init__(self, power: bool):
        super().__init__()
        self.inner, self.heads, self.power = nn.Linear(7, 16), 4, power
        self.qkv, self.out, self.last = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.inner(x)
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scale = (c // self.heads) ** -0.5 if self.power else 1 / c
        weights = (q @ k.transpose(-2, -1) * scale).softmax(-1)
        return self.last(x + self.out((weights @ v).transpose(1, 2).reshape(b, n, c)))


@pytest.mark.parametrize("power", [True, False])
def test_a_scale_computed_from_a_width_keeps_its_value(power):
    torch.manual_seed(0)
    model, x = Attention(power), torch.randn(2, 5, 7)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.qkv.weight.shape == (24, 8)  # two of four heads, half of the stream
    assert graphprune.verify(model, small, x).difference <= 1e-10


class Permuted(nn.Module):
    """Channels in another order, by a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        self.register_buffer("order", order)

    def forward(self, x):
        return self.second(torch.relu(self.first(x))[:, self.order])


def test_a_buffer_that_permutes_channels_is_renumbered(tmp_path):
    torch.manual_seed(0)
    model = Permuted().eval()
    plan = graphprune.trace(model, X).plan(0.5)
    assert graphprune.Plan.from_json(plan.to_json()) == plan
    small = graphprune.rebuild(model, plan)
    assert sorted(small.order.tolist()) == list(range(8))
    smaller = graphprune.rebuild(small, 0.5, X)
    assert graphprune.verify(model, smaller, X).difference < 1e-10
    path = graphprune.save(smaller, tmp_path / "small.safetensors")
    assert torch.equal(graphprune.load(path, Permuted).eval()(X), smaller(X))
    model.order.copy_(torch.arange(16))
    with pytest.raises(PlanError, match="'order' permutes channels in another order"):
        graphprune.rebuild(model, plan)


def shift(x, amount, width):
    """A helper with a number of its own, and a number that its caller gives."""
    return F.pad(x[:, width:], (0, 0, 0, 0, amount, 4))


class Called(nn.Module):
    """Numbers in helper functions, methods, and behind branches that torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

    def shifted(self, x):
        return shift(x, 0, 4) if x.shape[2] > 2 else x

    def forward(self, x, flag=None):
        y = self.first(x)
        if flag is None and y.shape[0] < 100:
            y = y + self.shifted(y)
        return self.second(y.view(y.shape[0], 4, 4, *y.shape[2:]).flatten(1, 2))


def test_numbers_in_functions_and_methods():
    torch.manual_seed(0)
    model = Called().eval()
    small = graphprune.rebuild(model, 0.5, X)
    assert small.first.out_channels < 16
    assert graphprune.verify(model, small, X).difference < 1e-10
    clone = copy.deepcopy(small)
    assert clone.forward.module is clone
    assert torch.equal(clone(X), small(X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        torch.save(small, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(X), small(X))


def test_a_plan_for_another_version_of_the_code_is_refused():
    model = Net().eval()
    plan = graphprune.trace(model, X).plan(0.5)
    text = plan.to_json()
    digest = plan.literals[0].digest
    other = graphprune.Plan.from_json(text)
    changed = tuple(dataclasses.replace(c, digest="0" * len(digest)) for c in other.literals)
    with pytest.raises(PlanError, match=r"source of Padded\.forward is not the one"):
        graphprune.rebuild(model, dataclasses.replace(other, literals=changed))


def four(x):
    return F.pad(x, (4, 4))


def scaled(factor):
    def pad(x):
        return F.pad(x, (4, 4)) * factor

    return pad


class Reached(nn.Module):
    """The shortcut is padded by a function that is reached in some unusual way."""

    def __init__(self, way):
        super().__init__()
        self.stem, self.wide, self.head = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 2)
        self.way, self.__factor = way, 2.0
        self.bound, self.listed, self.one, self.two = self.method, [four], scaled(2.0), scaled(3.0)

    def method(self, x):
        return F.pad(x, (4, 4))

    @staticmethod
    def static(x):
        return F.pad(x, (4, 4))

    def private(self, x):
        return F.pad(x, (4, 4)) * self.__factor

    def forward(self, x):
        y = self.stem(x)
        return self.head(self.wide(y) + self.way(self, y))


WAYS = {
    "bound method": lambda net, y: net.bound(y),
    "list": lambda net, y: net.listed[0](y),
    "two functions of one code": lambda net, y: net.one(y) + net.two(y),
    "static method": lambda net, y: net.static(y),
    "private name": lambda net, y: net.private(y),
    "argument": lambda net, y: (lambda f: f(y))(four),
    "length of a tensor": lambda net, y: torch.cat([y, y], 1) / len(y[0]),
    "slice object": lambda net, y: torch.cat([y[..., slice(0, 5)], y[..., slice(5, None)], y], 1),
    "narrow to the end": lambda net, y: torch.cat([y, y], 1).narrow(1, 4, 12).sum(1, keepdim=True),
}


@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
@pytest.mark.parametrize("name", WAYS)
def test_what_cannot_be_rewritten_stays(name):
    """Whatever is left to remove, the small model equals the masked one."""
    torch.manual_seed(0)
    model, x = Reached(WAYS[name]).eval(), torch.randn(2, 4)
    graph = graphprune.trace(model, x)
    if graph.groups:
        small = graphprune.rebuild(model, graph.plan(0.5))
        assert graphprune.verify(model, small, x).difference < 1e-10
    else:
        assert any("cannot be changed" in group.note for group in graph.frozen)


class ByName(Padded):
    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + F.pad(input=x, pad=(0, 0, 0, 0, 4, 4)))


class PartlyByName(Padded):
    def forward(self, x):
        return self.norm(self.conv(x)) + F.pad(x, pad=[0, 0, 0, 0, 4, 4], value=0.0)


class Starred(Padded):
    def forward(self, x):
        return self.norm(self.conv(x)) + F.pad(x, *((0, 0, 0, 0, 4, 4),))


class StarInside(Padded):
    def forward(self, x):
        return self.norm(self.conv(x)) + F.pad(x, (0, 0, 0, 0, *(4, 4)))


class FromShapes(Padded):
    def forward(self, x):
        y = self.norm(self.conv(x))
        more = (y.shape[1] - x.shape[1]) // 2
        return y + F.pad(x, (0, 0, 0, 0, more, more))


@pytest.mark.parametrize("block", [ByName, PartlyByName, Starred, StarInside, FromShapes])
def test_every_spelling_of_the_padding_shrinks(block):
    torch.manual_seed(0)
    model = Net()
    model.block = block()
    small = graphprune.rebuild(model, 0.5, X)
    assert small.stem.out_channels == 4
    graphprune.verify(model, small, X)


class InAMethod(nn.Module):
    """The number stands in a method that the forward calls."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(16, 4)
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)

    def short(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))

    def forward(self, x):
        x = self.stem(x)
        return self.head((self.conv(x) + self.short(x)).relu().mean((2, 3)))


def test_a_number_in_a_method_changes_a_second_time():
    """The frames of what was compiled anew are not the user's: wherever our own files lie."""
    once = graphprune.rebuild(InAMethod().eval(), 0.5, X)
    twice = graphprune.rebuild(once, 0.5, X)
    assert (twice.stem.out_channels, twice.conv.out_channels) == (2, 4)


class Pool(nn.Module):
    """Attention called as a function of torch, which knows one size of heads only."""

    def __init__(self, heads=4):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.heads = heads

    def forward(self, x):
        return F.multi_head_attention_forward(
            x, x, x, x.shape[-1], self.heads, None,
            torch.cat([self.q.bias, self.k.bias, self.v.bias]), None, None, False, 0.0,
            self.o.weight, self.o.bias, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight)[0]  # fmt: skip


@pytest.mark.parametrize("attention", ["heads", "head_dim"])
def test_attention_as_a_function_gets_sizes_of_its_own(attention):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), Pool(), nn.Linear(16, 3)).eval()
    x = torch.randn(5, 2, 6)
    once = graphprune.rebuild(model, 0.3, x, attention=attention)
    assert attention == "heads" or isinstance(once[1].forward, RewrittenForward)
    assert once[1].q.out_features == 12
    assert once[1].q.in_features == once[0].out_features == 12
    assert graphprune.verify(model, once, x).difference < 1e-10
    again = graphprune.rebuild(copy.deepcopy(once), 0.5, x, attention=attention)
    assert again[1].q.out_features == 8
    assert graphprune.verify(model, again, x).difference < 1e-10


def test_attention_that_torch_calls_is_torchs():
    """Inside a class of its own that takes the forward of torch's layer, no code can be changed."""

    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return nn.MultiheadAttention.forward(self, x, x, x)[0]

    model = nn.Sequential(nn.Linear(6, 16), Own(16, 4), nn.Linear(16, 3)).eval()
    x = torch.randn(5, 2, 6)
    small = graphprune.rebuild(nn.Sequential(*model, nn.Linear(3, 8), nn.Linear(8, 2)), 0.5, x)
    assert small[3].out_features == 4
    assert small[1].num_heads == 4


def test_a_plan_adds_no_sizes_to_other_calls():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), Pool(), nn.Linear(16, 3)).eval()
    plan = graphprune.trace(model, torch.randn(5, 2, 6)).plan(0.2)
    change = next(change for change in plan.literals if change.path == ("head_dim",))
    first, last, *columns = change.site.span
    other = dataclasses.replace(change.site, span=(first + 2, last - 4, *columns))
    changed = dataclasses.replace(change, site=other)
    with pytest.raises(PlanError, match="is not there"):
        graphprune.rebuild(model, dataclasses.replace(plan, literals=(changed,)))
