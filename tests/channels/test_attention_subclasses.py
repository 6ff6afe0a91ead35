"""Layers that inherit from torch's attention: cut as torch's own, where they leave it to them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune


class Same(nn.MultiheadAttention):
    """Nothing of its own."""


class Short(nn.MultiheadAttention):
    """Self attention of one argument."""

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Scaled(Same):
    """A class between, and a parameter of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((32,), 1.5))

    def forward(self, query, key, value, **kwargs):
        out, weights = super().forward(query, key, value, **kwargs)
        return out * self.gain, weights


class Own(nn.MultiheadAttention):
    """Torch's parameters in code of its own."""

    def forward(self, query, key, value):
        if not self._qkv_same_embed_dim:
            raise RuntimeError("only for inputs of one size")
        q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        split = [each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (q, k, v)]
        out = F.scaled_dot_product_attention(*split, scale=self.head_dim**-0.5)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class Sized(nn.MultiheadAttention):
    """A name of its own where ours would be."""

    scale = 2.0

    def forward(self, query, key, value):
        out, weights = super().forward(query, key, value)
        return out * self.scale, weights


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.stem, self.out = nn.Linear(6, 32), nn.Linear(32, 3)
        self.attend = kind(32, 4, batch_first=True)

    def forward(self, x):
        h = self.stem(x)
        read = self.attend(h) if isinstance(self.attend, Short) else self.attend(h, h, h)[0]
        return self.out(h + read)


X = torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CUT = (Same, Short, Scaled)


def net(kind):
    torch.manual_seed(0)
    model = Net(kind).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.4, 0.4)
    return model


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("attention", ["heads", "head_dim"])
@pytest.mark.parametrize("kind", CUT, ids=lambda kind: kind.__name__)
def test_it_is_cut_as_torchs_own(kind, attention):
    model = net(kind)
    plan = graphprune.trace(model, X, attention=attention).plan(0.5)
    small = graphprune.rebuild(model, plan)
    assert type(model.attend) is kind
    assert isinstance(small.attend, kind)
    assert small.attend.in_proj_weight.shape == (48, 16)
    assert graphprune.verify(model, small, X).verdict == "equal"
    own = size(model.attend) - size(nn.MultiheadAttention(32, 4))
    assert size(small.attend) - own / 2 < 0.3 * size(nn.MultiheadAttention(32, 4))


def test_code_of_its_own_runs_as_it_is():
    model = net(Own)
    small = graphprune.rebuild(model, 0.5, X)
    assert type(small.attend) is Own
    assert size(small) < 0.6 * size(model)
    assert graphprune.verify(model, small, X).verdict == "equal"


def test_a_name_of_its_own_where_ours_would_be_keeps_all():
    assert not graphprune.trace(net(Sized), X).groups


def test_layers_of_both_classes_are_copied_and_saved(tmp_path):
    model = net(Short)
    small = graphprune.rebuild(model, 0.5, X)
    small.attend.note = "mine"
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    graphprune.save(small, tmp_path / "small")
    for twin in (
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        torch.load(file, weights_only=False),
        graphprune.load(tmp_path / "small", lambda: Net(Short).double()).eval(),
    ):
        assert type(twin.attend) is type(small.attend)
        assert torch.equal(twin(X), small(X))
    assert copy.deepcopy(small).attend.note == "mine"
    again = graphprune.rebuild(small, 0.5, X)
    assert type(again.attend) is type(small.attend)
    assert graphprune.mask(model, again.graphprune_plan)(X).sub(again(X)).abs().max() < 1e-12
