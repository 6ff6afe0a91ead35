"""How long a model takes on a device, as a function of how many channels each group keeps.

A few shrunk models of random widths run on the device, with a stopwatch at every op, in their
place in the model, so that caches and overheads are those of real use. The time of each op is
fitted by what it does: multiply-accumulates, values read and written, weights read. The fits are
sums of products of affine forms of kept counts, as all costs are. Measurements are kept on disk.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from graphprune.measurement import cpu_threads, drawn, shared_copy
from graphprune.ops.calls import Args, Function, Kwargs, OpMode
from graphprune.ops.registry import WHOLE
from graphprune.ops.views import macs_of
from graphprune.planning.costs import Costs, Counts, Forms, Polynomials
from graphprune.record.inputs import Call

_ROUNDS, _LEAST, _SECONDS = 6, 1, 0.06
_RUNS = 9
_FEATURES = 4


@dataclass(frozen=True)
class Sample:
    """One measured model: kept counts, its ops with their milliseconds, and those of all of it."""

    counts: tuple[int, ...]
    names: tuple[str, ...]
    ops: tuple[float, ...]
    total: float


# --- measuring --------------------------------------------------------------------------------


class _Ops(OpMode):
    """Runs every ATen op under the stopwatch."""

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if self.watch.inside:
            return func(*args, **(kwargs or {}))
        return self.watch.timed(str(func.overloadpacket), func, args, kwargs or {})


class _Whole(TorchFunctionMode):
    """Runs functions that are recorded as one op under the stopwatch, as one op."""

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        target = torch.ops.aten.einsum.default if func is torch.einsum else WHOLE.get(func)
        if target is None or self.watch.inside:
            return func(*args, **(kwargs or {}))
        self.watch.inside = True
        try:
            return self.watch.timed(str(target.overloadpacket), func, args, kwargs or {})
        finally:
            self.watch.inside = False


class Stopwatch:
    """Times every op that runs inside ``with watch:``, as (name, milliseconds)."""

    def __init__(self, cuda: bool, clock: Callable[[], float]) -> None:
        self.cuda = cuda
        self.clock = clock
        self.entries: list[tuple[str, Any]] = []
        self.inside = False

    def timed(self, name: str, func: Callable[..., object], args: Args, kwargs: Kwargs) -> object:
        """Run a function and note how long it took."""
        if self.cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            out = func(*args, **kwargs)
            events[1].record()
            self.entries.append((name, events))
        else:
            start = self.clock()
            out = func(*args, **kwargs)
            self.entries.append((name, 1000 * (self.clock() - start)))
        return out

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time what runs inside."""
        with _Whole(self), _Ops(self):
            yield
        if self.cuda:
            torch.cuda.synchronize()
            self.entries = [(name, a.elapsed_time(b)) for name, (a, b) in self.entries]


@dataclass(frozen=True)
class Bench:
    """Where and on what latencies are measured: a device, inputs, a number of CPU threads."""

    call: Call
    device: torch.device
    threads: int | None

    def samples(self, models: Sequence[nn.Module], counts: Sequence[Counts]) -> list[Sample]:
        """Run models and time their ops and all of them: the shortest times of several rounds.

        Rounds go through all models, so that a busy moment of the machine hits none of them alone.
        """
        passes: list[list[list[tuple[str, float]]]] = [[] for _ in models]
        totals = [math.inf] * len(models)
        with self._ready(models) as ready:
            for _ in range(_ROUNDS):
                for number, run in enumerate(ready):
                    begin = time.perf_counter()
                    done = 0
                    while done < _LEAST or time.perf_counter() - begin < _SECONDS:
                        done += 1
                        watch = Stopwatch(self.device.type == "cuda", self.clock)
                        with watch.running():
                            run()
                        passes[number].append(watch.entries)
                        start = self.clock()
                        run()
                        totals[number] = min(totals[number], 1000 * (self.clock() - start))
        return [_sample(one, found, total) for one, found, total in zip(counts, passes, totals)]

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds; of the processor where one thread does it all, whatever else is running."""
        alone = self.device.type == "cpu" and self.cores == 1
        return time.thread_time if alone else time.perf_counter

    @property
    def cores(self) -> int:
        """The number of CPU threads."""
        return self.threads or torch.get_num_threads()

    def totals(
        self,
        models: Sequence[nn.Module],
        clock: Callable[[], float] = time.perf_counter,
        seconds: float = 1.0,
    ) -> list[list[float]]:
        """Milliseconds of single runs of several models, taken in turns."""
        times: list[list[float]] = [[] for _ in models]
        begin = time.perf_counter()
        with self._ready(models) as ready:
            while len(times[0]) < _RUNS or time.perf_counter() - begin < seconds:
                for run, found in zip(ready, times):
                    start = clock()
                    run()
                    found.append(1000 * (clock() - start))
        return times

    @contextlib.contextmanager
    def _ready(self, models: Sequence[nn.Module]) -> Iterator[list[Callable[[], None]]]:
        """Functions that run models, which have run before."""
        args, kwargs = drawn(self.call, self.device)
        cuda = self.device.type == "cuda"

        def runner(model: nn.Module) -> Callable[[], None]:
            clone = shared_copy(model).eval()

            def run() -> None:
                clone(*args, **kwargs)
                if cuda:
                    torch.cuda.synchronize(self.device)

            return run

        devices = [self.device] if cuda else []
        with cpu_threads(self.threads), torch.random.fork_rng(devices), torch.no_grad():
            ready = [runner(model) for model in models]
            for run in [*ready, *ready]:
                run()
            yield ready

    def __str__(self) -> str:
        """The device with all that times depend on."""
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, torch {torch.__version__}"
        return f"{processor()}, threads: {self.cores}, torch {torch.__version__}"


def processor() -> str:
    """The name of the processor; many models of one name differ in family and model number."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbered = "cpu family" in fields and "model" in fields
    return f"{name}, family {fields['cpu family']} model {fields['model']}" if numbered else name


def _sample(counts: Counts, passes: Sequence[Sequence[tuple[str, float]]], total: float) -> Sample:
    names = tuple(name for name, _ in passes[0])
    same = [found for found in passes if tuple(name for name, _ in found) == names]
    low = np.array([[ms for _, ms in found] for found in same]).min(0)
    return Sample(tuple(int(n) for n in counts), names, tuple(low.tolist()), total)


# --- what was measured, on disk ---------------------------------------------------------------


class Cache:
    """Samples on disk, in ``GRAPHPRUNE_CACHE`` or the user's cache folder.

    A folder that cannot be written is no error: then everything is measured again.
    """

    def __init__(self, *key: object) -> None:
        root = os.environ.get("GRAPHPRUNE_CACHE")
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) if root else Path(base) / "graphprune"
        text = json.dumps([str(part) for part in key])
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.path = folder / f"latency-{digest[:32]}.json"
        self.samples = self._read()

    def _read(self) -> list[Sample]:
        try:
            content = json.loads(self.path.read_text())
            return [
                Sample(tuple(s["counts"]), tuple(s["names"]), tuple(s["ops"]), float(s["total"]))
                for s in content
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def find(self, counts: Counts) -> Sample | None:
        """A measured model of these counts."""
        wanted = tuple(int(n) for n in counts)
        return next((sample for sample in self.samples if sample.counts == wanted), None)

    def add(self, sample: Sample) -> None:
        """Keep one more."""
        self.samples.append(sample)
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps([asdict(sample) for sample in self.samples])
            part = self.path.with_suffix(f".{os.getpid()}")
            part.write_text(text)
            part.replace(self.path)


# --- fitting ----------------------------------------------------------------------------------


def fit(costs: Costs, samples: Sequence[Sample]) -> Polynomials:
    """Fit the times of all ops, as a polynomial of the costs.

    Args:
        costs: of the analysis; forms that are not known yet are added.
        samples: measured models.
    """
    from scipy.optimize import nnls  # here: importing graphprune stays quick

    forms = costs.forms
    nodes = forms.analysis.records[0].ops
    features = [feature for node in nodes for feature in _features(node, forms)]
    polynomials = Polynomials.of(features)
    costs.matrix = forms.matrix()
    known = np.array(
        [polynomials.values(costs.sizes(np.array(s.counts, float))) for s in samples]
    ).reshape(len(samples), len(nodes), _FEATURES)
    times = np.array([aligned(nodes, sample) for sample in samples])
    total: Any = 0.0
    sums = np.zeros(len(samples))
    for number in range(len(nodes)):
        scale = np.maximum(known[:, number].max(0), 1.0)
        weight = 1 / np.maximum(times[:, number], 1e-4)
        rows = known[:, number] / scale * weight[:, None]
        factors = nnls(rows, times[:, number] * weight)[0] / scale
        sums += known[:, number] @ factors
        for feature, factor in zip(features[number * _FEATURES :][:_FEATURES], factors):
            if factor:
                total = total + feature * float(factor)
    totals = np.array([sample.total for sample in samples])
    return Polynomials.of([total * float(np.median(totals / sums))])


def _features(node: fx.Node, forms: Forms) -> tuple[Any, Any, Any, Any]:
    """What the time of an op may depend on: 1, MACs, values moved, weights read."""
    macs = macs_of(node, forms.shape)
    moved: object = 0
    weights: object = 0
    for used in dict.fromkeys([*node.all_input_nodes, node]):
        if used in forms.analysis.values:
            size = math.prod(forms.shape(used))
            if used.op == "get_attr":
                weights = weights + size
            else:
                moved = moved + size
    return 1, macs, moved, weights


def aligned(nodes: Sequence[fx.Node], sample: Sample) -> np.ndarray:
    """The time of every recorded op; 0 for those that another kernel stands for."""
    mine = [str(getattr(node.target, "overloadpacket", node.target)) for node in nodes]
    times = np.zeros(len(nodes))
    if list(sample.names) == mine:
        return np.array(sample.ops)
    matcher = difflib.SequenceMatcher(None, mine, sample.names, autojunk=False)
    for start, other, length in matcher.get_matching_blocks():
        times[start : start + length] = sample.ops[other : other + length]
    return times
