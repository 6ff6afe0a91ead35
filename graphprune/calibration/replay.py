"""Run the recorded graphs of a model, op by op, each batch on its own.

A batch stands at an op and holds the values that are still needed. A model that reads values of
tensors is recorded for every batch; where changed weights have changed what it reads, its own code
is run and recorded again.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune.calibration.choices import Choices
from graphprune.errors import ModelError
from graphprune.execute.fold import recompute_masked
from graphprune.record.batches import Batch, describe, device_of
from graphprune.record.evaluate import evaluated
from graphprune.record.inputs import Call
from graphprune.record.modes import lost
from graphprune.record.recorder import Record
from graphprune.record.recording import record_values
from graphprune.record.tensors import held_tensors

aten = torch.ops.aten
Values = dict[fx.Node, Any]
_NEEDED = ("shape", "dtype", "module")


class Stale(Exception):
    """A value that decides what runs is no longer what was recorded."""


class Lost(Exception):
    """A tensor that cannot be followed stands in the way."""


@dataclass
class Run:
    """One batch of one model: its recorded graph, and how far it has run.

    Attributes:
        record: what is run.
        call: the inputs.
        nodes: of the record.
        place: own numbers of the nodes by their number in the reference; absent where it has none.
        values: what is needed of what was computed.
        position: the number of the next op.
        choices: which ops choose rows by values; ``None`` for models that read none.
    """

    record: Record
    call: Call
    nodes: list[fx.Node]
    place: dict[int, int]
    choices: Choices | None
    values: Values = field(default_factory=dict)
    position: int = 0
    moved: bool = False  # whether weights have changed since it was recorded
    leaving: dict[int, list[fx.Node]] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)

    def node(self, number: int) -> fx.Node:
        """The node that has this number in the reference."""
        return self.nodes[self.place[number]]

    def like(self, reference: Sequence[fx.Node]) -> bool:
        """Whether it has the ops of the reference and no others."""
        return len(self.place) == len(self.nodes) == len(reference)


class Replay:
    """One model, and its runs over all batches.

    Nodes are named by their number in the reference: the first record of the small model, made from
    the batch ``first`` where several processes have batches of their own.

    Attributes:
        model: whose code it is.
        reference: the nodes of the first record.
        runs: one for each batch.
        pattern: one that all ranks have, from whose record the reference comes.
        tensors: parameters as they count, and buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        like: Sequence[fx.Node] | None = None,
        first: Batch | None = None,
    ) -> None:
        self.model = model
        self.device = device_of(model)
        self.tensors = dict(held_tensors(model))
        self.masks: dict[str, str] = {}  # the mask of a parameter that is masked, by name
        self.watched: dict[int, int] = {}  # ops, and the value whose writes are counted there
        self.held: Mapping[int, int] = {}
        known: dict[str, Record] = {}
        records = []
        both = batches if first is None else (first, *batches)
        calls = [Call(batch.args, batch.kwargs) for batch in both]
        for call in calls:
            key = repr(call.map(lambda tensor: tensor.to("meta")))  # shapes, and what is no tensor
            rec = known.get(key) or self._recorded(call)
            if not _reads(rec):
                known[key] = rec
            records.append(rec)
        for name, mask in self.masks.items():
            value = self.tensors[name].detach() * self.tensors[mask].to(self.tensors[name])
            self.tensors[name] = nn.Parameter(value, False)
        self.reference = list(like) if like is not None else list(records[0].graph.nodes)
        found = [self._run(rec, call) for rec, call in zip(records, calls)]
        self.pattern = found[0]
        self.runs = found if first is None else found[1:]

    def _recorded(self, call: Call) -> Record:
        rec = record_values(self.model, call)
        self.masks |= _fold_masks(rec.graph, dict(held_tensors(self.model)))
        for node in rec.graph.nodes:  # what else there is holds all that was computed
            node.meta = {key: node.meta[key] for key in _NEEDED if key in node.meta}
        return Record(False, rec.device, rec.graph, rec.constants)

    def _run(self, rec: Record, call: Call) -> Run:
        nodes = list(rec.graph.nodes)
        choices = Choices(nodes, self.tensors) if _reads(rec) else None
        run = Run(rec, call, nodes, _places(self.reference, nodes), choices)
        self._schedule(run)
        return run

    def hold(self, held: Mapping[int, int], watched: Mapping[int, int]) -> None:
        """Say which values something else needs until a later op, and whose writes count."""
        self.held, self.watched = held, dict(watched)
        for run in self.runs:
            self._schedule(run)

    def _schedule(self, run: Run) -> None:
        """When each value of a run is forgotten, and what is watched in it."""
        numbers = {node: number for number, node in enumerate(run.nodes)}
        for op, value in self.watched.items():  # its input, whatever made it here
            if op in run.place:
                where = self.reference[op].all_input_nodes.index(self.reference[value])
                inputs = run.nodes[run.place[op]].all_input_nodes
                run.place[value] = numbers[inputs[where]]
        held = {
            run.place[number]: run.place[until]
            for number, until in self.held.items()
            if number in run.place and until in run.place
        }
        run.leaving = {}
        for when, which in last_uses(run.nodes, held):
            run.leaving.setdefault(when, []).append(run.nodes[which])

    def settle(self) -> None:
        """Give the model what became of its masked parameters; what is masked stays as it was."""
        own = dict(held_tensors(self.model))
        with torch.no_grad():
            for name, mask in self.masks.items():
                own[name].copy_(torch.where(own[mask] != 0, self.tensors[name], own[name]))
        if self.masks:
            recompute_masked(self.model)

    def advance(self, which: int, number: int, needed: Sequence[int] = ()) -> bool:
        """Run a batch up to an op.

        Args:
            which: number of the batch.
            number: of the op.
            needed: numbers of others that it must have as well.

        Returns:
            Whether it has these ops, and the value of the first is there.
        """
        run = self.runs[which]
        for _ in range(2):
            if not run.place.keys() >= {number, *needed}:
                return False
            try:
                self._go(run, run.place[number])
            except Stale:  # its code decides anew; what was refitted before stays
                self.settle()
                fresh = self._run(self._recorded(run.call), run.call)
                vars(run).update(vars(fresh))
                continue
            except Lost:
                return False
            return run.nodes[run.place[number]] in run.values
        return False

    def _go(self, run: Run, number: int) -> None:
        if not run.position:
            run.values.update(_inputs(run.record, run.call, self.device))
        watched = {run.place.get(op): run.place.get(value) for op, value in self.watched.items()}
        while run.position <= number:
            for node in run.leaving.get(run.position - 1, ()):
                run.values.pop(node, None)
            node = run.nodes[run.position]
            if node.op == "get_attr":
                run.values[node] = self._tensor(run, str(node.target))
            elif node.op == "call_function":
                if node.target is lost:
                    raise Lost
                if run.choices is not None and run.moved and node in run.choices.decisive:
                    raise Stale
                value = self.compute(run, node, run.values)
                if run.moved and isinstance(value, Tensor):
                    _check_shape(node, value)
                run.values[node] = value
                if run.choices is not None:
                    run.choices.note(node, run.values)
            source = watched.get(run.position)
            if source is not None:
                run.versions[run.position] = run.values[run.nodes[source]]._version
            run.position += 1

    def compute(self, run: Run, node: fx.Node, values: Mapping[fx.Node, object]) -> Any:
        """The value of one op, given those it reads."""
        return evaluated(node, values, torch.device(run.record.device), self.device)

    def node(self, which: int, number: int) -> fx.Node:
        """A node in the record of a batch."""
        return self.runs[which].node(number)

    def value(self, which: int, number: int) -> Any:
        """The value of a node for one batch."""
        return self.runs[which].values[self.node(which, number)]

    def version(self, which: int, number: int) -> int:
        """How often the watched value had been written to when an op ran."""
        run = self.runs[which]
        return run.versions[run.place[number]]

    def again(self, which: int, numbers: Sequence[int]) -> None:
        """Compute ops anew."""
        run = self.runs[which]
        for number in numbers:
            node = self.node(which, number)
            run.values[node] = self.compute(run, node, run.values)

    def has_moved(self) -> None:
        """Weights have changed: what was recorded need not be true any more."""
        for run in self.runs:
            run.moved = True

    def _tensor(self, run: Run, name: str) -> Tensor:
        if name in self.tensors:
            return self.tensors[name].detach()
        return run.record.constants[name].to(self.device)


def _reads(rec: Record) -> bool:
    """Whether the code of the model may have read values."""
    return rec.device != "meta"


def _check_shape(node: fx.Node, value: Tensor) -> None:
    shape = node.meta.get("shape")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise Stale


def _places(reference: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> dict[int, int]:
    """Where the nodes of a reference are in another record, in order: by op and module."""
    first, second = [_key(node) for node in reference], [_key(node) for node in nodes]
    if first == second:
        return {number: number for number in range(len(first))}
    found = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    return {block.a + i: block.b + i for block in found for i in range(block.size)}


def _key(node: fx.Node) -> tuple[str, str, str]:
    name = str(node.target)
    name = "constant" if node.op == "get_attr" and name.startswith("constant_") else name
    return node.op, name, str(node.meta.get("module"))


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
    tensors = [tensor.detach().to(device, copy=True) for tensor in call.tensors()]
    return dict(zip(places, tensors, strict=True))


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
