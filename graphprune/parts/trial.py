"""Whether the code of a model goes on when a plan is carried out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.execute.shrink import hollow, shrink
from graphprune.measurement import drawn
from graphprune.plan.plan import Plan
from graphprune.record.batches import at_rest, device_of
from graphprune.record.inputs import Call
from graphprune.record.outputs import fields
from graphprune.record.random_numbers import same_numbers
from graphprune.record.recorder import Record
from graphprune.record.recording import dry
from graphprune.record.skeleton import without_weights


def goes_on(model: nn.Module, call: Call, record: Record, plan: Plan) -> bool:
    """Whether a small model runs, and returns the same shapes where outputs count, or fewer."""
    return obstacle(model, call, record, plan) is None


def obstacle(model: nn.Module, call: Call, record: Record, plan: Plan) -> str | None:
    """Why a small model does not run, or what it returns in another shape; ``None`` if it does.

    In train mode as well, where the whole model runs in it. A model that reads values is run on its
    device, with its weights.

    Args:
        model: the whole one; it is not touched.
        call: inputs it runs on.
        record: of a run on them.
        plan: what leaves.
    """
    on_meta = record.device == "meta"
    models = (
        (without_weights(model), hollow(model, plan)) if on_meta else (model, without(model, plan))
    )
    for training in (False, True):
        whole, rest = (_shapes(each, call, record, training) for each in models)
        if isinstance(whole, str):
            continue
        if isinstance(rest, str):
            return f"the code around does not go on ({rest})"
        if not _is_among(rest, whole):
            return "the outputs would have other shapes"
    return None


def _is_among(rest: list[object], whole: list[object]) -> bool:
    """Whether outputs have the shapes of others, of which some behind the first may be missing.

    A cache that is returned holds less where layers have left.
    """
    left = iter(whole)
    return rest[:1] == whole[:1] and all(shape in left for shape in rest)


def without(model: nn.Module, plan: Plan) -> nn.Module:
    """The small model, for which other plans follow."""
    small = shrink(model, plan)
    del vars(small)["graphprune_plan"]
    return small


def _shapes(model: nn.Module, call: Call, record: Record, training: bool) -> list[object] | str:
    """The shapes of the outputs that count; where the model does not run, what it says."""
    try:
        with at_rest(model), same_numbers(), torch.no_grad():
            model.train(training)
            if record.device == "meta":
                found = dry(model, call)
            else:
                args, kwargs = drawn(call, device_of(model))
                found = pytree.tree_leaves(fields(model(*args, **kwargs)))
    except Exception as error:  # whatever the code of the model raises
        return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
    counted = record.counted
    return [tuple(t.shape) for n, t in enumerate(tensors) if counted is None or n in counted]
