"""The masked model of a plan: same shapes, same outputs and gradients as the small model."""

from __future__ import annotations

import torch
import torchvision

import graphprune

torch.manual_seed(0)
model = torchvision.models.squeezenet1_1(weights=None).double().eval()
x = torch.randn(2, 3, 64, 64, dtype=torch.float64)

plan = graphprune.trace(model, x).plan(0.5)
masked = graphprune.mask(model, plan)
small = graphprune.rebuild(model, plan)

assert masked.features[0].weight.shape == model.features[0].weight.shape
torch.testing.assert_close(small(x), masked(x), rtol=0, atol=1e-12)

for net in (masked, small):
    net(x).square().sum().backward()

# The gradient of the small model is that of the masked one, without the removed channels.
kept = next(s.kept for s in plan.slots if (s.tensor, s.dim) == ("features.0.weight", 0))
wide, narrow = masked.features[0].weight.grad, small.features[0].weight.grad
gap = float((wide[list(kept)] - narrow).abs().max() / wide.abs().max())
print(f"first layer: {len(wide)} -> {len(narrow)} channels, gradients differ by {gap:.0e}")
assert gap < 1e-12
