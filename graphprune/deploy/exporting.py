"""The door: a small model becomes a file for an engine, checked there before anyone sees it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.arguments import as_path, check_seed, check_tolerance
from graphprune.deploy.agreeing import Agreement, Comparison
from graphprune.deploy.axes import Axis, Dynamic, find_axes
from graphprune.deploy.certificate import (
    Certificate,
    Compared,
    Ran,
    beside,
    of_agreement,
    sizes_of,
    with_masked,
)
from graphprune.deploy.certificate import certificate as new_certificate
from graphprune.deploy.engines import ENGINES, load_engine, needed
from graphprune.deploy.files import written_beside
from graphprune.deploy.flat import Flat, Port, chosen_names, input_names, type_name, unique
from graphprune.deploy.onnx_files import LARGE, check_opset, write
from graphprune.deploy.programs import (
    MACHINE,
    Fixed,
    Program,
    exported,
    open_shapes,
    write_compiled,
)
from graphprune.deploy.reading.source import source_of
from graphprune.deploy.traced_files import NOTE, is_recurrent, shapes_of, write_traced
from graphprune.errors import ExportError, InputError, ModelError, TraceError, warn
from graphprune.measurement import bytes_text, drawn, shared_copy
from graphprune.plan.plan import plan_of
from graphprune.record.batches import at_rest, device_of
from graphprune.record.checks import check_model
from graphprune.record.inputs import Call, called, infer
from graphprune.record.outputs import Outputs
from graphprune.record.recording import record
from graphprune.record.tensors import named_tensors
from graphprune.text import render

_BLOCK = 8  # channels that ONNX Runtime keeps side by side; 16 with AVX-512
Names = Sequence[str] | str | None
FORMATS = {".onnx": "ONNX", ".pt2": "torch.export"}


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with the model in its engine; ``print`` it.

    Attributes:
        path: the file.
        format: ``"ONNX"``, ``"torch.export"`` or ``"AOTInductor"``.
        opset: the version of ONNX's operators; ``None`` for other formats.
        inputs: names, dtypes and sizes of the inputs.
        outputs: the same of the outputs; sizes that follow open ones are told as formulas.
        bytes: size of the file and of the data file beside it, if there is one.
        agreement: the comparison in the engine; ``None`` when it was not asked for.
        notes: what else there is to say.
        certificate: the file beside it that says what was compared; read it with
            :meth:`graphprune.deploy.Certificate.read`.
    """

    path: Path
    format: str
    opset: int | None
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    bytes: int
    agreement: Agreement | None
    notes: tuple[str, ...] = ()
    certificate: Path | None = None

    @property
    def verdict(self) -> str:
        """``"equal"``, ``"not decided"`` or ``"not checked"``; what differs is never written."""
        return "not checked" if self.agreement is None else self.agreement.verdict

    def __str__(self) -> str:
        """What the file takes and returns, and a table of the comparisons."""
        version = "" if self.opset is None else f", opset {self.opset}"
        lines = [f"{self.path.name}: {self.format}{version}, {bytes_text(self.bytes)}"]
        lines += [f"  in   {port}" for port in self.inputs]
        lines += [f"  out  {port}" for port in self.outputs]
        return "\n".join([*lines, told(self.agreement), *self.notes])


def told(agreement: Agreement | None) -> str:
    """A comparison as a table."""
    if agreement is None:
        return "not checked"
    title = f"equals the model in {agreement.engine}, tolerance {agreement.tolerance:.0e}"
    if agreement.reason:
        title = f"not decided whether it equals the model in {agreement.engine}: {agreement.reason}"
    rows = [
        (check.name, check.inputs, f"{check.difference:.1e}" if check.decided else "-")
        for check in agreement.checks
    ]
    noted = [f"{check.name}: {check.note}" for check in agreement.checks if check.note]
    table = render(title, ("what", "inputs", "largest relative difference"), rows)
    return "\n".join([table, *noted])


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: object = None,
    *,
    dynamic: Dynamic = "batch",
    input_names: Names = None,
    output_names: Names = None,
    outputs: object = None,
    opset: int | None = None,
    external_data: bool | None = None,
    compiled: bool = False,
    check: bool = True,
    engine: str = "onnxruntime",
    tolerance: float | None = None,
    seed: int = 0,
    original: nn.Module | None = None,
    certificate: bool = True,
    command: Mapping[str, object] | None = None,
) -> Exported:
    """Write a model as a file for an engine, after comparing both there.

    ``.onnx`` is written by torch's exporter and run in ONNX Runtime, ``.pt2`` is a package of
    ``torch.export``, or with ``compiled`` of AOTInductor. The file is made beside its final name,
    run on the example inputs, on other values and at another size of every open dimension, and only
    then moved there; a file of that name is replaced. The model is left as it was.

    Args:
        model: any module, such as what :func:`graphprune.rebuild` returned; exported in eval mode.
        path: the file, ``.onnx`` or ``.pt2``.
        example_inputs: as for :func:`graphprune.trace`; inferred when absent.
        dynamic: which sizes stay open. ``"batch"``: the first of every input, if the model's code
            allows it (else a ``PruningWarning`` says that it is fixed); of a model that
            :func:`from_onnx` read, the sizes that its file leaves open. By name, with the
            dimension of every input or of some: ``{"batch": 0, "sequence": 1}``,
            ``{"sequence": {"input_ids": 1}}``. ``None``: all sizes are those of the example.
        input_names: names of the inputs, in order; when absent those of the arguments, or of the
            file that the model was read from.
        output_names: names of the outputs, in order; when absent keys of the output, or those of
            the file that the model was read from.
        outputs: which outputs the file returns, as for :func:`graphprune.trace`; all when absent.
        opset: version of ONNX's operators; the exporter's choice when absent.
        external_data: whether the weights go into ``path`` with ``.data`` behind it; when absent
            for models that one ONNX file cannot hold (2 GB).
        compiled: of a ``.pt2``: compile it by AOTInductor to machine code for the CPU of this
            machine, which takes a C++ compiler and up to a minute or two.
        check: compare with the model in the engine.
        engine: what runs an ONNX file for that, ``"onnxruntime"`` or ``"openvino"``.
        tolerance: largest relative difference allowed; 1e-5 in float32, 1e-2 in float16 when
            absent. Beyond it a difference counts as none while it is at most eight times what
            rounding does to the model itself, which the report says.
        seed: for other values of the inputs.
        original: what the small model was made from, for the certificate: both are compared, and
            it says so when they differ, as after fine-tuning.
        certificate: whether to write ``path`` with ``.certificate.json`` behind it, which
            :func:`graphprune.deploy.repeat` checks again.
        command: for the certificate: how to make the models again, as the command line does.

    Returns:
        What was written, and the comparison.

    Raises:
        ExportError: the model cannot be exported, or the engine does not load the file.
        VerificationError: the engine computes something else; no file is left.
        InputError: an argument is wrong, or a library is missing.
        ModelError: the model cannot be exported as it is (wrapped, quantized, without weights).

    Example:
        >>> import tempfile, torch, graphprune
        >>> from graphprune.deploy import export
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> small = graphprune.rebuild(net, 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = export(small, f"{folder}/small.onnx", torch.randn(1, 4))
        >>> print(made.verdict, made.inputs[0])
        equal input float32[batch, 4]
    """
    path = as_path(path)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"path must end in {' or '.join(FORMATS)}; got {path.name!r}")
    check_model(model)
    check_opset(opset)
    check_seed(seed)
    if compiled and path.suffix.lower() != ".pt2":
        raise InputError(f"compiled=True is about .pt2, and path is {path.name!r}")
    if tolerance is not None:
        check_tolerance(tolerance)
    if engine not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    if path.suffix.lower() == ".onnx":
        for library in ("onnx", "onnxscript", *([engine] if check else [])):
            needed(library, "writing and checking ONNX")
    with at_rest(model):
        ready = Ready(model, example_inputs, Outputs.of(outputs))
        source = source_of(model)
        if source is not None:  # back to ONNX as it came
            input_names = source.names if input_names is None else input_names
            output_names = ready.kept(source.outputs) if output_names is None else output_names
            dynamic = source.dynamic or None if dynamic == "batch" else dynamic
        ready.name(input_names, output_names)
        made = _Made(ready, path, dynamic, compiled)
        with written_beside(path) as folder:
            made.write(folder, opset, external_data)
            agreement = made.check(folder, engine, tolerance, seed) if check else None
            found = made.exported(folder, agreement)
            if certificate:
                masked = (
                    () if original is None else (with_masked(original, model, ready.call, seed),)
                )
                told = made.certificate(folder, found, original, masked, seed, command)
                (folder / beside(path).name).write_text(told.to_json(), encoding="utf-8")
                found = replace(found, certificate=beside(path))
    if agreement is not None and agreement.reason:
        warn(f"export could not decide whether {path.name} is right: {agreement.reason}")
    return found


class Ready:
    """A model with inputs on the CPU, in eval mode, and the names of what goes in and out."""

    def __init__(self, model: nn.Module, example_inputs: object, outputs: Outputs | None) -> None:
        self.model, self.call = model, example_call(model, example_inputs)
        self.twin = on_the_cpu(model)
        self.flat = Flat(self.twin, self.call)
        args, kwargs = drawn_where_absent(self.call)
        self.tensors = Call(args, kwargs).tensors()
        try:
            with torch.no_grad():
                out = self.flat.whole(*(tensor.clone() for tensor in self.tensors))
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} does not run on {self.call}: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.outputs = self.flat.choose(out, outputs)
        self.kinds = [tensor.dtype for tensor in self.flat.tensors_of(out)]
        self.inputs = input_names(model, self.call)

    def kept(self, names: Sequence[str]) -> list[str]:
        """Those of the names of all outputs that are of wanted ones."""
        chosen = self.flat.chosen
        return [*names] if chosen is None else [names[place] for place in chosen]

    def name(self, inputs: Names, outputs: Names) -> None:
        """Settle the names of inputs and outputs."""
        self.inputs = chosen_names(inputs, self.inputs, "input")
        names = chosen_names(outputs, self.outputs, "output")
        if outputs is not None and set(names) & set(self.inputs):
            raise InputError(f"{sorted(set(names) & set(self.inputs))} name inputs and outputs")
        self.outputs = unique(names, self.inputs)


def example_call(model: nn.Module, example_inputs: object) -> Call:
    """Example inputs as the model takes them."""

    def runs(call: Call) -> object:
        return record(model, call, False)

    if example_inputs is None:
        return infer(model, runs)[0]
    if isinstance(example_inputs, list):  # of arguments, or the one argument
        return called(example_inputs, runs)[0]
    return Call.of(example_inputs)


def on_the_cpu(model: nn.Module) -> nn.Module:
    """A copy in eval mode, which shares parameters with a model that is on the CPU."""
    try:
        if device_of(model).type == "cpu":
            return shared_copy(model).eval()
        return copy.deepcopy(model).cpu().eval()
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}"
        ) from error


def drawn_where_absent(call: Call) -> tuple[tuple[object, ...], dict[str, object]]:
    """The inputs on the CPU; drawn where they have no values, or are zero throughout."""
    absent = any(tensor.is_meta for tensor in call.tensors())
    floats = [t for t in call.tensors() if t.is_floating_point() and not t.is_meta]
    cpu = torch.device("cpu")
    return drawn(call, cpu) if absent or not any(map(torch.any, floats)) else call.on(cpu)


class _Made:
    """A file in the making."""

    def __init__(self, ready: Ready, path: Path, dynamic: Dynamic, compiled: bool) -> None:
        self.ready, self.path, self.dynamic, self.compiled = ready, path, dynamic, compiled
        self.opset: int | None = None
        self.recorded: Program | None = None
        if path.suffix.lower() == ".onnx" and is_recurrent(ready.twin):
            self.axes, self.notes = find_axes(dynamic, ready.inputs, ready.tensors), [NOTE]
            return
        whole = path.suffix.lower() == ".pt2" and ready.flat.chosen is None and not compiled
        self.axes, self.recorded, self.notes = _recorded(ready, dynamic, whole)

    def write(self, folder: Path, opset: int | None, external_data: bool | None) -> None:
        """Write the file, and the data file beside it where there is one."""
        file, ready = folder / self.path.name, self.ready
        size = sum(t.numel() * t.element_size() for _, t in named_tensors(ready.twin))
        apart = size > LARGE if external_data is None else external_data
        names = ready.inputs, ready.outputs
        common: Any = {"opset": opset, "external_data": apart}
        if self.recorded is None:
            try:
                given = ready.flat, ready.tensors
                self.opset = write_traced(*given, file, names, self.axes, **common)
                return
            except ExportError:  # what a trace cannot tell, the other exporter may
                found = _recorded(ready, self.dynamic, whole=False)
                self.axes, self.recorded, self.notes = found
        if file.suffix.lower() == ".onnx":
            self.opset = write(self.recorded, file, names, self.axes, **common)
        elif self.compiled:
            inputs, _ = _ports(ready, self.axes, open_shapes(self.recorded, self.axes))
            write_compiled(self.recorded, file, inputs, ready.tensors)
        else:
            torch.export.save(self.recorded, file)

    def check(self, folder: Path, name: str, tolerance: float | None, seed: int) -> Agreement:
        """Compare with the model in the engine."""
        engine = load_engine(folder / self.path.name, engine=name)
        comparison = Comparison(self.ready.flat, self.ready.outputs, engine, tolerance, seed)
        return comparison.all(self.ready.tensors, self.axes)

    def exported(self, folder: Path, agreement: Agreement | None) -> Exported:
        """What is told of the file."""
        if self.recorded is None:
            shapes = shapes_of(folder / self.path.name, self.axes)
        else:
            shapes = open_shapes(self.recorded, self.axes)
        inputs, outputs = _ports(self.ready, self.axes, shapes)
        total = sum(part.stat().st_size for part in folder.iterdir())
        kind = "AOTInductor" if self.compiled else FORMATS[self.path.suffix.lower()]
        notes = (
            *self.notes,
            *([MACHINE] if self.compiled else []),
            *odd_widths(self.ready.model, kind),
        )
        return Exported(self.path, kind, self.opset, inputs, outputs, total, agreement, notes)

    def certificate(
        self,
        folder: Path,
        found: Exported,
        original: nn.Module | None,
        masked: Sequence[Compared],
        seed: int,
        command: Mapping[str, object] | None,
    ) -> Certificate:
        """What is certified of it."""
        ready, agreement = self.ready, found.agreement
        names = tuple(ready.inputs), tuple(ready.outputs)
        sizes = sizes_of(self.axes, ready.inputs)
        ran = Ran(self.path.name, *names, ready.flat.chosen, sizes)
        checked = [] if agreement is None else [of_agreement(self.path.name, agreement)]
        return new_certificate(
            ready.model,
            original,
            [*masked, *checked],
            sorted(folder.iterdir()),
            ran=ran,
            engines=dict([] if agreement is None else [agreement.engine.rsplit(" ", 1)]),
            seed=seed,
            command=command,
        )


def odd_widths(model: nn.Module, kind: str) -> Iterator[str]:
    """Widths left by a plan that ONNX Runtime does not block, as measured on docs/deploy.md."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    odd = [m for m in convolutions if m.out_channels % _BLOCK and m.out_channels > _BLOCK]
    if kind == "ONNX" and odd and plan_of(model) is not None:
        yield (
            f"{len(odd)} of {len(convolutions)} convolutions have widths that are no multiple of "
            f"{_BLOCK}: ONNX Runtime runs them without its blocked layout, often slower than the "
            "original; plan with round_to=16 (--round-to 16)"
        )


def _recorded(ready: Ready, dynamic: Dynamic, whole: bool) -> tuple[list[Axis], Program, list[str]]:
    """The model as a program; the batch size is fixed where the code fixes it, if nobody asked."""
    axes = find_axes(dynamic, ready.inputs, ready.tensors)
    try:
        return axes, exported(ready.flat, ready.tensors, axes, whole=whole), []
    except Fixed as error:
        if dynamic != "batch":
            raise ExportError(
                f"{type(ready.model).__name__} fixes a size that was to be left open ({error}): "
                "leave it out of dynamic=, or rewrite the code that computes with it"
            ) from error
        found = exported(ready.flat, ready.tensors, [], whole=whole)
        text = f"the batch size is fixed at {axes[0].size}: the model's code fixes it ({error})"
        warn(text)
        return [], found, [text]


def _ports(
    ready: Ready, axes: Sequence[Axis], opened: Sequence[tuple[int | str, ...]]
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    shapes: list[list[int | str]] = [[*tensor.shape] for tensor in ready.tensors]
    for axis in axes:
        for number, dim in axis.places:
            shapes[number][dim] = axis.name
    inputs = zip(ready.inputs, ready.tensors, shapes)
    outputs = zip(ready.outputs, ready.kinds, opened)
    return (
        tuple(Port(name, type_name(tensor.dtype), tuple(shape)) for name, tensor, shape in inputs),
        tuple(Port(name, type_name(kind), shape) for name, kind, shape in outputs),
    )
