"""A plan executed without changing a shape: the reference that a small model must equal.

Where zeroed parameters say it all, the reference is a copy of the model with zeroes on the
writing and on the reading side of every removed channel. Where they do not (a sum over channels
after a sigmoid, the statistics of a LayerNorm), the forward of the copy evaluates the recorded
graph: every op that sums over channels reads zeroes for the removed ones, and statistics are
taken over the kept ones.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphprune.channels.analysis import Analysis
from graphprune.channels.blocks import fine_labels
from graphprune.errors import InputError, PlanError
from graphprune.ops.registry import op_of
from graphprune.ops.values import Value
from graphprune.plan.plan import Plan
from graphprune.record.copying import copy_module
from graphprune.record.inputs import Call
from graphprune.record.modes import leak
from graphprune.record.recorder import Record
from graphprune.record.recording import record
from graphprune.record.skeleton import held_tensors
from graphprune.verification.reference import with_constants

aten = torch.ops.aten


def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """The masked model of a plan, with the shapes of the original.

    Args:
        model: a model of the architecture the plan was made for; it is not touched.
        plan: which channels stay.

    Returns:
        A copy of ``model`` in which the removed channels contribute nothing. Groups reported as
        renormalising take their statistics over the kept channels only.

    Raises:
        PlanError: the plan does not fit the model.
        InputError: ``plan`` is no plan.

    Example:
        >>> import torch, graphprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = graphprune.trace(net).plan(0.5)
        >>> x = torch.randn(3, 4)
        >>> small = graphprune.rebuild(net, plan)
        >>> torch.allclose(graphprune.mask(net, plan)(x), small(x), atol=1e-6)
        True
    """
    if not isinstance(plan, Plan):
        raise InputError(
            "plan must be a Plan, such as graphprune.trace(model).plan(0.5) makes; "
            f"got {type(plan).__name__}"
        )
    plan.check(model)
    if plan.scales and not plan.exact:
        raise PlanError(
            "this plan follows a renormalising one by an exact one: no single masked model equals "
            "both; verify them one by one"
        )
    masked = with_constants(model, plan)
    if plan.evaluated:
        held = (*masked.parameters(), *masked.buffers())
        template = copy_module(masked, {id(tensor): tensor for tensor in held})
        masked.forward = MaskedForward(template, masked, plan)
        return masked
    tensors = dict(held_tensors(masked))
    with torch.no_grad():
        for slot in plan.slots:
            tensor = tensors[slot.tensor]
            tensor.masked_fill_(~slot.stays(tensor.shape).to(tensor.device), 0)
    return masked


class MaskedForward:
    """Evaluates the recorded graph of a model with masks, recording anew for new shapes."""

    def __init__(self, original: nn.Module, module: nn.Module, plan: Plan) -> None:
        self.template = original  # only recorded, which copies it
        self.module = module
        self.plan = plan
        self.recorded: dict[Any, tuple[Record, Masks]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedForward:
        """A copy for a copied module; recorded graphs are shared."""
        clone = MaskedForward(self.template, copy_module(self.module, memo), self.plan)
        clone.recorded = self.recorded
        return clone

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the masked model."""
        return self.run(Call(args, kwargs))[0]

    def run(self, call: Call) -> tuple[Any, dict[fx.Node, Any]]:
        """The output and the value of every node."""
        rec, masks = self.prepared(call)
        try:
            values = _evaluate(self.module, rec, masks, call)
        except RuntimeError:
            if rec.device != "meta":
                raise
            rec, masks = self.prepared(call, "cpu")  # code may look at the device
            values = _evaluate(self.module, rec, masks, call)
        outputs = [values[node] for node in rec.outputs]
        iterator = iter(outputs)
        leaves = [next(iterator) if leaf is Tensor else leaf for leaf in rec.output_leaves]
        return pytree.tree_unflatten(leaves, rec.output_spec), values

    def prepared(self, call: Call, device: str = "meta") -> tuple[Record, Masks]:
        """The recorded graph and its masks for inputs of these shapes."""
        key = (self.module.training, str(call))
        if key not in self.recorded or device != "meta":
            devices = ("meta", "cpu") if device == "meta" else (device,)
            rec = record(self.template, call, self.module.training, devices=devices)
            if any(tensor.is_meta for tensor in rec.constants.values()):  # their values are needed
                rec = record(self.template, call, self.module.training, devices=("cpu",))
            attention = self.plan.request.get("attention", "heads")
            analysis = Analysis.build(self.template, [rec], attention)
            self.recorded[key] = rec, Masks(analysis, self.plan)
        return self.recorded[key]


class Masks:
    """Which positions of recorded values stay."""

    def __init__(self, analysis: Analysis, plan: Plan) -> None:
        self.analysis = analysis
        self.readers = analysis.walk.readers
        labels = fine_labels(analysis) if plan.free_columns else analysis.units.labels
        self.plain = bool(plan.scales)  # statistics of the masked values themselves
        self.slots = plan.slots if "after" in plan.request else ()  # of several plans in a row
        self.alive = np.ones(len(labels), bool)
        starts = {(slot.tensor, slot.dim): slot.start for slot in analysis.slots}
        for slot in plan.slots:
            if slot.blocks > 1:
                continue  # what it reads is zeroed
            gone = np.setdiff1d(np.arange(slot.size), slot.kept)
            self.alive[starts[slot.tensor, slot.dim] + gone] = False
        fresh = analysis.walk.first_fresh  # constants leave with the last channel they are tied to
        owned = np.zeros(int(labels.max()) + 1, bool)
        owned[labels[:fresh]] = True
        alive = ~owned
        np.logical_or.at(alive, labels[:fresh], self.alive[:fresh])
        self.alive = alive[labels]

    def zeroed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters without the slices that left, where units differ from plan to plan."""
        for slot in self.slots:
            tensor = tensors[slot.tensor]
            if tensor.requires_grad or isinstance(tensor, nn.Parameter):  # buffers are updated
                tensors[slot.tensor] = zeroed(tensor, slot.stays(tensor.shape))
        return tensors

    def of(self, node: fx.Node) -> Tensor | None:
        """A boolean mask that broadcasts to the value of a node; ``None`` when all stays."""
        found = None
        for layer in self.value(node).layers:
            keep = torch.from_numpy(self.alive[layer.numpy()])
            if not bool(keep.all()):
                found = keep if found is None else found & keep
        return found

    def value(self, node: fx.Node) -> Value:
        """The layers of a node."""
        return self.analysis.values[node]


def _evaluate(module: nn.Module, rec: Record, masks: Masks, call: Call) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {}
    tensors = masks.zeroed(dict(held_tensors(module)))
    inputs = iter(call.tensors())
    device = next(iter(tensors.values())).device
    for node in rec.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "get_attr":
            name = str(node.target)
            values[node] = tensors[name] if name in tensors else rec.constants[name].to(device)
        elif node.op == "call_function":
            values[node] = _step(node, values, masks, (torch.device(rec.device), device))
    return values


def _step(
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    masks: Masks,
    devices: tuple[torch.device, torch.device],
) -> Any:
    if node.target is operator.getitem:
        return _item(values, *node.args)
    if node.target is leak:
        return None

    def value(source: fx.Node) -> Any:
        return zeroed(values[source], masks.of(source)) if reads else values[source]

    reads = node in masks.readers
    args: Any
    kwargs: Any
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    if kwargs.get("device") == devices[0]:  # recorded there, evaluated here
        kwargs = {**kwargs, "device": devices[1]}
    if reads and not masks.plain:
        rule = op_of(node).masked
        keep = masks.of(node.all_input_nodes[0])
        if rule is not None and keep is not None:
            out = rule(keep.to(args[0].device), *args, **kwargs)
            if out is not NotImplemented:
                return out
    kernel = op_of(node).kernel
    if kernel is not None:
        return kernel(*args, **kwargs)
    if node.target is aten.view.default:  # strides may differ from the recorded ones
        return aten.reshape.default(*args)
    op: Any = node.target
    return op(*args, **kwargs)


def _item(values: Mapping[fx.Node, Any], source: Any, index: Any) -> Any:
    return values[source][index]


def zeroed(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """Zero where the mask is false, whatever stood there."""
    if keep is None:
        return tensor
    return torch.where(keep.to(tensor.device), tensor, tensor.new_zeros(()))
