"""Layers that must keep their channels: patterns, and what else they hold in place."""

from __future__ import annotations

import torch
import torchvision

import graphprune

model = torchvision.models.resnet18(weights=None).eval()
example = torch.randn(1, 3, 64, 64)
graph = graphprune.trace(model, example)

# A residual stream is one group: keeping one of its writers keeps them all.
stream = graph.group_of("layer1.0.conv2")
print(f"layer1.0.conv2 shares its {stream.size} channels with {', '.join(stream.layers)}")

# Only the inner channels of the blocks: keep everything that writes to a residual stream.
plan = graph.plan(0.5, keep=["conv1", "layer?.?.conv2", "layer?.?.downsample.*"])
small = graphprune.rebuild(model, plan)
print(plan)

for stage, width in enumerate((64, 128, 256, 512), 1):
    block = small.get_submodule(f"layer{stage}.1")
    assert block.conv2.out_channels == width
    assert block.conv1.out_channels == width // 2
assert graphprune.verify(model, small, example).difference < 1e-10
