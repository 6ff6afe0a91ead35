"""A latency in the engine that will serve, met by running small models there."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from graphprune.api import rebuild, trace
from graphprune.arguments import is_int
from graphprune.deploy.engines import ALONE, ENGINES, needed
from graphprune.deploy.exporting import export
from graphprune.deploy.timing import Timing, bench, cores
from graphprune.errors import InputError
from graphprune.measurement import latency_text
from graphprune.plan.plan import Plan, carry, plan_of
from graphprune.planning.deadline import Curve
from graphprune.planning.latency import processor
from graphprune.planning.options import Options
from graphprune.planning.targets import targets_of
from graphprune.text import render, share

_TURNS = 8  # of a plan, an export and a measurement
_NEAR = 0.95  # of the limit used: good enough
_LEAST = 0.02  # of the MACs
_SECONDS = 2.0  # for original and small
_WIDTH = 16  # channels at a time: ONNX Runtime keeps so many side by side


@dataclass(frozen=True)
class Try:
    """One small model: its share of the MACs, and of the latency, foreseen and measured."""

    macs: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class Met:
    """A small model that is fast enough in its engine; ``print`` it.

    Attributes:
        small: the model, as :func:`graphprune.rebuild` returns it.
        engine: what it was measured in, with threads and processor.
        before: milliseconds of the original.
        limit: milliseconds allowed.
        predicted: milliseconds foreseen from the models measured before it.
        measured: milliseconds of the small model.
        tries: all that were measured.
    """

    small: nn.Module
    engine: str
    before: float
    limit: float
    predicted: float
    measured: float
    tries: tuple[Try, ...]

    def line(self) -> str:
        """What was measured and foreseen, for reports and for the notes of the plan."""
        before, predicted, measured = (
            latency_text(value, None) for value in (self.before, self.predicted, self.measured)
        )
        part = share(self.measured, self.before)
        return (
            f"latency on {self.engine}: {before} -> {measured} ({part}) measured, "
            f"{predicted} predicted"
        )

    def __str__(self) -> str:
        """A line, and a table of what was tried."""
        title = f"{self.line()}; at most {latency_text(self.limit, None)} asked for"
        rows = [[f"{100 * v:.1f} %" for v in (t.macs, t.predicted, t.measured)] for t in self.tries]
        return render(title, ("MACs", "latency foreseen", "latency measured"), rows)


def meet_latency(
    model: nn.Module,
    latency: float | str,
    example_inputs: object = None,
    *,
    runtime: str = "onnxruntime",
    attention: str = "heads",
    **options: Unpack[Options],
) -> Met:
    """Make a small model that takes at most so long in the engine that will serve it.

    Plans for several shares of the MACs are made; each small model is exported and measured in
    turns with the original, and the next share follows from what was measured.

    Args:
        model: the trained model; not touched.
        latency: a fraction of the original's, or an amount of time such as ``"3 ms"``.
        example_inputs: as for :func:`graphprune.trace`; also what the latency is measured on.
        runtime: what runs the exported files, ``"onnxruntime"`` or ``"openvino"``.
        attention: as for :func:`graphprune.trace`.
        options: criterion, scope and constraints as for ``graph.plan``; ``round_to`` is 16 unless
            given, as these engines run convolutions of other widths slowly, and ``threads`` of
            the CPU 1; ``None`` for all cores.

    Returns:
        The small model with what was foreseen and measured.

    Raises:
        InputError: the latency is out of reach, an argument is wrong, or a library is missing.

    Example:
        >>> import torch
        >>> from graphprune.deploy import meet_latency
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64))
        >>> meet_latency(net, 0.6, torch.randn(64, 64), threads=0)
        Traceback (most recent call last):
        graphprune.errors.InputError: threads must be a positive int, or None for all; got 0
    """
    (target,) = targets_of({"latency": latency}).values()
    threads = options.pop("threads", 1)
    if threads is not None and not is_int(threads, 1):
        raise InputError(f"threads must be a positive int, or None for all; got {threads!r}")
    if options.get("target"):
        raise InputError("target= is what is searched for here: name the latency alone")
    if runtime not in ENGINES:
        raise InputError(f"runtime must be {' or '.join(map(repr, ENGINES))}; got {runtime!r}")
    for library in ("onnx", "onnxscript", runtime):
        needed(library, f"a latency in {runtime}")
    options.setdefault("round_to", _WIDTH)
    graph = trace(model, example_inputs, attention=attention)
    with tempfile.TemporaryDirectory() as place:
        search = _Search(model, graph.call, Path(place), threads, runtime)
        while search.goes_on(target.of(search.before) / search.before):
            asked: Any = {**options, "target": {"macs": search.aim}}
            plan = graph.plan(**asked)
            search.measure(rebuild(model, plan, graph.call), macs_share(plan))
        return search.met(target.of(search.before))


def macs_share(plan: Plan) -> float:
    """The share of the MACs that a plan leaves."""
    return plan.after.macs / plan.before.macs


class _Search:
    """What was measured, and which share of the MACs to try next."""

    def __init__(
        self, model: nn.Module, call: object, place: Path, threads: int | None, runtime: str
    ) -> None:
        self.call, self.place, self.threads, self.runtime = call, place, threads, runtime
        self.original = self.exported(model, "original")
        self.curve = Curve(1.0)
        self.tries: list[Try] = []
        self.models: list[nn.Module] = []
        # One thread alone is timed by its processor, whatever else the machine does.
        alone = (threads or cores()) == 1 and runtime in ALONE
        self.clock = "processor" if alone else "wall"
        self.before, self.aim = self.timed({"original": self.original})[0].latency, 1.0

    def timed(self, files: dict[str, Path]) -> tuple[Timing, ...]:
        """Files in turns."""
        options: dict[str, Any] = {"threads": self.threads, "clock": self.clock}
        options["engine"] = self.runtime
        return bench(files, self.call, seconds=_SECONDS, **options).rows

    def exported(self, model: nn.Module, name: str) -> Path:
        """A file to measure; the user's own export compares it with the model."""
        file = self.place / f"{name}.onnx"
        return export(model, file, self.call, check=False, certificate=False).path

    def goes_on(self, limit: float) -> bool:
        """Whether to try another share of the MACs, which ``aim`` then is."""
        if any(_NEAR * limit <= found.measured <= limit for found in self.tries):
            return False
        if len(self.tries) == _TURNS:
            return False
        aim = float(min(max(self.curve.units(0.98 * limit), _LEAST), 1.0))
        seen = [found.macs for found in self.tries]
        if any(abs(aim - macs) < 1e-3 for macs in seen):  # no other model is nearer
            return False
        self.aim = aim
        return True

    def measure(self, small: nn.Module, macs: float) -> None:
        """Run one small model in turns with the original."""
        file = self.exported(small, f"small-{len(self.tries)}")
        models = {"original": self.original, "small": file}
        rows = self.timed(models)
        self.tries.append(Try(macs, self.curve.share(macs), rows[1].share))
        self.models.append(small)
        self.curve.add(macs, rows[1].share)

    def met(self, limit: float) -> Met:
        """The best model that is fast enough.

        Raises:
            InputError: none is.
        """
        fits = [n for n, found in enumerate(self.tries) if found.measured * self.before <= limit]
        if not fits:
            nearest = min(found.measured for found in self.tries) * self.before
            raise InputError(
                f"a latency of at most {latency_text(limit, None)} in {self.runtime} was not met: "
                f"the nearest model took {latency_text(nearest, None)}"
            )
        best = max(fits, key=lambda n: self.tries[n].macs)
        found, small = self.tries[best], self.models[best]
        name = f"{ENGINES[self.runtime](self.original).name}, threads: {self.threads or cores()}"
        engine = f"{name}, {processor()}"
        predicted, measured = (self.before * v for v in (found.predicted, found.measured))
        told = {"device": engine, "before": self.before, "predicted": predicted}
        plan = plan_of(small)
        assert plan is not None  # rebuild leaves it there
        request = {**plan.request, "latency": {**told, "measured": measured}}
        met = Met(small, engine, self.before, limit, predicted, measured, tuple(self.tries))
        notes = (*plan.notes, met.line())
        plan = replace(plan, request=request, notes=notes)
        carry(small, plan)
        return met
