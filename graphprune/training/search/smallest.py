"""The public function of this package, and the search behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.api import trace
from graphprune.errors import InputError
from graphprune.planning.make import counted_outputs
from graphprune.planning.naming import named
from graphprune.planning.options import Request
from graphprune.ranks import Ranks
from graphprune.record.agreement import agree
from graphprune.record.batches import check_data
from graphprune.record.checks import check_model
from graphprune.record.tensors import fingerprint, mark
from graphprune.text import bar, noted
from graphprune.training.search.checks import (
    check_arguments,
    check_call,
    check_examples,
    check_unit,
    further_of,
    least_of,
    quantity_of,
)
from graphprune.training.search.evaluating import right_or_wrong, span_of
from graphprune.training.search.outcome import Smallest
from graphprune.training.search.searching import Search
from graphprune.training.search.stored import Stored, digest


def smallest(
    model: nn.Module,
    evaluate: Callable[[nn.Module], object],
    data: Iterable[object] | None,
    max_drop: float,
    *,
    target: str | Mapping[str, float | str] = "macs",
    example_inputs: object = None,
    attention: str = "heads",
    outputs: object = None,
    evaluations: int = 8,
    sure: bool = True,
    confidence: float = 0.95,
    calibration: Mapping[str, Any] | bool = True,
    path: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> Smallest:
    """Find the smallest model whose evaluation drops by at most so much, without training.

    Every budget that is tried is planned (``criterion="auto"`` unless another one is named),
    rebuilt, calibrated on ``data``, and evaluated. The next one is where a curve through all drops
    meets ``max_drop``; drops are taken to grow as models get smaller.

    Where ``evaluate`` returns a number for every example, the two models are compared example by
    example, and the bound of the drop counts: with 95 % it is not larger over other examples of the
    kind. That holds for a model that was not chosen by the same examples; the search looks at a
    few models and takes one of them, so that figures to be published belong on examples that
    ``evaluate`` has never seen.

    Args:
        model: the trained model; it is not touched.
        evaluate: called with a model in eval mode, without gradients and with the same random
            numbers each time. Returns a number, larger for better models; or a number for every
            example (whether it was right, say), as a tensor or a list, always in the same order.
        data: batches without labels to choose and repair with; other examples than those of
            ``evaluate``. ``None``: channels are scored by weights alone, and nothing is calibrated.
        max_drop: in the unit of ``evaluate``, or of its mean: 0.01 for one point where it returns
            fractions or right and wrong, 1.0 where it returns percentages.
        target: what is made small, ``"macs"``, ``"params"``, ``"bytes"``, ``"memory"`` or
            ``"latency"``; or with how small is small enough, ``{"macs": 0.3}``, which is 0.2 of the
            original otherwise.
        example_inputs: as for :func:`trace`; inferred from the first layer when absent.
        attention: as for :func:`trace`.
        outputs: as for :func:`trace`.
        evaluations: how many small models are evaluated, at most.
        sure: the bound must not be above ``max_drop``; otherwise the drop itself.
        confidence: of the bound.
        calibration: further arguments of :func:`calibrate`; ``False`` leaves it out.
        path: a file that keeps what was found out. A later call with the same model, data and
            options goes on from there, for another ``max_drop`` or more ``evaluations`` as well. It
            holds plans and scores: the model is rebuilt and calibrated again, not evaluated.
        progress: show a progress bar, if the error stream is a terminal.
        options: as for ``graph.plan``, but for its ratio. Of several processes (``process_group``)
            each passes its own batches and evaluates its own examples, and all get the same model.

    Returns:
        The model, and the curve.

    Raises:
        InputError: an argument is wrong; an evaluation is not finite or of other examples; so few
            examples cannot show so small a drop; or no budget can be met.
        CheckpointError: the file is damaged or cannot be written.
        RankError: a rank has failed, or does not do as the others.

    Warns:
        PruningWarning: the evaluation of the original itself is not above ``max_drop``.

    Example:
        >>> import torch, graphprune
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
        >>> x, data = torch.randn(200, 4), [torch.randn(64, 4)]
        >>> y = net(x).argmax(1)
        >>> found = graphprune.smallest(net, lambda m: m(x).argmax(1) == y, data, 0.05)
        >>> found.chosen is None or found.chosen.most <= 0.05
        True
    """
    ranks = Ranks(options.get("process_group"))
    with ranks.together():
        check_model(model)
        check_arguments(evaluate, max_drop, evaluations, sure, confidence, options)
        batches = None if data is None else list(check_data(data))
        asked: dict[str, Any] = {"criterion": "auto", **named(options, model), "data": batches}
        quantity = quantity_of(target)
        request = Request.of(None, {**asked, "target": {quantity: 0.5}})
        further = further_of(calibration, batches)
        graph = trace(model, example_inputs, attention=attention, outputs=outputs)
        least = least_of(target, graph)
        settings = {
            "architecture": fingerprint(model),
            "weights": mark(model),
            "data": digest(ranks.share(digest(batches or []))),
            "target": quantity,
            "confidence": confidence,
            "calibration": further,
            "attention": attention,
            "inputs": str(graph.call),
            "outputs": counted_outputs(graph.analysis),
            "criterion": request.named,
            "options": {name: v for name, v in request.said().items() if name != "target"},
        }
        limits = max_drop, least, evaluations, sure
        agree(ranks, (settings["options"], quantity, confidence, further, limits), model=model)
        stored = Stored(path, settings, ranks)
        run = Search(model, graph, evaluate, quantity, asked, further, stored, ranks, confidence)
        base = run.start()
        check_unit(base, max_drop)
        if sure:
            check_examples(base, max_drop, confidence)
        note = f"evaluations that are finished are in {str(path)!r}; call again"
        shown = bar("budgets", evaluations, progress and ranks.first)
        with shown as tick, noted(None if path is None else note):
            run.run(*limits, tick)
        curve = tuple(sorted(run.curve, key=lambda tried: -tried.budget))
        good = [tried for tried in curve if tried.loss(sure) <= max_drop]
        chosen = min(good, key=lambda tried: (tried.reached, tried.budget), default=None)
        small = model if chosen is None else run.model_of(chosen)
    examples = len(base) if len(base) > 1 else None
    shares = right_or_wrong(base) and span_of(base) == 1
    told = float(base.mean()), chosen, curve, examples, confidence, shares
    return Smallest(small, quantity, max_drop, *told)


def rebuilt(
    model: nn.Module,
    amount: object,
    inplace: bool,
    max_drop: Any,
    evaluate: Any,
    options: Mapping[str, Any],
) -> nn.Module:
    """What stands behind ``graphprune.rebuild(model, max_drop=..., evaluate=...)``.

    Raises:
        InputError: something else was asked for as well, or no model is good enough.
    """
    check_call(amount, inplace, max_drop, evaluate)
    found = smallest(model, evaluate, max_drop=max_drop, **{"data": None, **options})
    if found.chosen is None:
        raise InputError(str(found))
    return found.model
