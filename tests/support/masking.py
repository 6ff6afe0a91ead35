"""Masked models, and plans that are made from them."""

import torch
from torch import nn
from torch.utils import _pytree as pytree

import graphprune
from graphprune import Plan
from support.comparing import assert_close, call, untouched

DOUBLE = torch.float64


def randomise(model):
    """Statistics and affine parameters of norms as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.double().eval()


def kill(layer, *channels):
    """Zero the filters of some output channels, not their biases."""
    with torch.no_grad():
        layer.weight[list(channels)] = 0


def shrunk(model, inputs, exact=True, **options):
    """The plan and the small model, compared with the masked one."""
    with untouched(model):
        plan = Plan.from_masks(model, inputs, **options)
        small = graphprune.rebuild(model, plan)
        wanted, found = (pytree.tree_leaves(call(m, inputs)) for m in (model, small))
        for left, right in zip(wanted, found, strict=True):
            if exact:
                assert_close(left, right)
    assert Plan.from_json(plan.to_json()) == plan
    assert sum(p.numel() for p in small.parameters()) == plan.after.params
    return plan, small
