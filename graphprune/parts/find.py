"""Find what can leave whole: branches that are added or concatenated, and blocks made of them.

Nothing is told by names or classes. Where the code of a model adds two tensors, one operand may
count as zero: what was computed for it alone is then not needed any more. The same holds for an
operand of a concatenation all of whose channels leave. Modules of which nothing
is needed leave; something small in their place keeps the code around them running. A block is a
module that hands its input on once the branches in it add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import fx, nn

from graphprune.ops.registry import op_of
from graphprune.parts.emptying import Emptying
from graphprune.parts.joined import Joined
from graphprune.parts.stream import (
    NOTHING,
    SUMS,
    Narrowed,
    covers,
    leaves,
    same_shape,
    sides_of,
)
from graphprune.plan.changes import Cut, SlotPlan, StandIn
from graphprune.plan.plan import Plan
from graphprune.planning.settle import Settled
from graphprune.record.inputs import Call
from graphprune.record.joins import Place

_MOST = 4  # sums that leave together


@dataclass(frozen=True)
class Part:
    """A part of a model that can leave whole.

    Attributes:
        name: the module that leaves, or the largest one of those that do.
        kind: ``"block"`` or ``"branch"``.
        modules: the outermost modules that leave.
        cuts: the sums in which an operand counts as zero.
        groups: the groups that lose all channels, where it is an operand of a concatenation.
        slots: what these are in parameters and buffers.
        params: parameters that leave with it alone.
        macs: multiply-accumulates of the example inputs that leave with it alone.
    """

    name: str
    kind: str
    modules: tuple[str, ...]
    cuts: tuple[Cut, ...] = field(repr=False)
    params: int = 0
    macs: int = 0
    groups: tuple[str, ...] = field(default=(), repr=False)
    slots: tuple[SlotPlan, ...] = field(default=(), repr=False)


class Finder(Emptying):
    """What can leave of a model, as its recorded graph tells."""

    first_stays = False  # whether the first of numbered layers would leave otherwise

    def __init__(self, model: nn.Module, call: Call, settled: Settled) -> None:
        super().__init__(model, call)
        self.joined = Joined(self, settled)

    def without(self, cuts: tuple[Cut, ...], groups: tuple[str, ...] = ()) -> Plan | None:
        """The plan without some branches; ``None`` where the code could not go on.

        Args:
            cuts: the sums in which an operand counts as zero.
            groups: the groups that lose all channels.
        """
        narrowed = self.joined.narrowed(groups) if groups else NOTHING
        stand_ins = None if narrowed is None else self.stand_ins(cuts, narrowed)
        if stand_ins is None:
            return None
        plan: Plan | None = Plan(self.joined.analysis.architecture, (), ())
        if groups:
            plan = self.joined.plan(groups, [stand_in.module for stand_in in stand_ins])
        return plan and replace(plan, cuts=cuts, stand_ins=tuple(stand_ins))

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
        if node.target not in SUMS or len(node.args) != 2:
            return False
        kept, dropped = node.args[1 - side], node.args[side]
        if not isinstance(kept, fx.Node) or not isinstance(dropped, fx.Node):
            return False
        alike = same_shape(kept, node) and kept.meta["dtype"] == node.meta["dtype"]
        if not alike or not node.meta["dtype"].is_floating_point:
            return False
        return dropped not in self.above(kept)

    def _gain(self, sides: Mapping[Place, int], narrowed: Narrowed = NOTHING) -> int:
        return sum(self.macs[node] for node in self._unneeded(sides, narrowed))

    def _unneeded(self, sides: Mapping[Place, int], narrowed: Narrowed) -> list[fx.Node]:
        needed = self.needed(sides, narrowed)
        return [node for node in self.macs if node not in needed]

    def saved(self, part: Part, amounts: Mapping[fx.Node, float]) -> float:
        """What recorded ops cost that leave with a part alone."""
        unneeded = self._unneeded(sides_of(part.cuts), self._narrowed(part.groups))
        return sum(amounts[node] for node in unneeded)

    def _narrowed(self, groups: tuple[str, ...]) -> Narrowed:
        return (self.joined.narrowed(groups) if groups else None) or NOTHING

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
                elif op_of(user).linear or len(op_of(user).powers) > 1:
                    waiting.append(user)
        return False

    @cached_property
    def branches(self) -> tuple[Part, ...]:
        """What is added to a stream, or concatenated, and can leave, in the order of the run."""
        found: dict[str, Part] = {}
        begins: dict[str, int] = {}
        for (module, place), sides in self.candidates.items():
            for side in sides:
                part = self.part("branch", (Cut(module, place, side),))
                if part is None or not part.macs:
                    continue
                name = part.name
                if name in found:
                    name = f"{module or 'model'}#{place}" + ("" if len(sides) == 1 else f".{side}")
                found[name] = replace(part, name=name)
                begins[name] = self.place[self.watched.sums[module, place][0]]
        for cuts in self._together:
            part = self.part("branch", cuts)
            known = {other.modules for other in found.values()}
            if part is not None and part.macs and part.modules not in known:
                places = [cut.place for cut in cuts]
                name = part.name if part.name not in found else f"{cuts[0].module}#{places}"
                found[name] = replace(part, name=name)
                begins[name] = self.place[self.watched.sums[cuts[0].key][0]]
        for groups in self.joined.candidates:
            part = self.part("branch", (), groups)
            if part is None or not part.macs:
                continue
            names = sorted({*part.modules} - found.keys(), key=lambda name: -self.params([name]))
            if names:
                found[names[0]] = replace(part, name=names[0])
                begins[names[0]] = self.calls[names[0]][0].begin
        return tuple(found[name] for name in sorted(found, key=begins.__getitem__))

    @cached_property
    def _together(self) -> list[tuple[Cut, ...]]:
        """The sums of one module through which all ways lead from something to the outputs.

        Attention over two streams at once is added to both.
        """
        ways: dict[fx.Node, frozenset[Cut] | None] = dict.fromkeys(self.ends)
        found: dict[tuple[Cut, ...], None] = {}
        for node in reversed(self.nodes):
            if node not in ways:
                ways[node] = self._ways_on(node, ways)
            cuts = ways[node]
            together = cuts and len(cuts) > 1 and len({cut.module for cut in cuts}) == 1
            if cuts and together and self.macs.get(node):
                found[tuple(sorted(cuts, key=lambda cut: cut.place))] = None
        return list(found)[::-1]

    def _ways_on(
        self, node: fx.Node, ways: Mapping[fx.Node, frozenset[Cut] | None]
    ) -> frozenset[Cut] | None:
        """The sums that may leave through which all ways on lead; ``None`` where one does not."""
        cuts: set[Cut] = set()
        for user in node.users:
            place = self.sums.get(user)
            sides = self.candidates.get(place, ()) if place is not None else ()
            side = next((side for side in sides if user.args[side] is node), None)
            if place is not None and side is not None and user.args[1 - side] is not node:
                cuts.add(Cut(*place, side))
                continue
            on = ways.get(user, frozenset())
            if on is None or len(cuts | on) > _MOST:
                return None
            cuts |= on
        return frozenset(cuts)

    @cached_property
    def blocks(self) -> tuple[Part, ...]:
        """Modules that hand their input on once the branches in them add nothing; of all levels."""
        cuts = {cut.key: cut for part in self.branches for cut in part.cuts}
        found = []
        for name in self.modules:
            inside = self._chain(name, cuts) if name in self.calls else None
            part = self.part("block", inside) if inside else None
            if part is not None and part.macs and any(covers(m, name) for m in part.modules):
                found.append(replace(part, name=name))
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
            given = {node for _, node in leaves((run.args, run.kwargs))}
            outs = [node for _, node in leaves(run.out)]
            passed = [self._passed(node, given, sides_of(cuts.values())) for node in outs]
            if not passed or passed[0] is None:  # further results may be no streams
                return None
            places = dict.fromkeys(place for way in passed if way for place in way)
            ways.add(tuple(cuts[place] for place in places))
        return ways.pop() if len(ways) == 1 else None

    def _passed(
        self, node: fx.Node, given: Container[fx.Node], sides: Mapping[Place, int]
    ) -> list[Place] | None:
        """The sums between what a module is given and a result of it, if nothing else is there."""
        passed: list[Place] = []
        while node not in given:
            before = self.before(node, sides, passed)
            if before is None:
                return None
            node = before
        return passed[::-1]

    def part(self, kind: str, cuts: tuple[Cut, ...], groups: tuple[str, ...] = ()) -> Part | None:
        """A part by the sums that it is cut from, or by groups that lose all channels.

        ``None`` where the code could not go on.
        """
        plan = self.without(cuts, groups)
        if plan is None or not plan.stand_ins:
            return None
        stand_ins = plan.stand_ins
        if self._begins(stand_ins, cuts):
            self.first_stays = True
            return None
        names = [stand_in.module for stand_in in stand_ins]
        largest = max(names, key=lambda name: self.params([name]))
        macs = self._gain(sides_of(cuts), self._narrowed(groups))
        params = self.params(names)
        return Part(largest, kind, tuple(names), cuts, params, macs, groups, plan.slots)

    def _begins(self, stand_ins: Iterable[StandIn], cuts: Iterable[Cut]) -> bool:
        """Whether the first of numbered layers would leave, or the first of a kind with state.

        Caches of keys and values ask their first entry how long they are.
        """
        if any(covers(s.module, first) for s in stand_ins for first in self._numbered_first):
            return True
        needed = self.needed(sides_of(cuts))
        return any(node not in needed for node in self._first_states)

    @cached_property
    def _first_states(self) -> list[fx.Node]:
        """The first entry of a cache, of each kind, or what that is cut from.

        Masks are made for the first layer of a kind; a window holds less than is read.
        """
        needed = self.needed({})
        kinds: dict[object, fx.Node] = {}
        for node in self.record.state:
            kinds.setdefault(node.target, node)
        found = []
        for node in kinds.values():
            while node not in needed and node.all_input_nodes:
                node = node.all_input_nodes[0]
            found += [node] if node in needed else []
        return found

    @cached_property
    def _numbered_first(self) -> list[str]:
        """Modules with number 0, of classes whose modules are numbered one after the other."""
        numbers: dict[tuple[type, str], dict[int, str]] = {}
        counts: dict[tuple[type, str], int] = {}
        for name, module in self.modules.items():
            for attribute, value in vars(module).items():
                if type(value) is int and attribute != "training":
                    key = type(module), attribute
                    numbers.setdefault(key, {})[value] = name
                    counts[key] = counts.get(key, 0) + 1
        return [
            known[0]
            for key, known in numbers.items()
            if len(known) > 1 and sorted(known) == list(range(counts[key]))
        ]

    def params(self, names: Iterable[str]) -> int:
        """The parameters that no module holds any more when some have left."""
        roots = tuple(names)
        total = 0
        for number, owners in self._owners.items():
            if all(any(covers(root, owner) for root in roots) for owner in owners):
                total += self._sizes[number]
        return total

    @cached_property
    def _owners(self) -> dict[int, set[str]]:
        """The modules that hold each parameter, by its ``id``."""
        owners: dict[int, set[str]] = {}
        for name, module in self.modules.items():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), set()).add(name)
        return owners

    @cached_property
    def _sizes(self) -> dict[int, int]:
        return {
            id(parameter): math.prod(parameter.shape)
            for module in self.modules.values()
            for parameter in module._parameters.values()
            if parameter is not None
        }
