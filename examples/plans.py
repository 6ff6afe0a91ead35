"""A plan is data: print it, store it as JSON, apply it to another instance."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torchvision

import graphprune
from graphprune.errors import PlanError

example = torch.randn(1, 3, 64, 64)
model = torchvision.models.mobilenet_v3_small(weights=None).eval()
plan = graphprune.trace(model, example).plan(0.5)
print(plan)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "plan.json")
    plan.to_json(path)
    print(f"\n{path.stat().st_size:,} bytes of JSON")
    again = graphprune.Plan.from_json(path)
assert again == plan

# The plan holds no weights: another instance of the architecture takes it as well.
other = torchvision.models.mobilenet_v3_small(weights=None).eval()
small = graphprune.rebuild(other, again)
assert graphprune.verify(other, small, example).difference < 1e-10

# Another architecture does not, and says why; neither does a model that was shrunk already.
for wrong in (torchvision.models.mobilenet_v3_large(weights=None), small):
    try:
        graphprune.rebuild(wrong, again)
    except PlanError as error:
        print(f"refused: {error}")
    else:
        raise AssertionError("a plan must not fit another model")
