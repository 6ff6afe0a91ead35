"""Weights and activations of 8 bits, by ONNX Runtime's own quantizer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.arguments import as_path
from graphprune.deploy.engines import Engine, needed, onnxruntime, told
from graphprune.deploy.files import written_beside
from graphprune.deploy.likeness import Likeness, compared, fed
from graphprune.deploy.onnx_files import LARGE
from graphprune.deploy.quiet import quiet
from graphprune.deploy.timing import Bench, Threads, bench, check_bench, size_of
from graphprune.errors import ExportError, GraphPruneError, InputError, warn
from graphprune.measurement import bytes_text
from graphprune.record.batches import batches, check_data

STATIC, DYNAMIC = "static", "dynamic"
_INTEGERS = (2, 3)  # of ONNX: unsigned and signed bytes
METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
_PRODUCTS = ("MatMul", "Gemm")
_DYNAMIC = (*_PRODUCTS, "Gather", "LSTM")  # tables are gathered; convolutions get slower
# Where there is attention, masks (-3e38) and norms ruin the ranges of all else.
_BESIDE_ATTENTION = ("Conv", "ConvTranspose", *_PRODUCTS)


@dataclass(frozen=True)
class Quantized:
    """What was written, and how it compares with the float file; ``print`` it.

    Attributes:
        path: the file.
        mode: ``"static"`` or ``"dynamic"``.
        bytes: its size.
        float_bytes: size of the float file.
        operators: how many operators compute in 8 bits, by name.
        likeness: outputs beside those of the float file; ``None`` without data.
        timed: latencies, where they were asked for.
    """

    path: Path
    mode: str
    bytes: int
    float_bytes: int
    operators: dict[str, int]
    likeness: Likeness | None
    timed: Bench | None = None

    def __str__(self) -> str:
        """Size, likeness, and a table of latencies."""
        ops = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        sizes = f"{bytes_text(self.float_bytes)} -> {bytes_text(self.bytes)}"
        lines = [f"{self.path.name}: {self.mode} int8, {sizes}; in 8 bits: {ops}"]
        lines.append("not compared: no data" if self.likeness is None else str(self.likeness))
        return "\n".join([*lines, *([] if self.timed is None else [str(self.timed)])])


def quantize(
    path: str | Path,
    out: str | Path,
    data: Iterable[object] | None = None,
    *,
    mode: str | None = None,
    test: Iterable[object] | None = None,
    method: str = "minmax",
    per_channel: bool = True,
    operators: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    beside: Mapping[str, nn.Module | str | Path] | None = None,
    threads: Threads = 1,
    seconds: float = 0.0,
) -> Quantized:
    """Quantize an ONNX file to 8 bits with ONNX Runtime, and compare it with the float file.

    Static quantization (QDQ, weights per channel) fixes the ranges of activations from ``data``;
    dynamic quantization finds them while it runs, and is for products of matrices. After the
    paper of Jacob et al. (2018), "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference".

    Args:
        path: a float ONNX file, such as :func:`export` wrote.
        out: the file to write.
        data: batches for the ranges, as everywhere: a list or ``DataLoader`` of tensors, tuples
            ``(input, target)``, or dicts by the names of the file's inputs. A few hundred items.
        mode: ``"static"`` or ``"dynamic"``; static when data are given.
        test: batches to compare both files on; ``data`` when absent. Class indices as targets
            give accuracies.
        method: how a range follows from what was seen: ``"minmax"``, ``"entropy"`` or
            ``"percentile"``.
        per_channel: a scale for every output channel of a weight.
        operators: types of ONNX operators to quantize. When absent, for dynamic products of
            matrices and tables; for static all that ONNX Runtime can, but products and
            convolutions alone in a file with a softmax or layer norms.
        keep: names of nodes that stay in float.
        beside: modules and files by name to measure with both files.
        threads: as for :func:`bench`.
        seconds: for each model measured; 0 measures nothing.

    Returns:
        Size, agreement and error beside the float file, and latencies.

    Raises:
        InputError: an argument is wrong, or ONNX Runtime is missing.
        ExportError: the quantizer fails, or leaves all in float.

    Example:
        >>> import tempfile, torch
        >>> from graphprune.deploy import export, quantize
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Linear(64, 4))
        >>> data = torch.randn(64, 8).split(16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = export(net, f"{folder}/net.onnx", data[0])
        ...     small = quantize(made.path, f"{folder}/net.int8.onnx", data)
        >>> print(small.mode, small.likeness.error < 0.05)
        static True
    """
    path, out = as_path(path), as_path(out, "out")
    mode = mode or (DYNAMIC if data is None else STATIC)
    _check(path, out, mode, method, data)
    _check_lists(path, operators, keep)
    models = {**_named_models(beside), path.name: path, out.name: out}
    check_bench(threads, seconds)
    for library in ("onnx", "onnxruntime"):
        needed(library, "quantizing")
    if data is not None:
        data = check_data(data, passes=1 if test is not None else 2)
    source = onnxruntime(path)
    with written_beside(out) as folder:
        file = folder / out.name
        kinds = list(operators) if operators else _kinds(path, mode)
        options = {"per_channel": per_channel, "op_types_to_quantize": kinds,
                   "nodes_to_exclude": list(keep)}  # fmt: skip
        try:
            with quiet():
                _write(path, file, source, None if mode == DYNAMIC else data, method, options)
        except GraphPruneError:
            raise
        except Exception as error:  # of many classes
            raise ExportError(
                f"ONNX Runtime's quantizer fails: {type(error).__name__}: {told(error)}"
            ) from error
        found = _in_8_bits(file)
        if not found:
            raise ExportError(
                f"nothing in {path.name} can be quantized ({mode}): "
                + ("pass data for static quantization" if mode == DYNAMIC else "see operators=")
            )
        tested = data if test is None else test
        engine = onnxruntime(file)
        likeness = None if tested is None else compared(source, engine, tested)
        size = sum(part.stat().st_size for part in folder.iterdir())
    if likeness is not None and likeness.told:
        warn(f"agreement of {out.name} with the float file means nothing: {likeness.told}")
    timed = None
    if seconds:
        first = next(iter(tested), None) if tested is not None else None
        example = None if first is None else tuple(t[:1] for t in fed(first, source.inputs))
        timed = bench(models, example, threads=threads, seconds=seconds)
    return Quantized(out, mode, size, size_of(path), found, likeness, timed)


def _check(path: Path, out: Path, mode: str, method: str, data: object) -> None:
    if mode not in (STATIC, DYNAMIC):
        raise InputError(f"mode must be 'static' or 'dynamic'; got {mode!r}")
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if mode == STATIC and data is None:
        raise InputError("static quantization needs data, batches that show the ranges of values")
    for name, file in (("path", path), ("out", out)):
        if file.suffix.lower() != ".onnx":
            raise InputError(f"{name} must end in .onnx; got {str(file)!r}")
    if path.resolve() == out.resolve():
        raise InputError("out must be another file than the float one, which it is compared with")


def _check_lists(path: Path, operators: Any, keep: Any) -> None:
    """Raise unless lists hold texts, nodes to keep are there, and the file is a float one."""
    for name, given in (("operators", operators), ("keep", keep)):
        listed = isinstance(given, Sequence) and not isinstance(given, str)
        if given is not None and not (listed and all(isinstance(item, str) for item in given)):
            raise InputError(f"{name} must be a list of texts; got {given!r}")
    needed("onnx", "quantizing")
    import onnx

    if not path.is_file():
        raise InputError(f"no file {str(path)!r}: pass an ONNX file, such as export wrote")
    try:
        nodes = onnx.load(path, load_external_data=False).graph.node
    except Exception as error:  # of protocol buffers, and others
        raise ExportError(f"{str(path)!r} is no ONNX file: {told(error)}") from error
    if any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in nodes):
        raise InputError(f"{path.name} is in 8 bits already: pass the float file")
    names = [node.name for node in nodes]
    unknown = [name for name in keep or () if name not in names]
    if unknown:
        close = difflib.get_close_matches(unknown[0], names, 3, 0.3) or names[:3]
        raise InputError(
            f"keep names {unknown[0]!r}, which is no node of {path.name}; such as "
            f"{', '.join(close)}"
        )


def _named_models(beside: Any) -> dict[str, Any]:
    if beside is None:
        return {}
    fits = isinstance(beside, Mapping) and all(
        isinstance(model, nn.Module | str | Path) for model in beside.values()
    )
    if not fits:
        raise InputError(f"beside must be modules and files by name; got {beside!r}")
    return dict(beside)


def _kinds(path: Path, mode: str) -> list[str] | None:
    """The types of operators to quantize; ``None`` for all."""
    if mode == DYNAMIC:
        return list(_DYNAMIC)
    import onnx

    kinds = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    attention = kinds & {"Softmax", "LayerNormalization", "RMSNormalization", "Attention"}
    return list(_BESIDE_ATTENTION) if attention else None


def _write(
    path: Path,
    file: Path,
    source: Engine,
    data: Iterable[object] | None,
    method: str,
    options: dict[str, Any],
) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = file.with_name(f"{file.name}.ready")
    large = size_of(path) > LARGE
    path = path if large else _whole(path, file.with_name(f"{ready.name}.whole"))
    common = {**options, "use_external_data_format": large}
    try:
        quant_pre_process(path, ready, skip_symbolic_shape=True, save_as_external_data=large)
        if data is None:
            quantization.quantize_dynamic(
                ready, file, weight_type=quantization.QuantType.QInt8, **common
            )
            return
        quantization.quantize_static(
            ready,
            file,
            _Reader(source.inputs, batches(data), method),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=getattr(quantization.CalibrationMethod, METHODS[method]),
            **common,
        )
    finally:
        for part in file.parent.glob(f"{ready.name}*"):
            part.unlink()


def _whole(path: Path, copy: Path) -> Path:
    """A file that holds its weights itself, as the quantizer's preparation wants it."""
    import onnx

    if size_of(path) == path.stat().st_size:
        return path
    onnx.save_model(onnx.load(path), copy)
    return copy


class _Reader:
    """Gives batches to ONNX Runtime's calibration, one at a time."""

    def __init__(self, names: Sequence[str], data: Iterator[object], method: str) -> None:
        self.names, self.data, self.method = names, data, method
        self.shapes: list[tuple[int, ...]] = []

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by the names of the inputs; ``None`` when there is no more."""
        batch = next(self.data, None)
        if batch is None:
            return None
        tensors = fed(batch, self.names)
        shapes = [tuple(tensor.shape) for tensor in tensors]
        self.shapes = self.shapes or shapes
        if self.method != "minmax" and shapes != self.shapes:
            raise InputError(
                f"method={self.method!r} needs batches of one shape; found {self.shapes} and "
                f"{shapes}: drop the last one, or take 'minmax'"
            )
        return {name: t.detach().cpu().numpy() for name, t in zip(self.names, tensors)}

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, Any]:
        found = self.get_next()
        if found is None:
            raise StopIteration
        return found


def _in_8_bits(file: Path) -> dict[str, int]:
    """The operators that compute on quantized values, counted by type."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    bytes_of = {item.name for item in graph.initializer if item.data_type in _INTEGERS}
    counts: dict[str, int] = {}
    for node in graph.node:
        kind = node.op_type
        fed_by = [made.get(value) == "DequantizeLinear" for value in node.input[:2]]
        table = kind == "Gather" and node.input[0] in bytes_of
        integer = kind in ("MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM")
        if integer or table or (kind in _BESIDE_ATTENTION and all(fed_by)):
            name = kind.removesuffix("Integer").removeprefix("DynamicQuantize")
            counts[name] = counts.get(name, 0) + 1
    return counts
