"""How long models take in the engines that run them, measured in turns."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.arguments import is_int, is_number
from graphprune.deploy.engines import ALONE, Engine, Run, eager, load_engine, onnxruntime, program
from graphprune.deploy.exporting import FORMATS, drawn_where_absent, example_call, on_the_cpu
from graphprune.deploy.load import Load
from graphprune.errors import ExportError, InputError
from graphprune.measurement import bytes_text, cpu_threads, latency_text
from graphprune.planning.latency import processor
from graphprune.record.inputs import Call
from graphprune.text import render

Models = Mapping[str, "nn.Module | str | Path"]
Threads = int | Sequence[int | None] | None
CLOCKS = {"wall": time.perf_counter, "processor": time.thread_time}
_TURN = 0.05  # seconds that a model runs before the next one has its turn
_ROUNDS = 10  # turns of each model, at least


@dataclass(frozen=True)
class Timing:
    """The times of one model; ``latency``, ``p95`` and ``spread`` are milliseconds of one run.

    Attributes:
        name: of the model.
        engine: what ran it, with its version.
        threads: CPU threads.
        latency: the median.
        p95: 95 % of the runs took at most so long.
        spread: interquartile range.
        runs: how many runs were timed.
        throughput: items of a batch in a second.
        share: the median over that of the first model, by turns that lay side by side.
        bytes: of the file; ``None`` for models in memory.
    """

    name: str
    engine: str
    threads: int
    latency: float
    p95: float
    spread: float
    runs: int
    throughput: float
    share: float
    bytes: int | None


@dataclass(frozen=True)
class Bench:
    """The times of some models on the same inputs; ``print`` it.

    Attributes:
        rows: models, for each number of threads.
        inputs: the shapes.
        machine: the processor and the number of its cores.
        load: what else the machine did meanwhile.
    """

    rows: tuple[Timing, ...]
    inputs: str
    machine: str
    load: str

    def __str__(self) -> str:
        """A table."""
        title = f"{self.inputs} on {self.machine}; {self.load}"
        return render(title, HEADER, [cells(row) for row in self.rows])


HEADER = ("model", "engine", "threads", "median", "p95", "IQR", "runs", "items/s", "share", "file")


def cells(row: Timing) -> tuple[str, ...]:
    """A row for a table."""
    return (
        row.name,
        row.engine,
        str(row.threads),
        *(latency_text(value, None) for value in (row.latency, row.p95, row.spread)),
        str(row.runs),
        f"{row.throughput:,.1f}" if row.throughput < 100 else f"{row.throughput:,.0f}",
        f"{100 * row.share:.1f} %",
        "-" if row.bytes is None else bytes_text(row.bytes),
    )


def bench(
    models: Models,
    example_inputs: object = None,
    *,
    threads: Threads = 1,
    seconds: float = 3.0,
    clock: str = "wall",
    engine: str = "onnxruntime",
) -> Bench:
    """Measure how long models take, in turns: A B A B, so that a busy moment hits all of them.

    A turn is one run that is not counted and as many as fit into a twentieth of a second; caches
    are warm, as in a server of one model.

    Args:
        models: by name: modules, which run in PyTorch in eval mode without gradients, and files,
            ``.onnx`` in ONNX Runtime, ``.pt2`` as programs of ``torch.export``. On the CPU.
        example_inputs: as for :func:`graphprune.trace`; those of the first module, or of the file,
            when absent. Tensors that are zero throughout are drawn.
        threads: CPU threads; ``None`` for all cores; several to measure each of them.
        seconds: for each model and number of threads; ten turns are taken in any case.
        clock: ``"wall"``, or with one thread ``"processor"``: the time that its processor works
            for it, which a busy machine disturbs less.
        engine: what runs ONNX files: ``"onnxruntime"``, or ``"openvino"`` (by the wall clock).

    Returns:
        Median, 95 % quantile, spread and throughput of each model, and the load of the machine.

    Raises:
        InputError: an argument is wrong, a library is missing, a file does not take the inputs.
        ExportError: an engine does not load or run a file.

    Example:
        >>> import torch, graphprune
        >>> from graphprune.deploy import bench
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.Linear(512, 2))
        >>> models = {"original": net, "small": graphprune.rebuild(net, 0.5)}
        >>> found = bench(models, torch.randn(1, 64), seconds=0.1)
        >>> [row.name for row in found.rows]
        ['original', 'small']
    """
    if not isinstance(models, Mapping) or not models:
        raise InputError(f"models must be modules and files by name; got {models!r}")
    numbers = check_bench(threads, seconds)
    alone = numbers == [1] and engine in ALONE
    if clock not in CLOCKS or (clock == "processor" and not alone):
        raise InputError(
            f"clock must be 'wall', or 'processor' with threads=1 of onnxruntime; got {clock!r}"
        )
    call = _call(models, example_inputs)
    args, kwargs = drawn_where_absent(call)
    given = Call(args, kwargs)
    rows: list[Timing] = []
    with Load() as load:
        for number in numbers:
            rows += _measured(models, given, number, seconds, CLOCKS[clock], engine)
    said = str(load) if clock == "wall" else f"time of the processor; {load}"
    return Bench(tuple(rows), str(given), f"{processor()} ({cores()} cores)", said)


def check_bench(threads: Threads, seconds: object) -> list[int]:
    """The numbers of threads to measure with.

    Raises:
        InputError: these are none, or no time to measure.
    """
    if not is_number(seconds, 0.0) or seconds == math.inf:
        raise InputError(f"seconds must be a number of at least 0; got {seconds!r}")
    return _threads(threads)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads(threads: Threads) -> list[int]:
    wanted: list[Any] = [threads]
    if isinstance(threads, Sequence) and not isinstance(threads, str):
        wanted = [*threads]
    if not wanted or not all(number is None or is_int(number, 1) for number in wanted):
        raise InputError(f"threads must be positive ints, or None for all cores; got {threads!r}")
    return list(dict.fromkeys(number or cores() for number in wanted))


def _call(models: Models, example_inputs: object) -> Call:
    """The inputs that all models are run on."""
    modules = [model for model in models.values() if isinstance(model, nn.Module)]
    if example_inputs is not None or modules:
        if not modules:
            return Call.of(example_inputs)
        return example_call(modules[0], example_inputs)
    first = Path(str(next(iter(models.values()))))
    return inputs_of(first)


def inputs_of(path: Path) -> Call:
    """Inputs that a file itself tells the shapes of; an open batch is 1.

    Raises:
        InputError: other sizes are open as well.
    """
    if path.suffix.lower() == ".pt2":
        example = program(path).example
        assert example is not None  # of every package
        return example
    engine = onnxruntime(path)
    tensors = []
    for name, kind, shape in engine.ports:
        if any(not isinstance(size, int) for size in shape[1:]):
            raise InputError(
                f"{path.name} leaves sizes open, {name} [{', '.join(map(str, shape))}]: pass "
                "example_inputs (--input 1,3,224,224, say) to measure it on"
            )
        tensors.append(torch.zeros([s if isinstance(s, int) else 1 for s in shape], dtype=kind))
    return Call(tuple(tensors))


def load_model(
    model: nn.Module | str | Path, call: Call, threads: int | None, engine: str
) -> Engine:
    """A model in its engine.

    Raises:
        InputError: it is neither a module nor a file of a known kind.
    """
    if isinstance(model, nn.Module):
        return eager(on_the_cpu(model), call, threads)
    path = Path(model)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{str(path)!r} is no file of an engine: expected .onnx or .pt2")
    loaded = load_engine(path, threads, engine)
    count = len(call.tensors())
    if loaded.inputs and len(loaded.inputs) != count:
        names = ", ".join(loaded.inputs)
        raise InputError(f"{path.name} takes {len(loaded.inputs)} inputs, {names}; got {count}")
    return loaded


def _measured(
    models: Models,
    call: Call,
    threads: int,
    seconds: float,
    clock: Callable[[], float],
    engine: str,
) -> list[Timing]:
    tensors = call.tensors()
    with cpu_threads(threads), torch.no_grad():
        engines = {n: load_model(model, call, threads, engine) for n, model in models.items()}
        runs = [_ready(name, ready, tensors) for name, ready in engines.items()]
        turns = in_turns(runs, seconds * len(runs), clock)
    base = [statistics.median(turn) for turn in turns[0]]
    items = tensors[0].shape[0] if tensors[0].dim() else 1
    rows = []
    for (name, ready), found in zip(engines.items(), turns):
        times = sorted(ms for turn in found for ms in turn)
        cuts = statistics.quantiles(times, n=20, method="inclusive")
        shares = [statistics.median(turn) / first for turn, first in zip(found, base)]
        model = models[name]
        rows.append(
            Timing(
                name,
                ready.name,
                threads,
                cuts[9],
                cuts[18],
                cuts[14] - cuts[4],
                len(times),
                1000 * items / cuts[9],
                statistics.median(shares),
                None if isinstance(model, nn.Module) else size_of(Path(model)),
            )
        )
    return rows


def _ready(name: str, engine: Engine, tensors: Sequence[Tensor]) -> Run:
    run = engine.ready(tensors)
    try:
        run()
    except Exception as error:  # of the engine or of the user's code
        raise ExportError(f"{name} does not run in {engine.name}: {error}") from error
    return run


def in_turns(
    runs: Sequence[Run], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> list[list[list[float]]]:
    """Milliseconds of each run, by turn, of each function."""
    turns: list[list[list[float]]] = [[] for _ in runs]
    begin = time.perf_counter()
    while len(turns[-1]) < _ROUNDS or time.perf_counter() - begin < seconds:
        for run, found in zip(runs, turns):
            run()
            times: list[float] = []
            start = time.perf_counter()
            while not times or time.perf_counter() - start < _TURN:
                before = clock()
                run()
                times.append(1000 * (clock() - before))
            found.append(times)
    return turns


def size_of(path: Path) -> int:
    """Bytes of a file, and of the weights beside it."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)
