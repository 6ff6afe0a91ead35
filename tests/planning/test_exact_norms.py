"""LayerNorm and GroupNorm that go on counting channels that left, as zeroes."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.norms import (
    BERT,
    Called,
    Helped,
    Images,
    Inherited,
    Permuted,
    Stream,
    ViT,
    rows,
)
from support.zeroing import drawn, zeroed
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import PlanError, PruningWarning
from graphprune.ops.exact_norms import layer_norm
from graphprune.plan.plan import NormChange
from graphprune.record.norms import ExactGroupNorm, ExactLayerNorm, counted
from graphprune.training import Pruner, iterate

TOKENS, MAPS = torch.randn(5, 4).double(), torch.randn(2, 3, 5, 6).double()
MODELS = {
    "LayerNorm": (lambda: rows(nn.LayerNorm(12)), TOKENS),
    "no bias": (lambda: rows(nn.LayerNorm(12, bias=False)), TOKENS),
    "no affine": (lambda: rows(nn.LayerNorm(12, elementwise_affine=False)), TOKENS),
    "three dimensions": (lambda: Images(nn.LayerNorm([12, 5, 6])), MAPS),
    "permuted": (lambda: Images(Permuted(12)), MAPS),
    "one group": (lambda: Images(nn.GroupNorm(1, 12)), MAPS),
    "one group, no affine": (lambda: Images(nn.GroupNorm(1, 12, affine=False)), MAPS),
    "two groups": (Stream, MAPS),
    "two groups, no affine": (lambda: Stream(affine=False), MAPS),
    "called in code": (lambda: Images(Called(12)), MAPS),
    "inherited": (lambda: Images(Inherited(12)), MAPS),
    "by a helper": (lambda: Images(Helped()), MAPS),
    "ViT": (ViT, torch.randn(2, 3, 8, 8).double()),
    "BERT": (BERT, torch.randint(0, 20, (2, 5))),
}


def shrunk(name):
    make, x = MODELS[name]
    model = drawn(make())
    return model, x, graphprune.rebuild(model, 0.5, x, exact_only=True)


def counting(model):
    return [m for m in model.modules() if isinstance(m, ExactLayerNorm | ExactGroupNorm)]


@pytest.mark.parametrize("name", MODELS)
def test_the_small_model_equals_the_model_with_zeroes(name):
    model, x, small = shrunk(name)
    plan = small.graphprune_plan
    assert plan.exact
    assert len(counting(small)) == len(plan.norms)
    assert plan.norms or [(change.path, change.new) for change in plan.literals] == [(("of",), 12)]
    whole = zeroed(model, plan)
    torch.testing.assert_close(small(x), whole(x), rtol=1e-10, atol=1e-12)
    assert graphprune.verify(model, small, x).difference <= 1e-10
    assert small.state_dict().keys() == model.state_dict().keys()


@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")  # where sides stay
@pytest.mark.parametrize("name", MODELS)
def test_a_second_round_counts_what_the_first_one_counted(name):
    model, x, small = shrunk(name)
    smaller = graphprune.rebuild(small, 0.5, x, exact_only=True)
    plan = smaller.graphprune_plan
    assert plan.removed > small.graphprune_plan.removed
    assert set(small.graphprune_plan.norms) <= set(plan.norms)
    assert plan.exact
    torch.testing.assert_close(smaller(x), zeroed(model, plan)(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(graphprune.rebuild(model, plan)(x), smaller(x))
    graphprune.verify(model, smaller, x)


@pytest.mark.parametrize("name", ["LayerNorm", "two groups"])
def test_gradients_are_those_of_the_model_with_zeroes(name):
    model, x, small = shrunk(name)
    whole = zeroed(model, small.graphprune_plan).train()
    small.train()(x).square().sum().backward()
    whole(x).square().sum().backward()
    kept = {slot.key: torch.tensor(slot.kept) for slot in small.graphprune_plan.slots}
    tensors = dict(whole.named_parameters())
    for parameter, tensor in small.named_parameters():
        grad = tensors[parameter].grad
        for dim in range(grad.dim()):
            index = kept.get((parameter, dim))
            grad = grad if index is None else grad.index_select(dim, index)
        torch.testing.assert_close(tensor.grad, grad)


def test_copies_files_and_changes_in_place(tmp_path):
    model, x, small = shrunk("two groups")
    wanted = small(x)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(x), wanted)
    graphprune.save(small, tmp_path / "small.safetensors")
    loaded = graphprune.load(tmp_path / "small.safetensors", copy.deepcopy(model))
    assert torch.equal(loaded(x), wanted)
    assert [m.of for m in counting(loaded)] == [6, 6]
    again = graphprune.Plan.from_json(small.graphprune_plan.to_json())
    assert again == small.graphprune_plan
    assert torch.equal(graphprune.rebuild(model, again, inplace=True)(x), wanted)
    assert "count what left as zeroes: first, last" in str(again)


def test_an_error_leaves_the_classes_as_they_were():
    model, _, small = shrunk("LayerNorm")
    plan = small.graphprune_plan
    with pytest.raises(PlanError):
        graphprune.rebuild(model, replace(plan, norms=(NormChange("1", 13),)), inplace=True)
    assert type(model[1]) is nn.LayerNorm


WRONG = {
    "more than it has": NormChange("1", 13),
    "fewer than are left": NormChange("1", 5),
    "none": NormChange("1", -1),
    "another layer": NormChange("0", 12),
    "no such module": NormChange("7", 12),
    "a container": NormChange("", 12),
}


@pytest.mark.parametrize("what", WRONG)
def test_plans_of_strangers_change_only_norms(what):
    model, _, small = shrunk("LayerNorm")
    plan = replace(small.graphprune_plan, norms=(WRONG[what],))
    with pytest.raises(PlanError, match="does not fit the model"):
        graphprune.rebuild(model, plan)


def test_a_norm_is_named_once_and_counted_by_no_other_attribute():
    model, x, small = shrunk("LayerNorm")
    plan = small.graphprune_plan
    with pytest.raises(PlanError, match="two norms for 1"):
        graphprune.rebuild(model, replace(plan, norms=plan.norms * 2))
    later = graphprune.trace(small, x).plan(0.5)
    size = graphprune.plan.plan.SizeChange("1", "of", (), 12, 8)
    with pytest.raises(PlanError, match="no size that a plan can change"):
        graphprune.rebuild(small, replace(later, sizes=(*later.sizes, size)))


def layer_norm_(x):
    return F.layer_norm(x, x.shape[-1:])


OTHERS = {  # calls of which no place in the source says that they are of torch's norm
    "by another name": lambda x: layer_norm_(x),
    "a function of torch itself": lambda x: torch.layer_norm(x, x.shape[-1:]),
    "a local name": lambda x, norm=F.layer_norm: norm(x, x.shape[-1:]),
}


class Own(nn.Module):
    """A norm that its code computes."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return OTHERS[self.name](x)


class Both(nn.Module):
    """One place in the code that serves norms over 12 and over 6 channels."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.read = nn.Linear(4, 12), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x):
        for layer in (self.wide, self.narrow):
            x = layer_norm_(layer(x))
        return self.read(x)


@pytest.mark.parametrize("name", OTHERS)
def test_calls_that_are_not_seen_to_be_of_a_norm_stay_whole(name):
    graph = graphprune.trace(rows(Own(name)), torch.randn(5, 4))
    with pytest.warns(PruningWarning, match="left whole by exact_only"):
        assert not graph.plan(0.5, exact_only=True).removed


def test_a_call_that_serves_several_widths_stays_whole():
    graph = graphprune.trace(Both(), torch.randn(5, 4))
    with pytest.warns(PruningWarning, match="left whole by exact_only"):
        assert not graph.plan(0.5, exact_only=True).removed


def test_only_modules_of_torch_are_replaced():
    own = nn.LayerNorm(12)
    assert counted(own) == 12
    own.forward = lambda x: x
    assert not counted(own)
    assert not counted(Called(12))


class Sneaky(nn.Module):
    """Its code calls a module of its own by the name of torch's function."""

    def __init__(self):
        super().__init__()
        self.layer_norm = nn.Linear(12, 12)

    def forward(self, x):
        return self.layer_norm(x) * F.softplus(x)


def test_plans_of_strangers_count_in_calls_of_norms_alone():
    model, x = drawn(Images(Called(12))), MAPS
    plan = graphprune.trace(model, x).plan(0.5, exact_only=True)
    (change,) = plan.literals
    for numbers in {"new": 13}, {"old": 10**9, "new": 10**9}, {"old": 0, "new": 0}:
        wrong = replace(change, **numbers)
        with pytest.raises(PlanError):
            graphprune.rebuild(model, replace(plan, literals=(wrong,)))
    model = rows(Sneaky())
    call = graphprune.record.sites.Site((), (1, 1, 15, 33))
    code = graphprune.record.sites.digest(Sneaky.forward.__code__)
    wrong = replace(change, module="1", site=call, digest=code)
    plan = graphprune.trace(model, TOKENS.float()).plan(0.5)
    with pytest.raises(PlanError, match="does not count 12 numbers"):
        graphprune.rebuild(model, replace(plan, literals=(wrong,)))


def test_a_renormalising_round_before_has_no_single_reference():
    model, x = drawn(rows(nn.LayerNorm(12))), TOKENS
    small = graphprune.rebuild(model, 0.25, x)
    smaller = graphprune.rebuild(small, 0.5, x, exact_only=True)
    assert smaller.graphprune_plan.norms == (NormChange("1", 9),)
    torch.testing.assert_close(graphprune.rebuild(model, smaller.graphprune_plan)(x), smaller(x))
    with pytest.raises(PlanError, match="one by one"):
        graphprune.mask(model, smaller.graphprune_plan)


def test_a_plain_round_behind_stays_exact_where_norms_count():
    model, x, small = shrunk("LayerNorm")
    smaller = graphprune.rebuild(small, 0.5, x)
    assert smaller.graphprune_plan.exact
    whole = zeroed(model, smaller.graphprune_plan)
    torch.testing.assert_close(smaller(x), whole(x), rtol=1e-10, atol=1e-12)


def test_rounds_of_iterate_go_on():
    model, x = drawn(rows(nn.LayerNorm(12))), TOKENS
    outcome = iterate(
        model, 2, None, lambda m: 0.0, sparsity=0.5, example_inputs=x, exact_only=True
    )
    assert outcome.model.graphprune_plan.removed == 6
    whole = zeroed(model, outcome.model.graphprune_plan)
    torch.testing.assert_close(outcome.model(x), whole(x), rtol=1e-10, atol=1e-12)


def test_a_pruner_finishes_with_norms_that_count():
    model, x = rows(nn.LayerNorm(12)), torch.randn(16, 4)
    optimizer = torch.optim.Adam(model.parameters())
    pruner = Pruner(model, x, optimizer, schedule=0.5, exact_only=True)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        pruner.step()
    before = copy.deepcopy(model)
    pruner.finish()
    assert counting(model) == [model[1]]
    torch.testing.assert_close(model(x), zeroed(before, pruner.plan)(x))
    model(x).square().mean().backward()
    optimizer.step()


def test_a_config_does_not_say_that_norms_count(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_labels=2, max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    ids = {"input_ids": torch.randint(0, 20, (2, 5))}
    with pytest.warns(PruningWarning, match="norms of a model built from it do not count"):
        small = graphprune.rebuild(model, 0.5, ids, exact_only=True)
    small.save_pretrained(tmp_path)  # with the plan
    loaded = graphprune.from_pretrained(tmp_path)
    assert type(loaded.bert.embeddings.LayerNorm).__name__ == "ExactLayerNorm"
    assert torch.equal(loaded(**ids).logits, small(**ids).logits)
    torch.testing.assert_close(
        small(**ids).logits, zeroed(model, small.graphprune_plan)(**ids).logits
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_statistics_of_narrow_numbers_are_taken_wide(dtype):
    x = (torch.randn(3, 7) * 300 + 500).to(dtype)  # squares that half precision cannot hold
    whole = F.layer_norm(F.pad(x.double(), (0, 1)), (8,))[:, :7]
    found = layer_norm(x, (7,), of=8)
    assert found.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), whole, rtol=tolerance, atol=tolerance)


def test_norms_of_vectors_count_zeroes_by_themselves():
    class Unit(nn.Module):
        def forward(self, x):
            return F.normalize(x, dim=-1)

    model = drawn(rows(Unit()))
    small = graphprune.rebuild(model, 0.5, TOKENS, exact_only=True)
    whole = zeroed(model, small.graphprune_plan)
    assert small.graphprune_plan.removed == 6
    torch.testing.assert_close(small(TOKENS), whole(TOKENS), rtol=1e-10, atol=1e-12)


class Method(nn.Module):
    def forward(self, x):
        return x.softmax(-1)


class Function(nn.Module):
    def forward(self, x):
        return F.log_softmax(x, dim=1)


class Named(nn.Module):
    def forward(self, x):
        return x * torch.softmax(input=x, dim=-1)


class Mean(nn.Module):
    def forward(self, x):
        return x - F.gelu(x).pow(2).mean(-1, keepdim=True)


class MeanFunction(nn.Module):
    def forward(self, x):
        return x * torch.mean(x, 1, True)


class Offset(nn.Module):
    """A root mean square norm of which no weight absorbs a factor, as Gemma has it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(12))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


SHARES = [Method, Function, Named, Mean, MeanFunction, Offset,
          lambda: nn.Softmax(-1), lambda: nn.LogSoftmax(dim=1)]  # fmt: skip


@pytest.mark.parametrize("make", SHARES)
def test_softmax_and_mean_count_what_left(make):
    model = drawn(nn.Sequential(nn.Linear(4, 12), make(), nn.Linear(12, 3)))
    small = graphprune.rebuild(model, 0.5, TOKENS, exact_only=True)
    smaller = graphprune.rebuild(small, 0.5, TOKENS, exact_only=True)
    for one, removed in (small, 6), (smaller, 9):
        plan = one.graphprune_plan
        assert plan.removed == removed
        assert plan.exact
        whole = zeroed(model, plan)
        torch.testing.assert_close(one(TOKENS), whole(TOKENS), rtol=1e-10, atol=1e-12)
        assert graphprune.verify(model, one, TOKENS).difference <= 1e-10
        assert torch.equal(pickle.loads(pickle.dumps(one))(TOKENS), one(TOKENS))
        assert torch.equal(graphprune.rebuild(model, plan)(TOKENS), one(TOKENS))


def test_a_mean_of_embedded_words_counts_what_left():
    model = drawn(nn.Sequential(nn.Embedding(20, 12), Offset(), nn.Linear(12, 3)))
    ids = torch.randint(0, 20, (2, 5))
    small = graphprune.rebuild(model, 0.5, ids, exact_only=True)
    assert small.graphprune_plan.removed == 6
    whole = zeroed(model, small.graphprune_plan)
    torch.testing.assert_close(small(ids), whole(ids), rtol=1e-10, atol=1e-12)


def spelled(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


STATISTICS = {
    "a norm spelled out": spelled,
    "variance": lambda x: x / x.var(-1, keepdim=True).sqrt(),
    "maximum": lambda x: x - x.amax(-1, keepdim=True),
    "a mean of what is not zero": lambda x: x - x.exp().mean(-1, keepdim=True),
    "of another type": lambda x: x.softmax(-1, dtype=torch.float64),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_other_statistics_stay_whole_and_it_is_said(name):
    class Op(nn.Module):
        def forward(self, x):
            return STATISTICS[name](x)

    graph = graphprune.trace(drawn(rows(Op())), TOKENS)
    with pytest.warns(PruningWarning, match="left whole by exact_only"):
        assert not graph.plan(0.5, exact_only=True).removed


class Drawn(nn.Module):
    """A residual stream of images that drawn norms, convolutions and activations follow."""

    def __init__(self, width, steps):
        super().__init__()
        self.make, self.read = nn.Conv2d(3, width, 1), nn.Linear(width, 2)
        self.steps = nn.ModuleList()
        for kind, parts, adds in steps:
            groups = max(n for n in range(1, parts + 1) if width % n == 0)
            norm = {"layer": Permuted, "group": lambda w, g=groups: nn.GroupNorm(g, w),
                    "wide": lambda w: nn.LayerNorm([w, 3, 3])}[kind](width)  # fmt: skip
            step = nn.Sequential(norm, nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            step.adds = adds
            self.steps.append(step)

    def forward(self, x):
        x = self.make(x)
        for step in self.steps:
            x = x + step(x) if step.adds else step(x)
        return self.read(x.mean((2, 3)))


STEP = st.tuples(st.sampled_from(["layer", "group", "wide"]), st.integers(1, 4), st.booleans())


@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
@given(st.integers(4, 9), st.lists(STEP, min_size=1, max_size=3), st.sampled_from([0.3, 0.6]))
@settings(max_examples=12, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
def test_drawn_networks_equal_those_with_zeroes(width, steps, ratio):
    model, x = drawn(Drawn(width, steps)), torch.linspace(-1, 1, 54).double().reshape(2, 3, 3, 3)
    graph = graphprune.trace(model, x)
    plan = graph.plan(ratio, exact_only=True)
    small = graphprune.rebuild(model, plan)
    later = graphprune.rebuild(small, ratio, x, exact_only=True)
    for one in (small, later):
        whole = zeroed(model, one.graphprune_plan)
        torch.testing.assert_close(one(x), whole(x), rtol=1e-9, atol=1e-10)


def test_a_width_that_is_written_out_changes_in_every_round():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(F.layer_norm(self.first(x), (8,)))

    model, x = Written().double(), torch.randn(3, 4, dtype=torch.float64)
    small = graphprune.rebuild(model, 0.5, x, exact_only=True)
    smaller = graphprune.rebuild(small, 0.5, x, exact_only=True)
    assert (small.last.in_features, smaller.last.in_features) == (4, 2)
    assert graphprune.verify(model, smaller, x).difference <= 1e-10
