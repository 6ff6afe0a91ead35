"""What functions did to channels before: the same function on the same ids does the same again.

A rule is a function of the ids that an op reads, of its other arguments, and of the sizes of
dimensions along which ids vary. So a call is followed once, and its answer serves other layers,
train mode and, where no op is of a kind that counts places in dimensions without ids, other batch
sizes and resolutions. Ids that a call makes anew belong to its n-th occurrence in a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ops.calls import TENSOR
from graphprune.ops.ids import Shape, reshape_blocks, varying
from graphprune.ops.registry import op_of, packet_of
from graphprune.ops.values import Value

aten = torch.ops.aten
RESHAPES = {  # nothing but the shape of their result says what they do
    TENSOR.view, TENSOR.reshape, torch.reshape, TENSOR.flatten, torch.flatten,
    TENSOR.unflatten, torch.unflatten,
}  # fmt: skip
JOINS = {torch.cat, torch.concat, torch.concatenate, torch.stack}
_JOIN = {aten.cat, aten.stack}
_RESHAPE = "reshape"
_ATOMS = frozenset({int, float, bool, str, type(None), complex, torch.dtype, torch.device,
                    torch.layout, torch.memory_format, type(Ellipsis)})  # fmt: skip

Key = tuple[Any, ...]


class _Unlike(Exception):
    """An argument that cannot be compared with one of another call."""


@dataclass(frozen=True)
class Call:
    """A call of a function: what it was given, and what its answer depends on."""

    parts: Key  # the function, and what else than tensors it was given
    shapes: tuple[Shape, ...]
    inputs: tuple[fx.Node, ...]
    key: Key  # where all of its ops take any size


@dataclass(frozen=True)
class Answer:
    """What was found of a call: the ops it is made of, and its results."""

    call: Call
    nodes: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]  # those that sum over channels
    told: Any  # the result, with nodes in the place of its tensors
    results: tuple[fx.Node, ...]
    any_size: bool
    fresh: bool  # it made ids of its own
    draws: bool  # random numbers

    def is_of(self, call: Call) -> bool:
        """Whether a call is the same in all its sizes."""
        return self.call.parts == call.parts and self.call.shapes == call.shapes


@dataclass
class Calls:
    """The answers to all calls that were followed."""

    values: dict[fx.Node, Value]
    used: int = 0  # answers given since the start of the run
    _answers: dict[Key, dict[object, Answer]] = field(default_factory=dict)
    _makers: dict[Key, dict[int, Answer]] = field(default_factory=dict)  # by occurrence
    _symbols: dict[object, int] = field(default_factory=dict)
    _known: dict[fx.Node, tuple[int, frozenset[int]]] = field(default_factory=dict)
    _seen: Counter[Key] = field(default_factory=Counter)
    _calls: dict[object, Call] = field(default_factory=dict)  # by what they were given
    _found: dict[int, Answer] = field(default_factory=dict)  # to those calls, by their id
    _simple: int = 0  # how many values were looked at

    def start(self) -> None:
        """A run begins."""
        self._seen.clear()
        self.used = 0

    def call(
        self,
        func: object,
        args: object,
        kwargs: object,
        nodes_of: Callable[[Iterable[Tensor]], tuple[fx.Node, ...]],
    ) -> Call | None:
        """A call in a form that can be compared; ``None`` where that is not possible."""
        tensors: list[Tensor] = []
        parts: list[Any] = [func]
        try:
            _flatten((args, kwargs), parts, tensors)
        except _Unlike:
            return None
        return self._of(tuple(parts), nodes_of(tensors))

    def reshape(self, node: fx.Node, new: Shape) -> Call | None:
        """A reshape: its answer depends on the blocks of dimensions in which ids vary."""
        old = node.meta["shape"]
        if 0 in old:
            return None
        symbol, dims = self._symbol(node)
        blocks = [
            (len(before), len(after))
            if dims.isdisjoint(before)
            else (old[before.start : before.stop], new[after.start : after.stop])
            for before, after in reshape_blocks(old, new)
        ]
        ones = [tuple(size == 1 for size in shape) for shape in (old, new)]
        key = (_RESHAPE, symbol, node.meta["dtype"], *blocks, *ones)
        return Call((_RESHAPE, new), (old,), (node,), key)

    def _of(self, parts: Key, nodes: tuple[fx.Node, ...]) -> Call:
        call = self._calls.get((parts, nodes))
        if call is None:
            call = self._calls[parts, nodes] = self._keyed(parts, nodes)
        return call

    def _keyed(self, parts: Key, nodes: tuple[fx.Node, ...]) -> Call:
        shapes = tuple(node.meta["shape"] for node in nodes)
        joined: set[int] = set()  # where sizes add up: all of them count
        if parts[0] in JOINS:
            for node, shape in zip(nodes, shapes):
                joined |= {dim - len(shape) for dim in self._symbol(node)[1]}
        key = [*parts]
        places: dict[fx.Node, int] = {}
        for node, shape in zip(nodes, shapes):
            symbol, dims = self._symbol(node)
            sizes = tuple(
                size if size < 2 or dim in dims or dim - len(shape) in joined else -1
                for dim, size in enumerate(shape)
            )
            place = places.setdefault(node, len(places))
            key.append((symbol, place, node.meta["dtype"], sizes))
        return Call(parts, shapes, nodes, tuple(key))

    def _symbol(self, node: fx.Node) -> tuple[int, frozenset[int]]:
        """A number for what a value carries, and the dimensions along which its ids vary."""
        if node not in self._known:
            value = self.values[node]
            key = (
                value.ndim, value.constant, value.given, value.linear,
                *((tuple(i.shape), i.numpy().tobytes()) for i in value.layers),
            )  # fmt: skip
            number = self._symbols.setdefault(key, len(self._symbols))
            dims = frozenset(dim for layer in value.layers for dim in varying(layer))
            self._known[node] = number, dims
        return self._known[node]

    def _maker(self, call: Call) -> Key:
        """A call that makes ids, whatever the sizes."""
        parts = tuple(0 if type(part) is int else part for part in call.parts)
        return (*parts, *(self._symbol(node)[0] for node in call.inputs))

    def find(self, call: Call) -> Answer | None:
        """The answer to a call, from one like it."""
        answer = self._found.get(id(call))
        if answer is None:
            known = self._answers.get(call.key, {})
            answer = known.get(call.shapes) or known.get(None)
            if answer is not None and self._calls.get((call.parts, call.inputs)) is call:
                self._found[id(call)] = answer
        if answer is None:
            key = self._maker(call)
            makers = self._makers.get(key)
            if makers is not None:
                answer = makers.get(self._seen[key])
                self._seen[key] += 1
        self.used += answer is not None
        return answer

    def put(self, answer: Answer) -> None:
        """Remember an answer."""
        if not answer.fresh:
            known = self._answers.setdefault(answer.call.key, {})
            known[answer.call.shapes] = answer
            if answer.any_size:
                known[None] = answer
            return
        key = self._maker(answer.call)
        if key not in self._makers:
            self._makers[key], self._seen[key] = {}, 1
        self._makers[key][self._seen[key] - 1] = answer

    def simplify(self, leaves: Callable[[Tensor], bool]) -> None:
        """A run is over: ids of which none leaves say nothing any more."""
        changed = False
        for node, value in [*islice(self.values.items(), self._simple, None)]:
            left = tuple(layer for layer in value.layers if leaves(layer))
            if len(left) < len(value.layers):
                self.values[node] = replace(value, layers=left)
                changed = True
        self._simple = len(self.values)
        if not changed:
            return
        self._known.clear()
        self._calls.clear()
        self._found.clear()
        answers = [answer for known in self._answers.values() for answer in known.values()]
        makers = [[*known.items()] for known in self._makers.values()]
        self._answers.clear()
        self._makers.clear()
        for answer in answers:
            self.put(replace(answer, call=self._renewed(answer.call)))
        for known in makers:
            for place, answer in known:
                answer = replace(answer, call=self._renewed(answer.call))
                self._makers.setdefault(self._maker(answer.call), {})[place] = answer

    def _renewed(self, call: Call) -> Call:
        if call.parts[0] is _RESHAPE:
            return self.reshape(call.inputs[0], call.parts[1]) or call
        return self._of(call.parts, call.inputs)


def takes_any_size(func: object, nodes: Sequence[fx.Node]) -> bool:
    """Whether what ops do to ids does not depend on the sizes of dimensions without ids."""
    if func is _RESHAPE:  # its blocks are compared
        return True
    others = [n for n in nodes if torch.Tag.pointwise not in getattr(n.target, "tags", ())]
    return all(
        op_of(node).any_size or (func in JOINS and packet_of(node) in _JOIN) for node in others
    )


def fits(value: Value, out: Tensor) -> bool:
    """Whether ids lie as the sizes of a tensor say."""
    return value.ndim == out.dim() and all(
        layer.shape[dim] in (1, size)
        for layer in value.layers
        for dim, size in enumerate(out.shape)
    )


def _flatten(tree: Any, parts: list[Any], tensors: list[Tensor]) -> None:
    kind = type(tree)
    if isinstance(tree, Tensor):
        parts.append(Tensor)
        tensors.append(tree)
    elif kind in _ATOMS:
        parts += (kind, tree)
    elif isinstance(tree, tuple | list):
        parts += (tuple if isinstance(tree, tuple) else list, len(tree))
        for item in tree:
            _flatten(item, parts, tensors)
    elif kind is dict:
        parts.append((dict, *tree))
        for item in tree.values():
            _flatten(item, parts, tensors)
    elif kind is slice:
        parts.append(slice)
        _flatten((tree.start, tree.stop, tree.step), parts, tensors)
    else:
        raise _Unlike


def tensors_in(tree: object) -> Iterator[Tensor]:
    """The tensors of arguments or of a result, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)


def changes(node: fx.Node) -> bool:
    """Whether an op writes into a tensor that it is given."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def looks(node: fx.Node) -> bool:
    """Whether what an op does depends on the values of tensors."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
