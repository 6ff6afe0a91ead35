"""One safetensors file: the small weights, and the plan that the shapes follow from."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torchvision

import graphprune

model = torchvision.models.shufflenet_v2_x1_0(weights=None).eval()
example = torch.randn(2, 3, 64, 64)
small = graphprune.rebuild(model, 0.5, example)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "small.safetensors")
    graphprune.save(small, path)
    print(f"{path.stat().st_size:,} bytes")
    # A function that makes the original architecture is enough: it is called without weights.
    loaded = graphprune.load(path, lambda: torchvision.models.shufflenet_v2_x1_0(weights=None))

assert loaded.graphprune_plan == small.graphprune_plan
with torch.no_grad():
    assert torch.equal(loaded.eval()(example), small(example))
