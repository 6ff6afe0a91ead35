"""Run the recorded graphs of two models side by side, op by op, for all batches at once."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune.errors import ModelError
from graphprune.execute.fold import recompute_masked
from graphprune.ops.registry import op_of
from graphprune.record.batches import Batch, describe, device_of
from graphprune.record.inputs import Call
from graphprune.record.modes import leak
from graphprune.record.recorder import Record
from graphprune.record.recording import record
from graphprune.record.skeleton import named_tensors

aten = torch.ops.aten
Values = dict[fx.Node, Any]


@dataclass
class Replay:
    """The recorded forward pass of one model, and its values for every batch.

    Nodes are named by their number, which is the same in the records for all shapes of batches.
    """

    model: nn.Module
    records: list[Record]  # of each batch; equal shapes share one
    nodes: list[list[fx.Node]]
    values: list[Values]
    masks: dict[str, str]  # the mask of a parameter that is masked, by name
    tensors: dict[str, Tensor] = field(init=False)  # parameters as they count, and buffers

    def __post_init__(self) -> None:
        held = self.tensors = dict(named_tensors(self.model))
        for name, mask in self.masks.items():
            held[name] = nn.Parameter(held[name].detach() * held[mask].to(held[name]), False)
        self.device = device_of(self.model)

    def settle(self) -> None:
        """Give the model what became of its masked parameters; what is masked stays as it was."""
        own = dict(named_tensors(self.model))
        with torch.no_grad():
            for name, mask in self.masks.items():
                own[name].copy_(torch.where(own[mask] != 0, self.tensors[name], own[name]))
        if self.masks:
            recompute_masked(self.model)

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Batch]) -> Replay:
        """Record a model for the shapes of all batches.

        Raises:
            ModelError: the forward pass reads values of tensors, or differs from batch to batch.
        """
        known: dict[str, Record] = {}
        masks: dict[str, str] = {}
        records, values = [], []
        for batch in batches:
            call = Call(batch.args, batch.kwargs)
            key = repr(call.map(lambda tensor: tensor.to("meta")))  # shapes, and what is no tensor
            if key not in known:
                known[key] = _recorded(model, call)
                masks |= _fold_masks(known[key].graph, dict(named_tensors(model)))
            records.append(known[key])
            values.append(_inputs(known[key], call, device_of(model)))
        nodes = [list(rec.graph.nodes) for rec in records]
        for other in nodes[1:]:
            same_ops(nodes[0], other, "for batches of different shapes")
        return cls(model, records, nodes, values, masks)

    def step(self, number: int) -> None:
        """Compute one node for all batches."""
        for which in range(len(self.records)):
            node = self.nodes[which][number]
            if node.op == "get_attr":
                self.values[which][node] = self._tensor(which, str(node.target))
            elif node.op == "call_function":
                self.values[which][node] = self.run(which, node, self.values[which])

    def run(self, which: int, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """The value of one op for one batch, given those it reads."""
        if node.target is leak:
            return None
        target: Any = node.target
        args: Any
        kwargs: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.target is operator.getitem:
            return args[0][args[1]]
        if kwargs.get("device") == torch.device(self.records[which].device):
            kwargs = {**kwargs, "device": self.device}
        kernel = op_of(node).kernel
        if kernel is not None:
            return kernel(*args, **kwargs)
        if node.target is aten.view.default:  # strides may differ from the recorded ones
            return aten.reshape.default(*args)
        return target(*args, **kwargs)

    def value(self, which: int, number: int) -> Any:
        """The value of a node for one batch."""
        return self.values[which][self.nodes[which][number]]

    def free(self, number: int) -> None:
        """Forget the values of a node."""
        for nodes, values in zip(self.nodes, self.values):
            values.pop(nodes[number], None)

    def _tensor(self, which: int, name: str) -> Tensor:
        if name in self.tensors:
            return self.tensors[name].detach()
        return self.records[which].constants[name].to(self.device)


def _recorded(model: nn.Module, call: Call) -> Record:
    rec = record(model, call, training=False)
    if rec.device == "meta" and any(tensor.is_meta for tensor in rec.constants.values()):
        rec = record(model, call, training=False, devices=("cpu",))  # their values are needed
    elif rec.device != "meta":
        raise ModelError(
            "the forward pass reads values of tensors, so that it may differ from input to input "
            'and cannot be repaired op by op: pass method="batchnorm"'
        )
    return rec


def _fold_masks(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Take products of a parameter with a buffer of zeroes and ones out: it is masked.

    Returns:
        The mask of every such parameter, by name.
    """
    found = {}
    for node in list(graph.nodes):
        sources = node.all_input_nodes
        if getattr(node.target, "overloadpacket", None) is not aten.mul or len(sources) != 2:
            continue
        names = [str(n.target) for n in sources if n.op == "get_attr" and str(n.target) in tensors]
        mask = next((n for n in names if not isinstance(tensors[n], nn.Parameter)), None)
        own = next((n for n in names if isinstance(tensors[n], nn.Parameter)), None)
        if own is None or mask is None or tensors[own].shape != tensors[mask].shape:
            continue
        if own in found or tensors[own].dim() < 2 or any(len(n.users) > 1 for n in sources):
            continue  # masked twice, a bias, or read without its mask as well
        if bool(((tensors[mask] != 0) & (tensors[mask] != 1)).any()):
            continue
        found[own] = mask
        source, other = sorted(sources, key=lambda n: str(n.target) != own)
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        if not other.users:
            graph.erase_node(other)
    return found


def _inputs(rec: Record, call: Call, device: torch.device) -> Values:
    places = [node for node in rec.graph.nodes if node.op == "placeholder"]
    tensors = [tensor.detach().to(device) for tensor in call.tensors()]
    return dict(zip(places, tensors, strict=True))


def same_ops(first: Sequence[fx.Node], second: Sequence[fx.Node], when: str) -> None:
    """Raise unless two records consist of the same ops in the same order.

    Raises:
        ModelError: names the first op that differs.
    """
    for number, (a, b) in enumerate(zip(first, second)):
        if a.op != b.op or (a.op == "call_function" and a.target != b.target):
            raise ModelError(
                f"the forward pass runs other ops {when}: op {number} is {a.target} in "
                f"{a.meta.get('module') or 'the model'}, and {b.target}"
            )
    if len(first) != len(second):
        raise ModelError(f"the forward pass runs {len(first)} ops, and {len(second)} {when}")


def last_uses(nodes: Sequence[fx.Node], held: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """Pairs (when, which): values that nothing reads after a node has run.

    Args:
        nodes: of a record.
        held: values, by number, that something else needs until a later node.
    """
    numbers = {node: number for number, node in enumerate(nodes)}
    for number, node in enumerate(nodes):
        last = max([number, *(numbers[user] for user in node.users)])
        yield max(last, held.get(number, 0)), number


def check_batches(batches: Sequence[Batch]) -> None:
    """Raise unless there is a batch with a tensor in it."""
    for batch in batches:
        if not Call(batch.args, batch.kwargs).tensors():
            raise ModelError(f"a batch without tensors: {describe(batch.args)}")
