"""Keep the accuracy of a small model without training.

A small model, its original and batches of data enter; the same small model leaves, its layers
refitted by least squares and its BatchNorm statistics taken anew. Imports ``execute`` and
``record``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphprune.calibration.repair import Refit, Repair
from graphprune.calibration.replay import Replay, check_batches
from graphprune.calibration.statistics import reestimate
from graphprune.errors import InputError
from graphprune.execute.shrink import kept_indices
from graphprune.plan.plan import Plan, plan_of
from graphprune.record.batches import (
    Batch,
    at_rest,
    batches,
    check_data,
    check_finite,
    device_of,
    evaluated,
)
from graphprune.record.checks import check_model
from graphprune.text import bar, render, tracked

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
    sweeps: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Bring a small model closer to its original, on unlabelled data and without training.

    ``"repair"`` refits the weights of the kept channels by least squares, layer by layer in the
    order in which they run, so that they take over what the removed channels contributed (He et
    al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017). A layer is
    fitted to the value of the original behind it: where its output is added to a shortcut, to the
    sum, so that it also makes up for the errors of earlier layers that the shortcut carries. With
    ``sweeps`` such a layer and those that make its inputs are then moved together, by Adam on
    the error behind them (Li et al., "BRECQ", ICLR 2021), and stay so if that error falls.
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
        sweeps: for ``"repair"``: how many times the layers of a segment are moved together over
            all batches, behind every layer that lost inputs; 0 for least squares alone.
        seed: for the choice of these places, and the order of the batches in a sweep.
        progress: show a progress bar, if the error stream is a terminal.

    Returns:
        A report of the errors at every layer; ``print`` it.

    Raises:
        InputError: an argument is wrong, a batch holds NaN or infinite values, ``small`` carries
            no plan, or a model does not run.
        PlanError: ``model`` is not the original of ``small``.
        ModelError: a model is wrapped, compiled or not finite, or the two do not run the same ops
            (``"repair"``, ``"bias"``).

    Example:
        >>> import torch, graphprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> small = graphprune.rebuild(net, 0.25)
        >>> report = graphprune.calibrate(small, net, [torch.randn(64, 4)])
        >>> report.changed
        ('2',)
    """
    plan = _check(small, model, method, ridge, rows)
    _check_sweeps(sweeps, method)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"seed must be an int, not {seed!r}")
    found = list(batches(check_data(data)))
    for number, batch in enumerate(found):
        check_finite(batch, number)
    if method == "batchnorm":
        names = reestimate(small, tracked(found, "calibration", len(found), progress))
        return Calibration(method, tuple(Refit(name) for name in names))
    parts = [Batch.of(batch).to(device_of(small)) for batch in found]
    check_batches(parts)
    with torch.inference_mode(False), torch.no_grad(), at_rest(model), evaluated(small):
        original, smaller = Replay.of(model, parts), Replay.of(small, parts)
        repair = Repair(
            original,
            smaller,
            kept_indices(plan),
            weights=method == "repair",
            ridge=ridge,
            rows=rows,
            seed=seed,
            sweeps=sweeps,
        )
        with bar("calibration", len(repair.nodes), progress) as tick:
            refits = repair.run(tick)
        smaller.settle()
    return Calibration(method, tuple(refits))


def _check_sweeps(sweeps: int, method: str) -> None:
    if not isinstance(sweeps, int) or isinstance(sweeps, bool) or sweeps < 0:
        raise InputError(f"sweeps must be an int of at least 0, such as 1; got {sweeps!r}")
    if sweeps and method != "repair":
        raise InputError(
            f'sweeps={sweeps} goes with method="repair" alone; got method {method!r}: leave it out'
        )


def _check(small: nn.Module, model: nn.Module, method: str, ridge: float, rows: int) -> Plan:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if not isinstance(ridge, int | float) or isinstance(ridge, bool) or not 0 <= ridge < 1e6:
        raise InputError(f"ridge must be a number of at least 0, such as 1e-3; got {ridge!r}")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise InputError(f"rows must be a positive int, such as 100000; got {rows!r}")
    plan = plan_of(small)
    if plan is None:
        raise InputError(
            f"small must be a model made by rebuild, which carries its plan; got "
            f"{type(small).__name__} without one (calibrate takes the small model first)"
        )
    check_model(small)
    check_model(model)
    plan.check(model)
    return plan
