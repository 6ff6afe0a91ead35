"""Groups that zeroes cannot stand for, found before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.api import ChannelGraph
from graphprune.channels.analysis import Group
from graphprune.plan.plan import Plan
from graphprune.record.batches import at_rest, device_of
from graphprune.record.copying import copy_module
from graphprune.training.soft import SoftMasks

PlanWithout = Callable[[Sequence[Group]], Plan]  # a plan that leaves some groups whole


def unmaskable(graph: ChannelGraph, plan_without: PlanWithout) -> list[Group]:
    """The groups whose channels cannot be masked by zeroed parameters.

    Those under a norm that takes statistics over them, or summed without weights; and those whose
    zeroed weights are divided by their norm, as in weight normalisation: these show in a trial
    run of a masked copy, as outputs or gradients that are not finite.

    Args:
        graph: of the model that will be trained.
        plan_without: makes a plan for it that leaves the given groups whole.
    """
    whole = _read_whole(graph)
    if _finite(graph, plan_without(whole)) or not _finite(graph, None):
        return whole
    rest = [group for group in graph.groups if group not in whole]
    for group in rest:
        others = [other for other in rest if other is not group]
        if not _finite(graph, plan_without([*whole, *others])):
            whole.append(group)
    return whole


def _read_whole(graph: ChannelGraph) -> list[Group]:
    """The groups that the analysis knows zeroes to be too little for."""
    analysis = graph.analysis
    labels = analysis.units.labels[analysis.marks.masked_ids()]
    return [group for group in graph.groups if np.isin(group.units, labels).any()]


def _finite(graph: ChannelGraph, plan: Plan | None) -> bool:
    """Whether outputs and gradients are finite under the masks of a plan."""
    if plan is not None and not plan.removed:
        return True
    model = copy_module(graph.model, {})
    if plan is not None:
        SoftMasks(model).put(plan)
    args, kwargs = graph.call.on(device_of(model))
    with torch.inference_mode(False), at_rest(model), torch.enable_grad():
        try:
            leaves = pytree.tree_leaves(model(*args, **kwargs))
            found = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
            roots = [tensor.mean() for tensor in found if tensor.requires_grad]
            wanted = [p for p in model.parameters() if p.requires_grad and roots]
            if wanted:
                found += torch.autograd.grad(roots, wanted, allow_unused=True)
        except RuntimeError:  # made-up inputs; layers that have no gradient in eval mode
            return True
    return all(bool(t.isfinite().all()) for t in found if t is not None and not t.is_sparse)
