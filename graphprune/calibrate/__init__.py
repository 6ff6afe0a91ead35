"""Keep the accuracy of a small model without training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from graphprune.batches import Batch, at_rest, batches, check_data, device_of
from graphprune.calibrate.repair import Refit, Repair
from graphprune.calibrate.replay import Replay, check_batches
from graphprune.calibrate.statistics import reestimate
from graphprune.errors import InputError
from graphprune.plan import Plan
from graphprune.rewrite.shrink import kept_indices
from graphprune.table import render

METHODS = ("repair", "bias", "batchnorm")


@dataclass(frozen=True)
class Calibration:
    """What a calibration did; ``print`` it.

    Attributes:
        method: as it was asked for.
        refits: one record for each layer, in the order in which they were refitted. For
            ``"batchnorm"`` the names of the norms, without errors.
    """

    method: str
    refits: tuple[Refit, ...]

    @property
    def changed(self) -> tuple[str, ...]:
        """The layers that were changed."""
        return tuple(refit.layer for refit in self.refits if not refit.note)

    def __str__(self) -> str:
        """A table of the layers, with the relative squared error before and after."""
        title = f'method "{self.method}": {len(self.changed)} of {len(self.refits)} layers changed'
        if self.method == "batchnorm":
            return render(title, ("layer",), [(refit.layer,) for refit in self.refits])
        rows = [
            (r.layer, *(("", "") if r.note else (f"{r.before:.2e}", f"{r.after:.2e}")), r.note)
            for r in self.refits
        ]
        return render(title, ("layer", "error before", "after", "left alone"), rows)


def calibrate(
    small: nn.Module,
    model: nn.Module,
    data: Iterable[Any],
    *,
    method: str = "repair",
    ridge: float = 1e-3,
    rows: int = 1 << 17,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Bring a small model closer to its original, on unlabelled data and without training.

    ``"repair"`` refits the weights of the kept channels by least squares, layer by layer in the
    order in which they run, so that they take over what the removed channels contributed (He et
    al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017). A layer is
    fitted to the value of the original behind it: where its output is added to a shortcut, to the
    sum, so that it also makes up for the errors of earlier layers that the shortcut carries.
    ``"bias"`` moves biases alone, so that the mean of every channel is the original's (Nagel et
    al., "Data-Free Quantization", ICCV 2019). ``"batchnorm"`` takes the running statistics of
    BatchNorm anew.

    Args:
        small: a model made by :func:`rebuild`; its parameters are changed in place.
        model: the original that ``small`` was made from; it is not touched.
        data: batches such as a ``DataLoader`` yields; targets are not needed. For ``"repair"``
            and ``"bias"`` all values that are alive between two ops are held for all batches.
        method: ``"repair"``, ``"bias"`` or ``"batchnorm"``.
        ridge: how strongly weights are held where they are, as a fraction of the mean second
            moment of what a layer reads.
        rows: how many places (pixels, tokens) of all batches a layer is fitted to, at most.
        seed: for the choice of these places.
        progress: show a progress bar, if the error stream is a terminal.

    Returns:
        A report of the errors at every layer; ``print`` it.

    Raises:
        InputError: an argument is wrong, ``small`` carries no plan, or a model does not run.
        PlanError: ``model`` is not the original of ``small``.
        ModelError: the two models do not run the same ops (``"repair"``, ``"bias"``).

    Example:
        >>> import torch, graphprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> small = graphprune.rebuild(net, 0.25)
        >>> report = graphprune.calibrate(small, net, [torch.randn(64, 4)])
        >>> report.changed
        ('2',)
    """
    _check(small, model, method, ridge, rows)
    plan: Plan = small.graphprune_plan  # type: ignore[assignment]
    found = list(batches(check_data(data)))
    if method == "batchnorm":
        with _bar(len(found), progress) as tick:
            names = reestimate(small, found, tick)
        return Calibration(method, tuple(Refit(name) for name in names))
    parts = [Batch.of(batch).to(device_of(small)) for batch in found]
    check_batches(parts)
    with at_rest(model), _evaluated(small), torch.no_grad():
        original, smaller = Replay.of(model, parts), Replay.of(small, parts)
        repair = Repair(
            original,
            smaller,
            kept_indices(plan),
            weights=method == "repair",
            ridge=ridge,
            rows=rows,
            seed=seed,
        )
        with _bar(len(repair.nodes), progress) as tick:
            refits = repair.run(tick)
    return Calibration(method, tuple(refits))


def _check(small: nn.Module, model: nn.Module, method: str, ridge: float, rows: int) -> None:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if not isinstance(ridge, int | float) or isinstance(ridge, bool) or not 0 <= ridge < 1e6:
        raise InputError(f"ridge must be a number of at least 0, such as 1e-3; got {ridge!r}")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise InputError(f"rows must be a positive int, such as 100000; got {rows!r}")
    if not isinstance(getattr(small, "graphprune_plan", None), Plan):
        raise InputError(
            f"small must be a model made by rebuild, which carries its plan; got "
            f"{type(small).__name__} without one (calibrate takes the small model first)"
        )
    small.graphprune_plan.check(model)  # type: ignore[union-attr, operator]


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the modes as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[], None]]:
    """A progress bar, if it is wanted and someone can see it."""
    console = Console(stderr=True)
    if not (progress and console.is_terminal):
        yield lambda: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("calibration", total=total)
        yield lambda: bar.update(task, advance=1)
