"""RMSNorm over fewer channels with the statistics of the plainly masked model."""

import copy
import warnings

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import PlanError, PruningWarning
from graphprune.record.tensors import named_tensors


class Fused(nn.Module):
    def __init__(self, eps=1e-2):
        super().__init__()
        self.norm = nn.RMSNorm(8, eps=eps)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x):
        return self.norm(x)


class Spelled(nn.Module):
    def __init__(self, spelling):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.eps = 1e-2
        self.spelling = spelling

    def forward(self, x):
        return SPELLINGS[self.spelling](self, x)


SPELLINGS = {
    "rsqrt": lambda s, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + s.eps) * s.weight,
    "divided": lambda s, x: s.weight * (x / torch.sqrt(x.square().mean(-1, True) + s.eps)),
    "power": lambda s, x: s.weight * (x * ((x * x).mean(dim=-1, keepdim=True) + s.eps) ** -0.5),
    "cast": lambda s, x: (
        s.weight.float()
        * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True).add(s.eps))).to(x)
    ),
    "mean of absolutes": lambda s, x: x / (x.abs().mean(-1, keepdim=True) + s.eps) * s.weight,
}
OTHERS = {  # nothing absorbs the factor
    "one plus weight": lambda s, x: (
        x * torch.rsqrt(x.pow(2).mean(-1, True) + s.eps) * (1 + s.weight)
    ),
    "literal eps": lambda s, x: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-3) * s.weight,
    "mean subtracted": lambda s, x: (x - x.mean(-1, keepdim=True)) * s.weight,
    "weight used twice": lambda s, x: (
        x * torch.rsqrt(x.pow(2).mean(-1, True) + s.eps) * s.weight + s.weight
    ),
    "factor read twice": lambda s, x: (
        x * torch.rsqrt(x.pow(2).mean(-1, True) + s.eps) * s.weight
        + x.pow(2).mean(-1, True) * s.weight
    ),
}
SPELLINGS |= OTHERS


def net(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 3))


def zeroed(model, plan):
    """The model with zeroes in place of the channels that left, and nothing else."""
    with torch.no_grad():
        tensors = dict(named_tensors(model))
        for slot in plan.slots:
            gone = [index for index in range(slot.size) if index not in slot.kept]
            tensors[slot.tensor].index_fill_(slot.dim, torch.tensor(gone), 0)
    return model


EXACT = {
    "nn.RMSNorm": Fused,
    "nn.RMSNorm of the least eps": lambda: Fused(None),
    **{name: lambda name=name: Spelled(name) for name in SPELLINGS if name not in OTHERS},
}


@pytest.mark.parametrize("name", EXACT)
def test_rescaled_norms_equal_the_plainly_masked_model(name):
    model = net(EXACT[name]()).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    plan = graphprune.trace(model, x).plan(0.5, exact_only=True)
    assert plan.exact
    assert plan.removed == 4
    assert len(plan.scales) == 1
    small = graphprune.rebuild(model, plan)
    wanted = zeroed(copy.deepcopy(model), plan)(x)
    rough = name in ("cast", "nn.RMSNorm of the least eps")
    torch.testing.assert_close(
        small(x), wanted, rtol=1e-5 if rough else 1e-12, atol=1e-6 if rough else 1e-12
    )
    graphprune.verify(model, small, x, tolerance=1e-5 if rough else None)


@pytest.mark.parametrize("name", OTHERS)
def test_norms_that_absorb_nothing_stay_whole(name):
    model = net(Spelled(name))
    graph = graphprune.trace(model, torch.randn(5, 4))
    with pytest.warns(PruningWarning, match="left whole by exact_only"):
        plan = graph.plan(0.5, exact_only=True)
    assert plan.removed == 0
    assert not plan.scales
    small = graphprune.rebuild(model, graph.plan(0.5))
    assert not small.graphprune_plan.exact
    graphprune.verify(model, small, torch.randn(5, 4))


def test_a_norm_used_twice_is_rescaled_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 8), Fused(), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.norm(self.norm(x) + x))

    model, x = Twice(), torch.randn(5, 4)
    plan = graphprune.trace(model, x).plan(0.5, exact_only=True)
    assert len(plan.scales) == 1
    graphprune.verify(model, graphprune.rebuild(model, plan), x)


def test_rounding_of_the_rescaled_weight_is_not_a_difference():
    model, x = net(Fused()), torch.randn(5, 4)
    small = graphprune.rebuild(model, 0.3, x, exact_only=True)
    assert small[1].norm.weight.dtype == torch.float32
    graphprune.verify(model, small, x)
    small[1].norm.weight.data *= 1.001
    with pytest.raises(graphprune.errors.VerificationError):
        graphprune.verify(model, small, x)


def test_a_plan_with_rescaled_norms_survives_json_and_composition():
    model, x = net(Fused()), torch.randn(5, 4)
    first = graphprune.trace(model, x).plan(0.25, exact_only=True)
    assert graphprune.Plan.from_json(first.to_json()) == first
    small = graphprune.rebuild(model, first)
    smaller = graphprune.rebuild(small, 0.5, x, exact_only=True)
    assert smaller[1].norm.eps == pytest.approx(1e-2 * 8 / 3)
    graphprune.verify(model, smaller, x)


def test_a_renormalising_plan_then_an_exact_one_has_no_single_reference():
    model, x = net(Fused()), torch.randn(5, 4)
    small = graphprune.rebuild(model, 0.25, x)
    smaller = graphprune.rebuild(small, 0.5, x, exact_only=True)
    with pytest.raises(PlanError, match="one by one"):
        graphprune.mask(model, smaller.graphprune_plan)


def test_the_config_of_a_llama_follows_eps():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM(config).eval()
        ids = {"input_ids": torch.randint(0, 20, (2, 5))}
        small = graphprune.rebuild(model, 0.5, ids, exact_only=True)
        graphprune.verify(model, small, ids)
        rebuilt = type(small)(small.config)
    assert small.config.rms_norm_eps == pytest.approx(2e-6)
    rebuilt.load_state_dict(small.state_dict())
    torch.testing.assert_close(rebuilt.eval()(**ids).logits, small(**ids).logits)
