"""What is claimed to be the same for every input is what the model computes for two of them."""

import operator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from support.strategies import specs, zeroed
from torch import fx, nn
from torch.nn import functional as F

from graphprune.masks.interpret import Interpreter, real_tensors
from graphprune.ops.fact import Fact, double
from graphprune.ops.registry import REGISTRY
from graphprune.ops.views import fact_rule
from graphprune.record.inputs import Call
from graphprune.record.recording import record

aten = torch.ops.aten
KNOWN = 0.75


class Around(nn.Module):
    """An op on maps of which channel 0 is unknown, 1 is constant, 2 is zero and 3 is unknown."""

    def __init__(self, op):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.op = op
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.scale = nn.Parameter(torch.tensor([1.0, 0.0, 2.0, 0.0]))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.register_buffer("rows", torch.tensor([2, 1, 0]))
        with torch.no_grad():
            self.conv.weight[1:3] = 0
            self.conv.bias[:] = torch.tensor([0.0, KNOWN, 0, 0])
            self.weight[:, 3] = 0
            self.weight[1] = 0
            self.kernel[:2, [0, 3]] = 0

    def forward(self, x):
        return self.op(self, self.conv(x))


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def by_index(m, x):
    return [x.index_select(1, m.rows), x[:, m.rows], x.gather(1, m.rows.view(1, 3, 1, 1))]


def in_place(m, x):
    y = x.clone()
    y[:, 0].fill_(2)
    y[:, 3].copy_(x[:, 1])
    y[:, 1].add_(1).mul_(y[:, 2])
    view = y.view(2, 4, 36)
    view[:, :, 0].zero_()
    y.transpose_(2, 3).unsqueeze_(0).squeeze_(0).relu_().masked_fill_(y > 1, 3)
    z = torch.ones(4, 4).t_().detach_()
    return y, view, z


def statistics(m, x):
    return [
        x.mean(1), x.mean((2, 3)), x.sum((0, 2)), x.sum(1), x.amax(1), x.amin((2, 3)), x.max(),
        x.max(2).values, x.min(), x.var(1), x.std((2, 3)), *torch.var_mean(x, 2),
        *torch.std_mean(x, 1), aten.norm(x, 2, [1]), aten.norm(x, 1),
        torch.linalg.vector_norm(x, dim=(2, 3)),
        x.logsumexp(2), x.prod(3), (x > 0).any(1), (x > 0).all(2), x.argmax(2), x.argmin(3),
        x.softmax(1), x.softmax(3), x.log_softmax(2), x.cumsum(2), x.cumprod(1),
        aten._safe_softmax(x, 3),
    ]  # fmt: skip


def norms(m, x):
    return [
        F.batch_norm(x, m.mean, m.var), F.batch_norm(x, m.mean, m.var, m.scale, m.mean),
        F.instance_norm(x), F.batch_norm(x, None, None, m.scale, training=True),
        F.group_norm(x, 2), F.group_norm(x, 4, m.scale, m.mean), F.layer_norm(x, (6, 6)),
        F.layer_norm(tokens(x), (4,), m.scale, m.mean), F.rms_norm(tokens(x), (4,), m.scale),
        F.rms_norm(x, (6,)),
        aten._native_batch_norm_legit(x, m.scale, m.mean, m.mean, m.var, False, 0.1, 0.1)[0],
        aten._native_batch_norm_legit_no_training(x, m.scale, m.mean, m.mean, m.var, 0.1, 0.1)[0],
        aten._batch_norm_no_update(x, m.scale, m.mean, m.mean, m.var, 0.1, 0.1)[0],
    ]  # fmt: skip


def products(m, x):
    t = tokens(x)
    return [
        F.linear(t, m.weight), F.linear(t, m.weight, m.weight[:, 0]), t @ m.weight.T, t @ t.mT,
        m.weight @ t.mT, torch.mm(t[0], m.weight.T), torch.addmm(m.scale, t[0], m.weight[:4].T),
        torch.bmm(t, t.mT), torch.baddbmm(t @ t.mT, t, t.mT, alpha=0.5), torch.mv(t[0], m.scale),
        torch.dot(t[0, :, 1], t[0, :, 2]), torch.vdot(t[0, :, 1], t[0, :, 0]),
        torch.einsum("bnc,oc->bno", t, m.weight), torch.einsum("bnc,bmc,c->bnm", t, t, m.scale),
        F.conv2d(x, m.kernel), F.conv2d(x, m.kernel, m.mean, 2, 1),
        F.conv1d(t.mT, m.kernel[..., 0]),
        F.conv2d(x, m.kernel[:, :1], padding=1, groups=4),
        F.conv2d(x, m.kernel, dilation=2, padding=2),
        F.conv_transpose2d(x, m.kernel, m.mean, 2, 1),
        F.conv_transpose2d(x, m.kernel[:, :2], groups=2),
        F.scaled_dot_product_attention(t, t, t),
        F.scaled_dot_product_attention(t, t, t, is_causal=True),
        F.scaled_dot_product_attention(t, t, t, t.new_zeros(36, 36)),
    ]  # fmt: skip


def pools(m, x):
    y, v = x.mean(3), x.unsqueeze(2).expand(-1, -1, 4, -1, -1)
    return [
        F.avg_pool1d(y, 2), F.avg_pool2d(x, 3, 2, 1), F.avg_pool3d(v, 2), F.max_pool1d(y, 2),
        F.max_pool2d(x, 3, 2, 1), F.max_pool3d(v, 2), F.adaptive_avg_pool1d(y, 2),
        F.adaptive_avg_pool2d(x, 4), F.adaptive_avg_pool3d(v, 2), F.adaptive_max_pool1d(y, 2),
        F.adaptive_max_pool2d(x, 2), F.adaptive_max_pool3d(v, 2), F.adaptive_avg_pool2d(x, 1),
        *(F.interpolate(y, 9, mode=mode) for mode in ("nearest", "nearest-exact", "linear")),
        *(F.interpolate(x, 9, mode=mode) for mode in ("nearest", "nearest-exact", "bilinear")),
        *(F.interpolate(v, 9, mode=mode) for mode in ("nearest", "nearest-exact", "trilinear")),
        F.interpolate(x, 9, mode="bicubic"),
        F.interpolate(x, 4, mode="bilinear", antialias=True),
        F.interpolate(x, 4, mode="bicubic", antialias=True),
        F.max_pool1d(y, 3, return_indices=True)[1],
    ]  # fmt: skip


def movement(m, x):
    v = x.unsqueeze(2).expand(-1, -1, 4, -1, -1)
    return [
        x.permute(1, 0, 2, 3), x.movedim(1, 3), x.flip(1), x.roll(1, 1), x.repeat(1, 2, 1, 1),
        *x.unbind(1), *x.split(3, 1), *x.split([1, 3], 1), *x.unsafe_split(2, 1),
        *x.unsafe_split_with_sizes([3, 1], 1), x.diagonal(0, 1, 2), x.unfold(1, 2, 1),
        torch.stack([x, x], 1), torch.cat([x, x[:, 1:2]], 1), torch.concat([x, x]), x.contiguous(),
        F.pad(x, (1, 1, 0, 0, 1, 2), value=KNOWN), F.channel_shuffle(x, 2), F.pixel_shuffle(x, 2),
        F.pixel_unshuffle(x, 2), F.unfold(x, 3, padding=1), x.tril(), x.triu(1),
        torch.slice_scatter(x, x[:, :2], 1, 2, 4), torch.select_scatter(x, x[:, 1], 1, 0),
        *(F.pad(x.mean(3), (1, 2), mode=mode) for mode in ("reflect", "replicate", "circular")),
        *(F.pad(x, (1, 2, 2, 1), mode=mode) for mode in ("reflect", "replicate", "circular")),
        *(F.pad(v, (1, 1, 1, 1, 1, 1), mode=mode) for mode in ("reflect", "replicate")),
        F.embedding(m.rows, m.weight), aten._reshape_alias(x, [2, 144], [144, 1]), x.reshape(-1),
        torch.view_as_complex(x.view(2, 4, 6, 3, 2)).real,
        torch.view_as_real(torch.view_as_complex(x.view(2, 4, 6, 3, 2)) * 2), aten.alias(x),
        aten._unsafe_view(x, [2, 144]), x[0, 0].t(), aten.t(x[0, 1]),
    ]  # fmt: skip


def pointwise(m, x):
    return [
        x.relu(), x.clamp(0, 1), F.gelu(x), F.hardswish(x), F.prelu(x, m.scale),
        F.threshold(x, 0.1, 2),
        aten._prelu_kernel(x, m.scale.view(4, 1, 1)),
        F.glu(x, 1), F.logsigmoid(x), x * m.scale.view(4, 1, 1), x * 0, x * 2, 1 - x,
        torch.rsub(x, 3),
        x / (x + 4), torch.where(x > 0.5, x, KNOWN),
        torch.where(x > 0.5, KNOWN, torch.tensor(KNOWN)),
        torch.where(x[:, 1:2] > 0, x, -x), x.masked_fill(x > 9, 1), x.to(torch.float32), x.clone(),
        torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 2), x.new_zeros(3),
        x.new_ones(3),
        x.new_full((2,), 3), torch.full((2,), 3.0) + x[0, 1, 0, :2], x.sigmoid().bernoulli(),
        torch.rand_like(x),
        torch.complex(x, x).imag, torch.polar(x, x).real, x.nan_to_num(), x.isfinite(), x // 1,
        aten.lift_fresh(x), aten.lift_fresh_copy(x), F.dropout(x.detach(), 0.5, False),
    ]  # fmt: skip


OPS = [by_index, in_place, statistics, norms, products, pools, movement, pointwise]


def evaluated(rec, tensors, inputs):
    """Every op of a recorded pass with what it returns."""
    values, inputs = {}, iter(inputs)
    for node in rec.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "get_attr":
            name = str(node.target)
            values[node] = tensors[name] if name in tensors else rec.constants[name].double()
        elif node.op == "call_function" and node.target is operator.getitem:
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            kwargs = {key: double(value) for key, value in kwargs.items()}
            if "device" in kwargs:
                kwargs["device"] = torch.device("cpu")
            copies = node.target is torch.ops.aten.view.default
            target = torch.ops.aten.reshape.default if copies else node.target
            values[node] = target(*args, **kwargs)
        if node.op != "output":
            yield node, values[node]


def claims(model, *inputs):
    """The recorded pass, and copies of all facts about it."""
    rec = record(model, Call.of(inputs), training=False)
    known = {}
    for node, facts in Interpreter(rec, real_tensors(model)).run():
        if isinstance(facts[node], Fact):
            known[node] = Fact(facts[node].value.clone(), facts[node].unknown.clone())
    return rec, known


def assert_sound(model, *inputs):
    """Compare all claims with two passes; the ops about which something was claimed."""
    rec, known = claims(model, *inputs)
    told = set()
    for number in range(2):
        torch.manual_seed(number)
        others = [torch.randn_like(x) * (1 + 2 * number) for x in inputs]
        for node, value in evaluated(rec, real_tensors(model), others):
            fact = known.get(node)
            if fact is None or fact.unknown.all():
                continue
            assert fact.value.shape == fact.unknown.shape == value.shape, node
            told.add(node.target)
            sure = ~fact.unknown
            claimed, found = (part[sure].to(torch.complex128) for part in (fact.value, value))
            assert torch.allclose(claimed, found, 1e-11, 1e-11), node
    return rec, known, told


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_claims_about_an_op_hold(op):
    _, known, told = assert_sound(Around(op).double().eval(), torch.randn(2, 3, 6, 6).double())
    assert told
    if op is not by_index:
        assert any(fact.unknown.any() for fact in known.values())


def test_every_rule_is_tried():
    """A rule that nothing above calls is tried with the sample of its op, or not tested."""
    seen = set()
    for op in OPS:
        rec = record(Around(op).double().eval(), Call.of(torch.randn(2, 3, 6, 6).double()), False)
        seen |= {str(getattr(node.target, "overloadpacket", None)) for node in rec.ops}
    rules = {name for name, op in REGISTRY.items() if fact_rule(op) and op.sample is None}
    elsewhere = {"aten.cudnn_batch_norm", "aten.miopen_batch_norm", "pointwise"}  # on a GPU
    assert sorted(rules - seen - elsewhere) == []


@given(specs())
@settings(max_examples=25)
def test_claims_about_a_network_hold(spec):
    model = zeroed(spec.build(), spec.seed, rows=False)
    assert_sound(model, spec.inputs())


@pytest.mark.slow
@given(specs())
@settings(max_examples=500)
def test_claims_about_a_network_hold_at_length(spec):
    assert_sound(zeroed(spec.build(), spec.seed, rows=False), spec.inputs())


def test_a_false_claim_is_noticed(monkeypatch):
    wrong = replace(REGISTRY["aten.relu"], fact=lambda op, x: Fact.known(x.filled()))
    monkeypatch.setitem(REGISTRY, "aten.relu", wrong)
    with pytest.raises(AssertionError):
        assert_sound(Around(lambda m, x: x.relu()).double(), torch.randn(2, 3, 6, 6).double())


def last(op):
    """What is known of the result of an op: values, with NaN where they depend on the input."""
    model = Around(op).double().eval()
    rec = record(model, Call.of(torch.randn(2, 3, 6, 6).double()), training=False)
    passed = {node: facts[node] for node, facts in Interpreter(rec, real_tensors(model)).run()}
    fact = passed[rec.outputs[0]]  # as later ops left it
    return fact.value.masked_fill(fact.unknown, torch.nan)


def test_borders_of_a_padded_convolution_are_known():
    out = last(lambda m, x: F.conv2d(x, m.kernel, padding=1))
    assert out[:, 2:].isnan().all()
    assert out[:, :2].isfinite().all()
    assert len(out[0, 0].unique()) == 9  # the middle, four sides and four corners


def test_zero_times_anything_is_known():
    scaled = last(lambda m, x: x * m.scale.view(4, 1, 1))
    assert scaled[:, 0].isnan().all()
    assert (scaled[:, [1, 2, 3]] == 0).all()
    normed = last(lambda m, x: F.batch_norm(x, m.mean, m.var, m.scale, m.mean))
    assert normed[:, 0].isnan().all()
    assert normed[:, 3].isfinite().all()


def test_attention_to_equal_values_gives_that_value():
    out = last(lambda m, x: F.scaled_dot_product_attention(*[tokens(x)] * 3))
    assert (out[..., 1] == KNOWN).all()
    assert (out[..., 2] == 0).all()
    assert out[..., [0, 3]].isnan().all()
    masked = last(
        lambda m, x: F.scaled_dot_product_attention(*[tokens(x)] * 3, x.new_zeros(36, 36))
    )
    assert masked[..., 1].isnan().all(), "all places may be masked"


def test_what_is_written_is_seen_through_views():
    def write(m, x):
        y = x.clone()
        part = y[:, 0]
        y.view(2, -1)[:, :36] = 3
        y[:, 1] += x[:, 0]
        return torch.stack([part, y[:, 1], y[:, 2]], 1)

    out = last(write)
    assert (out[:, 0] == 3).all()
    assert out[:, 1].isnan().all()
    assert (out[:, 2] == 0).all()


def test_a_column_of_a_table_is_known_whatever_row_is_read():
    table = nn.Embedding(5, 3).double()
    with torch.no_grad():
        table.weight[:, 1] = 2
    rec, known = claims(table, torch.tensor([1, 4, 0]))
    fact = known[rec.outputs[0]]
    assert fact.unknown.tolist() == [[True, False, True]] * 3
    assert (fact.value[:, 1] == 2).all()


@pytest.mark.parametrize(
    "op",
    [
        lambda m, x: torch.rand_like(x),
        lambda m, x: x.fill_diagonal_(1) if x.dim() == 2 else x.flatten(1).fill_diagonal_(1),
        lambda m, x: x[:, 1:2].sort(2).values + x[:, :1],
        lambda m, x: torch.empty_like(x),
        lambda m, x: x[:, 1] * float(x[0, 0, 0, 0]),
        lambda m, x: torch.zeros_like(x) + x.flatten().tolist()[0],
    ],
    ids=["random", "written by an op without a rule", "unknown beside", "empty", "item", "tolist"],
)
def test_nothing_is_claimed_of(op):
    assert last(op).isnan().all()


def test_ops_without_a_rule_are_run_on_what_is_known():
    assert last(lambda m, x: x[:, 1:3].sort(1).values)[0, :, 0, 0].tolist() == [0, KNOWN]
