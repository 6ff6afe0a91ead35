"""Masks without a dead channel: the plan says that nothing happens, and what to do."""

import torch
from torch import nn
from torch.nn.utils import prune

import graphprune


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)).eval()


def test_single_zeros_are_no_filter():
    model = network()
    for layer in (model[0], model[2]):
        rows, columns = map(torch.arange, layer.weight.shape)
        prune.custom_from_mask(layer, "weight", (rows[:, None] + columns) % 2)
    for made_permanent in (False, True):
        if made_permanent:
            for layer in (model[0], model[2]):
                prune.remove(layer, "weight")
        plan = graphprune.Plan.from_masks(model, torch.randn(3, 4))
        assert plan.removed == 0
        assert "50% of its weights are zero" in str(plan)


def test_a_model_that_was_never_pruned_is_told():
    plan = graphprune.Plan.from_masks(network(), torch.randn(3, 4))
    assert plan.notes[0].startswith("no channel of this model is dead: its weights are not zero")


def test_a_dead_filter_needs_no_note():
    model = network()
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    plan = graphprune.Plan.from_masks(model, torch.randn(3, 4))
    assert plan.removed == 8
    assert not any(note.startswith("no channel") for note in plan.notes)
