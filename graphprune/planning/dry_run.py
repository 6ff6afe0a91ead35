"""Run a shrunk copy without weights, and see whether it does what a plan foresees.

Nothing is computed on ``meta``: a run costs a few milliseconds and shows whether all sizes fit.
Models that read values have been recorded on the CPU, and run there, with their weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphprune.channels.analysis import Analysis, Pruned
from graphprune.errors import InputError, TraceError
from graphprune.execute.shrink import hollow, shrink
from graphprune.ops.calls import args_of
from graphprune.ops.given import numbers_for
from graphprune.ops.ids import Shape, varying
from graphprune.ops.registry import op_of
from graphprune.plan.plan import Plan
from graphprune.plan.vocabulary import for_small
from graphprune.record.inputs import Call
from graphprune.record.modes import leak
from graphprune.record.recorder import Record
from graphprune.record.recording import dry, run
from graphprune.record.sizes import Attribute, plain
from graphprune.record.skeleton import marked, skeleton, without_weights
from graphprune.record.tensors import named_modules, shapes_in

aten = torch.ops.aten


class Place(NamedTuple):
    """An op of a record."""

    record: int
    position: int


@torch.inference_mode(False)
def first_mismatch(
    model: nn.Module,
    call: Call,
    analysis: Analysis,
    alive: np.ndarray,
    plan: Plan,
    strict: bool = False,
) -> Place | None:
    """Record the small model, and compare the shape of every value with what is foreseen.

    A ``strict`` run has to reach its end by the same ops, whatever the values that it reads.

    Returns:
        The first op that fails or has another shape; ``None`` when all is well.
    """
    for number, original in enumerate(analysis.records):
        small, complete = _recorded(model, _batch(original, call), original, plan)
        bad = _first_difference(analysis, alive, original, small, strict=strict)
        if bad is None and not complete:
            bad = min(len(small.ops), len(original.ops) - 1)
        if bad is None and original.doubts and not plan.plain_statistics:
            bad = _first_other_float(original, small)
        if not (complete or strict) and any(map(_depends_on_values, original.ops[:bad])):
            continue  # boxes of other values, which the original may not take either
        if bad is not None:
            return Place(number, bad)
    return None


def _recorded(
    model: nn.Module, call: Call, original: Record, plan: Plan | None
) -> tuple[Record, bool]:
    """What ran of a shrunk copy, and whether that was all of it."""
    if original.device == "meta":
        clone = marked(without_weights(model) if plan is None else hollow(model, plan))
    else:
        clone = skeleton(model, original.device)
        if plan is not None:
            call = for_small(call, model, plan.vocabularies)
            clone = shrink(clone, plan, inplace=True)
    clone.train(original.training)
    try:
        found = run(clone, call, original.device, caches=original.caches, beside=original.beside)
        return found, True
    except TraceError as error:
        if not isinstance(error.record, Record):
            raise
        return error.record, False


def _batch(original: Record, call: Call) -> Call:
    """The inputs as they were when a pass was recorded: train mode may want two of a batch."""
    inputs = [node for node in original.graph.nodes if node.op == "placeholder"]
    tensors = call.tensors()
    if inputs and tensors and inputs[0].meta["shape"] != tuple(tensors[0].shape):
        return call.repeated(2)
    return call


def _first_difference(
    analysis: Analysis,
    alive: np.ndarray,
    original: Record,
    small: Record,
    whole: Record | None = None,
    strict: bool = False,
) -> int | None:
    """The first op of another kind or shape. Whether a reshape copies depends on strides.

    Behind what depends on values, the dimensions of channels that may leave are compared: how many
    boxes there are is another matter. ``whole`` is the original at another batch size, when the
    small model was run with that.
    """
    pruned = analysis.pruned(alive)
    scaled = {} if whole is None else dict(zip(_values(original), _values(whole)))
    mine = [(position, node) for position, node in enumerate(original.ops) if _compared(node)]
    others = [node for node in small.ops if _compared(node)]
    unsteady: set[fx.Node] = set()

    def differs(node: fx.Node, other: fx.Node) -> bool:
        foreseen, found = pruned.shape(node), other.meta["shape"]
        if 0 in node.meta["shape"] and 0 in found:
            return len(foreseen) != len(found)  # nothing in it tells its channels
        if node in scaled:
            foreseen = _at_batch(foreseen, node.meta["shape"], scaled[node].meta["shape"])
        if not unsteady:
            return foreseen != found
        layers = [i for i in pruned.values[node].layers if analysis.is_own(i)]
        moving = {dim for i in layers if not analysis.stays(i) for dim in varying(i)}
        return len(foreseen) != len(found) or any(foreseen[dim] != found[dim] for dim in moving)

    for (position, node), other in zip(mine, others):
        results = node.meta.get("items", {})
        looked = (node.target is leak and _reads_model(node)) or _depends_on_values(node)
        if looked or unsteady & set(node.all_input_nodes):
            unsteady.update((node, *results.values()))
        elsewhere = node.meta["module"] != other.meta["module"]
        if not _alike(node, other) or (unsteady and elsewhere):
            return None if unsteady and not strict else position  # other values take other ways
        if "shape" in node.meta and ("shape" not in other.meta or differs(node, other)):
            return position
        if (strict or not unsteady) and whole is None and _misplaced(pruned, node, other):
            return position
        for index, item in results.items():
            small_item = other.meta.get("items", {}).get(index)
            if item.users and small_item is not None and differs(item, small_item):
                return position
    return None


def _first_other_float(original: Record, small: Record) -> int | None:
    """The first op that is given another number: it was computed from a size."""
    for position, (node, other) in enumerate(zip(original.ops, small.ops)):
        if node.target != other.target:
            return None
        mine, others = _floats(node), _floats(other)
        if any(others.get(place) != number for place, number in mine.items()):
            return position
    return None


def _floats(node: fx.Node) -> dict[object, float]:
    """The floats that an op is given; a plan may add one, the scale of attention."""
    given: list[tuple[object, object]] = [*enumerate(node.args), *node.kwargs.items()]
    return {place: number for place, number in given if isinstance(number, float)}


class _Foreseen:
    """What ops ask for to tell which sizes they need, for one choice of ids."""

    def __init__(self, pruned: Pruned) -> None:
        self.pruned = pruned

    def shape(self, node: fx.Node, alive: np.ndarray) -> Shape:
        return self.pruned.shape(node)

    def positions(self, node: fx.Node, dim: int, alive: np.ndarray) -> np.ndarray:
        return self.pruned.positions(node, dim)


def _misplaced(pruned: Pruned, node: fx.Node, other: fx.Node) -> bool:
    """Whether an op was given the place of another channel: the shape does not show it."""
    op = op_of(node)
    if not op.places or op.given is None:
        return False
    numbers = {number.path: number.value for number in other.meta["numbers"]}
    for given in op.given(_Foreseen(pruned), node, pruned.alive):
        bound = numbers_for(node, given)
        if not bound and given.old != given.new and _argument(other, given.argument) != given.new:
            return True
        for place, number in bound.items():
            needed = given.new[place]
            if plain(numbers.get(number.path, needed)) != needed:
                return True
    return False


def _argument(node: fx.Node, name: str) -> list[Any]:
    """The numbers that an op was given by an argument of its schema."""
    schema: Any = node.target
    named = dict(zip((argument.name for argument in schema._schema.arguments), args_of(node)))
    value = {**named, **node.kwargs}.get(name)
    return [*value] if isinstance(value, list | tuple) else [value]


def _values(record: Record) -> list[fx.Node]:
    """What ops make, in order."""
    found = [item for node in record.ops for item in (node, *node.meta.get("items", {}).values())]
    return [node for node in found if "shape" in node.meta]


def _depends_on_values(node: fx.Node) -> bool:
    """Whether the shape of a result depends on values: selected boxes, say.

    Constants of the code have the same values in the small model.
    """
    tags = getattr(node.target, "tags", ())
    if getattr(node.target, "overloadpacket", None) is aten.index:
        depends = any(n.meta.get("dtype") == torch.bool for n in node.all_input_nodes[1:])
    elif torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
        depends = True
    else:
        known = ("aten", "prims", "graphprune")
        depends = str(getattr(node.target, "namespace", "aten")) not in known
    return depends and _reads_model(node)


def _reads_model(node: fx.Node) -> bool:
    """Whether an op reads what was computed from inputs, parameters or random numbers."""
    waiting, seen = list(node.all_input_nodes), {node}
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return True
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        constant = source.op == "get_attr" and str(source.target).startswith("constant_")
        seeded = torch.Tag.nondeterministic_seeded in getattr(source.target, "tags", ())
        if seeded or not (constant or source.op == "call_function"):
            return True
        waiting += source.all_input_nodes
    return False


_ALIKE = (
    {aten.view.default, aten._unsafe_view.default},
    {aten.native_layer_norm.default, torch.ops.graphprune.layer_norm.default},
    {aten.native_group_norm.default, torch.ops.graphprune.group_norm.default},
    {aten._softmax.default, torch.ops.graphprune.softmax.default},
    {aten._log_softmax.default, torch.ops.graphprune.log_softmax.default},
    {aten.mean.dim, torch.ops.graphprune.mean.default},
)


def _alike(node: fx.Node, other: fx.Node) -> bool:
    """Whether two ops are one, up to what a plan makes of it."""
    both = {node.target, other.target}
    return len(both) == 1 or any(both <= alike for alike in _ALIKE)


def _compared(node: fx.Node) -> bool:
    return node.target is not aten.clone.default


class Ran(NamedTuple):
    """What ran of the small model of a plan.

    Attributes:
        clone: the small model, without weights.
        outputs: the shapes of what it returned.
        ops: every op, and what it was given.
        passed: the shapes of what every module took and returned, when it ran on ``meta``.
        unread: attributes that it ran without.
    """

    clone: nn.Module
    outputs: list[Shape]
    ops: list[str]
    passed: dict[str, list[Shape]]
    unread: tuple[Attribute, ...] = ()


class _Unreadable:
    """Takes the place of a number that nobody seems to read: whatever is done with it fails."""

    def _fail(self, *_: object) -> NoReturn:
        raise TypeError("this attribute is read")

    __bool__ = __index__ = __int__ = __float__ = __len__ = __iter__ = __getitem__ = _fail
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _fail
    __hash__ = __contains__ = __call__ = __str__ = __repr__ = __format__ = _fail


@contextlib.contextmanager
def _without(model: nn.Module, unread: Iterable[Attribute]) -> Iterator[None]:
    """A model in which some attributes cannot be read."""
    modules = dict(named_modules(model))
    places = {(leaf.module, leaf.name) for leaf in unread if leaf.module in modules}
    held = [(vars(modules[module]), name) for module, name in places]
    values = [state[name] for state, name in held]
    try:
        for state, name in held:
            state[name] = _Unreadable()
        yield
    finally:
        for (state, name), value in zip(held, values):
            state[name] = value


def what_runs(
    model: nn.Module,
    call: Call,
    original: Record,
    plan: Plan,
    unread: tuple[Attribute, ...] = (),
) -> Ran | None:
    """Run the small model of a plan as the original was run; ``None`` when it does not run.

    ``unread`` are attributes that no forward reads, as far as is known: where it runs without
    them, that is shown.
    """
    batch, clone = _batch(original, call), hollow(model, plan)
    ran = Ran(clone, [], [], {}, unread)
    if original.device == "meta":
        hooks = [
            module.register_forward_hook(
                lambda _, *given, name=name: ran.passed.setdefault(name, []).extend(
                    shapes_in(given)
                ),
                with_kwargs=True,
            )
            for name, module in named_modules(clone)
        ]
        try:
            with _without(clone, unread):
                out = dry(clone.train(original.training), batch, ran.ops, original.caches)
        except Exception:  # whatever the code of a model raises: it is run again, and told then
            return what_runs(model, call, original, plan) if unread else None
        finally:  # they hold the copy, which would wait for the collector
            for hook in hooks:
                hook.remove()
        ran.outputs.extend(shapes_in(out))
        return ran
    small, complete = _recorded(model, batch, original, plan)
    for node in small.ops:
        numbers = [a for a in pytree.tree_leaves(node.args) if not isinstance(a, fx.Node)]
        ran.ops.append(f"{node.target} {numbers} {node.meta.get('shape')}")
    return ran if complete else None


@torch.inference_mode(False)
def broken(
    model: nn.Module,
    call: Call,
    analysis: Analysis,
    alive: np.ndarray,
    plan: Plan,
    ran: list[Ran],
    unread: tuple[Attribute, ...] = (),
) -> Place | None:
    """Where the small model of a plan fails: the check of every plan before it is handed out.

    It runs on ``meta`` with the example inputs and has to return what is foreseen. Where numbers
    in its code were changed, which might have held for one batch size only, it also has to take
    another batch size, if the original does. What fails is recorded, to see where.

    Models that read values run on the CPU with their weights, recorded at once: that takes no
    longer than the record of the original did. ``ran`` gets what ran on ``meta``, if it can
    without the attributes ``unread``.
    """
    if any(original.device != "meta" for original in analysis.records):
        return first_mismatch(model, call, analysis, alive, plan)
    pruned = analysis.pruned(alive)
    for original in analysis.records:
        foreseen = [pruned.shape(node) for node in original.outputs]
        found = what_runs(model, call, original, plan, unread)
        if found is not None and found.outputs != foreseen and unread:
            found = what_runs(model, call, original, plan)
        if found is not None:
            ran.append(found)
        if found is None or found.outputs != foreseen:
            place = first_mismatch(model, call, analysis, alive, plan)
            if place is not None:
                return place
    return _at_another_batch(model, call, analysis, alive, plan)


def _outputs(
    model: nn.Module, call: Call, original: Record, plan: Plan | None
) -> list[Shape] | None:
    """The shapes of the outputs of a shrunk copy; ``None`` when it does not run."""
    clone = skeleton(model, "meta") if plan is None else hollow(model, plan)
    try:
        leaves = dry(clone.train(original.training), call, caches=original.caches)
    except Exception:  # whatever the code of a model raises: it is run again, and told then
        return None
    return [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]


def _at_another_batch(
    model: nn.Module, call: Call, analysis: Analysis, alive: np.ndarray, plan: Plan
) -> Place | None:
    """Where numbers written into the code stand for the batch size of the example.

    Ops take shortcuts for tensors without elements, which hide what they do to others: then
    another batch size is tried as well.

    Raises:
        InputError: the small model fails only where the example has no elements.
    """
    original = analysis.records[0]
    empty = any(not tensor.numel() for tensor in call.tensors())
    if not plan.literals and not empty:
        return None
    other = call.another_batch()
    foreseen = _outputs(model, other, original, None)
    if foreseen is None or _outputs(model, other, original, plan) == foreseen:
        return None
    if empty:
        raise InputError(
            f"some of the example inputs hold no elements ({call}), which hides what their layers "
            "do: pass inputs that all hold some"
        )
    whole, complete = _recorded(model, other, original, None)
    if not complete or len(whole.ops) != len(original.ops):
        return first_changed(original, plan)
    small, complete = _recorded(model, other, original, plan)
    bad = _first_difference(analysis, alive, original, small, whole)
    if bad is None and not complete:
        bad = min(len(small.ops), len(original.ops) - 1)
    return first_changed(original, plan) if bad is None else Place(0, bad)


def first_changed(original: Record, plan: Plan) -> Place | None:
    """The first op that is given a number which a plan changes in the code."""
    sites = {(change.module, change.site) for change in plan.literals}
    places = (
        Place(0, position)
        for position, node in enumerate(original.ops)
        if (node.meta["module"], node.meta["site"]) in sites
    )
    return next(places, None)


def _at_batch(foreseen: Shape, before: Shape, now: Shape) -> Shape:
    """A foreseen shape at another batch size, given the original's at both."""
    if not len(foreseen) == len(before) == len(now):
        return now
    return tuple(size * n // b if b else n for size, b, n in zip(foreseen, before, now))
