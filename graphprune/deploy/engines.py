"""What runs models: each engine takes tensors on the CPU and returns tensors."""

from __future__ import annotations

import importlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.deploy.flat import Flat, on_cpu, type_name
from graphprune.deploy.quiet import quiet
from graphprune.errors import ExportError, InputError
from graphprune.measurement import cpu_threads
from graphprune.record.inputs import Call

Run = Callable[[], object]
Ports = tuple[tuple[str, torch.dtype, tuple[int | str, ...]], ...]
_EXTRAS = {"onnx": "onnx", "onnxruntime": "onnx", "onnxscript": "onnx", "openvino": "openvino"}
DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bool)": torch.bool,
    **{f"tensor({name})": getattr(torch, name) for name in ("int8", "uint8", "int32", "int64")},
}
OF_PACKAGE = "graphprune"  # in the metadata of a compiled package: its example inputs
_INSIDE = "/data/aotinductor/"
_ONLY_ERRORS = 4  # of the levels of ONNX Runtime's own log


@dataclass(frozen=True)
class Engine:
    """A model that is ready to run.

    Attributes:
        name: the engine with its version.
        inputs: the names of the inputs, in order; empty where they have none.
        run: the outputs for inputs.
        ready: what runs the model once on given inputs and returns nothing of use, for a stopwatch.
        ports: names, dtypes and sizes of the inputs, open ones by name, as far as a file tells.
        example: the arguments that a program was recorded with.
    """

    name: str
    inputs: tuple[str, ...]
    run: Callable[[Sequence[Tensor]], list[Tensor]]
    ready: Callable[[Sequence[Tensor]], Run]
    ports: Ports = ()
    example: Call | None = None


def needed(name: str, what: str) -> ModuleType:
    """An optional library.

    Raises:
        InputError: it is not installed.
    """
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f'{what} needs {name} ({error}): pip install "graphprune[{_EXTRAS[name]}]"'
        ) from None


def onnxruntime(path: Path, threads: int | None = None) -> Engine:
    """An ONNX file in ONNX Runtime, on the CPU.

    Args:
        path: the file.
        threads: within an op; all cores when absent.

    Raises:
        InputError: ONNX Runtime is not installed, or there is no such file.
        ExportError: it does not load the file.
    """
    runtime: Any = needed("onnxruntime", "running an ONNX file")
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}")
    options = runtime.SessionOptions()
    options.log_severity_level = _ONLY_ERRORS
    options.intra_op_num_threads = threads or 0
    # Threads that wait actively for more work would slow down whatever runs in turns with this.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = tuple(item.name for item in session.get_inputs())
    except Exception as error:  # of classes of its own, which share no base
        raise ExportError(f"ONNX Runtime cannot load {path.name!r}: {told(error)}") from error

    def feed(tensors: Sequence[Tensor]) -> dict[str, Any]:
        values = (runtime.OrtValue.ortvalue_from_numpy(_array(t)) for t in on_cpu(tensors))
        return dict(zip(names, values, strict=True))

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        try:
            found = session.run_with_ort_values(None, feed(tensors))
        except Exception as error:
            raise ExportError(told(error)) from error
        return [torch.from_numpy(value.numpy()) for value in found]

    def ready(tensors: Sequence[Tensor]) -> Run:
        given = feed(tensors)
        return lambda: session.run_with_ort_values(None, given)

    ports = tuple(
        (item.name, DTYPES.get(item.type, torch.float32), tuple(item.shape))
        for item in session.get_inputs()
    )
    return Engine(f"ONNX Runtime {runtime.__version__}", names, run, ready, ports)


def openvino(path: Path, threads: int | None = None) -> Engine:
    """An ONNX file in OpenVINO, on the CPU in float32 (it would take bfloat16 where it can).

    Args:
        path: the file.
        threads: of the engine; all cores when absent.

    Raises:
        InputError: OpenVINO is not installed, or there is no such file.
        ExportError: it does not load the file.
    """
    runtime: Any = needed("openvino", "OpenVINO")
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}")
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        with quiet():
            compiled = runtime.Core().compile_model(str(path), "CPU", settings)
        request = compiled.create_infer_request()
    except Exception as error:  # of classes of its own
        raise ExportError(f"OpenVINO cannot load {path.name!r}: {told(error)}") from error
    names = tuple(item.get_any_name() for item in compiled.inputs)

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        try:
            found = request.infer([_array(tensor) for tensor in on_cpu(tensors)])
        except Exception as error:
            raise ExportError(told(error)) from error
        return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]

    def ready(tensors: Sequence[Tensor]) -> Run:
        given = [_array(tensor) for tensor in on_cpu(tensors)]
        return lambda: request.infer(given, share_inputs=True, share_outputs=True)

    version = runtime.__version__.split("-")[0]
    return Engine(f"OpenVINO {version}", names, run, ready)


def eager(model: nn.Module, call: Call, threads: int | None = None) -> Engine:
    """A model in PyTorch, as it is; in eval mode the caller puts it."""
    return _of_torch(f"PyTorch {torch.__version__}, eager", Flat(model, call), threads)


def program(path: Path, threads: int | None = None) -> Engine:
    """A package of ``torch.export``, whose inputs are the tensors of the call, or of AOTInductor.

    Raises:
        ExportError: it is none.
    """
    if is_compiled(path):
        return compiled(path, threads)
    try:
        with quiet():
            loaded = torch.export.load(path)
    except Exception as error:
        raise ExportError(f"torch.export cannot load {path.name!r}: {told(error)}") from error
    args, kwargs = loaded.example_inputs
    call = Call(tuple(args), dict(kwargs))
    found = _of_torch(f"torch.export {torch.__version__}", Flat(loaded.module(), call), threads)
    return replace(found, example=call)


def is_compiled(path: Path) -> bool:
    """Whether a package holds machine code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as package:
        return any(_INSIDE in name for name in package.namelist())


def compiled(path: Path, threads: int | None = None) -> Engine:
    """A package of AOTInductor, on the CPU.

    Raises:
        ExportError: it does not load, on another kind of processor, say.
    """
    from torch._inductor import aoti_load_package

    try:
        with quiet():
            package: Any = aoti_load_package(str(path))
            given = json.loads(package.loader.get_metadata().get(OF_PACKAGE, "[]"))
    except Exception as error:
        raise ExportError(f"AOTInductor cannot load {path.name!r}: {told(error)}") from error
    ports = tuple(
        (each["name"], getattr(torch, each["dtype"]), tuple(each["shape"])) for each in given
    )
    example = [torch.zeros(each["example"], dtype=port[1]) for each, port in zip(given, ports)]

    def call(tensors: Sequence[Tensor]) -> Any:
        with cpu_threads(threads), torch.no_grad():
            return package(*tensors)

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        _check_sizes(ports, tensors)
        try:
            found = call(tensors)
        except Exception as error:
            raise ExportError(told(error)) from error
        return on_cpu([found] if isinstance(found, Tensor) else [*found])

    def ready(tensors: Sequence[Tensor]) -> Run:
        _check_sizes(ports, tensors)
        return lambda: call(tensors)

    name = f"AOTInductor {torch.__version__}"
    return Engine(name, (), run, ready, ports, Call(tuple(example), {}))


def _check_sizes(ports: Ports, tensors: Sequence[Tensor]) -> None:
    """Machine code checks nothing, and would read what is not there.

    Raises:
        ExportError: other inputs than the package takes.
    """
    if ports and len(ports) != len(tensors):
        raise ExportError(f"the package takes {len(ports)} inputs; got {len(tensors)}")
    opened: dict[int | str, int] = {}
    for (name, kind, shape), tensor in zip(ports, tensors):
        wanted = [
            size if isinstance(size, int) else opened.setdefault(size, found)
            for size, found in zip(shape, tensor.shape)
        ]
        if tensor.dtype != kind or len(shape) != tensor.dim() or wanted != [*tensor.shape]:
            raise ExportError(
                f"{name} is {type_name(kind)}[{', '.join(map(str, shape))}] in the package; got "
                f"{type_name(tensor.dtype)}[{', '.join(map(str, tensor.shape))}]"
            )


def _of_torch(name: str, flat: Flat, threads: int | None) -> Engine:
    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        with cpu_threads(threads), torch.no_grad():
            try:
                return on_cpu(flat(*tensors))
            except Exception as error:
                raise ExportError(told(error)) from error

    def ready(tensors: Sequence[Tensor]) -> Run:
        def once() -> None:
            with cpu_threads(threads), torch.no_grad():
                flat.whole(*tensors)

        return once

    return Engine(name, (), run, ready)


ENGINES = {"onnxruntime": onnxruntime, "openvino": openvino}
ALONE = frozenset({"onnxruntime"})  # with one thread they compute in that of the caller


def load_engine(file: Path, threads: int | None = None, engine: str = "onnxruntime") -> Engine:
    """The engine that runs a file: for ONNX the one that is named.

    Raises:
        InputError: an unknown engine.
    """
    if engine not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    return (
        ENGINES[engine](file, threads) if file.suffix.lower() == ".onnx" else program(file, threads)
    )


def told(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]


def _array(tensor: Tensor) -> Any:
    try:
        return tensor.numpy()
    except TypeError:
        raise ExportError(
            f"inputs of {tensor.dtype} cannot be given to ONNX Runtime from Python: export "
            "model.float()"
        ) from None
