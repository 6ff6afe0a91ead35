"""An oracle without ``mask``: channels that are dead by hand leave, and nothing may change.

Writers and normalisations of the chosen channels are zeroed in the original itself, so that the
shrunk model must equal the untouched original.
"""

import pytest
import torch
import torchvision
from support.comparing import assert_close, untouched
from support.zoo import randomise
from torch import nn

import graphprune

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def kill(layer, channels):
    """Zero what a convolution, linear layer or BatchNorm writes into some channels."""
    with torch.no_grad():
        layer.weight[channels] = 0
        if layer.bias is not None:
            layer.bias[channels] = 0
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean[channels] = 0


def pick(size, seed):
    """About half of the channels, at irregular places."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return sorted(order[: size // 2].tolist())


def remove(model, dead):
    """A plan that removes exactly these channels of these layers' groups."""
    graph = graphprune.trace(model, X[:1].to(next(model.parameters()).dtype))
    kept = {}
    for layer, channels in dead.items():
        group = graph.group_of(layer)
        weights = next(m for m in group.members if m.slot.tensor == f"{layer}.weight")
        rows = {int(row[0]): number for number, row in enumerate(weights.index)}
        gone = {rows[channel] for channel in channels}
        kept[group.name] = [n for n in range(group.size) if n not in gone]
    return graphprune.rebuild(model, graph.plan_of(kept))


def compare(model, dead):
    """The shrunk model against the untouched original."""
    with torch.no_grad(), untouched(model):
        wanted = model(X)
        small = remove(model, dead)
        assert_close(wanted, small(X))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert after < before
    return small


def built(factory, **options):
    torch.manual_seed(0)
    return randomise(factory(weights=None, **options)).double().eval()


def resnet():
    """ResNet-18: the first stage's stream and one inner width."""
    model = built(torchvision.models.resnet18, num_classes=5)
    stream, inner = pick(64, 1), pick(128, 2)
    first, second = model.layer1
    for writer in (model.conv1, model.bn1, first.conv2, first.bn2, second.conv2, second.bn2):
        kill(writer, stream)
    for writer in (model.layer2[1].conv1, model.layer2[1].bn1):
        kill(writer, inner)
    return model, {"conv1": stream, "layer2.1.conv1": inner}


def densenet():
    """A small DenseNet: a layer's new channels, which all later BatchNorms read."""
    torch.manual_seed(0)
    model = torchvision.models.DenseNet(8, (3, 2), 16, bn_size=2, num_classes=5)
    model = randomise(model).double().eval()
    block = model.features.denseblock1
    grown, inner = pick(8, 1), pick(16, 2)
    kill(block.denselayer2.conv2, grown)
    start = 16 + 8  # the stem and the first layer come before
    for norm in (block.denselayer3.norm1, model.features.transition1.norm):
        kill(norm, [start + channel for channel in grown])
    for writer in (block.denselayer1.conv1, block.denselayer1.norm2):
        kill(writer, inner)
    return model, {
        "features.denseblock1.denselayer2.conv2": grown,
        "features.denseblock1.denselayer1.conv1": inner,
    }


def mobilenet():
    """MobileNet v2: an expansion with its depthwise convolution, and a residual stream."""
    model = built(torchvision.models.mobilenet_v2, num_classes=5)
    expanded, stream = pick(96, 1), pick(24, 2)
    block = model.features[2].conv
    for writer in (block[0][0], block[0][1], block[1][0], block[1][1]):
        kill(writer, expanded)
    for writer in (block[2], block[3], *model.features[3].conv[2:]):
        kill(writer, stream)
    return model, {"features.2.conv.0.0": expanded, "features.2.conv.2": stream}


@pytest.mark.parametrize("plant", [resnet, densenet, mobilenet])
def test_dead_channels_leave_without_a_trace(plant):
    model, dead = plant()
    small = compare(model, dead)
    for layer, channels in dead.items():
        before, after = (m.get_submodule(layer).weight.shape[0] for m in (model, small))
        assert after == before - len(channels)


@pytest.mark.parametrize("plant", [resnet, densenet, mobilenet])
def test_a_living_channel_is_missed(plant):
    model, dead = plant()
    for layer, channels in dead.items():
        size = model.get_submodule(layer).weight.shape[0]
        living = [channel for channel in range(size) if channel not in channels]
        with pytest.raises(AssertionError, match="relative difference"):
            compare(model, {**dead, layer: [*channels, *living[::2]]})


@pytest.mark.parametrize("plant", [resnet, densenet, mobilenet])
def test_magnitude_finds_the_dead(plant):
    """The usual criterion scores the planted channels zero, and removes them first."""
    model, dead = plant()
    graph = graphprune.trace(model, X[:1])
    for layer, channels in dead.items():
        others = [module for module in dead if module != layer]
        plan = graph.plan(len(channels) / model.get_submodule(layer).weight.shape[0], keep=others)
        kept = next(s.kept for s in plan.slots if (s.tensor, s.dim) == (f"{layer}.weight", 0))
        assert not set(kept) & set(channels)
