"""The stand-in for ``nn.MultiheadAttention``: equal to it, and small models keep its interface."""

import copy
import inspect
import io
import itertools

import pytest
import torch
from support.comparing import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune.record.attention import MultiheadAttention, replace_attention

WIDTH, HEADS, BATCH, QUERIES, KEYS = 8, 2, 3, 4, 5
LAYERS = [
    {"batch_first": first, "add_bias_kv": kv, "add_zero_attn": zero, **sizes}
    for first, kv, zero, sizes in itertools.product(
        (True, False), (True, False), (True, False), ({}, {"kdim": 6, "vdim": 7}, {"bias": False})
    )
]


def varied(model):
    """In double precision, with random parameters."""
    for parameter in model.double().parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def pair(**options):
    """A layer of torch, and a copy of it run by our class."""
    layer = varied(nn.MultiheadAttention(WIDTH, HEADS, **options))
    ours = copy.deepcopy(layer)
    replace_attention(ours)
    assert type(ours) is MultiheadAttention
    return layer, ours


def inputs(layer, batch=BATCH):
    """Query, key and value as the layer wants them; without a batch for 0."""
    sizes = [(QUERIES, WIDTH), (KEYS, layer.kdim), (KEYS, layer.vdim)]
    drawn = [torch.randn(batch or 1, *size, dtype=torch.float64) for size in sizes]
    if not batch:
        return [x[0] for x in drawn]
    return drawn if layer.batch_first else [x.transpose(0, 1) for x in drawn]


def masks(copies):
    """Attention masks of all kinds; the third dimension is ``copies``."""
    closed = torch.rand(copies, QUERIES, KEYS) > 0.6
    closed[..., 0] = False  # something is left to look at
    added = torch.randn(copies, QUERIES, KEYS, dtype=torch.float64)
    return [None, closed[0], added[0], closed, added]


def paddings(batch):
    """Masks of padded keys; without a batch for 0."""
    closed = torch.zeros(batch or 1, KEYS, dtype=torch.bool)
    closed[:, -1] = closed[0, -2] = True
    added = torch.randn(batch or 1, KEYS, dtype=torch.float64)
    return [None] + [mask if batch else mask[0] for mask in (closed, added)]


def assert_same(wanted, found):
    """The same results of the two layers."""
    assert type(found) is type(wanted) is tuple
    assert len(found) == len(wanted) == 2
    for old, new in zip(wanted, found):
        assert (old is None) == (new is None)
        if old is not None:
            assert new.dtype == old.dtype
            assert_close(old, new, 1e-12)


@pytest.mark.parametrize("batch", [BATCH, 0], ids=["batch", "unbatched"])
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_it_equals_the_layer_of_torch(options, batch):
    layer, ours = pair(**options)
    query, key, value = inputs(layer, batch)
    for mask, padding in itertools.product(masks(HEADS * (batch or 1)), paddings(batch)):
        for weights, average in itertools.product((True, False), repeat=2):
            call = {
                "attn_mask": mask,
                "key_padding_mask": padding,
                "need_weights": weights,
                "average_attn_weights": average,
            }
            assert_same(layer(query, key, value, **call), ours(query, key, value, **call))


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"add_bias_kv": True}], ids=str)
def test_self_attention_in_eval_mode(options, weights):
    """Torch takes a fused path of its own here."""
    layer, ours = pair(**options)
    x = torch.randn(BATCH, KEYS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer.eval()(x, x, x, need_weights=weights)
        assert_same(wanted, ours.eval()(x, x, x, need_weights=weights))


@pytest.mark.parametrize("weights", [True, False])
def test_the_causal_hint(weights):
    layer, ours = pair(batch_first=True)
    x = torch.randn(BATCH, KEYS, WIDTH, dtype=torch.float64)
    mask = torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1)
    call = {"attn_mask": mask, "is_causal": True, "need_weights": weights}
    assert_same(layer(x, x, x, **call), ours(x, x, x, **call))
    with pytest.raises(RuntimeError):
        layer(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        ours(x, x, x, is_causal=True)


def test_gradients_are_equal():
    layer, ours = pair(add_bias_kv=True, kdim=6, vdim=7)
    x = inputs(layer)
    for each in (layer, ours):
        out, weights = each(*x)
        (out.square().sum() + weights.square().sum()).backward()
    for wanted, found in zip(layer.parameters(), ours.parameters(), strict=True):
        assert_close(wanted.grad, found.grad, 1e-12)


def test_dropout_of_weights():
    layer = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True).double()
    ours = copy.deepcopy(layer)
    replace_attention(ours)
    x = inputs(layer)
    for each in (layer, ours):
        dropped = each(*x, average_attn_weights=False)[1] == 0
        assert 0.2 < dropped.double().mean() < 0.8
        assert not (each.eval()(*x)[1] == 0).any()
    assert_same(layer(*x), ours(*x))


def test_it_is_called_as_the_layer_of_torch():
    wanted = inspect.signature(nn.MultiheadAttention.forward).parameters
    found = inspect.signature(MultiheadAttention.forward).parameters
    assert list(found) == list(wanted)
    assert [p.default for p in found.values()] == [p.default for p in wanted.values()]


def test_other_classes_stay():
    class Mine(nn.MultiheadAttention):
        """A method of its own that torch's forward calls."""

        def merge_masks(self, *args):
            return super().merge_masks(*args)

    for module in (Mine(WIDTH, HEADS), nn.Linear(2, 2)):
        kind = type(module)
        replace_attention(module)
        assert type(module) is kind


class Around(nn.Module):
    """Attention in a stream; the call of the layer is as a user writes it."""

    def __init__(self, call=None, **options):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, **options)
        self.call = call or {}

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.attention(x, x, x, **self.call)[0])


def shrunk(model, x, ratio=0.5, **options):
    """A model in double precision and its small one, which is verified."""
    model = varied(model).eval()
    small = graphprune.rebuild(model, ratio, x)
    report = graphprune.verify(model, small, x, **options)
    assert report.difference <= 1e-10
    return model, small


X = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0)).double()
CALLS = [{}, {"need_weights": False}, {"average_attn_weights": False}]


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True}], ids=str
)
def test_a_small_layer_keeps_the_interface(options, call):
    model, small = shrunk(Around(call, **options), X)
    layer = small.attention
    assert isinstance(layer, nn.MultiheadAttention)
    assert (layer.num_heads, layer.head_dim, layer.value_dim) == (2, 4, 4)  # whole heads leave
    assert layer.embed_dim == layer.kdim == layer.vdim == 8
    assert layer.in_proj_weight.shape == (3 * 2 * 4, 8)
    assert layer.out_proj.weight.shape == (8, 2 * 4)
    assert list(layer.state_dict()) == list(model.attention.state_dict())
    assert layer.batch_first == model.attention.batch_first
    x = torch.randn(2, 7, 8).double()
    out, weights = layer(x, x, x)
    length, batch = (7, 2) if layer.batch_first else (2, 7)
    assert out.shape == (2, 7, 8)
    assert weights.shape == (batch, length, length + (layer.bias_k is not None))
    assert torch.allclose(weights.sum(-1), torch.ones(1).double())
    assert layer(x, x, x, need_weights=False)[1] is None


def test_only_heads_may_leave_or_only_the_stream():
    model = varied(Around(batch_first=True))
    graph = graphprune.trace(model, X)
    heads, stream = sorted(graph.groups, key=lambda group: group.size)
    assert (heads.size, stream.size) == (4, 16)
    small = graphprune.rebuild(model, graph.plan_of({heads.name: [1, 2, 3]}))
    assert (small.attention.num_heads, small.attention.embed_dim) == (3, 16)
    assert graphprune.verify(model, small, X).difference <= 1e-10
    small = graphprune.rebuild(model, graph.plan_of({stream.name: list(range(5))}))
    assert (small.attention.num_heads, small.attention.embed_dim) == (4, 5)
    assert graphprune.verify(model, small, X).difference <= 1e-10


def test_widths_of_heads_leave_when_asked():
    model = varied(Around(batch_first=True))
    graph = graphprune.trace(model, X, attention="head_dim")
    small = graphprune.rebuild(model, graph.plan(0.5))
    layer = small.attention
    assert layer.num_heads == 4
    assert (layer.head_dim, layer.value_dim) == (2, 2)
    assert layer.scale == 4**-0.5  # that of the original
    assert graphprune.verify(model, small, X).difference <= 1e-10


def test_a_small_layer_is_copied_pickled_and_shrunk_again():
    model, small = shrunk(Around(batch_first=True), X)
    assert_close(small(X), copy.deepcopy(small)(X), 0)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert_close(small(X), torch.load(file, weights_only=False)(X), 0)
    smaller = graphprune.rebuild(small, 0.5, X)
    assert smaller.attention.num_heads == 1
    assert graphprune.verify(model, smaller, X).difference <= 1e-10


class Stream(nn.Sequential):
    """Layers of torch between two linear ones."""

    def __init__(self, *layers):
        super().__init__(nn.Linear(6, 16), *layers, nn.Linear(16, 3))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_layer(norm_first, batch_first):
    layer = nn.TransformerEncoderLayer(
        16, 4, 32, activation="gelu", batch_first=batch_first, norm_first=norm_first
    )
    _, small = shrunk(Stream(layer), X)
    assert small[1].self_attn.num_heads == 2
    assert small[1].linear1.weight.shape == (16, 8)
    assert small[1].norm1.normalized_shape == (8,)


@pytest.mark.parametrize("nested", [True, False])
def test_an_encoder_runs_without_gradients(nested):
    """Torch takes its fused path where it can: not where sizes of heads are our own."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    _, small = shrunk(Stream(encoder), X)
    wanted = small(X)
    with torch.no_grad():
        assert_close(wanted.detach(), small(X), 1e-12)
        inner = torch.randn(2, 7, 8).double()
        mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
        padding = torch.zeros(2, 7, dtype=torch.bool)
        padding[1, -2:] = True
        calls = [
            {"src_key_padding_mask": padding},
            {"mask": mask, "src_key_padding_mask": padding, "is_causal": True},
        ]
        fused = [small[1](inner, **call) for call in calls]
    for call, found in zip(calls, fused):
        assert_close(small[1](inner, **call).detach(), found, 1e-12)


class Translating(nn.Module):
    """A layer with a target and a memory."""

    def __init__(self, inner):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 3)
        self.inner = inner

    def forward(self, target: Tensor, memory: Tensor) -> Tensor:
        return self.last(F.relu(self.inner(self.left(target), self.right(memory))))


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_decoder_layer(norm_first):
    layer = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    _, small = shrunk(Translating(layer), (X[:, :5], X))
    assert small.inner.self_attn.num_heads == small.inner.multihead_attn.num_heads == 2
    assert small.inner.multihead_attn.embed_dim == 8


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer(norm_first):
    layers = nn.Transformer(16, 4, 2, 2, 32, batch_first=norm_first, norm_first=norm_first)
    model, small = shrunk(Translating(layers), (X, X))
    kept = [m.num_heads for m in small.modules() if isinstance(m, nn.MultiheadAttention)]
    assert kept == [2] * 6
    assert sum(p.numel() for p in small.parameters()) < 0.4 * sum(
        p.numel() for p in model.parameters()
    )


class Grouped(nn.Module):
    """Grouped queries: every head of keys and values serves several of queries."""

    def __init__(self, repeat):
        super().__init__()
        self.heads, self.served, self.width, self.repeat = 8, 4, 4, repeat
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.q, self.k, self.v = nn.Linear(12, 32), nn.Linear(12, 16), nn.Linear(12, 16)
        self.out = nn.Linear(32, 12)

    def forward(self, x):
        x = self.first(x)
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.width).transpose(1, 2)
        k = self.k(x).view(batch, length, self.served, self.width).transpose(1, 2)
        v = self.v(x).view(batch, length, self.served, self.width).transpose(1, 2)
        if self.repeat:
            k, v = (t.repeat_interleave(self.heads // self.served, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=not self.repeat)
        return self.last(x + self.out(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("repeat", [True, False])
def test_grouped_queries_leave_with_their_keys(repeat):
    _, small = shrunk(Grouped(repeat), X)
    assert (small.heads, small.served, small.width) == (4, 2, 4)
    assert small.q.weight.shape == (16, 6)
    assert small.k.weight.shape == small.v.weight.shape == (8, 6)
