"""Where less happens than was asked for, it is said, with what to do."""

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import InputError, PruningWarning

X = torch.randn(1, 4)


def small_net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keep": "*"}, r"0 of 8 channels were removed where 50% .*\n.* by keep=\* \(name fewer"),
        ({"keep": ["0", "2"]}, r"left whole by keep=0, 2 .*: 0"),
        ({"round_to": 8}, r"no width that is a multiple of round_to=8 \(try a smaller one\): 0"),
        ({"round_to": 16}, "multiple of round_to=16"),
        ({"min_kept": 1.0}, "min_kept and max_kept leave no choice: 0"),
    ],
)
def test_nothing_removed(options, told):
    with pytest.warns(PruningWarning, match=r"(?s)" + told):
        small = graphprune.rebuild(small_net(), 0.5, X, **options)
    assert small[0].out_features == 8


def test_a_norm_that_would_be_a_constant():
    net = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2, eps=1e-12), nn.Linear(2, 3))
    with pytest.warns(PruningWarning, match="a norm over a single channel would be a constant: 0"):
        small = graphprune.rebuild(net, 0.5, X)
    assert small[1].normalized_shape == (2,)


@pytest.mark.parametrize("options", [{"keep": "stem"}, {"round_to": 4}, {}])
def test_nothing_is_said_where_all_went_as_asked(options):
    net = nn.Sequential()
    net.stem, net.inner, net.head = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 2)
    graphprune.rebuild(net, 0.5, X, **options)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("ratio", r"pass the ratio by place, rebuild\(model, 0.5\)"),
        ("sparsity", r"pass the ratio by place"),
        ("ignored_layers", "keep takes glob patterns"),
        ("importance", "criterion says how channels are scored"),
        ("flops", 'target={"macs": 0.5}'),
    ],
)
def test_words_of_other_libraries(word, told):
    with pytest.raises(InputError, match=f"unknown option '{word}': .*{told}"):
        graphprune.rebuild(small_net(), example_inputs=X, **{word: 0.5})


class Decoder(nn.Module):
    """It reads the first of its stages."""

    def __init__(self, stages):
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(4, 8) for _ in range(stages))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.stages[0](x).relu())


def test_parameters_that_no_op_reads():
    told = r"80 parameters \(58.0 %\) stay, .* does not read them .*: stages.1, stages.2; remove"
    with pytest.warns(PruningWarning, match=told):
        small = graphprune.rebuild(Decoder(3).eval(), 0.5, X)
    assert small.stages[0].out_features == 4
    assert small.stages[1].out_features == 8
    assert "80 parameters (58.0 %) stay" in str(small.graphprune_plan)
    assert not graphprune.trace(Decoder(1).eval(), X).plan(0.5).notes


def test_a_few_unread_parameters_stand_in_the_plan_only():
    net = Decoder(1).eval()
    net.unread = nn.Parameter(torch.zeros(3))
    small = graphprune.rebuild(net, 0.5, X)
    assert "3 parameters (4.9 %) stay" in small.graphprune_plan.notes[0]


def test_a_ratio_by_which_nothing_leaves_is_told():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    graph = graphprune.trace(model, torch.randn(2, 6))
    with pytest.warns(PruningWarning, match=r"0 of 8 .* 1% was asked for\n  too small to lose"):
        graph.plan(0.01)
    with pytest.warns(PruningWarning, match="left whole by ratios: 0"):
        graph.plan(0.5, ratios={"0": 0.0})
