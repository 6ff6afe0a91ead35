"""What stands in for modules that leave, so that the code around them goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ops.registry import op_of
from graphprune.ops.vanishing import zero_of_zeroes
from graphprune.parts.stream import (
    NOTHING,
    Dims,
    Narrowed,
    Stream,
    aten,
    covers,
    holder_of,
    is_getitem,
    leaves,
    operand,
)
from graphprune.plan.changes import Cut, StandIn
from graphprune.record.joins import Place, Run
from graphprune.record.sizes import Extent, expression, extents


class Emptying(Stream):
    """What takes the place of modules when operands of sums count as zero."""

    def stand_ins(self, cuts: Iterable[Cut], narrowed: Narrowed = NOTHING) -> list[StandIn] | None:
        """What takes the place of the modules that leave; ``None`` where the code cannot go on.

        Args:
            cuts: the sums of which an operand counts as zero.
            narrowed: the values of which channels leave.
        """
        sides = {cut.key: cut.side for cut in cuts}
        missed: set[str] = set()  # of what nobody needed before: what would be given other shapes
        while True:
            made, more = self._stand_ins(sides, narrowed, missed)
            if more <= missed:
                return made
            missed |= more

    def _stand_ins(
        self, sides: Mapping[Place, int], narrowed: Narrowed, missed: Set[str]
    ) -> tuple[list[StandIn] | None, set[str]]:
        """What takes the place of modules, and which idle ones then cannot stay."""
        needed = self.needed(sides, narrowed)
        gone: dict[str, list[_Leaving]] = {}
        idle: set[str] = set()
        waiting = [""]
        while waiting:
            name = waiting.pop()
            leaving = self._leaving(name, needed, sides, narrowed.empty) if name else None
            if leaving and name not in missed and self._is_idle(name):
                idle.add(name)
            elif leaving:
                gone[name] = leaving
            else:
                waiting += self._children(name)
        zeroes, empties = self._zeroes(sides, gone), self._empties(narrowed.empty, needed, gone)
        if zeroes is None or empties is None:
            return None, set()
        for wide in (False, True):
            broad = (
                set[fx.Node]() if wide else {node for node, whole in zeroes.items() if not whole}
            )
            known = self._known_dims(gone, sides, narrowed, empties, broad)
            if not self._is_measured(needed, known, narrowed.dims):
                more = {name for name in idle if self._is_given_other(name, known)}
                return _made(gone, zeroes, empties, known, wide), more
        return None, set()

    def _is_idle(self, name: str) -> bool:
        """Whether the outputs do not need a module of the whole model either."""
        return all(
            self._needed.isdisjoint(self.nodes[run.begin : run.end])
            and self._needed.isdisjoint(node for _, node in leaves(run.out))
            for run in self.calls[name]
        )

    @cached_property
    def _needed(self) -> set[fx.Node]:
        return self.needed({})

    def _is_given_other(self, name: str, known: Dims) -> bool:
        """Whether a module is given a value of another shape than before."""
        given = (node for run in self.calls[name] for _, node in leaves((run.args, run.kwargs)))
        return any(len(known.get(n, n.meta["shape"])) < len(n.meta["shape"]) for n in given)

    def _is_measured(self, needed: set[fx.Node], known: Dims, narrowed: Dims) -> bool:
        """Whether code that stays asks for a size that is another one now."""
        return any(
            size.node in known
            and size.dim not in known[size.node] | narrowed.get(size.node, frozenset())
            for node in (needed & self._given_sizes.keys() if known else ())
            for size in self._given_sizes[node]
        )

    @cached_property
    def _given_sizes(self) -> dict[fx.Node, list[Extent]]:
        """The sizes of values that the code gave to ops."""
        found = {}
        for node in self.nodes:
            sizes = [
                size
                for number in node.meta.get("numbers", ())
                for size in extents(expression(number.value))
            ]
            if sizes:
                found[node] = sizes
        return found

    def _children(self, name: str) -> list[str]:
        prefix = f"{name}." if name else ""
        children = self.modules[name]._modules if name in self.modules else {}
        return [prefix + key for key, child in children.items() if child is not None]

    def _leaving(
        self, name: str, needed: set[fx.Node], sides: Mapping[Place, int], dead: Dims
    ) -> list[_Leaving] | None:
        """How every call of a module ends when the module leaves; ``None`` when it is needed."""
        runs = self.calls.get(name)
        if not runs or name not in self.modules:
            return None
        found = []
        busy = False
        for run in runs:
            inside = self.nodes[run.begin : run.end]
            if any(node in needed for node in self._readers(run)):
                return None  # a result that some parameter is needed for
            busy = busy or any(node.op in ("call_function", "get_attr") for node in inside)
            results = {node for _, node in leaves(run.out)}
            own = [n for n in inside if n.op == "call_function" and n not in results | dead.keys()]
            if any(self._escapes(node, run, needed) for node in own):
                return None
            leaving = _Leaving.of(run, self, needed, sides, dead)
            if leaving is None:
                return None
            found.append(leaving)
        return found if busy or self._remembers(name) else None

    def _remembers(self, name: str) -> bool:
        """Whether something in a module keeps what it sees: in train mode it may run more ops."""
        inside = (part for other, part in self.modules.items() if covers(name, other))
        return any(part._buffers for part in inside)

    def _readers(self, run: Run) -> list[fx.Node]:
        """The nodes in a call that read a tensor of the model."""
        key = run.begin, run.end
        if key not in self._known_readers:
            self._known_readers[key] = [
                node
                for node in self.nodes[run.begin : run.end]
                if any(each.op == "get_attr" for each in node.all_input_nodes)
            ]
        return self._known_readers[key]

    @cached_property
    def _known_readers(self) -> dict[tuple[int, int], list[fx.Node]]:
        return {}

    def _escapes(self, node: fx.Node, run: Run, needed: set[fx.Node]) -> bool:
        """Whether something outside of a call needs a value that the call does not return."""
        return any(
            user in needed and not run.begin <= self.place.get(user, run.begin) < run.end
            for user in node.users
        )

    def _zeroes(
        self, sides: Mapping[Place, int], gone: Mapping[str, list[_Leaving]]
    ) -> dict[fx.Node, bool] | None:
        """The results of what leaves that must be zero, and whether in their whole shape.

        Where they need not, they have size one in all dimensions but the first: sums broadcast.
        """
        results = {
            node for leavings in gone.values() for leaving in leavings for node in leaving.free
        }
        found: dict[fx.Node, bool] = {}
        for node, place in self.sums.items():
            side = sides.get(place)
            if side is None or self._inside(node, gone):
                continue
            whole = node.target is aten.add_.Tensor and side == 0  # it is written into
            if not self._zero(operand(node, side), results, found, whole):
                return None
        return found

    def _empties(
        self, dead: Dims, needed: set[fx.Node], gone: Mapping[str, list[_Leaving]]
    ) -> Dims | None:
        """The results of what leaves that must have no channels, and in which dimensions."""
        results = {
            node for leavings in gone.values() for leaving in leavings for node in leaving.free
        }
        waiting = [
            operand
            for node in (needed & self.joins if dead else ())
            if not self._inside(node, gone)
            for operand in node.all_input_nodes
            if operand in dead
        ]
        found: dict[fx.Node, frozenset[int]] = {}
        while waiting:
            node = waiting.pop()
            if node in results:
                found[node] = dead[node]
                continue
            before = [each for each in node.all_input_nodes if each in dead]
            if not before or not _takes_nothing(node, dead):
                return None
            waiting += before
        return found

    def _known_dims(
        self,
        gone: Mapping[str, list[_Leaving]],
        sides: Mapping[Place, int],
        narrowed: Narrowed,
        empties: Dims,
        broad: Set[fx.Node],
    ) -> dict[fx.Node, frozenset[int]]:
        """The dimensions in which values keep their size although something else stands there.

        Values that are not in the dictionary are as they were. The zeroes of ``broad`` are only as
        large as sums need.
        """
        leavings = [leaving for leavings in gone.values() for leaving in leavings]
        results = {node: leaving for leaving in leavings for node in leaving.free}
        inside = {
            node for leaving in leavings for node in self.nodes[leaving.run.begin : leaving.run.end]
        }
        known: dict[fx.Node, frozenset[int]] = {}
        for node in self.nodes:
            if node in empties:
                continue  # what it is concatenated with is as wide as the plan makes it
            if node in results:
                dims = results[node].like(node, known, node in broad)
                if dims is not None:
                    known[node] = dims
            elif self.sums.get(node) in sides:
                kept = operand(node, 1 - sides[self.sums[node]])
                if kept in known:
                    known[node] = known[kept]
            elif node not in inside and not known.keys().isdisjoint(node.all_input_nodes):
                known[node] = self._pointwise_dims(node, known)
        for node, dims in narrowed.dims.items():
            known[node] = known.get(node, frozenset(range(len(node.meta["shape"])))) - dims
        return known

    def _pointwise_dims(self, node: fx.Node, known: Dims) -> frozenset[int]:
        sources = node.all_input_nodes
        rank = len(node.meta.get("shape", ()))
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if not pointwise or any(len(s.meta.get("shape", ())) != rank for s in sources):
            return frozenset()
        return frozenset(range(rank)).intersection(*(known[s] for s in sources if s in known))

    def _inside(self, node: fx.Node, gone: Mapping[str, list[_Leaving]]) -> bool:
        """Whether a node belongs to the call of a module that leaves."""
        place = self.place[node]
        return any(
            leaving.run.begin <= place < leaving.run.end
            for leavings in gone.values()
            for leaving in leavings
        )

    def _zero(
        self, node: fx.Node, results: set[fx.Node], found: dict[fx.Node, bool], whole: bool
    ) -> bool:
        """Let a value be zero by letting what modules return be zero."""
        if node in results:
            found[node] = found.get(node, False) or whole
            return True
        if node.op != "call_function":
            return False
        op, operands = op_of(node), node.all_input_nodes
        factors = [each for each, power in zip(operands, op.powers) if power > 0]
        if len(op.powers) > 1:
            return any(self._zero(each, results, found, whole) for each in factors)
        if op.signs or is_getitem(node) or zero_of_zeroes(node):
            return all(self._zero(each, results, found, True) for each in operands)
        return False


def _made(
    gone: Mapping[str, list[_Leaving]],
    zeroes: Mapping[fx.Node, bool],
    empties: Dims,
    known: Dims,
    wide: bool,
) -> list[StandIn] | None:
    """What takes the place of modules; ``None`` where a call of one ends unlike the others."""
    made = []
    for name, leavings in gone.items():
        ways = {leaving.gives(zeroes, empties, known, wide) for leaving in leavings}
        holder, gives = ways.pop()
        if ways or None in gives:
            return None
        made.append(StandIn(name, tuple(map(str, gives)), holder))
    return sorted(made, key=lambda stand_in: stand_in.module)


@dataclass
class _Leaving:
    """A call of a module that leaves: what hands on what, and what no one needs."""

    run: Run
    kept: dict[tuple[object, ...], str]  # results that are needed, and the argument they equal
    free: set[fx.Node]  # the others
    given: dict[fx.Node, str]  # the arguments, and the way to each

    @classmethod
    def of(
        cls,
        run: Run,
        stream: Stream,
        needed: set[fx.Node],
        sides: Mapping[Place, int],
        dead: Dims,
    ) -> _Leaving | None:
        """What is known of a call; ``None`` where something of its results is still needed."""
        if holder_of(run.out) is None:
            return None
        given: dict[fx.Node, str] = {}
        sources: dict[fx.Node, str] = {}
        for path, node in leaves((run.args, run.kwargs)):
            text = ".".join(("kwargs" if path[0] else "args", *map(str, path[1:])))
            sources.setdefault(stream.source(node, sides), text)
            if node.op != "get_attr":
                given.setdefault(node, text)
        kept: dict[tuple[object, ...], str] = {}
        free: set[fx.Node] = set()
        outer = _used_after(run, stream, needed, sides) - dead.keys()
        for path, node in leaves(run.out):
            if node not in outer:
                free.add(node)
                continue
            same = sources.get(stream.source(node, sides))
            if same is None:
                return None
            kept[path] = same
        return cls(run, kept, free, given)

    def nearest(self, node: fx.Node, known: Dims) -> tuple[fx.Node, frozenset[int]] | None:
        """The argument most like a result, and the dimensions in which it has the same size."""
        shape = node.meta["shape"]
        found: list[tuple[fx.Node, frozenset[int]]] = []
        for other in self.given:
            if other.meta["dtype"] == node.meta["dtype"] and len(other.meta["shape"]) == len(shape):
                same = (dim for dim, size in enumerate(shape) if other.meta["shape"][dim] == size)
                found.append(
                    (other, frozenset(same) & known.get(other, frozenset(range(len(shape)))))
                )
        return max(found, key=lambda pair: len(pair[1]), default=None)

    def like(self, node: fx.Node, known: Dims, broad: bool) -> frozenset[int] | None:
        """The dimensions in which what is returned in place of a result has its size; all."""
        found, shape = self.nearest(node, known), node.meta["shape"]
        dims = frozenset() if found is None else found[1]
        if broad:
            ones = {dim for dim, size in enumerate(shape) if size == 1}
            dims = frozenset({*sorted(dims)[:1], *ones})
        return None if found and len(dims) == len(shape) else dims

    def gives(
        self, zeroes: Mapping[fx.Node, bool], empties: Dims, known: Dims, wide: bool
    ) -> tuple[str, tuple[str | None, ...]]:
        """What a stand-in returns: its holder and its items; ``None`` where none would do."""
        holder = holder_of(self.run.out) or ""
        items = [self.run.out] if not holder else self.run.out
        return holder, tuple(
            self._item(item, (number,) if holder else (), zeroes, empties, known, wide)
            for number, item in enumerate(items)
        )

    def _item(
        self,
        item: object,
        path: tuple[object, ...],
        zeroes: Mapping[fx.Node, bool],
        empties: Dims,
        known: Dims,
        wide: bool,
    ) -> str | None:
        if not isinstance(item, fx.Node):
            return "none"
        if path in self.kept:
            return self.kept[path]
        if item in empties:
            return self._none_of(item, empties[item], known)
        found, whole = self.nearest(item, known), zeroes.get(item)
        if found is None or not found[1]:
            return None if whole else "zero"
        text = self.given[found[0]]
        if whole is None:  # nothing that stays depends on it
            return text
        if whole:
            return f"zeros {text}" if item not in known else None
        dims = sorted(found[1]) if wide else [min(found[1])]
        return f"zeros {text} in {','.join(map(str, dims))}"

    def _none_of(self, item: fx.Node, dims: frozenset[int], known: Dims) -> str | None:
        """What has the sizes of a result but for those that are zero.

        Where no argument tells them, something empty, which concatenations skip; what comes before
        these may not need the others.
        """
        shape = item.meta["shape"]
        others = frozenset(range(len(shape))) - dims
        counts: dict[str, int] = {}
        for node, text in self.given.items():
            own = node.meta["shape"]
            if node.meta["dtype"] == item.meta["dtype"] and len(own) == len(shape):
                same = (dim for dim in others & known.get(node, others) if own[dim] == shape[dim])
                counts[text] = sum(1 for _ in same)
        best = max(counts, key=counts.__getitem__, default=None)
        told = best is not None and counts[best] == len(others)
        if not told and all(op_of(user).joins for user in item.users):
            return "empty"
        return best and f"none of {best} in {','.join(map(str, sorted(dims)))}"


def _takes_nothing(node: fx.Node, dead: Dims) -> bool:
    """Whether an op runs on values without channels: kernels of poolings, say, refuse them."""
    if is_getitem(node) or op_of(node).keeps == "order":
        return True
    if any(each not in dead for each in node.all_input_nodes):
        return torch.Tag.pointwise in getattr(node.target, "tags", ())

    def nothing(each: fx.Node) -> Tensor:
        sizes = [0 if d in dead[each] else size for d, size in enumerate(each.meta["shape"])]
        return torch.empty(sizes, dtype=each.meta["dtype"])

    target: Any = node.target
    try:
        target(*fx.node.map_arg(node.args, nothing), **fx.node.map_arg(node.kwargs, nothing))
    except Exception:  # whatever a kernel raises
        return False
    return True


def _used_after(
    run: Run, stream: Stream, needed: set[fx.Node], sides: Mapping[Place, int]
) -> set[fx.Node]:
    """The results of a call that something outside needs."""
    found = set()
    for _, node in leaves(run.out):
        if node in stream.ends:
            found.add(node)
        for user in node.users:
            inside = run.begin <= stream.place.get(user, -1) < run.end
            if inside or user not in needed:
                continue
            side = sides.get(stream.sums[user]) if user in stream.sums else None
            if side is None or user.args[1 - side] is node:
                found.add(node)
    return found
