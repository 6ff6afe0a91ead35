"""The small model of a plan, tried: whether its code says new ids where it said old ones."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from graphprune.errors import InputError, TraceError
from graphprune.execute.ids import special_ids
from graphprune.execute.shrink import hollow, shrink
from graphprune.plan.changes import LiteralChange, SizeChange, chain
from graphprune.plan.plan import Plan
from graphprune.plan.vocabulary import Vocabulary, for_small
from graphprune.planning.settle import changed_literal
from graphprune.record.inputs import Call
from graphprune.record.recorder import Record
from graphprune.record.recording import record
from graphprune.record.sites import changeable
from graphprune.record.sizes import Attribute, Literal, attributes, expression
from graphprune.record.tensors import held_tensors
from graphprune.text import shorten
from graphprune.vocabulary.find import Found
from graphprune.vocabulary.flow import Number, kinds


@dataclass
class Trial:
    """The small model of a plan, recorded to see that its code says new ids where it said old ones.

    Args:
        model: the original.
        call: inputs it runs on.
        records: its recorded forward passes.
        found: its vocabulary.
        plan: by which ids leave.
    """

    model: nn.Module
    call: Call
    records: Sequence[Record]
    found: Found
    plan: Plan
    _tried: bool = False  # whether all numbers in the code were changed, as nothing else ran

    @property
    def vocabulary(self) -> Vocabulary:
        """Which ids stay."""
        return self.plan.vocabularies[0]

    def settled(self) -> Plan:
        """The plan with changes of all numbers in the code that are ids.

        Raises:
            InputError: a number cannot be changed; says where it stands.
        """
        for _ in range(3):
            wrong = [pair for place in range(len(self.records)) for pair in self._wrong(place)]
            if not wrong:
                return self.plan
            before = self.plan
            for number, new in wrong:
                self._change(number, new)
            if self.plan == before:
                break
        number, new = wrong[0]
        raise InputError(
            f"{_where(number.node)} says {number.value}, which must become {new} in the small "
            "model, and cannot be changed there: keep all ids below it, so that it stays"
        )

    @property
    def _moved(self) -> str:
        """What the user can do about numbers that change."""
        own = [*special_ids(self.model, self.vocabulary)]
        own += [number.value for kind in self.found.kind for number in kind.numbers]
        moved = sorted({old for old in own if self.vocabulary.new_id(old) != old})
        told = shorten([f"{old} becomes {self.vocabulary.new_id(old)}" for old in moved])
        return f", where {told}: keep all ids below these, so that they stay" if moved else ""

    def _inputs(self, original: Record) -> Call:
        """The inputs of a recording."""
        batch = {t.shape[0] for t in self.call.tensors() if t.dim()}
        return self.call.repeated(2) if original.training and batch == {1} else self.call

    def _small(self, original: Record) -> Record:
        """The small model, recorded as the original was."""
        meta = original.device == "meta"
        small = hollow(self.model, self.plan) if meta else shrink(self.model, self.plan)
        call = for_small(self._inputs(original), self.model, self.plan.vocabularies)
        return record(small, call, original.training, devices=(original.device,))

    def _wrong(self, place: int) -> list[tuple[Number, int]]:
        """The numbers in the code of the small model that are not as they should be."""
        original, mine = self.records[place], self.found.kind[place]
        try:
            small = self._small(original)
        except TraceError as error:
            every = [(number, self._wanted(number)) for number in mine.numbers]
            wrong = [(number, new) for number, new in every if new != number.value]
            if wrong and not self._tried:  # what the code says may be no id any more
                self._tried = True
                return wrong
            raise InputError(f"the model does not run with fewer ids: {error}") from error
        others = [
            k for k in kinds(small, dict(held_tensors(self.model))) if k.inputs == mine.inputs
        ]
        theirs = others[0].numbers if others else []
        if len(theirs) == len(mine.numbers):
            wrong = [
                (number, wanted)
                for number, other in zip(mine.numbers, theirs)
                if not self._right(number, wanted := self._wanted(number), other.value)
            ]
            if wrong:
                return wrong
        if len(original.ops) != len(small.ops) or len(theirs) != len(mine.numbers):
            raise InputError(f"this model runs other ops with fewer ids{self._moved}")
        known = {number.node for number in mine.numbers} | mine.lookups
        for one, other in zip(original.ops, small.ops):
            if not self._alike(one, other, one in known):
                told = f"{_where(one)} is given other numbers with fewer ids"
                raise InputError(f"{told}{self._moved}")
        return []

    def _wanted(self, number: Number) -> int:
        """What a number in the code must become: all ids stay on their side of it."""
        if number.bound is None:
            new = self.vocabulary.new_id(number.value)
            if new is None:  # the code takes another way for ids that stay
                raise InputError(f"{_where(number.node)} reads id {number.value}: keep it as well")
            return new
        least = number.value + number.bound
        return bisect.bisect_left(self.vocabulary.kept, least) - number.bound

    def _right(self, number: Number, wanted: int, found: int) -> bool:
        """Whether a number is as it must be; beyond all ids, one is as good as another."""
        last = len(self.vocabulary.kept)
        if number.bound is not None:
            wanted, found = wanted + number.bound, found + number.bound
            return found == wanted or found <= wanted == 0 or found >= wanted == last
        inside = 0 <= number.value < self.vocabulary.size
        return found == wanted if inside else found < 0 > number.value or found >= last

    def _alike(self, one: fx.Node, other: fx.Node, known: bool) -> bool:
        """Whether two ops are the same, and are given the same numbers; sizes and ids aside."""
        before, after = self.vocabulary.size, len(self.vocabulary.kept)
        pairs = zip(_given(one), _given(other), strict=False)
        same = all(
            a == b or a != a or (type(a) is type(b) is int and a * after == b * before)
            for a, b in pairs
        )
        return one.target == other.target and (known or same)

    def _change(self, number: Number, new: int) -> None:
        """Let an attribute, or the code, say another number."""
        for given in number.node.meta.get("numbers", ()):
            if given.value != number.value:
                continue
            leaves = attributes(expression(given.value))
            site: Any = number.node.meta.get("site")
            module = str(number.node.meta.get("module"))
            if len(leaves) == 1 and isinstance(expression(given.value), Attribute):
                (leaf,) = leaves
                change = SizeChange(leaf.module, leaf.name, leaf.path, leaf.value, new)
                self.plan = replace(self.plan, sizes=chain(self.plan.sizes, (change,)))
                return
            literal = site and Literal(module, site, given.path, number.value)
            if literal and changeable(site, given.path):
                edit: LiteralChange = changed_literal(literal, new)
                self.plan = replace(self.plan, literals=chain(self.plan.literals, (edit,)))
                return


def _given(node: fx.Node) -> list[Any]:
    """The numbers that an op is given."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, int | float)]


def _where(node: fx.Node) -> str:
    module = node.meta.get("module") or "the model"
    line = f" ({node.meta['line']})" if node.meta.get("line") else ""
    return f"the code of {module}{line}"
