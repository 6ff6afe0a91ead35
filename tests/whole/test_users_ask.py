"""What users of other engines asked for: one test per row of their list that is possible now.

The number in a test's name is the row.
"""

import re
import time
import warnings

import pytest
import torch
import torchvision
from support.comparing import call, shapes, untouched
from support.zoo import ZOO, randomise
from support.zoo.branches import Block, CifarResNet
from support.zoo.registry import conv, sandwich
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import graphprune
from graphprune.errors import GraphPruneError, InputError, ModelError, PruningWarning
from graphprune.training import Pruner

X = torch.zeros(2, 3, 8, 8)


def resnet(seed=0):
    torch.manual_seed(seed)
    down = nn.Sequential(conv(8, 16, 1, stride=2), nn.BatchNorm2d(16))
    return randomise(CifarResNet(Block(8, 16, 2, down)), seed).eval()


def verified(name, ratio=0.5):
    entry = ZOO[name]
    model, inputs = entry.build(), entry.inputs()
    with untouched(model):
        small = graphprune.rebuild(model, ratio, inputs)
        graphprune.verify(model, small, inputs)
    return model, small


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    ["c2f_with_reuse", "overlapping_slices", "split_into_literal_sizes", "layer_called_twice"],
)
def test_row_1_chunk_split_slices_and_reuse(name):
    model, small = verified(name)
    assert parameters(small) < 0.6 * parameters(model)


def test_row_2_save_and_load_without_pickle(tmp_path):
    small = graphprune.rebuild(resnet(), 0.5, X)
    graphprune.save(small, tmp_path / "small.safetensors")
    loaded = graphprune.load(tmp_path / "small.safetensors", resnet).eval()
    assert type(loaded) is CifarResNet
    assert list(loaded.state_dict()) == list(resnet().state_dict())
    assert torch.equal(call(loaded, X), call(small, X))


def test_row_3_latency_is_a_budget_and_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("graphprune.planning.deadline._MEASURED", 0.1)
    monkeypatch.setattr("graphprune.planning.latency._SECONDS", 0.01)
    plan = graphprune.trace(resnet(), X).plan(target={"latency": "1 s"}, threads=1)
    assert plan.request["latency"]["measured"] <= 1000
    assert re.search(r"latency on .*: .* ms -> .* ms \(.* %\) measured, .* ms predicted", str(plan))


def test_row_4_rounding_is_part_of_selection():
    plan = graphprune.trace(resnet(), X).plan(round_to=4, target={"macs": 0.6})
    assert all(len(group.kept) % 4 == 0 for group in plan.groups)
    assert plan.after.macs <= 0.6 * plan.before.macs


def test_row_5_remembered_sizes_are_patched():
    _, small = verified("MultiHead")
    assert small.heads == 2
    assert small.width == 3
    assert small.q.out_features == 6


@pytest.mark.parametrize(
    "name", ["LeNetComputedView", "LeNetLiteralView", "LeNetNumFlatFeatures", "LeNetAttributeView",
             "vgg_flattened_map", "folded_windows"])  # fmt: skip
def test_row_6_reshape_view_flatten(name):
    model, small = verified(name)
    assert parameters(small) < 0.6 * parameters(model)


@pytest.mark.parametrize(
    "name", ["channel_shuffle_by_view", "channel_shuffle_layer", "pixel_shuffle", "pixel_unshuffle"]
)
def test_row_7_shuffles(name):
    verified(name)


@pytest.mark.parametrize("groups", [2, 3, 4, 6])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_row_8_grouped_convolutions_stay_divisible(groups, ratio):
    model = randomise(sandwich(conv(24, 48, groups=groups), 24, 48)).eval()
    small = graphprune.rebuild(model, ratio, X)
    layer = small.thing
    assert layer.in_channels % layer.groups == layer.out_channels % layer.groups == 0
    assert layer.in_channels < 24
    graphprune.verify(model, small, X)


def test_row_9_every_norm_follows():
    for name in ("instance_norm_affine_tracking", "group_norm_columns", "group_norm_whole_groups",
                 "layer_norm_channels_last", "batch_norm_of_cumulative_average"):  # fmt: skip
        verified(name)
    small = graphprune.rebuild(resnet(), 0.5, X)
    for module in small.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean.shape == module.weight.shape == (module.num_features,)


def test_row_12_bare_parameters():
    _, small = verified("bare_scale_offset_and_buffers")
    assert small.thing.scale.shape == (4, 1, 1)
    assert small.thing.offset.shape == (1, 4, 1, 1)
    assert small.thing.gain.shape == small.thing.shift.shape == (4,)


def test_row_13_densenet_in_seconds():
    model = torchvision.models.densenet121(weights=None)
    start = time.process_time()
    graph = graphprune.trace(model, torch.zeros(1, 3, 64, 64))
    assert time.process_time() - start < 10  # the peer needs minutes on larger ones
    assert len(graph.groups) > 100


def test_row_14_nothing_happened_and_it_is_said():
    entry = ZOO["rolled_channels"]
    with pytest.warns(PruningWarning, match=r"roll over channels in thing"):
        graphprune.rebuild(entry.build(), 0.5, entry.inputs())
    with pytest.raises(InputError, match="no channel of this model can be removed"):
        graphprune.rebuild(nn.Sequential(nn.Linear(4, 2)), 0.5, torch.zeros(1, 4))
    with pytest.warns(PruningWarning, match="too small to lose a channel"):
        graphprune.rebuild(resnet(), 0.06, X)


def test_row_15_masked_and_pruned_accuracy_agree():
    """After biases, norms with offsets and sigmoids: every prediction is the same."""
    model = resnet().double()
    images = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    small = graphprune.rebuild(model, 0.5, images[:1])
    masked = graphprune.mask(model, small.graphprune_plan)
    assert torch.equal(call(small, images).argmax(1), call(masked, images).argmax(1))
    for name in ("squeeze_excitation", "sum_over_channels_after_sigmoid", "activations"):
        verified(name)


def test_row_16_accuracy_comes_back_without_training():
    """Channels by the error that they leave, and the others refitted: far nearer than norms."""
    model, x = resnet().double(), torch.randn(64, 3, 8, 8, dtype=torch.float64)
    wanted, errors = call(model, x), []
    for options in ({}, {"criterion": "reconstruction", "data": [x]}):
        small = graphprune.rebuild(model, 0.3, x[:1], **options)
        errors.append(float((call(small, x) - wanted).square().mean()))
        graphprune.calibrate(small, model, [x])
        errors.append(float((call(small, x) - wanted).square().mean()))
    assert errors[1] < 0.5 * errors[0]
    assert errors[3] < min(errors[:3])


def test_row_17_the_same_seed_gives_the_same_model():
    for criterion in ("l2", "random"):
        plans = [
            graphprune.rebuild(resnet(), 0.5, X, criterion=criterion, seed=4).graphprune_plan
            for _ in range(2)
        ]
        assert plans[0] == plans[1]
    other = graphprune.rebuild(resnet(), 0.5, X, criterion="random", seed=5).graphprune_plan
    assert other != plans[1]


def test_row_18_the_ratio_is_what_it_says():
    """Half of the channels of every group, and the plan tells parameters and MACs."""
    model = resnet()
    plan = graphprune.trace(model, X).plan(0.5)
    assert all(len(group.kept) == group.size - group.size // 2 for group in plan.groups)
    small = graphprune.rebuild(model, plan)
    assert plan.before.params == parameters(model)
    assert plan.after.params == parameters(small)
    assert plan.after.macs == graphprune.measure(small, X).macs
    assert f"{plan.after.params:,}" in str(plan)


def test_row_19_optimizer_and_average_go_on_with_the_new_parameters():
    model = resnet().train()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    average = AveragedModel(model)
    rate = torch.optim.lr_scheduler.StepLR(sgd, 1)
    pruner = Pruner(model, X, sgd, schedule=0.5, copies=average)
    for _ in range(3):
        sgd.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        sgd.step()
        rate.step()
        pruner.step()
        average.update_parameters(model)
        pruner.finish()
    owned = {id(p) for p in model.parameters()}
    assert {id(p) for group in sgd.param_groups for p in group["params"]} == owned
    assert all(sgd.state[p]["momentum_buffer"].shape == p.shape for p in model.parameters())
    widths = [[p.shape for p in m.parameters()] for m in (average.module, model, resnet())]
    assert widths[0] == widths[1] != widths[2]


def test_row_20_wrappers_are_named():
    with pytest.raises(ModelError, match=r"DataParallel.*\.module"):
        graphprune.rebuild(nn.DataParallel(resnet()), 0.5, X)


def test_row_21_the_small_model_exports():
    small = graphprune.rebuild(resnet(), 0.5, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(small, (X,))
    found = program.module()(X)
    assert torch.allclose(found, call(small, X), atol=1e-5)


def test_row_23_standard_modules_only():
    model = resnet()
    small = graphprune.rebuild(model, 0.5, X)
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    assert all(type(p) is nn.Parameter for p in small.parameters())
    assert set(vars(small)) - set(vars(model)) == {"graphprune_plan"}


class OwnConv(nn.Module):
    """A layer of one's own: no torch layer inside, sizes under odd names."""

    def __init__(self, into, out):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(into, 3, 3, out) / 5)
        self.n_in, self.n_out = into, out

    def forward(self, x):
        assert x.size(1) == self.n_in, f"expected {self.n_in} channels"
        b, _, h, w = x.shape
        y = F.conv2d(x, self.kernel.permute(3, 0, 1, 2), padding=1)
        return y.reshape(b, self.n_out, h * w).view(b, self.n_out, h, w)


def test_row_24_custom_layers_need_no_registration():
    model = randomise(sandwich(OwnConv(8, 6), 8, 6)).eval()
    small = graphprune.rebuild(model, 0.5, X)
    assert (small.thing.n_in, small.thing.n_out) == (4, 3)
    assert small.thing.kernel.shape == (4, 3, 3, 3)
    graphprune.verify(model, small, X)


@pytest.mark.parametrize("name", ["TupleOutput", "NestedDictOutput", "KeywordArguments",
                                  "NestedInputs", "ImageAndTable", "FPN"])  # fmt: skip
def test_row_25_tuples_dicts_and_keywords(name):
    model, small = verified(name)
    inputs = ZOO[name].inputs()
    assert shapes(call(small, inputs)) == shapes(call(model, inputs))


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.999])
def test_row_26_classifier_is_never_cut(ratio, scope):
    """No class disappears, and no layer is emptied."""
    small = graphprune.rebuild(resnet(), ratio, X, scope=scope)
    assert small.linear.out_features == 4
    assert call(small, X).shape == (2, 4)
    assert all(p.numel() for p in small.parameters())


def test_row_27_frozen_layers_do_not_vanish():
    model, small = verified("frozen_backbone")
    assert small[0].out_channels == 4
    assert [p.requires_grad for p in small.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert [group.size for group in graphprune.trace(model, X).groups] == [8, 6]


@pytest.mark.parametrize("training", [True, False])
def test_row_28_the_model_is_left_as_it_was(training):
    model = resnet().train(training)
    model.layer1.bn2.train(not training)
    with untouched(model):
        graphprune.rebuild(model, 0.5, X)
    mistakes = [
        lambda: graphprune.rebuild(model, 2.0, X),
        lambda: graphprune.rebuild(model, 0.5, torch.zeros(2, 5, 8, 8)),
        lambda: graphprune.rebuild(model, 0.5, X, keep=["nothing"]),
        lambda: graphprune.rebuild(model, 0.5, X, criterion="magic"),
        lambda: graphprune.rebuild(model, graphprune.trace(ZOO["UNet"].build(), X).plan(0.5)),
        lambda: graphprune.verify(model, model, X),
    ]
    for mistake in mistakes:
        with untouched(model), pytest.raises(GraphPruneError):
            mistake()
