"""Find what can leave whole: branches that are added to a stream, and blocks made of them.

Nothing is told by names or classes. Where the code of a model adds two tensors, one operand may
count as zero: what was computed for it alone is then not needed any more. Modules of which nothing
is needed leave; something small in their place keeps the code around them running. A block is a
module that hands its input on once the branches in it add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from graphprune.ops.registry import op_of, packet_of
from graphprune.ops.views import macs_of
from graphprune.plan.changes import Cut, StandIn
from graphprune.record.cost import recorded_shape, storages
from graphprune.record.inputs import Call
from graphprune.record.joins import Place, Run, Watched
from graphprune.record.recording import record
from graphprune.record.tensors import named_modules

aten = torch.ops.aten
_SUMS = {aten.add.Tensor, aten.add_.Tensor}
_SAME = {aten.detach, aten.alias, aten.clone}  # the values of their input
_ORDERED = {aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.squeeze}
_RECTIFIED = {aten.relu, aten.relu_}
_CLAMPED = {aten.hardtanh, aten.hardtanh_, aten.clamp, aten.clamp_}
_PRODUCTS = {aten.mul, aten.mul_, aten.div, aten.div_}
_NOT_NEGATIVE = {aten.relu, aten.relu_, aten.sigmoid, aten.sigmoid_, aten._softmax, aten.exp}
_LARGEST = {aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.avg_pool2d}


@dataclass(frozen=True)
class Part:
    """A part of a model that can leave whole.

    Attributes:
        name: the module that leaves, or the largest one of those that do.
        kind: ``"block"`` or ``"branch"``.
        modules: the outermost modules that leave.
        cuts: the sums in which an operand counts as zero.
        params: parameters that leave with it alone.
        macs: multiply-accumulates of the example inputs that leave with it alone.
    """

    name: str
    kind: str
    modules: tuple[str, ...]
    cuts: tuple[Cut, ...] = field(repr=False)
    params: int = 0
    macs: int = 0


class Zero(IntEnum):
    """In which shape a value must be zero, so that the code around it goes on."""

    SINGLE = 0  # one number
    THIN = 1  # of size one in dimensions that are not known
    WHOLE = 2


class Finder:
    """What can leave of a model, as its recorded graph tells."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.watched = Watched()
        self.record = record(model, call, False, watch=self.watched.watching)
        self.nodes = self.watched.nodes
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.modules = dict(named_modules(model))
        self.calls: dict[str, list[Run]] = {}
        for run in self.watched.runs:
            self.calls.setdefault(run.module, []).append(run)
        self.sums = {node: place for place, nodes in self.watched.sums.items() for node in nodes}
        outputs, counted = self.record.outputs, self.record.counted
        self.ends = [n for place, n in enumerate(outputs) if counted is None or place in counted]
        self.roots = storages(self.nodes)
        self.writes: dict[fx.Node, list[fx.Node]] = {}  # of parts of a storage, by its root
        for node in self.nodes:
            if _writes(node):
                written: Any = node.args[0]
                self.writes.setdefault(self.roots.get(written, node), []).append(node)
        self.owner = self._owners(model)
        self.macs = {node: int(macs_of(node, recorded_shape)) for node in self.record.ops}

    def _owners(self, model: nn.Module) -> dict[int, set[str]]:
        """The modules that hold each parameter, by its ``id``."""
        owners: dict[int, set[str]] = {}
        for name, module in self.modules.items():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), set()).add(name)
        return owners

    # --- what is needed ---------------------------------------------------------------------

    def needed(self, sides: Mapping[Place, int]) -> set[fx.Node]:
        """The nodes that the outputs need when operands of some sums count as zero."""
        found: set[fx.Node] = set()
        given = [
            n for root, nodes in self.writes.items() if root.op == "placeholder" for n in nodes
        ]
        waiting = [*self.ends, *given]
        while waiting:
            node = waiting.pop()
            if node in found:
                continue
            found.add(node)
            waiting += self.writes.get(self.roots.get(node, node), ())
            side = sides.get(self.sums[node]) if node in self.sums else None
            if side is None:
                waiting += node.all_input_nodes
            else:
                waiting.append(_operand(node, 1 - side))
        return found

    def source(self, node: fx.Node, sides: Mapping[Place, int]) -> fx.Node:
        """The earliest node that holds the same values."""
        while True:
            before = self._before(node, sides)
            if before is None:
                return node
            node = before

    def _before(
        self, node: fx.Node, sides: Mapping[Place, int], passed: list[Place] | None = None
    ) -> fx.Node | None:
        """The node that holds what this one holds, if it changes nothing.

        ``passed`` gets the sums in between of which an operand counts as zero.
        """
        place = self.sums.get(node)
        if place is not None and place in sides:
            if passed is not None:
                passed.append(place)
            return _operand(node, 1 - sides[place])
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        first, packet = node.args[0], packet_of(node)
        if packet in _SAME:
            return first
        if packet in _ORDERED:
            return self._turned_back(node, sides, passed)
        if packet in _RECTIFIED and self._not_negative(first, sides):
            return first
        if packet in _CLAMPED and self._clamped(first, node, sides):
            return first
        return None

    def _turned_back(
        self, node: fx.Node, sides: Mapping[Place, int], passed: list[Place] | None
    ) -> fx.Node | None:
        """The node whose shape a view gives back, after views that keep all in order."""
        seen: list[Place] = []
        found = _first(node)
        while not _same_shape(found, node):
            if packet_of(found) in _ORDERED:
                found = _first(found)
                continue
            before = self._before(found, sides, seen)
            if before is None:
                return None
            found = before
        if passed is not None:
            passed += seen
        return found

    def _not_negative(self, node: fx.Node, sides: Mapping[Place, int]) -> bool:
        for _ in range(len(self.nodes)):
            node = self.source(node, sides)
            packet = packet_of(node)
            if packet in _NOT_NEGATIVE:
                return True
            if packet in _CLAMPED:
                low: Any = node.args[1] if len(node.args) > 1 else None
                return _number(low) and bool(low >= 0)
            through = packet in _LARGEST or (op_of(node).linear and packet is not aten.neg)
            if not (_is_getitem(node) or through):
                return False
            first = node.args[0]
            if not isinstance(first, fx.Node):
                return False
            node = first
        return False

    def _clamped(self, node: fx.Node, like: fx.Node, sides: Mapping[Place, int]) -> bool:
        """Whether values lie within the bounds of a clamp already."""
        node = self.source(node, sides)
        return packet_of(node) in _CLAMPED and node.args[1:] == like.args[1:]

    # --- what stands in for what leaves -------------------------------------------------------

    def stand_ins(self, cuts: Iterable[Cut]) -> list[StandIn] | None:
        """What takes the place of the modules that leave; ``None`` where the code cannot go on."""
        sides = {cut.key: cut.side for cut in cuts}
        needed = self.needed(sides)
        gone: dict[str, list[_Leaving]] = {}
        waiting = [""]
        while waiting:
            name = waiting.pop()
            leaving = self._leaving(name, needed, sides) if name else None
            if leaving:
                gone[name] = leaving
            else:
                waiting += self._children(name)
        zeroes = self._zeroes(sides, gone)
        if zeroes is None:
            return None
        known = self._known_dims(gone)
        made = []
        for name, leavings in gone.items():
            ways = {leaving.gives(zeroes, known) for leaving in leavings}
            holder, gives = ways.pop()
            if ways or None in gives:
                return None
            made.append(StandIn(name, tuple(map(str, gives)), holder))
        return sorted(made, key=lambda stand_in: stand_in.module)

    def _children(self, name: str) -> list[str]:
        prefix = f"{name}." if name else ""
        children = self.modules[name]._modules if name in self.modules else {}
        return [prefix + key for key, child in children.items() if child is not None]

    def _leaving(
        self, name: str, needed: set[fx.Node], sides: Mapping[Place, int]
    ) -> list[_Leaving] | None:
        """How every call of a module ends when the module leaves; ``None`` when it is needed."""
        runs = self.calls.get(name)
        if not runs or name not in self.modules:
            return None
        found = []
        busy = False
        for run in runs:
            inside = self.nodes[run.begin : run.end]
            busy = busy or any(node.op in ("call_function", "get_attr") for node in inside)
            results = {node for _, node in _leaves(run.out)}
            for node in inside:
                if (
                    node.op == "call_function"
                    and node not in results
                    and self._escapes(node, run, needed)
                ):
                    return None
            leaving = _Leaving.of(run, self, needed, sides)
            if leaving is None:
                return None
            found.append(leaving)
        return found if busy else None

    def _escapes(self, node: fx.Node, run: Run, needed: set[fx.Node]) -> bool:
        """Whether something outside of a call needs a value that the call does not return."""
        return any(
            user in needed and not run.begin <= self.place.get(user, run.begin) < run.end
            for user in node.users
        )

    def _zeroes(
        self, sides: Mapping[Place, int], gone: Mapping[str, list[_Leaving]]
    ) -> dict[fx.Node, Zero] | None:
        """The results of what leaves that must be zero, and in which shape."""
        results = {
            node for leavings in gone.values() for leaving in leavings for node in leaving.free
        }
        found: dict[fx.Node, Zero] = {}
        for node, place in self.sums.items():
            side = sides.get(place)
            if side is None or self._inside(node, gone):
                continue
            in_place = node.target is aten.add_.Tensor and side == 0
            shape = Zero.WHOLE if in_place else Zero.SINGLE
            if not self._zero(_operand(node, side), results, found, shape):
                return None
        return found

    def _known_dims(self, gone: Mapping[str, list[_Leaving]]) -> dict[fx.Node, frozenset[int]]:
        """The dimensions in which values keep their size although something else stands there.

        Values that are not in the dictionary are as they were.
        """
        leavings = [leaving for leavings in gone.values() for leaving in leavings]
        results = {node: leaving for leaving in leavings for node in leaving.free}
        inside = {
            node for leaving in leavings for node in self.nodes[leaving.run.begin : leaving.run.end]
        }
        known: dict[fx.Node, frozenset[int]] = {}
        for node in self.nodes:
            if node in results:
                dims = results[node].like(node, known)
                if dims is not None:
                    known[node] = dims
            elif node not in inside and not known.keys().isdisjoint(node.all_input_nodes):
                known[node] = self._pointwise_dims(node, known)
        return known

    def _pointwise_dims(
        self, node: fx.Node, known: Mapping[fx.Node, frozenset[int]]
    ) -> frozenset[int]:
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
        self, node: fx.Node, results: set[fx.Node], found: dict[fx.Node, Zero], shape: Zero
    ) -> bool:
        """Let a value be zero by letting what modules return be zero."""
        if node in results:
            passed = Zero.THIN if node in self.passed else Zero.SINGLE
            found[node] = max(found.get(node, shape), shape, passed)
            return True
        if node.op != "call_function":
            return False
        operands = node.all_input_nodes
        if packet_of(node) in _PRODUCTS:
            divided = packet_of(node) in (aten.div, aten.div_)
            tried = operands[: 1 if divided else None]
            return any(self._zero(each, results, found, shape) for each in tried)
        if node.target in _SUMS or op_of(node).signs or op_of(node).linear or _is_getitem(node):
            return all(self._zero(each, results, found, Zero.WHOLE) for each in operands)
        return False

    @cached_property
    def passed(self) -> set[fx.Node]:
        """Values that a module hands on as it got them: in train mode it may do more."""
        return {
            node
            for run in self.watched.runs
            for _, node in _leaves(run.out)
            if any(node is given for _, given in _leaves((run.args, run.kwargs)))
        }

    # --- parts --------------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> dict[Place, tuple[int, ...]]:
        """The operands of every sum that may count as zero: those computed from the other one."""
        found = {}
        for place, nodes in self.watched.sums.items():
            sides = [side for side in (0, 1) if all(self._may_leave(n, side) for n in nodes)]
            if len(sides) == 2:  # side by side: a projection of the stream is what stays
                weights = [self._gain({place: side}) for side in sides]
                if not all(self._is_branch(n) for n in nodes):
                    sides = [sides[weights[1] > weights[0]]]
            if sides:
                found[place] = tuple(sides)
        return found

    def _may_leave(self, node: fx.Node, side: int) -> bool:
        if node.target not in _SUMS or len(node.args) != 2:
            return False
        kept, dropped = node.args[1 - side], node.args[side]
        if not isinstance(kept, fx.Node) or not isinstance(dropped, fx.Node):
            return False
        alike = _same_shape(kept, node) and kept.meta["dtype"] == node.meta["dtype"]
        if not alike or not node.meta["dtype"].is_floating_point:
            return False
        return dropped not in self.above(kept)

    def _gain(self, sides: Mapping[Place, int]) -> int:
        needed = self.needed(sides)
        return sum(count for node, count in self.macs.items() if node not in needed)

    def _is_branch(self, node: fx.Node) -> bool:
        """Whether a sum is itself what is added to a stream."""
        seen = {node}
        waiting = [node]
        while waiting:
            for user in waiting.pop().users:
                if user in seen:
                    continue
                seen.add(user)
                if user in self.sums:
                    other = [each for each in user.all_input_nodes if each not in seen]
                    if other and any(each in self.above(node) for each in other):
                        return True
                elif op_of(user).linear or packet_of(user) in _PRODUCTS:
                    waiting.append(user)
        return False

    def above(self, node: fx.Node) -> set[fx.Node]:
        """All nodes that a node is computed from."""
        known = self._above.get(node)
        if known is None:
            known = set()
            waiting = [*node.all_input_nodes]
            while waiting:
                each = waiting.pop()
                if each not in known:
                    known.add(each)
                    waiting += each.all_input_nodes
            self._above[node] = known
        return known

    @cached_property
    def _above(self) -> dict[fx.Node, set[fx.Node]]:
        return {}

    @cached_property
    def branches(self) -> tuple[Part, ...]:
        """What is added to a stream and can leave, in the order in which it runs."""
        found: list[Part] = []
        names: set[str] = set()
        for (module, place), sides in self.candidates.items():
            for side in sides:
                part = self.part("branch", (Cut(module, place, side),))
                if part is None or not part.macs:
                    continue
                name = part.name
                if name in names:
                    name = f"{module or 'model'}#{place}" + ("" if len(sides) == 1 else f".{side}")
                names.add(name)
                found.append(Part(name, "branch", *_rest(part)))
        return tuple(found)

    @cached_property
    def blocks(self) -> tuple[Part, ...]:
        """Modules that hand their input on once the branches in them add nothing; of all levels."""
        cuts = {cut.key: cut for part in self.branches for cut in part.cuts}
        found = []
        for name in self.modules:
            inside = self._chain(name, cuts) if name in self.calls else None
            part = self.part("block", inside) if inside else None
            if part is not None and part.macs and any(_covers(m, name) for m in part.modules):
                found.append(Part(name, "block", *_rest(part)))
        return tuple(found)

    @cached_property
    def single_blocks(self) -> tuple[Part, ...]:
        """The blocks that are no mere chains of smaller ones."""
        chains = {block.name: frozenset(block.cuts) for block in self.blocks}
        found: list[Part] = []
        for block in self.blocks:
            if any(set(block.cuts) == set(other.cuts) for other in found):
                continue
            inner = [
                cuts
                for name, cuts in chains.items()
                if name.startswith(f"{block.name}.") and cuts < chains[block.name]
            ]
            if not inner or frozenset().union(*inner) != chains[block.name]:
                found.append(block)
        return tuple(found)

    def _chain(self, name: str, cuts: Mapping[Place, Cut]) -> tuple[Cut, ...] | None:
        """The sums between the input of a module and its output, if nothing else lies there."""
        if not name:
            return None
        ways = set()
        for run in self.calls[name]:
            given = {node for _, node in _leaves((run.args, run.kwargs))}
            outs = [node for _, node in _leaves(run.out)]
            if not outs:
                return None
            passed: list[Place] = []
            node, sides = outs[0], _sides(cuts.values())
            while node not in given:
                before = self._before(node, sides, passed)
                if before is None:
                    return None
                node = before
            ways.add(tuple(cuts[place] for place in passed[::-1]))
        return ways.pop() if len(ways) == 1 else None

    def part(self, kind: str, cuts: tuple[Cut, ...]) -> Part | None:
        """A part by the sums that it is cut from; ``None`` where the code could not go on."""
        stand_ins = self.stand_ins(cuts)
        if not stand_ins:
            return None
        names = [stand_in.module for stand_in in stand_ins]
        params = {name: self.params([name]) for name in names}
        largest = max(names, key=lambda name: params[name])
        return Part(largest, kind, tuple(names), cuts, self.params(names), self._gain(_sides(cuts)))

    def params(self, names: Iterable[str]) -> int:
        """The parameters that no module holds any more when some have left."""
        roots = tuple(names)
        total = 0
        for number, owners in self.owner.items():
            if all(any(_covers(root, owner) for root in roots) for owner in owners):
                total += self._sizes[number]
        return total

    @cached_property
    def _sizes(self) -> dict[int, int]:
        return {
            id(parameter): math.prod(parameter.shape)
            for module in self.modules.values()
            for parameter in module._parameters.values()
            if parameter is not None
        }


@dataclass
class _Leaving:
    """A call of a module that leaves: what hands on what, and what no one needs."""

    run: Run
    kept: dict[tuple[Any, ...], str]  # results that are needed, and the argument they equal
    free: set[fx.Node]  # the others
    given: dict[fx.Node, str]  # the arguments, and the way to each

    @classmethod
    def of(
        cls, run: Run, finder: Finder, needed: set[fx.Node], sides: Mapping[Place, int]
    ) -> _Leaving | None:
        """What is known of a call; ``None`` where something of its results is still needed."""
        if _holder(run.out) is None:
            return None
        given: dict[fx.Node, str] = {}
        sources: dict[fx.Node, str] = {}
        for path, node in _leaves((run.args, run.kwargs)):
            text = ".".join(("kwargs" if path[0] else "args", *map(str, path[1:])))
            sources.setdefault(finder.source(node, sides), text)
            if node.op != "get_attr":
                given.setdefault(node, text)
        kept: dict[tuple[Any, ...], str] = {}
        free: set[fx.Node] = set()
        outer = _used_after(run, finder, needed, sides)
        for path, node in _leaves(run.out):
            if node not in outer:
                free.add(node)
                continue
            same = sources.get(finder.source(node, sides))
            if same is None:
                return None
            kept[path] = same
        return cls(run, kept, free, given)

    def nearest(
        self, node: fx.Node, known: Mapping[fx.Node, frozenset[int]]
    ) -> tuple[fx.Node, frozenset[int]] | None:
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

    def like(self, node: fx.Node, known: Mapping[fx.Node, frozenset[int]]) -> frozenset[int] | None:
        """The dimensions in which what is returned in place of a result has its size; all."""
        found = self.nearest(node, known)
        dims = frozenset() if found is None else found[1]
        return None if found and len(dims) == len(node.meta["shape"]) else dims

    def gives(
        self, zeroes: Mapping[fx.Node, Zero], known: Mapping[fx.Node, frozenset[int]]
    ) -> tuple[str, tuple[str | None, ...]]:
        """What a stand-in returns: its holder and its items; ``None`` where none would do."""
        holder = _holder(self.run.out) or ""
        items = [self.run.out] if not holder else self.run.out
        return holder, tuple(
            self._item(item, (number,) if holder else (), zeroes, known)
            for number, item in enumerate(items)
        )

    def _item(
        self,
        item: Any,
        path: tuple[Any, ...],
        zeroes: Mapping[fx.Node, Zero],
        known: Mapping[fx.Node, frozenset[int]],
    ) -> str | None:
        if not isinstance(item, fx.Node):
            return "none"
        if path in self.kept:
            return self.kept[path]
        zero = zeroes.get(item)
        if zero is Zero.SINGLE:
            return "zero"
        found = self.nearest(item, known)
        if found is None or not (found[1] or zero is None):
            return "zero" if zero is None else None
        text = self.given[found[0]]
        if zero is None:
            return text
        if item not in known:
            return f"zeros {text}"
        dims = ",".join(map(str, sorted(found[1])))
        return f"zeros {text} in {dims}" if zero is Zero.THIN else None


def _used_after(
    run: Run, finder: Finder, needed: set[fx.Node], sides: Mapping[Place, int]
) -> set[fx.Node]:
    """The results of a call that something outside needs."""
    found = set()
    for _, node in _leaves(run.out):
        if node in finder.ends:
            found.add(node)
        for user in node.users:
            inside = run.begin <= finder.place.get(user, -1) < run.end
            if inside or user not in needed:
                continue
            side = sides.get(finder.sums[user]) if user in finder.sums else None
            if side is None or user.args[1 - side] is node:
                found.add(node)
    return found


def _holder(out: Any) -> str | None:
    """What holds the results of a call: nothing, a tuple or a list of tensors; else ``None``."""
    if isinstance(out, fx.Node):
        return ""
    if type(out) in (tuple, list):
        flat = all(isinstance(item, fx.Node) or item is None for item in out)
        return type(out).__name__ if flat and out else None
    return None


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], fx.Node]]:
    """The nodes in nested data, with the way to each."""
    if isinstance(tree, fx.Node):
        yield path, tree
    elif isinstance(tree, tuple | list):
        for number, item in enumerate(tree):
            yield from _leaves(item, (*path, number))
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from _leaves(item, (*path, key))


def _operand(node: fx.Node, side: int) -> fx.Node:
    """An operand of a sum of two tensors."""
    found = node.args[side]
    assert isinstance(found, fx.Node)
    return found


def _sides(cuts: Iterable[Cut]) -> dict[Place, int]:
    return {cut.key: cut.side for cut in cuts}


def _rest(part: Part) -> tuple[Any, ...]:
    return part.modules, part.cuts, part.params, part.macs


def _covers(root: str, name: str) -> bool:
    return name == root or name.startswith(f"{root}.")


def _is_getitem(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return bool(one.meta.get("shape") == other.meta.get("shape"))


def _first(node: fx.Node) -> fx.Node:
    """The tensor that an op is given first."""
    found = node.args[0]
    assert isinstance(found, fx.Node)
    return found


def _writes(node: fx.Node) -> bool:
    """Whether an op writes into a tensor that others may read by other nodes."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or first.op == "get_attr":
        return False
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return not pointwise or _is_part(first)


def _is_part(node: fx.Node) -> bool:
    """Whether a tensor is a view of another one."""
    schema = getattr(node.target, "_schema", None)
    returned = schema.returns[:1] if schema is not None and not schema.is_mutable else ()
    return any(value.alias_info is not None for value in returned)
