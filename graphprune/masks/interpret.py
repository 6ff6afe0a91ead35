"""Go through a recorded graph with the real weights and an unknown input.

This is an abstract interpretation: for every value it finds which positions are the same for
every input of the recorded shape, and what they are. Values are taken to be finite, so that zero
times anything is zero. An op without a rule makes its results unknown, unless all that it reads
is known. So nothing is claimed that does not hold; at worst too little is claimed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphprune.ops.calls import Args, Kwargs, Overload, args_of, target_of
from graphprune.ops.fact import Fact, double, found, values
from graphprune.ops.registry import op_of
from graphprune.ops.views import fact_rule
from graphprune.record.evaluate import evaluated
from graphprune.record.modes import leak
from graphprune.record.recorder import Record
from graphprune.record.tensors import held_tensors

aten = torch.ops.aten
Facts = Mapping[fx.Node, Any]  # a Fact, or a list of them


def real_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, on the CPU, floating point in double precision."""
    return {name: _real(tensor) for name, tensor in held_tensors(model)}


def _real(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", double(tensor.dtype), copy=True)


class Interpreter:
    """Facts about all values of a recorded forward pass.

    Args:
        record: recorded in eval mode, on any device.
        tensors: what :func:`real_tensors` returned; in-place ops may write into them.
    """

    def __init__(self, record: Record, tensors: Mapping[str, Tensor]) -> None:
        self.record, self.tensors = record, tensors
        self.read = False  # whether the code saw values of the input: all that follows may differ
        self.writes = any(map(_writes, record.graph.nodes))

    def run(self) -> Iterator[tuple[fx.Node, Facts]]:
        """Each op with the facts of all values that are still read, its own included."""
        known: dict[fx.Node, object] = {}
        last = {}
        for node in self.record.graph.nodes:
            for source in node.all_input_nodes:
                last[source] = node
        for node in self.record.graph.nodes:
            if node.op == "output":
                continue
            known[node] = self.of(node, known)
            if node.op == "call_function":
                yield node, known
            for source in (*node.all_input_nodes, node):
                if last.get(source, node) is node:
                    known.pop(source, None)

    def fixed(self, node: object) -> Fact | None:
        """A value that is made of parameters by ops without side effects, wherever it is read."""
        if not isinstance(node, fx.Node) or node.op == "placeholder" or _writes(node):
            return None
        inputs = {source: self.fixed(source) for source in node.all_input_nodes}
        if any(fact is None for fact in inputs.values()):
            return None
        fact = self.of(node, inputs)
        return fact if isinstance(fact, Fact) and fact.constant else None

    def of(self, node: fx.Node, known: Facts) -> Any:
        """The fact of a node; for an op with several results a list."""
        if node.op == "get_attr":
            return self.stored(node)
        if node.op == "call_function" and node.target is operator.getitem:
            place = args_of(node)
            items, index = known[place[0]], place[1]
            return items[index] if isinstance(items, list) and index < len(items) else _any(node)
        if node.op != "call_function" or self.read:
            return _any(node)
        recorded = torch.device(self.record.device)
        return evaluated(node, known, recorded, torch.device("cpu"), self.applied)

    def applied(self, node: fx.Node, args: object, kwargs: object) -> object:
        """What an op makes of facts, and whether the code saw values that depend on the input."""
        if _reads(node) and not all(fact.constant for fact in found((args, kwargs))):
            self.read = True
            return _any(node)
        args, kwargs = pytree.tree_map_only(torch.dtype, double, (args, kwargs))
        result = apply(node, args, kwargs)
        if self.writes and getattr(node.target, "is_view", False):
            return self.viewed(node, found((args, kwargs)), result)
        return result

    def viewed(self, node: fx.Node, sources: list[Fact], result: object) -> object:
        """A view that became a copy here would not see what is written later."""
        memory = {fact.unknown.untyped_storage().data_ptr() for fact in sources}
        if all(fact.unknown.untyped_storage().data_ptr() in memory for fact in found(result)):
            return result
        for fact in (*sources, *found(result)):
            fact.unknown.fill_(True)
        return result

    def stored(self, node: fx.Node) -> object:
        """A parameter, a buffer, or a constant of the code."""
        name = str(node.target)
        tensor = self.tensors.get(name)
        if tensor is None and not self.record.constants[name].is_meta:
            tensor = _real(self.record.constants[name])
        return _any(node) if tensor is None or self.read else Fact.known(tensor)


def apply(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What an op does to facts."""
    op = target_of(node)
    if not isinstance(op, torch._ops.OpOverload):
        return _any(node)
    rule = fact_rule(op_of(op))
    changes = op._schema.is_mutable
    try:
        if rule is not None:
            return rule(op, *args, **kwargs)
        if changes:
            return _in_place(node, op, args, kwargs)
        return _functional(node, op, args, kwargs)
    except RuntimeError:  # unfollowed, or no kernel for double precision
        return _spoiled(node, op, args, kwargs) if changes else _any(node)


def _functional(node: fx.Node, op: Overload, args: Args, kwargs: Kwargs) -> Any:
    random = torch.Tag.nondeterministic_seeded in op.tags or "empty" in op._schema.name
    if random or not all(fact.constant for fact in found((args, kwargs))):
        return _any(node)
    out = op(*values(args), **values(kwargs))
    return pytree.tree_map_only(Tensor, Fact.known, list(out) if type(out) is tuple else out)


def _in_place(node: fx.Node, op: Overload, args: Args, kwargs: Kwargs) -> Any:
    """Compute the result apart, then write it: views of the same memory see it."""
    name = op.overloadpacket._qualified_op_name.partition("::")[2]
    packet = getattr(aten, name.removesuffix("_"), None)
    functional = getattr(packet, op._overloadname, None)
    if not name.endswith("_") or functional is None or not isinstance(args[0], Fact):
        return _spoiled(node, op, args, kwargs)
    rule = fact_rule(op_of(functional))
    result = (
        _functional(node, functional, args, kwargs)
        if rule is None
        else rule(functional, *args, **kwargs)
    )
    args[0].value.copy_(result.value)
    args[0].unknown.copy_(result.unknown)
    return args[0]


def _spoiled(node: fx.Node, op: Overload, args: Args, kwargs: Kwargs) -> Any:
    """What an op writes to is unknown afterwards."""
    for place, argument in enumerate(op._schema.arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        target = args[place] if place < len(args) else kwargs.get(argument.name)
        for fact in found(target) if written else ():
            fact.unknown.fill_(True)
    shape = node.meta.get("shape")
    same = args and isinstance(args[0], Fact) and shape == tuple(args[0].value.shape)
    return args[0] if same and args[0].unknown.all() else _any(node)


def _any(node: fx.Node) -> Any:
    """Nothing is known of the result."""
    if "shape" in node.meta:
        return Fact.nothing(node.meta["shape"], node.meta["dtype"])
    return None  # the items of a list know their own shapes


def _writes(node: fx.Node) -> bool:
    """Whether an op writes into a tensor that it is given."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _reads(node: fx.Node) -> bool:
    """Whether the code that called an op got to see values."""
    tags = getattr(node.target, "tags", ())
    seen = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
    return seen or node.target is leak
