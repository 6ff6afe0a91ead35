"""The public function of this package, and its report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.arguments import check_seed, is_int, is_number
from graphprune.calibration.items import Folds, count, doubt, set_apart
from graphprune.calibration.outcome import distance
from graphprune.calibration.repair import Refit, Repair, Settings
from graphprune.calibration.replay import Replay, check_batches
from graphprune.calibration.statistics import reestimate
from graphprune.errors import InputError
from graphprune.execute.fold import recompute_masked
from graphprune.execute.shrink import kept_indices
from graphprune.plan.plan import Plan, plan_of
from graphprune.ranks import Ranks
from graphprune.record.agreement import agree
from graphprune.record.batches import (
    Batch,
    at_rest,
    batches,
    check_batched,
    check_data,
    check_finite,
    device_of,
    evaluated,
    told_apart,
)
from graphprune.record.checks import check_model
from graphprune.record.padding import masks_of
from graphprune.record.tensors import named_tensors
from graphprune.text import bar, render, tracked

METHODS = ("repair", "bias", "batchnorm")
_UNDONE = "undone: the outputs had become worse"
_WORSE = 1 + 1e-6  # than before: not by rounding


@dataclass(frozen=True)
class Calibration:
    """What a calibration did; ``print`` it.

    Attributes:
        method: as it was asked for.
        refits: one record for each layer, in the order in which they were refitted. For
            ``"batchnorm"`` the names of the norms, without errors.
        before, after: the squared error of the outputs as a fraction of their variance, on items
            that no layer was fitted to; ``None`` where they cannot be compared.
    """

    method: str
    refits: tuple[Refit, ...]
    before: float | None = None
    after: float | None = None

    @property
    def changed(self) -> tuple[str, ...]:
        """The layers that were changed."""
        return tuple(refit.layer for refit in self.refits if not refit.note)

    def __str__(self) -> str:
        """A table of the layers, with the relative squared error before and after."""
        title = f'method "{self.method}": {len(self.changed)} of {len(self.refits)} layers changed'
        if self.before is not None and self.after is not None:
            title += f"\nerror of the outputs {self.before:.2e} before, {self.after:.2e} after"
        if self.method == "batchnorm":
            rows = [(refit.layer, refit.note) for refit in self.refits]
            return render(title, ("layer", "left alone"), rows)
        heads = ("layer", "error before", "after", "held out", "ridge", "left alone")
        return render(title, heads, [_row(refit) for refit in self.refits])


def _row(refit: Refit) -> tuple[str, ...]:
    if refit.note:
        before = f"{refit.before:.2e}" if refit.before else ""
        return refit.layer, before, "", "", "", refit.note
    errors = (f"{error:.2e}" for error in (refit.before, refit.after, refit.held))
    return refit.layer, *errors, f"{refit.ridge:.0e}", ""


def calibrate(
    small: nn.Module,
    model: nn.Module,
    data: Iterable[object],
    *,
    method: str = "repair",
    ridge: float | None = None,
    rows: int = 1 << 17,
    sweeps: int = 0,
    held_out: float = 0.125,
    memory: float = 4e9,
    seconds: float | None = None,
    seed: int = 0,
    progress: bool = False,
    process_group: Any = None,
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

    Nothing is made worse: a refit is taken only if it lowers the error on items (images, texts)
    that are held out from it, each in turn; and the last refits are undone until the outputs, on
    items that no layer was fitted to, are no worse than before. The report says so.

    Under ``torch.distributed`` every process calls it with the same models and its own batches.
    What they sum up is summed over all of them, and all end with the same small model: that of one
    process on all batches, of which batch i of rank r of n is batch ``i * n + r``.

    Args:
        small: a model made by :func:`rebuild`; its parameters are changed in place.
        model: the original that ``small`` was made from; it is not touched.
        data: batches such as a ``DataLoader`` yields: tensors, dicts with attention masks, lists of
            images of different sizes, each with or without targets, which are not needed. Padded
            positions do not count where ``model`` shows that a mask leaves them out.
        method: ``"repair"``, ``"bias"`` or ``"batchnorm"``.
        ridge: how strongly weights are held where they are, as a fraction of the mean second
            moment of what a layer reads; chosen for every layer by the error on items held out
            from the fit when absent.
        rows: how many places (pixels, tokens) of all batches a layer is fitted to, at most.
        sweeps: for ``"repair"``: how many times the layers of a segment are moved together over
            all batches, behind every layer that lost inputs; 0 for least squares alone.
        held_out: for ``"repair"``: the share of the items, 128 at most, that no layer is fitted to,
            and that the outputs are compared on; at 0 they are compared on all items.
        memory: for ``"repair"`` and ``"bias"``: bytes of activations that a process holds at once,
            for all its batches together. Early layers are fitted to fewer batches where all would
            hold more.
        seconds: stop refitting after this time; layers that were not reached stay as they are.
        seed: for the choice of these places, and the order of the batches in a sweep.
        progress: show a progress bar, if the error stream is a terminal.
        process_group: of ``torch.distributed``, over which sums are taken; the default group when
            it is initialised. ``False``: this process calibrates on its own.

    Returns:
        A report of the errors at every layer; ``print`` it.

    Raises:
        InputError: an argument is wrong, a batch holds NaN or infinite values, ``small`` carries
            no plan, or a model does not run.
        PlanError: ``model`` is not the original of ``small``.
        ModelError: a model is wrapped, compiled or not finite.
        RankError: another process has failed, or has another model or other options.

    Example:
        >>> import torch, graphprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> small = graphprune.rebuild(net, 0.25)
        >>> report = graphprune.calibrate(small, net, [torch.randn(64, 4)])
        >>> report.changed
        ('2',)
    """
    ranks = Ranks(process_group)
    with ranks.together():
        plan = _check(small, model, method)
        _check_numbers(method, ridge, rows, sweeps, seed)
        _check_bounds(held_out, memory, seconds)
        asked = method, ridge, rows, sweeps, held_out, memory, seconds, seed
        agree(ranks, (asked, plan.to_json()), original=model, **{"small model": small})
        found = list(told_apart(model, batches(check_data(data), ranks)))
        for number, batch in enumerate(found):
            check_finite(batch, number)
            check_batched(batch, number, plan.inputs)
        if method == "batchnorm":
            return _renormed(small, model, found, progress and ranks.first, ranks)
        parts = [Batch.of(batch).to(device_of(small)) for batch in found]
        check_batches(parts)
        settings = Settings(
            weights=method == "repair",
            ridge=ridge,
            rows=rows,
            sweeps=sweeps,
            seed=seed,
            memory=memory,
            seconds=math.inf if seconds is None else seconds,
        )
        apart = set_apart(parts, held_out if method == "repair" else 0, ranks)
        return _repaired(small, model, kept_indices(plan), apart, settings, progress, ranks)


def _repaired(
    small: nn.Module,
    model: nn.Module,
    kept: Mapping[str, Mapping[int, Tensor]],
    apart: tuple[Sequence[Batch], Sequence[Batch], Sequence[int]],
    settings: Settings,
    progress: bool,
    ranks: Ranks,
) -> Calibration:
    fit, check, turns = apart
    checked = any(ranks.share(bool(check)))
    with torch.inference_mode(False), torch.no_grad(), at_rest(model), evaluated(small):
        judge = _Judge(small, model, check if checked else fit, ranks)
        judge.doubt = 0.0 if checked else judge.doubt
        first = _first(fit, device_of(small), ranks)
        smaller = Replay(small, fit, first=first)
        original = Replay(model, fit, smaller.reference, first)
        masks = masks_of(model, fit)
        folds = Folds(fit, turns, settings.seed, ranks)
        repair = Repair(original, smaller, kept, folds, masks, settings, ranks)
        try:
            with bar("calibration", len(repair.layers), progress and ranks.first) as tick:
                refits = repair.run(tick)
            smaller.settle()
            after = judge.error()
            while repair.steps and judge.worse(after):  # twice as many refits are taken back
                for _ in range(min(len(repair.steps), judge.failures)):
                    repair.undo()
                smaller.settle()
                after = judge.error()
            ranks.copy_from(0, [tensor for _, tensor in named_tensors(small)])
        except BaseException:
            judge.restore()
            raise
    if not repair.steps:
        judge.restore()
    for place in [n for n, refit in enumerate(refits) if not refit.note][len(repair.steps) :]:
        refits[place] = replace(refits[place], note=_UNDONE)
    method = "repair" if settings.weights else "bias"
    return Calibration(method, tuple(refits), judge.before, after)


def _first(fit: Sequence[Batch], device: torch.device, ranks: Ranks) -> Batch | None:
    """The first batch of the first rank that has one, from which all ranks name layers."""
    if ranks.size == 1:
        return None
    has = ranks.share(bool(fit)).index(True)
    given = fit[0].to(torch.device("cpu")) if ranks.rank == has else None
    found = ranks.share(given)[has]
    assert found is not None
    return found.to(device)


def _renormed(
    small: nn.Module, model: nn.Module, found: Sequence[object], progress: bool, ranks: Ranks
) -> Calibration:
    judge = _Judge(small, model, [Batch.of(batch) for batch in found], ranks)
    try:
        names = reestimate(small, tracked(found, "calibration", len(found), progress), ranks)
        after, note = judge.error(), ""
    except BaseException:
        judge.restore()
        raise
    if judge.worse(after):
        judge.restore()
        after, note = judge.before, _UNDONE
    ranks.copy_from(0, [tensor for _, tensor in named_tensors(small)])
    return Calibration("batchnorm", tuple(Refit(n, note=note) for n in names), judge.before, after)


class _Judge:
    """Tells whether the outputs of the small model became worse on some batches."""

    def __init__(
        self, small: nn.Module, model: nn.Module, batches: Sequence[Batch], ranks: Ranks
    ) -> None:
        self.small, self.model, self.batches, self.ranks = small, model, batches, ranks
        self.doubt = doubt(sum(ranks.share(sum(count(batch) or 1 for batch in batches))))
        self.masks = masks_of(model, batches)
        self.known = [(t, t.detach().clone()) for _, t in named_tensors(small)]
        self.before = self.error()
        self.failures = 0

    def error(self) -> float | None:
        """The distance between the outputs of the two models."""
        return distance(self.small, self.model, self.batches, self.masks, self.ranks)

    def worse(self, after: float | None) -> bool:
        """Whether this is more than it was."""
        most = None if self.before is None else self.before * (_WORSE + self.doubt)
        found = self.ranks.decided(most is not None and (after is None or after > most))
        self.failures = 2 * self.failures or 1 if found else 0
        return found

    def restore(self) -> None:
        """Give the small model the numbers that it had."""
        with torch.no_grad():
            for tensor, value in self.known:
                tensor.detach().copy_(value)
        recompute_masked(self.small)


def _check(small: nn.Module, model: nn.Module, method: str) -> Plan:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    plan = plan_of(small)
    if plan is None:
        raise InputError(
            f"small must be a model made by rebuild, which carries its plan; got "
            f"{type(small).__name__} without one (calibrate takes the small model first)"
        )
    check_model(small)
    check_model(model)
    plan.check(model)
    if any(len(vocabulary.kept) < vocabulary.size for vocabulary in plan.vocabularies):
        raise InputError(
            "the two models read different ids of tokens, and one batch cannot be given to both: "
            "let channels leave and calibrate first, then call trim_vocabulary, which changes "
            "nothing else"
        )
    return plan


def _check_numbers(method: str, ridge: Any, rows: Any, sweeps: Any, seed: Any) -> None:
    if ridge is not None and not (is_number(ridge) and 0 <= ridge < 1e6):
        raise InputError(f"ridge must be a number of at least 0, such as 1e-3; got {ridge!r}")
    if not is_int(rows) or rows < 1:
        raise InputError(f"rows must be a positive int, such as 100000; got {rows!r}")
    if not is_int(sweeps) or sweeps < 0:
        raise InputError(f"sweeps must be an int of at least 0, such as 1; got {sweeps!r}")
    if sweeps and method != "repair":
        raise InputError(
            f'sweeps={sweeps} goes with method="repair" alone; got method {method!r}: leave it out'
        )
    check_seed(seed)


def _check_bounds(held_out: Any, memory: Any, seconds: Any) -> None:
    if not is_number(held_out) or not 0 <= held_out <= 0.5:
        raise InputError(
            f"held_out must be a share of the items from 0 to 0.5, such as 0.1; got {held_out!r}"
        )
    if not is_number(memory) or not memory > 0:
        raise InputError(f"memory must be a positive number of bytes, such as 4e9; got {memory!r}")
    if seconds is not None and not (is_number(seconds) and seconds > 0):
        raise InputError(f"seconds must be a positive number, such as 300; got {seconds!r}")
