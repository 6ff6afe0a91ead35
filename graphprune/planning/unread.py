"""Attributes that no forward reads but users do: a remembered width, such as ``num_features``.

Nothing says what such a number means, so that it follows only when it equals a size that changed
wherever it can come from: what goes into its module and the parts of it, and what comes out, became
the same other size, and inside of it no dimension, width of a layer, number of parts or size of an
input has kept that value. Where that is not certain, the plan says so.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import nn

from graphprune.arguments import is_int
from graphprune.channels.analysis import Analysis
from graphprune.execute.shrink import hollow
from graphprune.ops.ids import Shape
from graphprune.plan.plan import Plan, SizeChange
from graphprune.planning.dry_run import Ran, what_runs
from graphprune.record.inputs import Call
from graphprune.record.recorder import Record
from graphprune.record.sites import filled
from graphprune.record.sizes import Attribute, attributes, expression, plain
from graphprune.record.tensors import named_modules
from graphprune.text import shorten

_LEAST = 3  # smaller numbers are seldom widths
_ALONE = 12  # attributes that are tried one by one
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Became = dict[int, set[int]]  # sizes before, and what they became


def with_unread(
    model: nn.Module, call: Call, analysis: Analysis, plan: Plan, ran: Sequence[Ran] = ()
) -> Plan:
    """A plan in which attributes follow that nobody reads, as far as that is certain.

    Args:
        model: the model of the plan; it is not touched.
        call: inputs it runs on.
        analysis: what the plan was made of.
        plan: with all other changes.
        ran: what ran of its small model, when that is known.
    """
    leaves = waiting(model, analysis, plan)
    if not leaves:
        return plan
    owners = {leaf.module for leaf in leaves}
    first = ran[0] if ran else what_runs(model, call, analysis.records[0], plan)
    small = hollow(model, plan) if first is None else first.clone
    inside = _inside(model, small, call, plan, owners)
    passing = _passing(analysis.records[0], {} if first is None else first.passed)
    certain, doubtful = [], []
    for leaf in leaves:
        near = passing[leaf.module].get(leaf.value, set())
        within = inside[leaf.module].get(leaf.value, set())
        found = (near or within) - {leaf.value}
        if not found:
            continue
        if len(found) == 1 and leaf.value not in near | within:
            new = next(iter(found))
            certain.append(SizeChange(leaf.module, leaf.name, leaf.path, leaf.value, new))
        elif near or not passing[leaf.module]:
            doubtful.append(leaf)
    known = [first, *ran[1:]]
    followed = _harmless(model, call, analysis, plan, certain, known)
    return replace(followed, notes=(*plan.notes, *_told(doubtful)))


def waiting(model: nn.Module, analysis: Analysis, plan: Plan) -> tuple[Attribute, ...]:
    """The attributes that no code was seen to read, nor mentions, and that may follow."""
    if not plan.slots:
        return ()
    read = _read(analysis) | {change.key for change in plan.sizes}
    leaves = [leaf for leaf in _remembered(model) if leaf not in read]
    if not leaves:
        return ()
    mentions, kinds = _Mentions(model), {n: type(m) for n, m in named_modules(model)}
    return tuple(leaf for leaf in leaves if leaf.name not in mentions.of(kinds[leaf.module]))


def _harmless(
    model: nn.Module,
    call: Call,
    analysis: Analysis,
    plan: Plan,
    changes: list[SizeChange],
    ran: Sequence[Ran | None],
) -> Plan:
    """The plan with those changes that leave all that runs as it is."""
    keys = {change.key for change in changes}
    shown = [one is not None and keys.issubset(one.unread) for one in ran]
    if len(shown) == len(analysis.records) and all(shown):
        return replace(plan, sizes=(*plan.sizes, *changes))  # it ran without them
    others = analysis.records[len(ran) :]
    before = [*ran, *(what_runs(model, call, record, plan) for record in others)]

    def tried(more: list[SizeChange]) -> bool:
        other = replace(plan, sizes=(*plan.sizes, *more))
        after = (what_runs(model, call, record, other) for record in analysis.records)
        return all(a and b and a.ops == b.ops for a, b in zip(before, after))

    if not tried(changes):
        changes = [change for change in changes[:_ALONE] if tried([change])]
        changes = changes if tried(changes) else []
    return replace(plan, sizes=(*plan.sizes, *changes))


def _told(doubtful: list[Attribute]) -> Iterator[str]:
    if doubtful:
        names = [f"{leaf.module}.{leaf.name} ({leaf.value})".lstrip(".") for leaf in doubtful]
        yield (
            "attributes that keep their value, although some sizes of that value change: "
            f"{shorten(dict.fromkeys(names), 6)}"
        )


def _remembered(model: nn.Module) -> Iterator[Attribute]:
    """The ints that modules remember, apart from those that torch's layers have."""
    for name, module in named_modules(model):
        bases = [base for base in type(module).__mro__ if base.__module__.startswith("torch.nn")]
        if type(module) in bases:
            continue
        known = {key for base in bases for key in vars(base).get("__constants__", ())}
        for key, value in vars(module).items():
            listed = type(value) in (tuple, list)
            for place, item in enumerate(value if listed else (value,)):
                number = type(item) is int and item >= _LEAST
                if number and not key.startswith("_") and key not in known:
                    yield Attribute(name, key, (place,) if listed else (), item)


class _Mentions:
    """The names in all code that a forward can reach.

    An attribute of such a name may be read where no one sees it: as an index into a list, say. What
    a method reads of ``self`` concerns modules of its own class alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.anywhere: set[str] = set()
        self.of_self: defaultdict[type, set[str]] = defaultdict(set)
        seen: set[tuple[types.CodeType, type]] = set()
        waiting: list[tuple[object, type]] = []
        for _, module in named_modules(model):
            if not type(module).__module__.startswith("torch.nn."):
                own = vars(module).get("forward")
                waiting += [(type(module).forward, type(module)), (own, type(module))]
                waiting.append((getattr(own, "function", None), type(module)))
        while waiting:
            thing, kind = waiting.pop()
            thing = getattr(thing, "fget", None) or getattr(thing, "__func__", thing)
            if not isinstance(thing, types.FunctionType) or (thing.__code__, kind) in seen:
                continue
            seen.add((thing.__code__, kind))
            of_self, others = _names(thing.__code__)
            self.of_self[kind] |= of_self
            self.anywhere |= others
            names = of_self | others
            held = [cell.cell_contents for cell in thing.__closure__ or () if filled(cell)]
            waiting += [(inspect.getattr_static(kind, name, None), kind) for name in names]
            elsewhere = [*(thing.__globals__.get(name) for name in names), *held]
            waiting += [
                (other, kind)
                for other in elsewhere
                if isinstance(other, types.FunctionType)
                and not other.__module__.startswith("torch.")
            ]

    def of(self, kind: type) -> set[str]:
        """Those that may be read of a module of a class."""
        return self.anywhere | self.of_self[kind]


@lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """What a function, with those inside it, reads of its first argument; its other names."""
    of_self, others = set[str](), {text for text in code.co_consts if isinstance(text, str)}
    first = code.co_varnames[0] if code.co_argcount else None
    before = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and before == first is not None:
            of_self.add(step.argval)
        elif step.argval in code.co_names:
            others.add(step.argval)
        local = step.argval if step.opname.startswith("LOAD_FAST") else None
        before = local[-1] if isinstance(local, tuple) else local  # two at once, since 3.13
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            others.update(*_names(const))
    return frozenset(of_self), frozenset(others)


def _read(analysis: Analysis) -> set[Attribute]:
    """The attributes that a recorded forward gave to an op, or compared."""
    found: set[Attribute] = set()
    for record in analysis.records:
        sides: list[Any] = [side for c in record.comparisons for side in (c.left, c.right)]
        for node in record.graph.nodes:
            sides += (expression(number.value) for number in node.meta.get("numbers", ()))
        found.update(leaf for side in sides for leaf in attributes(side))
    return found


def _sides() -> defaultdict[str, Became]:
    return defaultdict(lambda: defaultdict(set))


def _inside(
    model: nn.Module, clone: nn.Module, call: Call, plan: Plan, owners: set[str]
) -> defaultdict[str, Became]:
    """For some modules what the sizes inside them became; those that stayed are in it, too."""
    found = _sides()
    changed = {(change.module, change.name) for change in plan.sizes}
    small = dict(named_modules(clone))
    given = {side for tensor in call.tensors() for side in tensor.shape[1:]}
    for name in owners:
        for side in given:
            found[name][side].add(side)
    for name, module in named_modules(model):
        around = [holder for holder in (name, *_around(name)) if holder in owners]
        if not around or name not in small:  # what was compiled is plain in the copy
            continue
        for old, new in _sizes(name, module, small[name], changed):
            for holder in around:
                found[holder][old].add(new)
    return found


def _passing(record: Record, after: dict[str, list[Shape]]) -> defaultdict[str, Became]:
    """For every module what the sizes became that go into it and its parts, and come out.

    Parts in a list of modules, which nobody calls, are those of the module around it.
    """
    found = _sides()
    for name in record.passed.keys() & after.keys():
        around = next((holder for holder in _around(name) if holder in record.passed), name)
        for old, new in zip(record.passed[name], after[name]):
            for holder in dict.fromkeys((name, around)):
                for was, now in zip(old[1:], new[1:]):
                    if was != now or holder == name:
                        found[holder][was].add(now)
    return found


def _sizes(
    name: str, module: nn.Module, small: nn.Module, changed: set[tuple[str, str]]
) -> Iterator[tuple[int, int]]:
    """The sizes of a module itself, before and after."""
    for members in ("_parameters", "_buffers"):
        for key, tensor in vars(module)[members].items():
            other = vars(small)[members].get(key)
            if tensor is not None and other is not None:
                yield from zip(tensor.shape, other.shape)
    if isinstance(module, _LISTS):
        yield len(module), len(module)
    torchs = type(module).__module__.startswith("torch.nn")
    for key, value in vars(module).items():
        sized = isinstance(value, int | tuple | list)
        if sized and (torchs or (name, key) in changed):
            both = (value, vars(small).get(key))
            olds, news = (v if isinstance(v, tuple | list) else (v,) for v in both)
            for old, new in zip(olds, news):
                if is_int(new) and is_int(old):
                    yield plain(old), plain(new)


def _around(name: str) -> Iterator[str]:
    """The modules that one is inside of, the nearest first."""
    while name:
        name = name.rpartition(".")[0]
        yield name
