"""Shrink a ResNet-18 by half and prove that it equals the masked original."""

from __future__ import annotations

import torch
import torchvision

import graphprune

model = torchvision.models.resnet18(weights=None).eval()
example = torch.randn(1, 3, 64, 64)

small = graphprune.rebuild(model, 0.5, example)
report = graphprune.verify(model, small, example)  # raises where they differ
before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))

print(report)
print(f"{before:,} parameters -> {after:,}; conv1 is now {small.conv1}")

assert type(small) is type(model)
assert small(example).shape == (1, 1000)
assert after < 0.3 * before
assert report.difference < 1e-10
