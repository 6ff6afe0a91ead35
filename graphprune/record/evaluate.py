"""A recorded op run again, on whatever stands in the place of its values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from graphprune.ops.calls import Args, Kwargs, target_of
from graphprune.ops.registry import op_of
from graphprune.record.modes import leak

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default}


def evaluated(
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    recorded: torch.device,
    device: torch.device,
    apply: Callable[[fx.Node, Any, Any], Any] | None = None,
) -> object:
    """The value of one recorded op, given those that it reads.

    Args:
        node: the op, or a result of one with several.
        values: of the nodes that it reads.
        recorded: the device it was recorded on.
        device: where it runs now: what the code asked for on ``recorded`` is made there.
        apply: called with the op and its arguments instead of running it.
    """
    args: Any
    kwargs: Any
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.target is operator.getitem:
        return args[0][args[1]]
    if kwargs.get("device") == recorded:
        kwargs = {**kwargs, "device": device}
    return (apply or run)(node, args, kwargs)


def run(node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """Run an op. Strides may differ from the recorded ones, and some kernels are our own."""
    target = target_of(node)
    if target is leak:
        return None
    if target in _VIEWS:
        return aten.reshape.default(*args)
    return (op_of(target).kernel or target)(*args, **kwargs)
