"""Find out, before anyone plans, which channels can leave as far as the model's code goes.

A trial plan of irregular widths is solved for sizes; sizes that neither an attribute nor a number
in the source can change freeze their channels, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx, nn

from graphprune.channels.analysis import Analysis
from graphprune.errors import RewriteError, TraceError
from graphprune.execute.shrink import shrink
from graphprune.ops.ids import varying
from graphprune.ops.rules import Reason
from graphprune.plan.plan import IndexChange, LiteralChange, Plan, SizeChange, SlotPlan
from graphprune.planning import adapt
from graphprune.planning.problems import Problem, freeze, ids_around, unite
from graphprune.record.inputs import Call
from graphprune.record.recorder import Record
from graphprune.record.recording import record, run
from graphprune.record.sizes import Attribute, Literal
from graphprune.record.skeleton import named_modules, skeleton

Trusted = frozenset[tuple[int, int]]
TRIALS = 2


@dataclass
class Settled:
    """An analysis whose sizes can all be changed as its groups need it.

    ``trusted`` are the (record, op) positions of plain ints that were seen to follow the shapes by
    themselves.
    """

    analysis: Analysis
    trusted: Trusted = frozenset()
    solved: tuple[np.ndarray, adapt.Changes] | None = None  # for the channels asked for last

    def copy(self) -> Settled:
        """A copy in which more can be frozen."""
        return Settled(self.analysis.copy(), self.trusted)

    def changes(self, alive: np.ndarray) -> adapt.Changes:
        """The sizes that change when these ids stay."""
        if self.solved is None or not np.array_equal(self.solved[0], alive):
            self.solved = alive, adapt.changes(self.analysis, alive, self.trusted)
        return self.solved[1]


def analyse(
    model: nn.Module, call: Call, first: Record | None = None, attention: str = "heads"
) -> Settled:
    """Record, analyse and settle all sizes.

    Args:
        model: the user's model, not touched.
        call: inputs it runs on.
        first: the recorded forward pass in eval mode, when there is one already.
        attention: see ``trace``.
    """
    settled = Settled(Analysis.build(model, _records(model, call, first), attention))
    for number in range(TRIALS):
        while not feasible(model, call, settled, trial(settled.analysis, number)):
            pass
    return settled


def feasible(
    model: nn.Module, call: Call, settled: Settled, kept: Mapping[str, Sequence[int]]
) -> bool:
    """Whether the code can follow a plan; if not, more channels were tied or frozen."""
    analysis = settled.analysis
    alive = analysis.alive(kept)
    found = settled.changes(alive)
    problems = found.problems
    unclear = [problem for problem in problems if problem.literal]
    if unclear and len(unclear) == len(problems):
        trusted, problems = _try(model, call, analysis, alive, unclear)
        settled.trusted |= trusted
    settled.solved = None if problems or unclear else settled.solved
    if problems:
        resolve_problems(settled, problems)
        return False
    return not found.unsure or bool(unclear) or follows(model, call, settled, alive)


def follows(model: nn.Module, call: Call, settled: Settled, alive: np.ndarray) -> bool:
    """Whether a shrunk copy runs as foreseen; if not, the channels concerned are frozen."""
    analysis = settled.analysis
    mismatch = first_mismatch(model, call, analysis, alive)
    if mismatch is None:
        return True
    node = analysis.records[mismatch[0]].ops[mismatch[1]]
    module, line = node.meta["module"], node.meta["line"]
    reason = Reason(f"the code around {node.target} does not follow", module, line)
    before = analysis.records[mismatch[0]].ops[: mismatch[1] + 1]
    for node in reversed(before):  # what shrinks at the op, or else what shrank last before it
        ids = ids_around(analysis, node)
        if not all(alive[layer.numpy()].all() for layer in ids):
            for layer in ids:
                analysis.freeze(layer, reason)
            return False
    raise RewriteError(f"the shrunk model would not run: {reason}; please report this")


def resolve_problems(settled: Settled, problems: Sequence[Problem]) -> None:
    """Tie or freeze the channels that stand in the way."""
    certain = [problem for problem in problems if not problem.literal] or problems
    analysis = settled.analysis
    if any([unite(analysis, problem) for problem in certain]):
        return
    if any([freeze(analysis, problem) for problem in certain]):
        return
    if not any(_freeze_before(analysis, problem) for problem in certain):
        raise RewriteError(f"{certain[0].reason}, but no channel it depends on is left to freeze")


def _freeze_before(analysis: Analysis, problem: Problem) -> bool:
    """Freeze what shrinks last before an op; whether there was anything."""
    for rec in analysis.records:
        ops = rec.ops
        for node in reversed(ops[: ops.index(problem.node) + 1] if problem.node in ops else ()):
            ids = ids_around(analysis, node)
            if not all(analysis.units.frozen[analysis.units.labels[i]].all() for i in ids):
                for layer in ids:
                    analysis.freeze(layer, problem.reason)
                return True
    return False


def trial(analysis: Analysis, number: int) -> dict[str, list[int]]:
    """Kept channels of irregular number and place, the same for every call.

    Groups of different sizes keep different numbers, where they can: some code takes equal sizes
    for the absence of a layer (LSTM without projection).
    """
    generator = np.random.default_rng(number)
    kept = {}
    sizes: dict[int, int] = {}
    for group in analysis.groups:
        for _ in range(4):
            count = int(generator.integers(1, max(group.size, 2)))
            if sizes.setdefault(count, group.size) == group.size:
                break
        kept[group.name] = sorted(generator.permutation(group.size)[:count].tolist())
    return kept


def _records(model: nn.Module, call: Call, first: Record | None = None) -> list[Record]:
    evaluated = first or record(model, call, False)
    if not _depends_on_mode(model, evaluated):
        return [evaluated]
    batch = {t.shape[0] for t in call.tensors() if t.dim()}
    call = call.repeated(2) if batch == {1} else call
    try:
        return [evaluated, record(model, call, True)]
    except TraceError:
        return [evaluated]


def _depends_on_mode(model: nn.Module, evaluated: Record) -> bool:
    """Whether train mode may run other ops: code looked at it, or layers were not used."""
    tensors = (str(n.target) for n in evaluated.graph.nodes if n.op == "get_attr")
    used = {*evaluated.used, *(tensor.rpartition(".")[0] for tensor in tensors)}
    unused = (module for name, module in named_modules(model) if name not in used)
    return evaluated.branches or any(
        p is not None for module in unused for p in module._parameters.values()
    )


def _try(
    model: nn.Module,
    call: Call,
    analysis: Analysis,
    alive: np.ndarray,
    unclear: Sequence[Problem],
) -> tuple[Trusted, list[Problem]]:
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


def first_mismatch(
    model: nn.Module, call: Call, analysis: Analysis, alive: np.ndarray
) -> tuple[int, int] | None:
    """Shrink a copy without weights, run it, and compare every shape with what is foreseen.

    Returns:
        (record, op) of the first op that fails or has another shape; ``None`` when all is well.
    """
    plan = bare_plan(analysis, alive, adapt.changes(analysis, alive))
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
            partial = error.record
            if not isinstance(partial, Record):
                raise
            bad = _first_difference(analysis, original, partial, alive)
            stop = min(len(partial.ops), len(original.ops) - 1) if bad is None else bad
            if any(map(_depends_on_values, original.ops[:stop])):
                continue  # boxes of other values, which the original may not take either
            return number, stop
        bad = _first_difference(analysis, original, small, alive)
        if bad is not None:
            return number, bad
    return None


def _first_difference(
    analysis: Analysis, original: Record, small: Record, alive: np.ndarray
) -> int | None:
    """The first op of another kind or shape. Whether a reshape copies depends on strides."""
    mine = [(position, node) for position, node in enumerate(original.ops) if _compared(node)]
    others = [node for node in small.ops if _compared(node)]
    unsteady: set[fx.Node] = set()

    def differs(node: fx.Node, other: fx.Node) -> bool:
        wanted, found = analysis.shape(node, alive), other.meta["shape"]
        if not unsteady:
            return wanted != found
        moving = {dim for layer in analysis.values[node].layers for dim in varying(layer)}
        return len(wanted) != len(found) or any(wanted[dim] != found[dim] for dim in moving)

    for (position, node), other in zip(mine, others):
        results = node.meta.get("items", {})
        if _depends_on_values(node) or unsteady & set(node.all_input_nodes):
            unsteady.update((node, *results.values()))
        if node.target != other.target and not {node.target, other.target} <= _RESHAPES:
            return None if unsteady else position  # other values take other ways
        if "shape" in node.meta and ("shape" not in other.meta or differs(node, other)):
            return position
        for index, item in results.items():
            small_item = other.meta.get("items", {}).get(index)
            if item.users and small_item is not None and differs(item, small_item):
                return position
    return None


def _depends_on_values(node: fx.Node) -> bool:
    """Whether the shape of a result depends on values: selected boxes, say."""
    tags = getattr(node.target, "tags", ())
    packet = getattr(node.target, "overloadpacket", None)
    if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
        return True
    if packet is torch.ops.aten.index:
        return any(n.meta.get("dtype") == torch.bool for n in node.all_input_nodes[1:])
    return str(getattr(node.target, "namespace", "aten")) not in ("aten", "prims")


_RESHAPES = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}


def _compared(node: fx.Node) -> bool:
    return node.target is not torch.ops.aten.clone.default


def _change(leaf: Literal, new: float) -> LiteralChange:
    site = replace(leaf.site, file="", first=0, digest="")
    return LiteralChange(leaf.module, site, leaf.path, leaf.value, new, leaf.site.digest)


def bare_plan(analysis: Analysis, alive: np.ndarray, found: adapt.Changes) -> Plan:
    """The slots and sizes of a plan, without its report."""
    slots = []
    for slot in analysis.slots:
        keep = alive[slot.start : slot.start + slot.size]
        if not keep.all():
            kept = tuple(np.flatnonzero(keep).tolist())
            slots.append(SlotPlan(slot.tensor, slot.dim, slot.size, kept))
    sizes = [
        SizeChange(leaf.module, leaf.name, leaf.path, leaf.value, int(new))
        for leaf, new in found.values.items()
        if isinstance(leaf, Attribute)
    ]
    literals = [
        _change(leaf, new) for leaf, new in found.values.items() if isinstance(leaf, Literal)
    ]
    indices = [
        IndexChange(name, tuple(values.tolist()), tuple(np.flatnonzero(alive[ids]).tolist()))
        for name, ids in analysis.walk.renumbered.items()
        if (values := analysis.walk.numbers(name)) is not None and not alive[ids].all()
    ]
    return Plan(
        analysis.architecture, (), tuple(slots), tuple(sizes), tuple(literals), tuple(indices)
    )
