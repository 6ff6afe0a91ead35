"""Which widths the config of a model says: by trial, before anything is planned.

A field that sizes several groups sizes them together, and some sizes follow from two fields at
once: a width that is divided among heads shrinks with their number. Fields are therefore made
smaller in ever larger sets, all by the same share; of what that builds, the sizes say which
channels would have left. Where the model without these is said by a config, shapes, values and
outputs, that is a way in which groups may shrink. No name of a field or a library is known.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
from torch import nn

from graphprune.channels.analysis import Group
from graphprune.errors import GraphPruneError, InputError
from graphprune.execute.building import Field, Recipe
from graphprune.execute.config import Before, unsaid
from graphprune.execute.likeness import shapes_of
from graphprune.execute.shrink import shrink
from graphprune.execute.widths import Sizes, sizes_of
from graphprune.plan.plan import Plan
from graphprune.planning.settle import Settled, bare_plan
from graphprune.record.inputs import Call
from graphprune.record.tensors import named_modules
from graphprune.text import shorten

FEW = 48  # sizes that are all tried; of more, a few, and the one that is chosen
SETS = 400  # of fields that are tried together
Counts = dict[str, int]  # how many channels groups keep, by name


@dataclass(frozen=True)
class Joint:
    """Groups that shrink together: in every row, how many channels each of them keeps."""

    fields: tuple[Field, ...]
    groups: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]  # decreasing; the first is the whole

    @property
    def fine(self) -> bool:
        """Whether all numbers of channels do, but for what heads leave of them."""
        return len(self.rows) >= self.rows[0][-1] - 1

    def without(self, row: tuple[int, ...]) -> Joint:
        """Where one of them was found not to do after all."""
        return replace(self, rows=tuple(each for each in self.rows if each != row))


@dataclass(frozen=True)
class Sayable:
    """What a config says, and of all other groups why it does not."""

    joints: tuple[Joint, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)

    def told(self, groups: Iterable[Group]) -> Iterator[str]:
        """A line for each reason why groups stay whole."""
        lines: dict[str, list[str]] = {}
        for group in groups:
            if group.name in self.reasons:
                lines.setdefault(self.reasons[group.name], []).extend(group.layers[:1])
        for reason, layers in lines.items():
            yield f"stay whole, as no config says otherwise: {shorten(layers, 4)}: {reason}"


class Search:
    """The search for what a config says.

    Args:
        model: the original.
        call: its example inputs.
        settled: its channels.

    Raises:
        InputError: it has no config that builds it.
    """

    def __init__(self, model: nn.Module, call: Call, settled: Settled) -> None:
        self.model, self.call, self.settled = model, call, settled
        self.analysis = settled.analysis
        self.groups = {group.name: group for group in self.analysis.groups}
        kind = type(model).__name__
        recipe = Recipe.of(model)
        if recipe is None:
            parts = [n for n, part in named_modules(model) if n and Recipe.of(part) is not None]
            told = f"; pass the part that has one: {shorten(parts, 2)}" if parts else ""
            raise InputError(
                f"expressible='config': {kind} has no config that it is built from{told}"
            )
        self.recipe = recipe
        try:
            first = recipe.build(recipe.config)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"[:200]
            raise InputError(f"expressible='config': {kind} is not built from it ({told})") from (
                error
            )
        shapes = shapes_of(model)
        odd = {key for key, _ in shapes.items() ^ shapes_of(first).items()}
        if odd:
            names = shorten(sorted({name for name, _ in odd}), 3)
            raise InputError(
                f"expressible='config': the config of {kind} builds another model, {names} differ"
            )
        self.base: Sizes = sizes_of(first)
        self.pure = {name: list(self._pure(group)) for name, group in self.groups.items()}
        self.reasons: dict[str, str] = {}

    def run(self) -> Sayable:
        """All ways to shrink, none of which shares a group with another."""
        effects = self._effects()
        keys = {name: self._keys(group) for name, group in self.groups.items()}
        joints: list[Joint] = []
        for names in _components(effects, keys):
            joints += self._of_component({f: effects[f] for f in names})
        known = {name for joint in joints for name in joint.groups}
        reasons = {
            name: self.reasons.get(name) or self._nothing(name, effects, keys[name])
            for name in self.groups
            if name not in known
        }
        return Sayable(tuple(joints), reasons)

    def _nothing(self, name: str, effects: Mapping[Field, set[object]], keys: set[object]) -> str:
        """Why none of the fields that size a group may shrink it."""
        sizing = {path: found for path, found in effects.items() if found & keys}
        if not sizing:
            return "no field of it sizes them"
        named = shorten([".".join(map(str, path)) for path in sizing], 3)
        for group in self.analysis.all_groups:
            slots = {(m.slot.tensor, m.slot.dim) for m in group.members}
            if group.frozen and any(slots & found for found in sizing.values()):
                layers = shorten(group.layers, 2)
                return f"{named} of it sizes {layers} as well, which stay: {group.note}"
        return f"what smaller {named} of it would build is not what is left of the model"

    # --- which fields size what ----------------------------------------------------------------

    def _keys(self, group: Group) -> set[object]:
        """The dimensions and the attributes that shrink with a group."""
        keys: set[object] = {(m.slot.tensor, m.slot.dim) for m in group.members}
        some = self._plan({group.name: max(1, group.size // 2)})
        return keys | {(change.module, change.name) for change in (some.sizes if some else ())}

    def _pure(self, group: Group) -> Iterator[tuple[tuple[str, int], int]]:
        """The dimensions that hold nothing but channels of a group."""
        for member in group.members:
            if member.index.size == member.slot.size:
                yield (member.slot.tensor, member.slot.dim), member.slot.size

    def _effects(self) -> dict[Field, set[object]]:
        """What each number of the config changes."""
        found = {}
        for path, value in self.recipe.numbers.items():
            for other in (2 * value, value // 2 if type(value) is int else value / 2):
                sizes = self._sizes({path: other}) if other else None
                if sizes is not None:
                    changed = {k for k, n in self.base.items() if sizes.get(k, n) != n}
                    if any(isinstance(part, int) for _, part in changed) or changed:
                        found[path] = changed
                    break
        return found

    def _sizes(self, changes: Mapping[Field, float]) -> Sizes | None:
        try:
            return sizes_of(self.recipe.build(self.recipe.changed(changes)))
        except Exception:  # there is no such model
            return None

    # --- sets of fields ------------------------------------------------------------------------

    def _of_component(self, effects: Mapping[Field, set[object]]) -> list[Joint]:
        """The sets of fields that shrink groups in the finest steps, of fields that share some.

        A width that heads must divide may do alone, by a half; with the number of heads it goes
        down by that of one head.
        """
        found: list[Joint] = []
        for fields in _sets(list(effects)):
            if not any(joint.fine and set(fields) >= set(joint.fields) for joint in found):
                joint = self._joint(fields)
                found += [] if joint is None else [joint]
        chosen: list[Joint] = []
        taken: set[str] = set()
        for joint in sorted(found, key=lambda joint: (-len(joint.rows), len(joint.fields))):
            if taken.isdisjoint(joint.groups):
                chosen.append(joint)
                taken |= set(joint.groups)
        return chosen

    def _joint(self, fields: tuple[Field, ...]) -> Joint | None:
        """How groups shrink with a set of fields; ``None`` where it builds no small model."""
        numbers = [self.recipe.numbers[path] for path in fields]
        whole = [int(n) for n in numbers if type(n) is int]
        most = math.gcd(*whole) if whole else self._largest(fields)
        for left in _tries(most):
            counts = self._counts(fields, Fraction(left, most))
            if not counts:
                continue
            reason = self._differs(counts)
            if not reason:
                return self._rows(fields, most, most - left, counts)
            for name in counts:
                self.reasons[name] = reason
        return None

    def _largest(self, fields: tuple[Field, ...]) -> int:
        """How fine a factor can be made smaller: by the channels of what it sizes."""
        sizes = self._sizes({path: self.recipe.numbers[path] / 2 for path in fields}) or {}
        sized = [
            self.groups[name].size
            for name, pure in self.pure.items()
            if any(sizes.get(key, size) != size for key, size in pure)
        ]
        return math.gcd(*sized) if sized else 1

    def _changes(self, fields: Iterable[Field], share: Fraction) -> dict[Field, float] | None:
        changes: dict[Field, float] = {}
        for path in fields:
            number = self.recipe.numbers[path]
            part = number * share
            if type(number) is int and Fraction(part).denominator != 1:
                return None
            changes[path] = int(part) if type(number) is int else float(part)
        return changes

    def _counts(self, fields: tuple[Field, ...], share: Fraction) -> Counts | None:
        """How many channels groups would have kept, by what a smaller config builds."""
        changes = self._changes(fields, share)
        sizes = None if changes is None else self._sizes(changes)
        if sizes is None:
            return None
        counts = {}
        for name, pure in self.pure.items():
            size = self.groups[name].size
            found = {Fraction(int(sizes.get(key, 0)) * size, old) for key, old in pure}
            if len(found) != 1:
                if found:
                    return None
                continue
            number = found.pop()
            if number.denominator != 1 or not 1 <= number <= size:
                return None
            if number != size:
                counts[name] = int(number)
        return counts if self._foreseen(counts, sizes) else None

    def _foreseen(self, counts: Counts, sizes: Sizes) -> bool:
        """Whether all dimensions are as large as these channels leave them."""
        alive = self.analysis.alive(self._kept(counts))
        left: dict[object, int] = {}
        for slot in self.analysis.slots:
            key = slot.tensor, slot.dim
            left[key] = left.get(key, 0) + int(alive[slot.start : slot.start + slot.size].sum())
        return all(
            sizes.get(key) == left.get(key, old)
            for key, old in self.base.items()
            if isinstance(key[1], int)
        )

    # --- one small model -----------------------------------------------------------------------

    def _kept(self, counts: Counts) -> dict[str, tuple[int, ...]]:
        return {name: tuple(range(number)) for name, number in counts.items()}

    def _plan(self, counts: Counts) -> Plan | None:
        """A plan that keeps the first channels."""
        alive = self.analysis.alive(self._kept(counts))
        solved = self.settled.changes(alive)
        return None if solved.problems else bare_plan(self.analysis, alive, solved)

    def _differs(self, counts: Counts) -> str:
        """Why no config says a small model with such widths; empty where one does."""
        plan = self._plan(counts)
        if plan is None:
            return "the code of the model does not follow such widths"
        try:
            return said_by_config(self.model, self.call, plan)
        except GraphPruneError as error:
            return str(error)

    def _rows(self, fields: tuple[Field, ...], most: int, step: int, first: Counts) -> Joint | None:
        """All sizes that do, in steps that were seen to do; of many, not each is tried."""
        names = sorted(first, key=lambda name: -self.groups[name].size)  # the finest first
        whole = tuple(self.groups[name].size for name in names)
        rows = [whole]
        places = range(most - step, 0, -step)
        for left in places:
            share = Fraction(left, most)
            row = [size * share for size in whole]
            if any(number.denominator != 1 for number in row):
                continue
            counts = {name: int(number) for name, number in zip(names, row)}
            if len(places) > FEW or self._counts(fields, share) == counts:
                rows.append(tuple(map(int, row)))
        return Joint(fields, tuple(names), tuple(rows)) if len(rows) > 1 else None

    def wrong(self, joint: Joint, row: tuple[int, ...]) -> bool:
        """Whether sizes that were not tried do not do."""
        counts = dict(zip(joint.groups, row))
        share = Fraction(row[0], joint.rows[0][0])
        return self._counts(joint.fields, share) != counts


def said_by_config(model: nn.Module, call: Call, plan: Plan) -> str:
    """Why the config of a model does not say a plan; empty where it does.

    The small model is made, and its config sought as for one that is saved.
    """
    before = Before.of(model)
    return "" if before is None else unsaid(shrink(model, plan), before, call)


def _tries(most: int) -> Iterator[int]:
    """Ever fewer of ``most``: what remains after steps of one, two, four, and some others."""
    steps = [1 << power for power in range(most.bit_length())]
    found = [most - step for step in steps] + [most // 2, most // 3, most // 4, 1]
    yield from (left for left in dict.fromkeys(found) if 0 < left < most)


def _sets(fields: list[Field]) -> Iterator[tuple[Field, ...]]:
    """Sets of fields, small ones first, of all at last."""
    sizes = (itertools.combinations(fields, size) for size in range(1, len(fields)))
    yield from itertools.islice(itertools.chain.from_iterable(sizes), SETS)
    yield tuple(fields)


def _components(
    effects: Mapping[Field, set[object]], keys: Mapping[str, set[object]]
) -> Iterator[list[Field]]:
    """Fields that change some of the same, together, where they size a group.

    The width of a head is an attribute that a width and the number of heads change.
    """
    sized = set[object]().union(*keys.values())
    left = dict(effects)
    while left:
        first = next(iter(left))
        names, found = left.pop(first), [first]
        while more := [path for path, others in left.items() if others & names]:
            for path in more:
                names = names | left.pop(path)
                found.append(path)
        if names & sized:
            yield found


def levels_of(lists: Iterable[np.ndarray], size: int) -> np.ndarray:
    """The levels of groups of other sizes, as of one of ``size`` channels: their mean."""
    places = np.arange(1, size + 1) / size
    resampled = []
    for levels in lists:
        finite = np.where(np.isfinite(levels), levels, 1.0)  # of the last channel
        known = np.concatenate([np.zeros(1), finite])
        resampled.append(np.interp(places * len(levels), np.arange(len(known)), known))
    found = np.asarray(np.mean(resampled, axis=0))
    found[-1] = np.inf
    return found
