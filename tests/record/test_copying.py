"""Copies are whole and apart: hooks, handles, masks, and what cannot be copied."""

import copy
import functools
import threading

import pytest
import torch
from support.comparing import untouched
from torch import nn
from torch.nn.utils import prune

import graphprune
from graphprune.errors import ModelError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


class Keeping(Net):
    """A hook hands a feature to the forward."""

    def __init__(self, register):
        super().__init__()
        self.features = {}
        register(self)

    def forward(self, x):
        y = super().forward(x)
        return y, self.features["b"].sum(1)


def by_closure(net):
    def hook(module, args, out):
        net.features["b"] = out

    net.b.register_forward_hook(hook)


def by_dictionary(net):
    features = net.features
    net.b.register_forward_hook(lambda module, args, out: features.update(b=out))


def by_default(net):
    net.b.register_forward_hook(lambda m, i, out, owner=net: owner.features.update(b=out))


def by_partial(net):
    def keep(owner, module, args, out):
        owner.features["b"] = out

    net.b.register_forward_hook(functools.partial(keep, net))


def built(make, *args):
    torch.manual_seed(0)
    return make(*args).eval().double()


@pytest.mark.parametrize("register", [by_closure, by_dictionary, by_default, by_partial])
@pytest.mark.parametrize("run_before", [False, True])
def test_hooks_of_a_copy_keep_what_the_copy_sees(register, run_before):
    model = built(Keeping, register)
    if run_before:
        model(X)
    seen = dict(model.features)
    with torch.no_grad():
        small = graphprune.rebuild(model, 0.5, X)
        assert model.features == seen
        assert torch.equal(small(X)[1], small.features["b"].sum(1))
        graphprune.verify(model, small, X)
    assert small.a.out_features == 4
    assert all(value.device.type == "cpu" for value in model.features.values())


LOOKS = [
    lambda module, args, out: print(out.detach().cpu().numpy().shape),
    lambda module, args, out: out.detach().cpu().tolist() and None,
]


@pytest.mark.parametrize("look", LOOKS)
def test_a_hook_that_only_looks_freezes_nothing(look):
    model = built(Net)
    model.a.register_forward_hook(look)
    small = graphprune.rebuild(model, 0.5, X)
    assert small.a.out_features == small.b.out_features == 4


def test_a_hook_whose_look_comes_back_freezes_what_it_saw():
    class Returning(Net):
        def forward(self, x):
            y = self.a(x).relu()
            return self.c(self.b(y + torch.from_numpy(self.seen)))

        def look(self, module, args, out):
            self.seen = out.detach().numpy() + 1

    model = built(Returning)
    model.a.register_forward_hook(model.look)
    assert graphprune.trace(model, X).group_of("a").frozen


def test_handles_of_hooks_stay_usable():
    class Holding(Net):
        def __init__(self):
            super().__init__()
            self.handle = self.a.register_forward_hook(self.look)

        def look(self, module, args, out):
            self.seen = out.shape

    model = built(Holding)
    with untouched(model), torch.no_grad():
        small = graphprune.rebuild(model, 0.5, X)
        twin = torch.optim.swa_utils.AveragedModel(copy.deepcopy(small)).module
        graphprune.verify(model, small, X)
    twin(X)
    assert twin.seen == (2, 4)
    twin.handle.remove()
    assert not twin.a._forward_hooks
    assert small.a._forward_hooks


@pytest.mark.parametrize("thing", [lambda net: net._modules.keys(), lambda net: threading.Lock()])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_cannot_be_copied_is_named(thing, inplace):
    model = nn.Sequential(built(Net), nn.Linear(2, 2)).double()
    model[0].odd = thing(model[0])
    with untouched(model), pytest.raises(ModelError, match=r"'0\.odd' of Net cannot be copied"):
        graphprune.rebuild(model, 0.5, X, inplace=inplace)


class Tagger(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(4, 12, batch_first=True), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_masks_of_recurrent_layers_are_followed(kind, gates):
    model, x = built(Tagger, kind), X[:, None].expand(2, 3, 4)
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        mask = torch.ones_like(getattr(model.rnn, name))
        mask.view(gates, 12, -1)[:, [1, 4, 7, 10]] = 0
        prune.custom_from_mask(model.rnn, name, mask)
    with torch.no_grad():
        if kind is nn.LSTM:
            wanted = model(x)
            small = graphprune.rebuild(model, graphprune.Plan.from_masks(model, x))
            assert small.rnn.hidden_size == 8
            assert torch.allclose(small(x), wanted)
        half = graphprune.rebuild(model, 0.5, x)
        assert half.rnn.hidden_size == 6
        graphprune.verify(model, half, x)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.o = nn.Linear(4, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        y = self.i(x)
        return self.o(self.attention(y, y, y, need_weights=False)[0])


def test_masks_of_the_output_of_attention_are_followed():
    model, x = built(Attending), X[:, None].expand(2, 3, 4)
    prune.l1_unstructured(model.attention.out_proj, "weight", 0.4)
    with torch.no_grad():
        small = graphprune.rebuild(model, 0.5, x)
        graphprune.verify(model, small, x)
    assert small.attention.num_heads == 2
    assert small.o.in_features == 8
