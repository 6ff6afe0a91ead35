"""The door: a smaller vocabulary for a model, planned, tried and carried out."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphprune.api import rebuild
from graphprune.errors import InputError, TraceError
from graphprune.execute.ids import special_ids
from graphprune.execute.shrink import hollow, shrink
from graphprune.plan.changes import LiteralChange, SizeChange, chain
from graphprune.plan.plan import Plan
from graphprune.plan.vocabulary import Vocabulary, changed, for_small, parameter_names
from graphprune.planning.make import assemble
from graphprune.planning.settle import Settled, _change, _records, follow, rehearse
from graphprune.planning.unread import with_unread
from graphprune.record.checks import check_model
from graphprune.record.inputs import Call, called, infer
from graphprune.record.recorder import Record
from graphprune.record.recording import record
from graphprune.record.sites import changeable
from graphprune.record.sizes import Attribute, Literal, attributes, expression
from graphprune.record.tensors import held_tensors
from graphprune.text import shorten
from graphprune.vocabulary.find import Found, Search
from graphprune.vocabulary.flow import Kind, Number, kinds
from graphprune.vocabulary.tokenizer import beside

_LENGTH = 8  # of texts that are tried where no inputs are given


def trim_vocabulary(
    model: nn.Module,
    ids: object,
    example_inputs: object = None,
    *,
    embedding: str | None = None,
    output: str | bool | None = None,
    tokenizer: object = None,
) -> nn.Module:
    """Make a model with fewer ids, whose logits of these ids are the original's.

    Rows of the embedding tables that the input ids read, and of the output layer, tied or not,
    leave. The new id of each id that stays is its place among them, in the order of the old ones.

    Args:
        model: the trained model; it is not touched.
        ids: those that stay, whole numbers in any order: a list, a set, a tensor. Ids that the
            model itself names (padding, start and end in its config, numbers in its code) stay as
            well; the plan says which were added.
        example_inputs: as for :func:`trace`, with old ids; inferred when absent.
        embedding: the table, by the name of its module or parameter, where it is not clear.
        output: the layer that makes the logits, where it is not clear; ``False`` where none does.
        tokenizer: the tokenizer of the ids: its special and added tokens, its bytes, and the parts
            that tokens are made of stay as well, so that :func:`trim_tokenizer` can trim it.

    Returns:
        A model of the same classes that takes new ids. Its ``graphprune_plan.vocabularies`` map
        ids; it is verified, saved and loaded like any other small model, and can be pruned further.

    Raises:
        InputError: ids that the model does not have; it is not clear which table is meant; or the
            model reads ids in a way that would change: says where.
        ModelError: as for :func:`trace`.
        TraceError: the model does not run on the example inputs.

    Example:
        >>> import torch, graphprune
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100))
        >>> small = graphprune.trim_vocabulary(net, [3, 14, 15, 92])
        >>> logits = net(torch.tensor([[14, 92]]))[..., [3, 14, 15, 92]]
        >>> torch.allclose(small(torch.tensor([[1, 3]])), logits)
        True
    """
    call, plan = planned(model, ids, example_inputs, embedding, output, tokenizer)
    return rebuild(model, plan, call)


def planned(
    model: nn.Module,
    ids: object,
    example_inputs: object = None,
    embedding: str | None = None,
    output: str | bool | None = None,
    tokenizer: object = None,
) -> tuple[Call, Plan]:
    """The plan by which ids leave, and the inputs that it was made with."""
    check_model(model)
    asked = numbers(ids)
    call, first = _recorded(model, example_inputs)
    search = Search(model, call, _records(model, call, first))
    found = search.vocabulary(asked[-1], embedding, output)
    if asked[-1] >= found.vocabulary.size:
        raise InputError(
            f"id {asked[-1]} is out of range: the vocabulary has ids 0 to "
            f"{found.vocabulary.size - 1} ({shorten([r[0] for r in found.vocabulary.rows])})"
        )
    added = dict(_added(model, found, asked))
    parts = {} if tokenizer is None else beside(tokenizer, {*asked, *added})
    parts = {n: why for n, why in parts.items() if n < found.vocabulary.size}
    kept = tuple(sorted({*asked, *added, *parts}))
    vocabulary = replace(found.vocabulary, kept=kept)
    notes = [
        f"ids that stay as the {who} names them: {shorten(list(map(_told, more.items())), 6)}"
        for who, more in (("model", added), ("tokenizer", parts))
        if more
    ]
    if not vocabulary.outputs:
        notes.append(f"no output has a logit for each of {vocabulary.size:,} ids: outputs stay")
    plan = _assembled(model, call, found, vocabulary, notes)
    return call, Trial(model, call, search.records, found, plan).settled()


def numbers(ids: Any) -> list[int]:
    """Ids as a user may give them, in order and each once.

    Raises:
        InputError: they are no whole numbers of at least 0, or there are none.
    """
    try:
        items = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)
    except TypeError:
        items = None
    advice = "pass whole numbers, such as [0, 5, 7]"
    if items is None or isinstance(ids, str | bytes):
        raise InputError(f"ids must be the ids that stay, not a {type(ids).__name__}: {advice}")
    wrong = [item for item in items if type(item) is not int and not isinstance(item, np.integer)]
    if wrong:
        kind = type(wrong[0]).__name__
        advice = "of a mask pass mask.nonzero().flatten()" if kind == "bool" else advice
        raise InputError(f"ids must be whole numbers, found {wrong[0]!r} ({kind}): {advice}")
    if not items:
        raise InputError("ids are empty: at least one must stay")
    kept = sorted({int(item) for item in items})
    if kept[0] < 0:
        raise InputError(f"ids must be 0 or more, found {kept[0]}")
    return kept


def _recorded(model: nn.Module, example_inputs: object) -> tuple[Call, Record]:
    """The inputs, and what they were recorded as; ids are tried where none are given."""
    if example_inputs is not None:
        return called(example_inputs, lambda call: record(model, call, training=False))
    ids = torch.zeros((2, _LENGTH), dtype=torch.int64)
    names = [name for name in parameter_names(model) if name.endswith("input_ids")]
    for call in (Call((ids,)), Call((), dict.fromkeys(names, ids))):
        if call.args or call.kwargs:
            with contextlib.suppress(TraceError):
                return call, record(model, call, training=False)
    return infer(model, lambda call: record(model, call, False, devices=("meta",)))


def _told(item: tuple[int, str]) -> str:
    return f"{item[0]} ({item[1]})"


def _added(model: nn.Module, found: Found, asked: Sequence[int]) -> Iterator[tuple[int, str]]:
    """The ids that must stay as well, each with why."""
    known, size = set(asked), found.vocabulary.size
    for special, name in special_ids(model, found.vocabulary).items():
        if special not in known:
            known.add(special)
            yield special, name
    for number in (number for kind in found.kind for number in kind.numbers):
        if number.bound is None and 0 <= number.value < size and number.value not in known:
            known.add(number.value)
            yield number.value, f"in the code of {number.node.meta.get('module') or 'the model'}"


def _assembled(
    model: nn.Module, call: Call, found: Found, vocabulary: Vocabulary, notes: Iterable[str]
) -> Plan:
    """The plan by which rows leave, with the sizes in the code that follow."""
    settled = Settled(replace(found.analysis, vocabulary=found.vocabulary))
    small = for_small(call, model, (vocabulary,))  # new ids are ids of the original as well
    chosen = {found.group.name: vocabulary.kept}
    try:
        finding = follow(model, small, settled, chosen)
        plan = assemble(small, finding.settled, chosen, {"vocabulary": len(vocabulary.kept)})
        alive = finding.settled.analysis.alive(chosen)
        finding = rehearse(model, small, finding.settled, plan, alive)
    except InputError as error:
        raise InputError(str(error).replace("these channels", "rows of the vocabulary")) from None
    if not finding.possible:
        reason = finding.settled.analysis.later.frozen[-1][1]
        raise InputError(f"rows of the vocabulary cannot leave: {reason}")
    plan = with_unread(model, small, found.analysis, plan)
    others = (group for group in plan.groups if group.name != found.group.name)
    groups = tuple(replace(group, exact=True) for group in others)  # none of them loses any
    return replace(plan, groups=groups, evaluated=False, notes=(*notes, *plan.notes))


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
    _again: dict[int, tuple[Record, Kind]] = field(default_factory=dict)
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

    def _original(self, place: int) -> tuple[Record, Kind]:
        """The original, recorded, and where its ids go.

        Where its code reads values it is recorded once more, with ids that stay: the small model
        shall read the same.
        """
        first, kind = self.records[place], self.found.kind[place]
        if first.device == "meta":
            return first, kind
        if place not in self._again:
            vocabularies = self.plan.vocabularies
            call = changed(self._inputs(first), self.model, vocabularies, Vocabulary.settled)
            again = record(self.model, call, first.training, devices=(first.device,))
            found = kinds(again, dict(held_tensors(self.model)))
            same = (other for other in found if other.tables.keys() & kind.tables.keys())
            self._again[place] = again, next(same, kind)
        return self._again[place]

    def _small(self, original: Record) -> Record:
        """The small model, recorded as the original was."""
        meta = original.device == "meta"
        small = hollow(self.model, self.plan) if meta else shrink(self.model, self.plan)
        call = for_small(self._inputs(original), self.model, self.plan.vocabularies)
        return record(small, call, original.training, devices=(original.device,))

    def _wrong(self, place: int) -> list[tuple[Number, int]]:
        """The numbers in the code of the small model that are not as they should be."""
        original, mine = self._original(place)
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
                edit: LiteralChange = _change(literal, new)
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


__all__ = ["numbers", "planned", "trim_vocabulary"]
