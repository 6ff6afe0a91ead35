"""Find out, before anyone plans, which channels can leave as far as the model's code goes.

A trial plan of irregular widths is solved for sizes. Sizes that are literals in some forward are
traced again as such; sizes that nothing can change freeze their channels, with the reason.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Sequence

import numpy as np
from torch import nn

from graphprune import adapt
from graphprune.analysis import Analysis
from graphprune.errors import RewriteError, TraceError
from graphprune.inputs import Call
from graphprune.plan import LiteralChange, Plan, SizeChange, SlotPlan
from graphprune.rewrite.forward import mark_literals, symbolic
from graphprune.rewrite.shrink import shrink
from graphprune.rules import Reason
from graphprune.sizes import Attribute, Literal
from graphprune.trace import Record, record, run, skeleton

Trusted = frozenset[tuple[int, int]]


def analyse(model: nn.Module, call: Call, first: Record) -> tuple[Analysis, Trusted]:
    """Record, analyse and settle all sizes.

    Args:
        model: the user's model, not touched.
        call: inputs it runs on.
        first: the recorded forward pass in eval mode.
    """
    owners: list[str] = []
    records = _records(model, call, owners, first)
    while True:
        analysis = Analysis.build(model, records)
        owner, trusted = _settle(model, call, analysis, owners)
        if owner is None:
            return analysis, trusted
        owners.append(owner)
        records = _records(model, call, owners)


def _settle(
    model: nn.Module, call: Call, analysis: Analysis, owners: Sequence[str]
) -> tuple[str | None, Trusted]:
    """Freeze what cannot be resized; or name a module whose literals must be traced."""
    while True:
        alive = analysis.alive(trial(analysis))
        problems = adapt.changes(analysis, alive).problems
        unclear = [problem for problem in problems if problem.literal]
        if len(unclear) < len(problems):
            problems = [problem for problem in problems if not problem.literal]
        elif unclear:
            trusted, problems = _try(model, call, analysis, alive, unclear)
            if not problems:
                return None, trusted
        else:
            return None, frozenset()
        owner = _new_owner(model, problems, owners)
        if owner is not None:
            return owner, frozenset()
        freeze_problems(analysis, problems)


def trial(analysis: Analysis) -> dict[str, list[int]]:
    """Kept channels of irregular number and place, the same for every call."""
    generator = np.random.default_rng(7)
    kept = {}
    for group in analysis.groups:
        count = int(generator.integers(1, max(group.size, 2)))
        kept[group.name] = sorted(generator.permutation(group.size)[:count].tolist())
    return kept


def _records(
    model: nn.Module, call: Call, owners: Sequence[str], first: Record | None = None
) -> list[Record]:
    prepare = mark_literals(owners) if owners else None
    evaluated = first or record(model, call, False, prepare)
    if not _depends_on_mode(model, evaluated.used):
        return [evaluated]
    batch = {t.shape[0] for t in call.tensors() if t.dim()}
    call = call.repeated(2) if batch == {1} else call
    try:
        return [evaluated, record(model, call, True, prepare)]
    except TraceError:
        return [evaluated]


def _depends_on_mode(model: nn.Module, used: Iterable[str]) -> bool:
    """Whether train mode may run other ops: code reads ``training``, or layers were not run."""
    used = set(used)
    classes = set()
    for name, module in model.named_modules():
        if name not in used and any(True for _ in module.parameters(recurse=False)):
            return True
        classes.add(type(module))
    return any(_reads_training(cls) for cls in classes)


def _reads_training(cls: type) -> bool:
    for base in cls.__mro__:
        if base.__module__.startswith("torch.nn.") and not base.__module__.startswith(
            "torch.nn.modules.activation"
        ):
            continue
        for value in vars(base).values():
            function = inspect.unwrap(value) if callable(value) else value
            code = getattr(function, "__code__", None)
            if isinstance(code, types.CodeType) and "training" in code.co_names:
                return True
    return False


def _try(
    model: nn.Module,
    call: Call,
    analysis: Analysis,
    alive: np.ndarray,
    unclear: Sequence[adapt.Problem],
) -> tuple[Trusted, list[adapt.Problem]]:
    """Run the trial model: which plain ints follow the shapes by themselves?"""
    ops = {
        node: (number, position)
        for number, rec in enumerate(analysis.records)
        for position, node in enumerate(rec.ops)
    }
    failed = first_mismatch(model, call, analysis, alive)
    if failed is None:
        return frozenset(ops[problem.node] for problem in unclear), []
    number, position = failed
    node = analysis.records[number].ops[position]
    guilty = [p for p in unclear if p.node is node]
    if not guilty:
        before = [p for p in unclear if ops[p.node][0] == number and ops[p.node][1] <= position]
        guilty = before[-1:] or list(unclear[:1])
    return frozenset(), guilty


def _new_owner(
    model: nn.Module, failed: Sequence[adapt.Problem], owners: Sequence[str]
) -> str | None:
    """A module whose forward holds a literal to change and can be rewritten."""
    for problem in failed:
        if problem.literal and problem.owner not in owners:
            try:
                for training in (False, True):
                    symbolic(model.get_submodule(problem.owner), training)
            except RewriteError:
                continue
            return problem.owner
    return None


def first_mismatch(
    model: nn.Module, call: Call, analysis: Analysis, alive: np.ndarray
) -> tuple[int, int] | None:
    """Shrink a copy without weights, run it, and compare every shape with what is foreseen.

    Returns:
        (record, op) of the first op that fails or has another shape; ``None`` when all is well.
    """
    plan = bare_plan(analysis, alive)
    for number, original in enumerate(analysis.records):
        clone = skeleton(model, original.device).train(original.training)
        shrink(clone, plan, inplace=True)
        batch = call
        inputs = [n for n in original.graph.nodes if n.op == "placeholder"]
        tensors = call.tensors()
        if inputs and tensors and inputs[0].meta["shape"] != tuple(tensors[0].shape):
            batch = call.repeated(2)
        try:
            small = run(clone, batch, original.device)
        except TraceError as error:
            partial: Record = error.record  # type: ignore[attr-defined]
            bad = _first_difference(analysis, original, partial, alive)
            last = len(original.ops) - 1
            return number, min(len(partial.ops), last) if bad is None else bad
        bad = _first_difference(analysis, original, small, alive)
        if bad is not None:
            return number, bad
    return None


def _first_difference(
    analysis: Analysis, original: Record, small: Record, alive: np.ndarray
) -> int | None:
    for position, (mine, other) in enumerate(zip(original.ops, small.ops)):
        if mine.target is not other.target:
            return position
        if "shape" in mine.meta and analysis.shape(mine, alive) != other.meta.get("shape"):
            return position
        others = other.meta.get("items", {})
        for index, item in mine.meta.get("items", {}).items():
            if index in others and analysis.shape(item, alive) != others[index].meta["shape"]:
                return position
    return None


def bare_plan(analysis: Analysis, alive: np.ndarray) -> Plan:
    """The slots and sizes of a plan, without its report."""
    found = adapt.changes(analysis, alive)
    slots = []
    for slot in analysis.slots:
        keep = alive[slot.start : slot.start + slot.size]
        if not keep.all():
            kept = tuple(np.flatnonzero(keep).tolist())
            slots.append(SlotPlan(slot.tensor, slot.dim, slot.size, kept))
    sizes = [
        SizeChange(leaf.module, leaf.name, leaf.path, leaf.value, new)
        for leaf, new in found.values.items()
        if isinstance(leaf, Attribute)
    ]
    literals = [
        LiteralChange(leaf.module, leaf.node, leaf.path, leaf.training, leaf.value, new)
        for leaf, new in found.values.items()
        if isinstance(leaf, Literal)
    ]
    return Plan(analysis.architecture, (), tuple(slots), tuple(sizes), tuple(literals))


def freeze_problems(analysis: Analysis, problems: Iterable[adapt.Problem]) -> list[Reason]:
    """Freeze the channels around sizes that cannot be changed."""
    reasons = []
    for problem in problems:
        for ids in adapt.ids_of(analysis, problem.node):
            analysis.freeze(ids, problem.reason)
        reasons.append(problem.reason)
    return reasons
