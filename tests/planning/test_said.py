"""Where less happens than was asked for, it is said, with what to do."""

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import InputError, PruningWarning
from graphprune.planning.hints import HINTS
from graphprune.planning.options import OPTIONS

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
        ("sparsity", r"pass the fraction .* as ratio, rebuild\(model, 0.5\)"),
        ("pruning_ratio", "pass the fraction of channels"),
        ("ch_sparsity", "pass the fraction of channels"),
        ("ignored_layers", r"keep takes modules, or glob patterns .* keep=\[model.head\]"),
        ("ignored_scope", "keep takes modules"),
        ("iterative_steps", "graphprune.training.iterate"),
        ("num_heads", 'attention="heads"'),
        ("dummy_input", "pass the inputs as example_inputs"),
        ("dataloader", "pass batches as data"),
        ("constraints", 'target={"macs": 0.5'),
        ("root_module_types", "found by tracing"),
        ("importance", "criterion says how channels are scored"),
        ("flops", 'target={"macs": 0.5}'),
    ],
)
def test_words_of_other_libraries(word, told):
    with pytest.raises(InputError, match=f"unknown option '{word}': .*{told}"):
        graphprune.rebuild(small_net(), example_inputs=X, **{word: 0.5})


PRUNERS = (  # what the constructors of Torch-Pruning 1.6 take besides a model
    "example_inputs importance global_pruning pruning_ratio pruning_ratio_dict max_pruning_ratio "
    "iterative_steps iterative_pruning_ratio_scheduler ignored_layers round_to isomorphic "
    "in_channel_groups out_channel_groups num_heads prune_num_heads prune_head_dims "
    "head_pruning_ratio head_pruning_ratio_dict customized_pruners unwrapped_parameters "
    "root_module_types forward_fn output_transform channel_groups ch_sparsity ch_sparsity_dict"
)


@pytest.mark.parametrize("word", PRUNERS.split())
def test_every_argument_of_a_pruner_is_taken_or_answered(word):
    assert word in HINTS or word in OPTIONS or word == "example_inputs"


def test_what_hints_name_is_there():
    import graphprune.training

    assert callable(graphprune.training.iterate)
    assert not set(HINTS) & set(OPTIONS)
    for options in ({"attention": "heads"}, {"attention": "head_dim"}, {"outputs": None}):
        graphprune.rebuild(small_net(), 0.5, X, **options)


def test_a_ratio_by_name():
    net = small_net()
    assert graphprune.rebuild(net, example_inputs=X, ratio=0.5)[0].out_features == 4
    assert graphprune.trace(net, X).plan(ratio=0.5).removed == 4
    plan = graphprune.trace(net, X).plan(0.5)
    for given, kind in ((0.5, "a ratio by place"), (plan, "a plan")):
        with pytest.raises(InputError, match=f"both {kind} and ratio=0.25 were given"):
            graphprune.rebuild(net, given, X, ratio=0.25)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.add_module("odd[0]", nn.Linear(8, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.relu(self.get_submodule("odd[0]")(self.body(x))))


@pytest.mark.parametrize(
    ("keep", "widths"),
    [
        (lambda net: net.body, (8, 8, 3)),
        (lambda net: [net.body[0]], (8, 4, 3)),
        (lambda net: [net.body[0], "odd*"], (8, 4, 6)),
        (lambda net: (net.get_submodule("odd[0]"),), (4, 4, 6)),
        (lambda net: {net.body[2]}, (4, 8, 3)),
    ],
)
def test_modules_that_keep_their_channels(keep, widths):
    net = Deep()
    small = graphprune.rebuild(net, 0.5, X, keep=keep(net))
    layers = small.body[0], small.body[2], small.get_submodule("odd[0]")
    assert tuple(layer.out_features for layer in layers) == widths
    assert graphprune.trace(net, X).plan(0.5, keep=keep(net)) == small.graphprune_plan
    said = small.graphprune_plan.request["keep"]
    assert graphprune.rebuild(net, 0.5, X, keep=said).graphprune_plan == small.graphprune_plan


def test_modules_as_keys_and_in_training():
    from graphprune.training import Pruner

    net = Deep()
    plan = graphprune.trace(net, X).plan(0.5, ratios={net.body: 0.25, net.body[0]: 0.5})
    assert [len(group.kept) for group in plan.groups] == [4, 6, 3]
    plan = graphprune.trace(net, X).plan(0.75, min_kept={"*": 0.25, net.body: 0.5})
    assert [len(group.kept) for group in plan.groups] == [4, 4, 2]
    pruner = Pruner(net, X, schedule=0.5, keep=[net.body[0]])
    assert pruner.options["keep"] == ["body.0"]


def test_a_module_of_another_model():
    with pytest.raises(InputError, match="keep holds a Linear that is no module of this model"):
        graphprune.rebuild(Deep(), 0.5, X, keep=[Deep().head])
    with pytest.raises(InputError, match="ratios holds a Linear that is no module"):
        graphprune.rebuild(Deep(), 0.5, X, ratios={Deep().head: 0.3})


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
