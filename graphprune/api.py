"""The one call: ``rebuild(model, ratio)``."""

from __future__ import annotations

from typing import Any, Unpack

from torch import nn

from graphprune.checks import check_model
from graphprune.collecting import uncollected
from graphprune.errors import InputError
from graphprune.graph import trace
from graphprune.options import Options, Request
from graphprune.plan import Plan
from graphprune.rewrite.config import follow_config, has_config, sizes_of
from graphprune.rewrite.shrink import shrink


@uncollected
def rebuild(
    model: nn.Module,
    ratio_or_plan: float | Plan | None = None,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    attention: str = "heads",
    **options: Unpack[Options],
) -> nn.Module:
    """Make a genuinely smaller model whose output equals the masked original.

    Args:
        model: the trained model; not touched unless ``inplace``.
        ratio_or_plan: the fraction of channels to remove in [0, 1), or a plan; leave it out and
            name a ``target`` for a budget.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword
            arguments; inferred from the first layer when absent. Not needed with a plan.
        inplace: change ``model`` itself; its parameters stay the same objects.
        attention: ``"heads"`` removes whole attention heads, ``"head_dim"`` makes all narrower.
        options: criterion, scope, targets and constraints: see :class:`graphprune.Options`.

    Returns:
        A model of the same classes and ``state_dict`` names with its own, smaller parameters;
        dtype, device, memory format, hooks and train/eval state are kept. Its
        ``graphprune_plan`` says which channels stayed.

    Raises:
        ModelError: the model is quantized, scripted, compiled, wrapped, lazy or not finite.
        InputError: an argument is wrong, or no channel can be removed.
        TraceError: the model does not run on the example inputs.
        PlanError: the plan belongs to another architecture, or was applied already.

    Warns:
        PruningWarning: much less was removed than asked for.

    Example:
        >>> import torch, torchvision, graphprune
        >>> model = torchvision.models.resnet18(weights=None)
        >>> small = graphprune.rebuild(model, 0.5)
        >>> sum(p.numel() for p in small.parameters()) < 0.3 * 11_700_000
        True
    """
    if isinstance(ratio_or_plan, Plan):
        if options:
            raise InputError(
                f"a plan was given, which is complete: leave out {', '.join(options)}, or pass "
                "them to graph.plan"
            )
        check_model(model, values=False)
        return _shrunk(model, ratio_or_plan, inplace)
    Request.of(ratio_or_plan, options)  # a wrong option is told before anything long is done
    plan = trace(model, example_inputs, attention=attention).plan(ratio_or_plan, **options)
    return _shrunk(model, plan, inplace)


def _shrunk(model: nn.Module, plan: Plan, inplace: bool) -> nn.Module:
    before = sizes_of(model) if has_config(model) else {}
    small = shrink(model, plan, inplace=inplace)
    if before:
        follow_config(small, before)
    return small
