"""Run a model once and record the ATen ops it calls.

The model is copied without its weights to the ``meta`` device and run once; nothing is computed
and nothing of the user's model is touched. A model that reads values of tensors (``.item()``,
non-maximum suppression) is run on the CPU with its real weights instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphprune.errors import InputError, TraceError
from graphprune.ops.calls import OpMode
from graphprune.ops.views import run_on_meta
from graphprune.record import outside, scope
from graphprune.record.beside import Passed, passed_by, running
from graphprune.record.checks import is_weightless
from graphprune.record.inputs import Call, infer
from graphprune.record.outputs import Outputs, fields, named_leaves, taken_back, tensors_inside
from graphprune.record.random_numbers import same_numbers
from graphprune.record.recorder import Record, Recorder
from graphprune.record.skeleton import skeleton

Watch = Callable[[nn.Module, Recorder], contextlib.AbstractContextManager[Any]]


def unwatched(model: nn.Module, recorder: Recorder) -> contextlib.AbstractContextManager[object]:
    """Nothing else is noted while a model is recorded."""
    return contextlib.nullcontext()


@torch.inference_mode(False)  # in it, ops are not taken apart
def record(
    model: nn.Module,
    call: Call,
    training: bool,
    devices: Sequence[str] = ("meta", "cpu"),
    watch: Watch = unwatched,
    alike: bool = True,
) -> Record:
    """Run a copy of the model on the inputs and record it.

    Args:
        model: the user's model; it is not touched.
        call: the inputs.
        training: record in train mode instead of eval mode.
        devices: where to run it, in this order, until it works.
        watch: of the copy and its recorder makes what else is entered while the copy runs.
        alike: modules that values pass by run beside others of their kind.

    Raises:
        TraceError: the model does not run on these inputs.
    """
    failure: TraceError | None = None
    for device in devices:
        if device != "meta" and is_weightless(model):
            raise TraceError(
                "the model reads values as it runs, and its weights are on the meta device: load "
                f"them{f' ({failure})' if failure else ''}"
            ) from failure
        try:
            return _record(model, call, training, device, watch, alike)
        except TraceError as error:
            error.__cause__ = error.__cause__ or failure
            failure = error
    assert failure is not None
    raise failure


def inferred(model: nn.Module) -> tuple[Call, Record]:
    """Usual inputs on which the model runs, and what it was recorded as.

    On the CPU it is tried only where its forward names them: there, a guess is costly.

    Raises:
        InputError: it runs on none.
    """

    def runs(call: Call) -> Record:
        named = not any(tensor.is_meta for tensor in call.tensors())
        return record(model, call, False, ("meta", "cpu") if named else ("meta",))

    return infer(model, runs)


def record_values(model: nn.Module, call: Call) -> Record:
    """Record a model in eval mode with the values of all its constants.

    They are kept on ``meta`` where code makes them of numbers; where it does not say them, the
    model is recorded again on the CPU.

    Raises:
        TraceError: the model does not run on these inputs.
    """
    found = record(model, call, training=False)
    if found.device == "meta" and any(tensor.is_meta for tensor in found.constants.values()):
        found = record(model, call, training=False, devices=("cpu",))
    return found


def _record(
    model: nn.Module,
    call: Call,
    training: bool,
    device: str,
    watch: Watch,
    alike: bool,
) -> Record:
    def clone() -> nn.Module:
        copied = skeleton(model, device).train(training)
        return copied if device == "meta" else copied.to(device)

    try:
        found = run(clone(), call, device, watch_mode=not training, watch=watch)
        if found.lengths:
            with scope.lengths():
                found = run(clone(), call, device, watch_mode=not training, watch=watch)
        beside = passed_by(model, found.used) if device == "cpu" and alike else ()
        if beside:
            measured = scope.lengths() if found.lengths else contextlib.nullcontext()
            with contextlib.suppress(TraceError), measured:
                found = run(
                    clone(), call, device, watch_mode=not training, watch=watch, beside=beside
                )
        return found
    except TraceError as error:
        if training or not isinstance(error.__cause__, TypeError | ValueError):
            raise
        return run(
            clone(), call, device, watch=watch
        )  # it may want ``training`` to be a plain bool


@torch.inference_mode(False)
def run(
    clone: nn.Module,
    call: Call,
    device: str,
    watch_mode: bool = False,
    watch: Watch = unwatched,
    caches: bool = True,
    beside: Sequence[Passed] = (),
) -> Record:
    """Record a model that may be marked and changed by running.

    Args:
        clone: the copy to run.
        call: the inputs.
        device: where the copy and the inputs are.
        watch_mode: notice whether the code looks at ``training``, in eval mode.
        watch: of the copy and its recorder makes what else is entered while the copy runs.
        caches: whether its code may keep tensors outside of the model.
        beside: modules that run beside others.
    """
    recorder = Recorder(clone, device, clone.training)
    try:
        return _run(clone, call, recorder, watch_mode, watch, caches, beside)
    finally:
        recorder.identity.forget()


def _run(
    clone: nn.Module,
    call: Call,
    recorder: Recorder,
    watch_mode: bool,
    watch: Watch,
    caches: bool,
    beside: Sequence[Passed],
) -> Record:
    args, kwargs = call.on(recorder.device)
    if watch_mode:
        recorder.watch_mode(clone)
    for tensor in pytree.tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor):
            recorder.placeholder(tensor)
    grad = torch.no_grad()
    nothing: list[object] = []
    watching = outside.unchanged(clone) if caches else contextlib.nullcontext(nothing)
    try:
        with (
            watching as kept,
            same_numbers(),
            grad,
            recorder,
            watch(clone, recorder),
            running(clone, recorder, beside),
        ):
            out = clone(*args, **kwargs)
    except Exception as error:
        failed = TraceError(
            f"the model does not run on the example inputs ({call}): "
            f"{type(error).__name__}: {error}\n"
            f"  inside module {recorder.innermost or '(root)'!r}; "
            "pass example_inputs that model(*example_inputs) accepts"
        )
        failed.record = recorder.record
        raise failed from error
    recorder.forget_looks()
    result = recorder.record
    result.beside = beside
    found = any(name.startswith("constant_") for name in result.constants)  # kept before, perhaps
    result.caches = bool(kept) or found
    leaves, result.output_spec = pytree.tree_flatten(fields(out))
    result.output_names = [name for name, _ in named_leaves(out)]
    for leaf in leaves:
        result.output_leaves.append(Tensor if isinstance(leaf, Tensor) else leaf)
        if isinstance(leaf, Tensor):
            result.outputs.append(recorder.node_of(leaf))
    counted = result.outputs
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if call.outputs is not None:
        result.counted = _counted(call.outputs, out, tensors, clone.training)
        if result.counted is not None:
            counted = [result.outputs[place] for place in sorted(result.counted)]
    result.state = [recorder.node_of(t) for leaf in leaves for t in tensors_inside(leaf)]
    back = {id(value) for value in taken_back(clone, out, recorder.handed)}
    if result.counted is None or call.outputs is None:
        held = [t for leaf in leaves if id(leaf) not in back for t in tensors_inside(leaf)]
    else:
        held = call.outputs.inside(out, tensors, back)
    inside = [recorder.node_of(tensor) for tensor in held]
    if call.outputs is not None and call.outputs.names:
        counted = [*counted, *inside]
    if recorder.device == "cpu" and call.outputs is None:  # returned, perhaps, when values differ
        likes = {_like(node) for node in result.outputs}
        calls = [n for _, n in result.calls if not n.meta.get("beside")]
        inside = [*inside, *(node for node in calls if _like(node) in likes)]
    # what the model itself reads again, or takes back, such as a cache of keys and values, is
    # state: the small model makes its own
    unread = dict.fromkeys(node for node in inside if not node.users and node not in counted)
    result.graph.output((*counted, *unread))
    result.graph.lint()
    return result


def _like(node: fx.Node) -> tuple[object, object]:
    """What a value has in common with those that could be returned in its place."""
    return node.meta.get("shape"), node.meta.get("dtype")


def _counted(
    outputs: Outputs, out: object, tensors: list[Tensor], training: bool
) -> frozenset[int] | None:
    """The outputs that count; all of them in a train mode that returns something else."""
    try:
        return outputs.counted(out, tensors)
    except InputError:
        if training:
            return None
        raise


class _Shapes(OpMode):
    """Runs ops on ``meta``, the quick way where there is one, and lists what they were given."""

    def __init__(self, ran: list[str] | None) -> None:
        super().__init__()
        self.ran = ran

    def __torch_dispatch__(
        self, func: object, types: object, args: object = (), kwargs: object = None
    ) -> object:
        if self.ran is not None:
            self.ran.append(f"{func} {_told(args)} {_told(kwargs)}")
        return run_on_meta(func, args, kwargs or {})


def _told(value: Any) -> object:
    """What an op is given, with shapes for tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {name: _told(item) for name, item in value.items()}
    return [_told(item) for item in value] if isinstance(value, list | tuple) else value


@torch.inference_mode(False)
def dry(
    clone: nn.Module, call: Call, ran: list[str] | None = None, caches: bool = True
) -> list[object]:
    """The leaves of what a copy on ``meta`` returns; nothing is recorded, errors are its own.

    Args:
        clone: the copy.
        call: the inputs.
        ran: gets a line for every op and what it was given, when there is a list for it.
        caches: whether its code may keep tensors outside of the model.
    """
    args, kwargs = call.on("meta")
    kept = outside.unchanged(clone) if caches else contextlib.nullcontext()
    with kept, same_numbers(), torch.no_grad(), scope.recording(None), _Shapes(ran):
        return pytree.tree_leaves(fields(clone(*args, **kwargs)))
