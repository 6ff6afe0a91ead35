"""The walk over a recorded graph.

A rule is called as ``rule(walk, node, *args, **kwargs)`` with the arguments of the op, where
every tensor is a :class:`Value`. It declares ties on ``walk`` and returns the layers of the
result, or a list of them for an op with several results.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ops.calls import target_of
from graphprune.ops.ids import (
    Alternatives,
    Layers,
    Shape,
    Ties,
    Way,
    align,
    along,
    first_along,
    varying,
)
from graphprune.ops.marks import Marks, Statistics
from graphprune.ops.registry import Op, op_name, op_of
from graphprune.ops.values import Natural, Reason, Value


def _emptied(result: Any) -> bool:
    """Whether no ids are left to say what varies along a layer."""
    if isinstance(result, Tensor):
        return not result.numel() and bool(varying(result))
    return any(map(_emptied, result or ()))


def _told(result: Any, index: int) -> bool:
    """Whether a rule says what one of several results carries; an empty tuple: nothing at all."""
    return result == () or index < len(result)


def _is_linear(op: Op, inputs: Sequence[Value]) -> bool:
    """Whether the result is zero where operands are that are zero with their parameters."""
    if op.linear:
        return bool(inputs) and all(value.linear for value in inputs)
    return any(value.linear for value, power in zip(inputs, op.powers) if power >= 1)


@dataclass
class Walk:
    """What rules are applied with, node by node: they write to its ties and its marks.

    Where a plan is followed instead of made, ``by_blocks``, ``row`` and ``leaves`` ask it.

    Attributes:
        by_blocks: whether a grid that a node reads along a dimension is cut along this one.
        row: what stands for a layer along some dimensions, of size 1 there.
        leaves: whether any ids of a layer are known to leave.
    """

    ties: Ties
    slots: Callable[[str], Value | None]
    attention: str = "heads"
    numbers: Callable[[str], Tensor | None] = lambda name: None
    values: dict[fx.Node, Value] = field(default_factory=dict)
    marks: Marks = field(default_factory=Marks)
    copied: list[tuple[int, int]] = field(default_factory=list)
    unused: set[fx.Node] = field(default_factory=set)
    by_blocks: Callable[[fx.Node, Tensor, int], bool] = lambda node, layer, dim: False
    row: Callable[[Tensor, Iterable[int]], Tensor] = first_along
    leaves: Callable[[Tensor], bool] = lambda layer: False
    crossed: list[tuple[fx.Node, Tensor]] = field(default_factory=list)
    node: fx.Node | None = None
    rows: Tensor | None = None  # ids of rows that may leave, though tables and outputs hold them
    lookups: Set[fx.Node] = frozenset()  # ops that read such rows by ids
    returned: list[Tensor] = field(default_factory=list)  # what outputs hold, where there are any

    def __post_init__(self) -> None:
        self.first_fresh = self.ties.size

    def is_fresh(self, layer: Tensor) -> bool:
        """Whether the ids of a layer belong to no parameter."""
        return bool((layer >= self.first_fresh).all())

    def run(self, graph: fx.Graph) -> None:
        """Walk a recorded graph."""
        self.unused |= unused(graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = Value(node.meta["shape"], given=True)
            elif node.op == "get_attr":
                value = self.slots(str(node.target))
                self.values[node] = value or Value(node.meta["shape"], constant=True)
            elif node.op == "output":
                for value in self._values(node.args):
                    if self.rows is None:
                        self.freeze_value(value, Reason(Natural.OUTPUT))
                    else:
                        self.returned += value.layers
            elif node.target is not operator.getitem:
                self.apply(node)
        self.finish()

    def finish(self) -> None:
        """What is known only when all ops were seen."""
        self.marks.finish(self.ties)
        if self.rows is not None and self.returned:
            labels = torch.from_numpy(self.ties.components())
            for layer in self.returned:
                ids = layer.reshape(-1)
                free = torch.isin(labels[ids], labels[self.rows])
                self.ties.freeze(ids[~free], Reason(Natural.OUTPUT))
            self.returned = []

    def _looked_up(self, layer: Tensor) -> bool:
        """Whether the current op reads rows that may leave by ids, which leave with them."""
        if self.rows is None or self.node not in self.lookups:
            return False
        return bool(torch.isin(layer, self.rows).all())

    def apply(self, node: fx.Node) -> None:
        """Apply the rule of one op to the values that it reads."""
        self.node = node
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        inputs = list(self._values((node.args, node.kwargs)))
        op = op_of(node)
        if len(inputs) > 1 and not op.layer:
            many = [v.layers for v in inputs if v.constant and len(v.layers) > 2]
            self.marks.stacked.extend(layer for layers in many for layer in layers)
        constant = bool(inputs) and all(value.constant for value in inputs)
        rule = None if unruly(node) else op.channels
        if not op.makes and not any(value.layers for value in inputs):
            result: Any = ()
        elif rule is not None:
            result = rule(self, node, *args, **kwargs)
        else:
            result = self.refuse(inputs)
        if any(0 in value.shape for value in inputs) and _emptied(result):
            result = self.refuse(inputs, "channels of a tensor without elements")
        items = node.meta.get("items", {})
        if any(item.users and not _told(result, index) for index, item in items.items()):
            result = self.refuse(inputs, f"a result of {op_name(node)} that its rule leaves out")
        given = any(value.given for value in inputs)
        linear = _is_linear(op, inputs)
        if "shape" in node.meta:
            self._store(node, result or (), constant, given, linear)
        for index, item in items.items():
            layers = result[index] if result and index < len(result) else ()
            self._store(item, layers, constant, given, linear)

    def _value(self, node: fx.Node) -> Any:
        return self.values[node]

    def _store(
        self, node: fx.Node, layers: Iterable[Tensor], constant: bool, given: bool, linear: bool
    ) -> None:
        layers = self.vary(layers)
        given = given and not layers
        self.values[node] = Value(node.meta["shape"], layers, constant, given, linear)

    def _values(self, tree: Any) -> Iterable[Value]:
        found: list[Value] = []
        fx.map_arg(tree, lambda n: found.append(self.values[n]))
        return found

    def vary(self, layers: Iterable[Tensor]) -> Layers:
        """Drop layers that became constant; the one channel they name must stay."""
        kept = []
        for layer in layers:
            dims = varying(layer)
            if not dims:
                self.freeze(layer, "a single channel is taken out by index")
            elif len(dims) > 1 and self.is_copy(layer):
                self.freeze(layer, "copies in several dimensions")
            else:
                kept.append(layer)
                if len(dims) > 1:
                    self.keep_grid(layer)
        return tuple(kept)

    def copies(self, count: int) -> Tensor:
        """New ids for positions that all hold the same value."""
        first = self.ties.size
        ids = self.ties.fresh(count)
        if self.copied and self.copied[-1][1] == first:
            first = self.copied.pop()[0]
        self.copied.append((first, self.ties.size))
        return ids

    def is_copy(self, layer: Tensor) -> bool:
        """Whether a layer consists of copies: of masks over places, hardly of channels."""
        first, last = int(layer.min()), int(layer.max())
        place = bisect.bisect_right(self.copied, (first, self.ties.size)) - 1
        return place >= 0 and last < self.copied[place][1]

    def reason(self, text: str) -> Reason:
        """A reason at the current node."""
        node = self.node
        if node is None:
            return Reason(text)
        return Reason(text, node.meta.get("module", ""), node.meta.get("line"))

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Tie two layers position by position."""
        self.ties.tie(a, b)

    def collapse(self, layer: Tensor, dims: Iterable[int]) -> Tensor:
        """Tie the ids of a layer along ``dims`` and return what stands for it there."""
        row = self.row(layer, dims)
        if row is not layer:
            self.tie(row, layer)
        return row

    def sides(self, layer: Tensor, dims: Iterable[int]) -> Layers:
        """What stands for a grid along ``dims``; of one that was cut both ways, its other side too.

        Several plans in a row cut a grid (heads x width) along either side.
        """
        side = self.row(layer, varying(layer) - set(dims))
        row = self.row(layer, dims)
        return (row, side) if self.leaves(side) else (row,)

    def align(self, layer: Tensor, dims: Iterable[int]) -> None:
        """Parts along ``dims`` that must stay equally large: they keep equal columns."""
        first = layer
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        self.marks.aligned.append((first, layer))

    def freeze(self, layer: Tensor, text: str) -> None:
        """Ids that must stay."""
        self.ties.freeze(layer, self.reason(text))

    def freeze_value(self, value: Value, reason: Reason) -> None:
        """Freeze all ids of a value."""
        for layer in value.layers:
            self.ties.freeze(layer, reason)

    def refuse(self, inputs: Iterable[Value], text: str | None = None) -> Any:
        """Freeze everything an op reads: the fate of ops without a rule."""
        node = self.node
        assert node is not None
        known: str = getattr(node.target, "reason", f"unknown op {op_name(node)}")
        for value in inputs:
            self.freeze_value(value, self.reason(text or known))
        return ()

    def settle(self, value: Value, dims: Iterable[int], text: str) -> Layers:
        """The layers of a value that do not vary along ``dims``.

        Layers that vary along ``dims`` and elsewhere are tied along ``dims``; layers that vary
        only along ``dims`` are frozen for the reason ``text``.
        """
        dims = frozenset(dims)
        kept = []
        for layer in value.layers:
            if varying(layer) <= dims:
                if not self._looked_up(layer):
                    self.freeze(layer, text)
            else:
                kept.append(self.collapse(layer, dims))
        return tuple(kept)

    def broadcast(self, values: Iterable[Value], ndim: int, text: str = "") -> Layers:
        """Tie values position by position, as a pointwise op does, and return their layers."""
        values = self._single(list(values), ndim)
        items = [
            (index, align(layer, ndim), (1,) * (ndim - value.ndim) + tuple(value.shape))
            for index, value in enumerate(values)
            for layer in (value.layers or (torch.zeros((1,) * value.ndim, dtype=torch.int64),))
        ]
        found = self._around_fixed(items, text or "combined with a tensor of fixed size")
        first: dict[frozenset[int], int] = {}  # layers along one dimension are tied to the first
        for index, layer, _, dims in found:
            if not dims:
                continue
            leads = first.setdefault(dims, index) == index
            for other, partner, _, others in found:
                follows = dims == others and len(dims) == 1 and not leads
                if other > index and dims & others and not follows:
                    self._meet(layer, partner)
        chosen: list[tuple[int, Tensor, frozenset[int]]] = []
        for index, layer, _, dims in sorted(found, key=lambda item: -len(item[3])):
            tied = any(other != index and dims <= taken for other, _, taken in chosen)
            if dims and not tied:
                chosen.append((index, layer, dims))
        return tuple(layer for _, layer, _ in chosen)

    def _single(self, values: list[Value], ndim: int) -> list[Value]:
        """One layer each in the dimensions where other values vary as well."""
        if not any(len(value.layers) > 1 for value in values):
            return values
        result = []
        for index, value in enumerate(values):
            for dim in range(value.ndim) if len(value.layers) > 1 else ():
                place = dim - value.ndim
                others = (v for i, v in enumerate(values) if i != index and v.ndim >= -place)
                if any(v.on(place) for v in others):
                    value = replace(value, layers=self.single(value, dim))
            result.append(value)
        return result

    def single(self, value: Value, dim: int) -> Layers:
        """The layers of a value, with one of those that vary along ``dim`` alone.

        Two of them come from dimensions that were merged. Either they say the same (heads, and
        heads x width), or channels can leave along one of them only, the outermost.
        """
        pure = [layer for layer in value.layers if varying(layer) == {dim % value.ndim}]
        if len(pure) < 2:
            return value.layers
        changes = [int((i.flatten().diff() != 0).sum()) for i in pure]
        best = min(range(len(pure)), key=lambda n: (self.is_fresh(pure[n]), changes[n]))
        for layer in pure:
            if layer is not pure[best]:
                reason = self.reason("merged with other channels")
                same = Way(((layer, pure[best]),))
                stays = Way(frozen=(layer,), aligns=True, reason=reason)
                both = torch.cat([layer.flatten(), pure[best].flatten()])
                self.choose(Alternatives(both, (same, stays), firm=True))
        return tuple(i for i in value.layers if i is pure[best] or not any(i is p for p in pure))

    def _meet(self, a: Tensor, b: Tensor) -> None:
        """Tie two layers.

        What varies along one side of a grid (heads x width) is cut with the grid along that side,
        or stays while the grid is cut along the other.
        """
        for line, grid in ((a, b), (b, a)):
            side = varying(line)
            if len(side) == 1 and side < varying(grid):
                (dim,) = side
                columns = Way(((line, grid),))
                rows = ((grid.narrow(dim, 0, 1), grid),)
                if self.is_fresh(line):
                    stays = Way(rows, (line,), aligns=True)
                    self.choose(Alternatives(grid, (stays, columns)))
                else:
                    reason = self.reason("met a grid that is cut along its other side")
                    stays = Way(rows, (line,), aligns=True, reason=reason)
                    self.choose(Alternatives(grid, (columns, stays), firm=True))
                return
        self.tie(a, b)

    def _around_fixed(
        self, items: list[tuple[int, Tensor, Shape]], text: str
    ) -> list[tuple[int, Tensor, Shape, frozenset[int]]]:
        """Dimensions in which another operand has a fixed size keep theirs.

        Layers that vary elsewhere too (heads x width) are tied along them, others are frozen.
        """
        sizes: dict[int, Shape] = {}
        moving: dict[int, set[int]] = {}
        for index, layer, shape in items:
            sizes[index] = shape
            moving.setdefault(index, set()).update(varying(layer))
        found = []
        for index, layer, shape in items:
            dims = varying(layer)
            fixed = {
                dim
                for dim in dims
                for other, size in sizes.items()
                if other != index and size[dim] > 1 and dim not in moving[other]
            }
            if fixed == dims and dims:
                self.freeze(layer, text)
            elif fixed:
                layer = self.collapse(layer, fixed)
            found.append((index, layer, shape, varying(layer)))
        return found

    def keep_grid(self, layer: Tensor, dims: Iterable[int] = ()) -> None:
        """A layer that varies along several dimensions; along ``dims`` no row leaves alone."""
        self.marks.grids.append((layer, frozenset(dims)))

    def read_along(self, value: Value, dim: int) -> Value:
        """A value that a weight reads along one side of a grid (blocks x width).

        The grid is cut along its other side, which the result still has (``crossed`` tells what
        leaves then), or along this one where ``by_blocks`` says so.
        """
        layers: list[Tensor] = []
        for layer in value.layers:
            others = varying(layer) - {dim}
            if layer.shape[dim] > 1 and others and self.node is not None:
                self.crossed.append((self.node, layer.narrow(dim, 0, 1)))
                if self.by_blocks(self.node, layer, dim):
                    self.collapse(layer, others)
                    layers += self.sides(layer, others)
                    continue
            layers.append(layer)
        return replace(value, layers=tuple(layers))

    def choose(self, choice: Alternatives) -> None:
        """Leave a decision between several ways to tie until the walk is over."""
        self.marks.choices.append(choice)

    def combine(self, layers: Iterable[Tensor]) -> None:
        """Ids of parameters along one dimension that are read together, or not."""
        self.marks.combined.append([layer.reshape(-1) for layer in layers])

    def renumber(self, buffer: str, ids: Tensor) -> Tensor:
        """The numbers in a buffer name these ids: those that were said first are returned."""
        return self.marks.renumbered.setdefault(buffer, ids)

    def read(self, *layers: Tensor) -> None:
        """Ids of a parameter that is contracted away: a reading slot."""
        self.marks.reads.extend(layers)

    def read_part(self, parts: Tensor, others: Tensor) -> None:
        """A slice of a table is read; what no slice reads may be read for other inputs."""
        self.marks.rows.append(parts.reshape(-1))
        if others.numel():
            self.marks.other_rows.append((others.reshape(-1), self.reason("rows not read here")))

    def reading(self) -> None:
        """The current node sums over channels: the reference zeroes what it reads."""
        assert self.node is not None
        self.marks.readers.add(self.node)

    def write(self, value: Value, others: Iterable[Value], layers: Iterable[Tensor]) -> None:
        """Channels of the result that a parameter makes in a product."""
        if value.constant and value.linear and not any(other.constant for other in others):
            self.marks.written.extend(layers)

    def share(self, layer: Tensor, text: str) -> None:
        """A softmax over these ids: over the kept ones, if they are channels."""
        self.renormalise(layer, text)
        self.mask(layer)
        self.marks.softmaxes.append((layer, self.reason(text)))

    def renormalise(self, ids: Tensor, text: str) -> None:
        """Removing these ids changes statistics (which matters when someone reads these)."""
        assert self.node is not None
        if op_of(self.node).masked is None:  # the reference could not be computed
            self.freeze(ids, f"no statistics under a mask are declared of {op_name(self.node)}")
        elif self.node not in self.unused:
            self.marks.statistics.append(Statistics(ids.reshape(-1), self.reason(text), self.node))

    def mask(self, *layers: Tensor) -> None:
        """Zeroed parameters do not zero these ids in what the current node reads."""
        assert self.node is not None
        self.marks.readers.add(self.node)
        self.marks.masked.setdefault(self.node, []).extend(layers)

    def spare(self, *layers: Tensor) -> None:
        """Zeroed parameters would break the current node: what reads its result is zeroed."""
        assert self.node is not None
        self.marks.masked.setdefault(self.node, []).extend(layers)

    def extents(self, shape: Shape) -> Layers:
        """One layer of fresh ids per dimension: a constant that can be cut anywhere."""
        return tuple(
            along(self.copies(size), dim, len(shape)) for dim, size in enumerate(shape) if size > 1
        )


def unused(graph: fx.Graph) -> set[fx.Node]:
    """Ops whose results nothing reads in the end."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        changes = node.target is not operator.getitem and (schema is None or schema.is_mutable)
        if node.op == "call_function" and not changes and all(u in found for u in node.users):
            found.add(node)
    return found


def unruly(node: fx.Node) -> bool:
    """Whether an op is not what its rule is about.

    It writes into a tensor given as ``out``, and is not pointwise; or ``torch.vmap`` hides
    dimensions from it.
    """
    op = target_of(node)
    out = getattr(op, "_overloadname", "").endswith("out") and torch.Tag.pointwise not in op.tags
    return out or bool(node.meta.get("transformed"))
