"""The door: a smaller vocabulary for a model, planned, tried and carried out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.api import rebuild
from graphprune.errors import InputError, TraceError
from graphprune.execute.ids import doubtful, special_ids
from graphprune.plan.plan import Plan
from graphprune.plan.vocabulary import Vocabulary, changed
from graphprune.planning.make import assemble
from graphprune.planning.settle import Settled, follow, recorded, rehearse
from graphprune.planning.unread import with_unread
from graphprune.record.checks import check_model
from graphprune.record.inputs import Call, called
from graphprune.record.outputs import Outputs
from graphprune.record.recorder import Record
from graphprune.record.recording import inferred, record
from graphprune.record.sizes import attributes, expression
from graphprune.text import shorten
from graphprune.vocabulary.find import Found, Search
from graphprune.vocabulary.tokenizer import beside, checked, known_ids
from graphprune.vocabulary.trial import Trial

_LENGTH = 8  # of texts that are tried where no inputs are given


def trim_vocabulary(
    model: nn.Module,
    ids: object,
    example_inputs: object = None,
    *,
    embedding: str | None = None,
    output: str | bool | None = None,
    outputs: object = None,
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
        outputs: which outputs count, as for :func:`trace`: others may hold ids themselves.
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
    call, plan = planned(model, ids, example_inputs, embedding, output, outputs, tokenizer)
    return rebuild(model, plan, call)


def planned(
    model: nn.Module,
    ids: object,
    example_inputs: object = None,
    embedding: str | None = None,
    output: str | bool | None = None,
    outputs: object = None,
    tokenizer: object = None,
) -> tuple[Call, Plan]:
    """The plan by which ids leave, and the inputs that it was made with."""
    check_model(model)
    asked = numbers(ids)
    if tokenizer is not None:
        checked(tokenizer)
    counted = Outputs.of(outputs)
    call, first = _recorded(model, example_inputs)
    if counted is not None:
        call = replace(call, outputs=counted)
        first = record(model, call, training=False)
    search = Search(model, call, recorded(model, call, first))
    found, vocabulary, notes = _chosen(search, asked, embedding, output, tokenizer)
    if any(each.device != "meta" for each in search.records):  # its code reads values: of ids that
        call = changed(call, model, (vocabulary,), Vocabulary.settled)  # the small model can read
        search = Search(model, call, recorded(model, call))
        found, vocabulary, notes = _chosen(search, asked, embedding, output, tokenizer)
    return call, _assembled(model, call, search.records, found, vocabulary, notes)


def _chosen(
    search: Search,
    asked: Sequence[int],
    embedding: str | None,
    output: str | bool | None,
    tokenizer: object,
) -> tuple[Found, Vocabulary, list[str]]:
    """Which vocabulary is meant, what stays of it, and what is to be said of that."""
    advice = _beyond(tokenizer, asked[-1])
    found = search.vocabulary(asked[-1], embedding, output, advice)
    size = found.vocabulary.size
    if asked[-1] >= size:
        raise InputError(
            f"id {asked[-1]} is out of range: the vocabulary has ids 0 to {size - 1} "
            f"({shorten([row[0] for row in found.vocabulary.rows])}){advice}"
        )
    added = dict(_added(search.model, found, asked))
    parts = {} if tokenizer is None else beside(tokenizer, {*asked, *added})
    parts = {number: why for number, why in parts.items() if number < size}
    notes = [
        f"ids that stay as the {who} names them: {shorten(list(map(_told, more.items())), 6)}"
        for who, more in (("model", added), ("tokenizer", parts))
        if more
    ]
    if not found.vocabulary.outputs:
        notes.append(
            f"no output has a logit for each of {size:,} ids: outputs stay, and ids among them (of "
            "argmax, say) are the old ones"
        )
    fitting = [k for k in search.kinds[0] if search.size(k) > asked[-1]]
    others = [search.told(k) for k in fitting if not k.tables.keys() & found.kind[0].tables.keys()]
    if others:
        notes.append(f"other tables that inputs read stay whole: {shorten(others, 3)}")
    kept = {*asked, *added, *parts}
    named = {number.value for kind in found.kind for number in kind.numbers}
    special = kept & {*special_ids(search.model, found.vocabulary), *named}
    vocabulary = replace(found.vocabulary, kept=tuple(sorted(kept)), special=tuple(sorted(special)))
    return found, vocabulary, notes


def numbers(ids: Any) -> list[int]:
    """Ids as a user may give them, in order and each once.

    Raises:
        InputError: they are no whole numbers of at least 0, or there are none.
    """
    try:
        items = list(ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids)
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
    call = Call((torch.zeros((2, _LENGTH), dtype=torch.int64),))
    with contextlib.suppress(TraceError):
        return call, record(model, call, training=False)
    return inferred(model)


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
    model: nn.Module,
    call: Call,
    records: Sequence[Record],
    found: Found,
    vocabulary: Vocabulary,
    notes: Iterable[str],
) -> Plan:
    """The plan by which rows leave, with the sizes in the code that follow."""
    settled = Settled(replace(found.analysis, vocabulary=vocabulary))
    chosen = {found.group.name: vocabulary.kept}
    alive = settled.analysis.alive(chosen)
    try:
        if settled.changes(alive).problems:
            settled = follow(model, call, settled, chosen).settled
        plan = assemble(call, settled, chosen, {"vocabulary": len(vocabulary.kept)})
    except InputError as error:
        raise InputError(str(error).replace("these channels", "rows of the vocabulary")) from None
    sized, plan = plan, Trial(model, call, records, found, plan).settled()
    reads = any(each.device != "meta" for each in records)  # then ids in the code must be right
    finding = rehearse(model, call, settled, plan if reads else sized, alive)
    if not finding.possible:
        reason = finding.settled.analysis.later.frozen[-1][1]
        raise InputError(f"rows of the vocabulary cannot leave: {reason}")
    plan = with_unread(model, call, found.analysis, plan)
    others = (group for group in plan.groups if group.name != found.group.name)
    groups = tuple(replace(group, exact=True) for group in others)  # none of them loses any
    told = (*notes, *_unsure(model, records, plan), *plan.notes)
    return replace(plan, groups=groups, evaluated=False, notes=told)


def _unsure(model: nn.Module, records: Iterable[Record], plan: Plan) -> Iterator[str]:
    """A word on attributes that may be ids, and that no code reads as it was recorded."""
    nodes = (node for record in records for node in record.graph.nodes)
    given = (number for node in nodes for number in node.meta.get("numbers", ()))
    read = {(a.module, a.name) for number in given for a in attributes(expression(number.value))}
    read |= {(change.module, change.name) for change in plan.sizes}
    found = doubtful(model, plan.vocabularies[0])
    names = [
        f"{name}.{key} ({old})".lstrip(".") for name, key, old in found if (name, key) not in read
    ]
    if names:
        yield f"attributes that may be ids, and stay: {shorten(names, 6)}"


def _beyond(tokenizer: object, largest: int) -> str:
    """What is to be said where an id of a tokenizer is none of the table."""
    ids = None if tokenizer is None else known_ids(tokenizer)
    if not ids or largest not in ids:
        return ""
    return f"; the tokenizer has ids up to {max(ids)}: it is larger than the table"


__all__ = ["numbers", "planned", "trim_vocabulary"]
