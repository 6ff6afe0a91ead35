"""Compare a small model with the masked original: outputs, gradients, running statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from graphprune.arguments import check_seed, check_tolerance
from graphprune.errors import InputError, ModelError, warn
from graphprune.plan.plan import Plan, plan_of
from graphprune.record.checks import check_model
from graphprune.record.inputs import Call, called
from graphprune.record.masked_names import masked_names
from graphprune.record.recording import inferred, record
from graphprune.text import render, shorten
from graphprune.verification.comparing import Session, first_line
from graphprune.verification.models import Check, DoesNotRun

EQUAL, NOT_DECIDED = "equal", "not decided"
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


@dataclass(frozen=True)
class Report:
    """All comparisons of one verification; no difference is larger than the tolerance allows.

    ``verdict`` says whether they prove something: it is ``"equal"``, or ``"not decided"`` for the
    ``reason`` given. (Models that differ raise ``VerificationError``.)
    """

    checks: tuple[Check, ...]
    tolerance: float
    exact: bool
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """``"equal"`` or ``"not decided"``."""
        return NOT_DECIDED if self.reason else EQUAL

    @property
    def difference(self) -> float:
        """The largest relative difference found."""
        return max((check.difference for check in self.checks), default=0.0)

    def __str__(self) -> str:
        """A table of the comparisons."""
        rows = [
            (c.name, c.inputs, f"{c.difference:.1e}" if c.decided else "-") for c in self.checks
        ]
        kind = "exact" if self.exact else "statistics over the kept channels"
        title = f"small model equals the masked original ({kind}), tolerance {self.tolerance:.0e}"
        if self.reason:
            title = f"not decided whether the small model equals the masked original: {self.reason}"
        noted = [f"{check.name}: {check.note}" for check in self.checks if check.note]
        noted = list(dict.fromkeys((*self.notes, *noted)))
        table = render(title, ("what", "inputs", "largest relative difference"), rows)
        return "\n".join([table, *noted])


def verify(
    model: nn.Module,
    small_or_plan: nn.Module | Plan,
    example_inputs: object = None,
    *,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    seed: int = 0,
) -> Report:
    """Prove that a small model equals the masked original.

    Compared are the outputs in eval mode on the values of the example inputs, and on random ones at
    another batch size and, where the model allows one, at another resolution; in float64 also, in
    eval and in train mode (dropout off), the gradient of every kept weight, and the buffers after a
    step in train mode. (In lower precision gradients through ReLU and batch statistics differ by
    more than rounding even between two runs of the same model.)

    Where the models differ it looks twice: random numbers in shapes that shrink are drawn as in the
    original; a difference no larger than what rounding does to the masked model itself is none.
    What cannot be decided is said in the report, beside what was; where nothing was, the verdict
    is ``"not decided"``, and a ``PruningWarning`` says so. A model that does not run in
    float64 is compared in float32, which the report says.

    A plan :meth:`Plan.from_masks` is compared with the masked model that holds the same constants
    in its biases and, in eval mode, with the model as it is given.

    Args:
        model: the original.
        small_or_plan: what :func:`rebuild` returned, or a plan.
        example_inputs: as for :func:`trace`; inferred when absent.
        dtype: the precision to compare in: float64, float32, float16 or bfloat16 of torch.
        tolerance: the largest relative difference allowed; 1e-10 in float64, 1e-5 in float32.
        seed: for the random inputs.

    Returns:
        A report, whose ``verdict`` is ``"equal"`` or ``"not decided"``; ``print`` it.

    Raises:
        VerificationError: the models differ; names the first module that does.
        ModelError: the original does not run on the example inputs.
        InputError: ``small_or_plan`` is neither a plan nor a model that carries one, or ``dtype``
            or ``tolerance`` is wrong.
        PlanError: the plan does not belong to ``model``.

    Example:
        >>> import torch, graphprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graphprune.verify(net, graphprune.rebuild(net, 0.5)).difference < 1e-10
        True
    """
    check_model(model)
    plan = small_or_plan if isinstance(small_or_plan, Plan) else plan_of(small_or_plan)
    if plan is None:
        raise InputError(
            f"expected a Plan or a model made by rebuild, got {type(small_or_plan).__name__} "
            "without a graphprune_plan"
        )
    if isinstance(small_or_plan, nn.Module):
        check_model(small_or_plan)
        others = sorted(masked_names(model) ^ masked_names(small_or_plan))
        if others:
            raise InputError(
                f"{shorten(others)} has a mask of torch.nn.utils.prune in one of the models alone: "
                "verify before masks are put on or removed"
            )
    plan.check(model)
    if dtype not in TOLERANCES:
        names = ", ".join(map(str, TOLERANCES))
        raise InputError(f"dtype must be one of {names}; got {dtype!r}")
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    check_tolerance(tolerance)
    check_seed(seed)
    call = _call(model, example_inputs)
    if plan.scales and not plan.exact:
        reason = "it follows a renormalising plan by an exact one: verify them one by one"
        return _warned(Report((), tolerance, plan.exact, reason))
    pair = model, small_or_plan, plan
    try:
        return _warned(_report(Session(*pair, dtype, tolerance, seed), call))
    except DoesNotRun as error:
        if dtype is not torch.float64:
            raise _refused(call, dtype, error) from error
        refused = error
    low = torch.float32
    tolerance = max(tolerance, TOLERANCES[low])
    try:
        report = _report(Session(*pair, low, tolerance, seed), call)
    except DoesNotRun as error:
        raise _refused(call, dtype, refused) from error
    note = f"compared in float32, within {tolerance:.0e}: in float64 the original does not run"
    return _warned(replace(report, notes=(f"{note} ({first_line(refused)})", *report.notes)))


def _call(model: nn.Module, example_inputs: object) -> Call:
    if example_inputs is None:
        return inferred(model)[0]
    if isinstance(example_inputs, list):  # of arguments, or the one argument
        return called(example_inputs, lambda call: record(model, call, False))[0]
    return Call.of(example_inputs)


def _report(session: Session, call: Call) -> Report:
    """All comparisons in one precision."""
    checks = [*session.all(call)]
    request = session.plan.request
    if request.get("masks") and request["fold"] != "approximate" and "after" not in request:
        checks += session.as_given()
    outputs = [check for check in checks if check.name.startswith("output")]
    reason = session.constant()
    if not any(check.decided for check in outputs):
        reason = outputs[0].note if outputs else "nothing was compared"
    told = "inputs held ids that left: others stood in their place"
    notes = (told,) if session.ids.replaced else ()
    return Report(tuple(checks), session.tolerance, session.plan.exact, reason, notes)


def _refused(call: Call, dtype: torch.dtype, error: DoesNotRun) -> ModelError:
    return ModelError(
        f"the original does not run on {call} in {dtype} ({error}): pass another dtype=, or "
        "example_inputs="
    )


def _warned(report: Report) -> Report:
    if report.reason:
        warn(f"verify could not decide whether the small model is right: {report.reason}")
    return report
