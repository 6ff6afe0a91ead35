"""What a model costs: parameters, multiply-accumulates, memory, time."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import InputError, ModelError, TraceError
from graphprune.record.cost import left_out, macs, peak_activations
from graphprune.record.inputs import Call, called, infer
from graphprune.record.recorder import Record
from graphprune.record.recording import record
from graphprune.record.tensors import named_tensors
from graphprune.text import render, share

_MIN_RUNS, _MAX_RUNS, _SECONDS = 5, 50, 2.0


@dataclass(frozen=True)
class Measurement:
    """What one forward pass of a model costs; ``print`` it, or :meth:`compare` two.

    Attributes:
        model: the class of the model.
        inputs: the shapes it was measured on.
        device: where the latency was measured.
        parameters: number of parameters, tied ones once.
        macs: multiply-accumulates of one forward pass on the inputs.
        bytes: bytes of parameters and buffers.
        activation_bytes: peak bytes of inputs, outputs and values in between, in eval mode
            without gradients, each freed after its last use.
        latency: median milliseconds of one forward pass; ``None`` when not measured.
        spread: interquartile range of the latency, in milliseconds.
        left_out: ops whose multiply-accumulates nobody declared, so that they are not counted
            (see ``graphprune.ops.declare``).
    """

    model: str
    inputs: str
    device: str
    parameters: int
    macs: int
    bytes: int
    activation_bytes: int
    latency: float | None = None
    spread: float | None = None
    left_out: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str, float]]:
        """Name, value for people, and number of everything that was measured."""
        rows: list[tuple[str, str, float]] = [
            ("parameters", count_text(self.parameters), self.parameters),
            ("MACs", count_text(self.macs) + self._without(), self.macs),
            ("memory of weights", bytes_text(self.bytes), self.bytes),
            ("peak of activations", bytes_text(self.activation_bytes), self.activation_bytes),
        ]
        if self.latency is not None:
            rows.append(("latency", latency_text(self.latency, self.spread), self.latency))
        return rows

    def _without(self) -> str:
        return f" (without {', '.join(self.left_out)})" if self.left_out else ""

    def compare(self, after: Measurement) -> Comparison:
        """This measurement beside a later one.

        Example:
            >>> import torch, graphprune
            >>> from graphprune.measurement import measure
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            >>> before = measure(net, latency=False)
            >>> after = measure(graphprune.rebuild(net, 0.5), latency=False)
            >>> before.compare(after).ratios["parameters"] < 0.6
            True
        """
        return Comparison(self, after)

    def __str__(self) -> str:
        """A table."""
        title = f"{self.model} on {self.inputs}, {self.device}"
        return render(title, ("what", "value"), [row[:2] for row in self.rows()])


@dataclass(frozen=True)
class Comparison:
    """Two measurements side by side; ``print`` it."""

    before: Measurement
    after: Measurement

    @property
    def ratios(self) -> dict[str, float]:
        """After divided by before, for everything measured in both (``nan`` where it was 0)."""
        numbers = {name: number for name, _, number in self.after.rows()}
        return {
            name: numbers[name] / number if number else math.nan
            for name, _, number in self.before.rows()
            if name in numbers
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Name, before, after and percentage of everything measured in both."""
        others = {name: (text, number) for name, text, number in self.after.rows()}
        return [
            (name, text, others[name][0], share(others[name][1], number))
            for name, text, number in self.before.rows()
            if name in others
        ]

    def __str__(self) -> str:
        """A table with one line for each quantity: before, after, percentage."""
        title = f"{self.after.model} on {self.after.inputs}, {self.after.device}"
        return render(title, ("what", "before", "after", "after / before"), self.rows())


def measure(
    model: nn.Module,
    example_inputs: object = None,
    *,
    latency: bool = True,
    repeats: int | None = None,
    threads: int | None = None,
) -> Measurement:
    """Measure what one forward pass of a model costs, in eval mode.

    Args:
        model: any module that runs; it is not touched.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword
            arguments; inferred from the first layer when absent. For the latency, floating
            point tensors are filled with random numbers.
        latency: whether to run the model for its latency, on the device of its parameters.
        repeats: how many timed runs; when absent 5 to 50, as fit into two seconds.
        threads: CPU threads while timing; torch's current setting when absent.

    Returns:
        Parameters, multiply-accumulates, bytes, peak activation memory and median latency.

    Raises:
        InputError: ``repeats`` or ``threads`` is not positive, or no input could be inferred.
        ModelError: not a module, or the latency of a model without weights was asked for.
        TraceError: the model does not run on the example inputs.

    Example:
        >>> import torch
        >>> from graphprune.measurement import measure
        >>> measure(torch.nn.Linear(4, 8), torch.randn(1, 4), latency=False).macs
        32
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, number in (("repeats", repeats), ("threads", threads)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise InputError(f"{name} must be a positive int, got {number!r}")
    call, recorded = _recorded(model, example_inputs)
    tensors = [tensor for _, tensor in named_tensors(model)]
    device = tensors[0].device if tensors else torch.device("cpu")
    median = spread = None
    if latency:
        if any(tensor.is_meta for tensor in tensors):
            raise ModelError("the model has no weights (meta device): pass latency=False")
        median, spread = _latency(model, call, device, repeats, threads)
    return Measurement(
        type(model).__name__,
        str(call),
        str(device),
        sum(parameter.numel() for parameter in model.parameters()),
        macs(recorded),
        sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        peak_activations(recorded),
        median,
        spread,
        left_out(recorded),
    )


def _recorded(model: nn.Module, example_inputs: object) -> tuple[Call, Record]:
    def runs(call: Call) -> Record:
        return record(model, call, training=False)

    if example_inputs is None:
        return infer(model, runs)
    return called(example_inputs, runs)


# --- latency ----------------------------------------------------------------------------------


def _latency(
    model: nn.Module,
    call: Call,
    device: torch.device,
    repeats: int | None,
    threads: int | None,
) -> tuple[float, float]:
    """Median and interquartile range of the milliseconds of one forward pass."""
    args, kwargs = drawn(call, device)
    clone = shared_copy(model).eval()

    def run() -> None:
        clone(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    devices = [device] if device.type == "cuda" else []
    with cpu_threads(threads), torch.random.fork_rng(devices), torch.no_grad():
        try:
            run()
        except Exception as error:
            raise TraceError(
                f"the model does not run on {device} ({call}): {type(error).__name__}: {error}"
            ) from error
        times = list(_timed(run, repeats))
    if len(times) == 1:
        return times[0], 0.0
    quarters = statistics.quantiles(times, n=4, method="inclusive")
    return quarters[1], quarters[2] - quarters[0]


def _timed(run: Callable[[], None], repeats: int | None) -> Iterator[float]:
    run()
    begin = time.perf_counter()
    for done in range(repeats or _MAX_RUNS):
        start = time.perf_counter()
        if repeats is None and done >= _MIN_RUNS and start - begin > _SECONDS:
            return
        run()
        yield 1000 * (time.perf_counter() - start)


def drawn(call: Call, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs on a device: floats are drawn, so that no zeros or denormals distort times."""
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator)
            return values.to(device, tensor.dtype)
        if tensor.is_meta:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return tensor

    return call.map(draw).on(device)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy with the same parameters but its own buffers, flags and other state."""
    memo: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # weights recomputed by hooks
                memo.setdefault(id(value), value.detach())
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Compute with this many CPU threads, for a while; ``None`` leaves the setting alone."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- numbers for people -----------------------------------------------------------------------


def count_text(number: int) -> str:
    """A count with a decimal prefix: ``11.69 M``."""
    return _prefixed(number, ("", " k", " M", " G", " T"))


def bytes_text(number: int) -> str:
    """Bytes with a decimal prefix: ``46.8 MB``."""
    return _prefixed(number, (" B", " kB", " MB", " GB", " TB"))


def latency_text(median: float, spread: float | None) -> str:
    """Milliseconds with the interquartile range: ``12.3 ms (IQR 0.4)``."""
    digits = 3 if median < 1 else 2 if median < 10 else 1
    return f"{median:.{digits}f} ms" + ("" if spread is None else f" (IQR {spread:.{digits}f})")


def _prefixed(number: int, units: tuple[str, ...]) -> str:
    if number < 1000:
        return f"{number}{units[0]}"
    power = min(int(math.log10(number)) // 3, len(units) - 1)
    value = number / 1000**power
    if round(value, 2) >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.2f}{units[power]}"
