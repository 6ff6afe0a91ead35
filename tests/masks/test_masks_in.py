"""Masks in: what is dead leaves, and the small model equals the masked one."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from support.comparing import assert_close, call
from support.masking import DOUBLE, kill, randomise, shrunk
from support.strategies import Spec, specs, zeroed
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils import _pytree as pytree
from torchvision.models.resnet import BasicBlock, ResNet

import graphprune
from graphprune import Plan
from graphprune.errors import InputError, PlanError, VerificationError


class LeNet(nn.Module):
    """The network of PyTorch's pruning tutorial."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, int(x.nelement() / x.shape[0]))
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))

    @property
    def hidden(self):
        return self.conv1, self.conv2, self.fc1, self.fc2


def lenet():
    torch.manual_seed(0)
    return LeNet().double().eval(), torch.randn(3, 1, 32, 32, dtype=DOUBLE)


class Custom(prune.BasePruningMethod):
    """Masks every third filter."""

    PRUNING_TYPE = "structured"

    def compute_mask(self, t, default_mask):
        mask = default_mask.clone()
        mask[::3] = 0
        return mask


SPELLINGS = {
    "ln_structured": lambda m: prune.ln_structured(m, "weight", 0.5, n=2, dim=0),
    "random_structured": lambda m: prune.random_structured(m, "weight", 0.5, dim=0),
    "columns": lambda m: prune.ln_structured(m, "weight", 0.5, n=1, dim=1)
    if m.weight.shape[1] > 1 else None,
    "custom": lambda m: Custom.apply(m, "weight"),
    "from_mask": lambda m: prune.custom_from_mask(m, "weight", torch.arange(len(m.weight)).reshape(
        -1, *[1] * (m.weight.dim() - 1)).expand(m.weight.shape) % 2),
    "twice": lambda m: (prune.ln_structured(m, "weight", 0.4, n=2, dim=0),
                        prune.random_unstructured(m, "weight", 0.3)),
    "zeroed": lambda m: kill(m, *range(1, len(m.weight), 2)),
}  # fmt: skip


@pytest.mark.parametrize("removed", [False, True], ids=["hooks", "removed"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_lenet_in_every_spelling(spelling, removed):
    model, x = lenet()
    for layer in model.hidden:
        SPELLINGS[spelling](layer)
    for layer in model.hidden if removed and spelling != "zeroed" else ():
        if prune.is_pruned(layer):
            prune.remove(layer, "weight")
    plan, small = shrunk(model, x)
    share = plan.after.params / plan.before.params
    assert share < (0.65 if spelling == "columns" else 0.5), share
    assert list(small.state_dict()) == list(model.state_dict())
    assert graphprune.verify(model, small, x).difference < 1e-10


def test_the_tutorial_leaves_exactly_the_kept_filters():
    model, x = lenet()
    for layer, part in zip(model.hidden, (0.5, 0.25, 0.5, 0.25), strict=True):
        prune.ln_structured(layer, "weight", part, n=2, dim=0)
    plan, small = shrunk(model, x)
    widths = [small.conv1.out_channels, small.conv2.out_channels, small.fc1.out_features]
    assert [*widths, small.fc2.out_features] == [3, 12, 60, 63]
    assert small.fc1.in_features == 12 * 25
    assert plan.notes == ()
    assert {change.tensor for change in plan.biases} <= {
        "conv2.bias",
        "fc1.bias",
        "fc2.bias",
        "fc3.bias",
    }
    ones = [layer.weight_mask.bool().all() for layer in small.hidden]
    assert all(ones), "the masks that are left hide nothing"


def test_masks_that_remain_are_carried_over():
    model, x = lenet()
    parameters = [(layer, "weight") for layer in model.hidden] + [(model.fc1, "bias")]
    prune.global_unstructured(parameters, prune.L1Unstructured, amount=0.9)
    with torch.no_grad():
        model.conv2.weight_orig[::2] = 0
    _, small = shrunk(model, x)
    assert small.conv2.out_channels < 16
    for name in ("conv1", "conv2", "fc1", "fc2"):
        layer = getattr(small, name)
        assert prune.is_pruned(layer)
        assert layer.weight_mask.shape == layer.weight_orig.shape == layer.weight.shape
        assert 0 < float(layer.weight_mask.mean()) < 1
    assert small.conv2.in_channels == small.conv2.weight_orig.shape[1]
    before = small(x)
    small.conv1(torch.zeros(1, 1, 32, 32, dtype=DOUBLE)).sum().backward()
    assert (small.conv1.weight_orig.grad[small.conv1.weight_mask == 0] == 0).all()
    for name in ("conv1", "conv2", "fc1", "fc2"):
        prune.remove(getattr(small, name), "weight")
    assert_close(before.detach(), small(x).detach())


def test_a_masked_bias_takes_a_constant():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3)).double()
    prune.custom_from_mask(model[2], "bias", torch.tensor([0.0, 1, 0]))
    kill(model[0], 1, 5)
    plan, small = shrunk(model, torch.randn(5, 4, dtype=DOUBLE))
    assert plan.removed == 2
    assert small[2].bias_mask.tolist() == [1, 1, 1]


def test_resnets_by_the_loop_that_people_write():
    """Zeroed filters before norms with shifts: streams, downsampling, borders of padding."""
    torch.manual_seed(0)
    model = randomise(ResNet(BasicBlock, [2, 1, 1, 1], num_classes=10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            order = module.weight.detach().abs().sum((1, 2, 3)).argsort()
            for index in order[: len(order) // 2].tolist():
                kill(module, index)
    x = torch.randn(2, 3, 32, 32, dtype=DOUBLE)
    plan, small = shrunk(model, x)
    widths = [block.conv1.out_channels for block in (*small.layer1, *small.layer4)]
    assert widths == [33, 33, 257], "one stands for the constants at the borders"
    assert small.fc.in_features < 512
    other = torch.randn(1, 3, 48, 48, dtype=DOUBLE)
    assert_close(call(model, other), call(small, other))
    assert any("layer1.0.conv1" in note and "borders" in note for note in plan.notes)
    assert any("not constant" in note for note in plan.notes), "streams that others write"
    rough, smaller = shrunk(model, x, exact=False, fold="approximate")
    assert smaller.layer1[0].conv1.out_channels == 32
    assert any("not exact" in note for note in rough.notes)
    assert not torch.allclose(call(model, x), call(smaller, x))
    plain, larger = shrunk(model, x, fold="none")
    assert not plain.biases
    assert not plain.merges
    assert larger.layer1[0].conv1.out_channels > 33


def padded():
    """Constant channels in front of two padded convolutions without biases."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.GELU(), nn.Conv2d(6, 5, 3, 2, bias=False),
        nn.Flatten(), nn.Linear(5 * 25, 4),
    )  # fmt: skip
    randomise(model)
    with torch.no_grad():
        model[1].bias.fill_(3)
        model[1].running_mean.zero_()
    kill(model[0], 0, 2, 3)
    kill(model[3], 1, 4)
    return model, torch.randn(2, 3, 12, 12, dtype=DOUBLE)


def test_borders_are_exact():
    model, x = padded()
    plan, small = shrunk(model, x)
    assert small[0].out_channels == 6, "three constants are one channel"
    assert [change.tensor for change in plan.merges] == ["3.weight"]
    assert small[5].in_channels == 4, "GELU(0) is zero"
    assert graphprune.verify(model, small, x).difference < 1e-10


def test_merging_into_masked_weights():
    model, x = padded()
    prune.random_unstructured(model[3], "weight", 0.5)
    plan, small = shrunk(model, x)
    assert plan.merges[0].mask == "3.weight_mask"
    assert graphprune.verify(model, small, x).difference < 1e-10
    assert prune.is_pruned(small[3])


@pytest.mark.parametrize("inplace", [False, True])
def test_float32_is_as_exact_as_it_can_be(inplace):
    model, x = padded()
    model, x = model.float(), x.float()
    plan, small = shrunk(model, x, exact=False)
    assert_close(call(model, x), call(small, x), 1e-5)
    assert graphprune.verify(model, small, x).difference < 1e-10
    original = copy.deepcopy(model)
    again = graphprune.rebuild(model, plan, inplace=inplace)
    assert (again is model) == inplace
    assert_close(call(original, x), call(again, x), 1e-5)


def test_a_layer_without_a_bias_gets_one():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3, bias=False)).double()
    x = torch.randn(5, 4, dtype=DOUBLE)
    kill(model[0], 2, 3, 4)
    plan, small = shrunk(model, x)
    assert plan.biases[0].like == ("2.weight", 0)
    assert small[2].bias.shape == (3,)
    assert graphprune.verify(model, small, x).difference < 1e-10
    half = graphprune.rebuild(small, 0.5, x)
    both = half.graphprune_plan
    assert_close(call(half, x), call(graphprune.rebuild(model, both), x))
    assert graphprune.verify(model, half, x).difference < 1e-10


def test_constants_of_a_pruned_model_compose(tmp_path):
    model, x = padded()
    first = graphprune.rebuild(
        model, graphprune.trace(model, x).plan_of({"g0": [0, 1, 2, 4, 5, 6]})
    )
    kill(first[3], 2)
    second = graphprune.rebuild(first, Plan.from_masks(first, x))
    assert_close(call(first, x), call(second, x))
    masked = copy.deepcopy(model)
    kill(masked[3], 2)
    assert_close(call(second, x), call(graphprune.rebuild(masked, second.graphprune_plan), x))
    path = graphprune.save(second, tmp_path / "small.safetensors")
    assert_close(call(second, x), call(graphprune.load(path, model), x))


def test_a_plan_belongs_to_the_weights_it_was_made_from():
    model, x = padded()
    plan = Plan.from_masks(model, x)
    other = copy.deepcopy(model)
    for module in other:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with pytest.raises(PlanError, match="from the masks of a model with other weights: make a new"):
        graphprune.rebuild(other, plan)
    graphprune.rebuild(model.float(), plan)


def test_verify_notices_a_wrong_constant():
    model, x = padded()
    plan = Plan.from_masks(model, x)
    (merge,) = plan.merges
    factors = (merge.factors[0] * 1.01, *merge.factors[1:])
    wrong = dataclasses.replace(plan, merges=(dataclasses.replace(merge, factors=factors),))
    with pytest.raises(VerificationError, match="the model as given"):
        graphprune.verify(model, wrong, x)
    linear = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3)).double()
    kill(linear[0], 1)
    x = torch.randn(5, 4, dtype=DOUBLE)
    plan = Plan.from_masks(linear, x)
    (change,) = plan.biases
    off = dataclasses.replace(change, values=(*change.values[:-1], change.values[-1] + 1e-6))
    with pytest.raises(VerificationError, match="the model as given"):
        graphprune.verify(linear, dataclasses.replace(plan, biases=(off,)), x)


def test_nothing_dead():
    model, x = lenet()
    plan, _ = shrunk(model, x)
    assert (plan.removed, plan.biases, plan.weights) == (0, (), None)
    assert len(plan.notes) == 1
    assert "no channel of this model is dead" in plan.notes[0]
    assert plan.before == plan.after


@pytest.mark.parametrize("which", ["weight", "both"])
def test_a_dead_layer_keeps_one_channel(which):
    model, x = lenet()
    with torch.no_grad():
        model.fc2.weight.zero_()
        if which == "both":
            model.fc2.bias.zero_()
    plan, small = shrunk(model, x)
    assert small.fc2.out_features == small.fc1.out_features == 1
    assert any("fc2: 1 constant channel stays: a layer keeps at least one" in n for n in plan.notes)


PROJECTED = Spec(  # with one unit left, it would be as wide as its projection
    (("Conv", (3, 1, 1, 1, "batch", "relu")), ("Projected", (1, 3, 2))), ((2, False),), 0
)


@example(PROJECTED, False, "exact")
@given(specs(), st.booleans(), st.sampled_from(["exact", "exact", "none"]))
@settings(max_examples=12)
def test_random_networks_equal_themselves_masked(spec, rows, fold):
    equals_masked(spec, rows, fold)


@pytest.mark.slow
@given(specs(), st.booleans(), st.sampled_from(["exact", "exact", "none"]))
@settings(max_examples=600)
def test_random_networks_equal_themselves_masked_at_length(spec, rows, fold):
    equals_masked(spec, rows, fold)


def equals_masked(spec, rows, fold):
    model, x = zeroed(spec.build(), spec.seed, rows), spec.inputs()
    plan = Plan.from_masks(model, x, fold=fold)
    small = graphprune.rebuild(model, plan)
    event(f"removed {plan.removed > 0}, constants {bool(plan.biases)}, {bool(plan.merges)}")
    other = torch.randn(3, *x.shape[1:], dtype=DOUBLE)
    for inputs in (x, other):
        for left, right in zip(*(pytree.tree_leaves(call(m, inputs)) for m in (model, small))):
            assert (left - right).abs().max() <= 1e-10 * left.abs().max().clamp_min(1e-3)


def test_bad_inputs():
    model, x = lenet()
    for options, text in (
        ({"fold": "maybe"}, "fold must be one of exact, approximate, none, not 'maybe'"),
        ({"masks": {"conv9": [True]}}, "no layer 'conv9' with a weight; layers: conv1, conv2, fc1"),
        (
            {"masks": {"conv1": [True]}},
            r"mask of 'conv1' has shape \[1\]; expected \[6\], one entry",
        ),
        ({"masks": {"conv1": torch.rand(6)}}, "'conv1' holds other values than true and false"),
        ({"masks": {"conv1": "yes"}}, "the mask of 'conv1' is no vector"),
        ({"attention": "none"}, "attention must be one of heads, queries, head_dim"),
    ):
        with pytest.raises(InputError, match=text):
            Plan.from_masks(model, x, **options)
