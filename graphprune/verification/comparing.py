"""Compare a small model with its masked original, run by run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import ModelError
from graphprune.record.inputs import Call
from graphprune.verification.follow import Undecided
from graphprune.verification.looks import fail, second_look, summed
from graphprune.verification.models import Check, DoesNotRun, Models, Trial, difference
from graphprune.verification.reference import as_given
from graphprune.verification.trials import (
    EXAMPLE,
    OTHER_BATCH,
    OTHER_SIDE,
    OTHER_VALUES,
    alike,
    given,
    others,
)

__all__ = ["EXAMPLE", "Check", "Session", "difference"]


class Session(Models):
    """Both models in one precision, without dropout, and how they compare."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[tuple[Trial, list[Tensor]]] = []  # outputs of the masked model
        self.stepped = False  # whether gradients were compared in eval mode

    def unchanged(self, call: Call) -> tuple[str, Call]:
        """Random inputs of the shapes of the example inputs."""
        return EXAMPLE, alike(self, call)[0]

    def outputs(self, name: str, call: Call, training: bool) -> Check:
        """Compare outputs without gradients.

        Raises:
            VerificationError: they differ.
            ModelError: the original does not run.
        """
        try:
            return self.compare(Trial(name, call, training))[0]
        except DoesNotRun as error:
            text = f"the original does not run on {call} in {self.dtype} ({error})"
            raise ModelError(f"{text}: pass another dtype=, or example_inputs=") from error

    def compare(self, trial: Trial) -> list[Check]:
        """Compare what a run of each model leaves: outputs, gradients, buffers.

        Raises:
            VerificationError: they differ.
            DoesNotRun: the original does not run, or has no gradient there.
        """
        try:
            wanted = self.reference(trial)
            if wanted.outputs and not finite(wanted.outputs):
                raise Undecided("no output is finite on these inputs")
            found, error = self.shrunk(trial)
            pairs = self.equal(trial, wanted, found)
            if pairs is None and self.forget():
                wanted = self.reference(trial)
                pairs = self.equal(trial, wanted, found)
            if not trial.training:
                self.seen.append((trial, [tensor.detach() for tensor in wanted.outputs]))
            if pairs is not None:
                return summed(trial, pairs)
            return second_look(self, trial, wanted, found, error)
        except Undecided as reason:
            return [
                Check(f"output, {trial.name}", str(trial.call), 0.0, str(reason), decided=False)
            ]

    def as_given(self) -> Iterator[Check]:
        """Compare with the original itself, whose constants a plan from masks has moved."""
        original = as_given(self.original, self.plan)
        for trial in [trial for trial, _ in self.seen]:
            trial = replace(trial, name=f"the model as given, {trial.name}", backward=False)
            wanted, found = self.run(original, trial), self.run(self.small, trial)
            pairs = self.pairs(trial, wanted, found)
            if pairs is None or not all(pair.gap <= self.tolerance for pair in pairs):
                worst = "other shapes" if pairs is None else f"{max(p.gap for p in pairs):.1e}"
                fail(self, trial, f"relative difference {worst}")
            yield replace(summed(trial, pairs)[0], name=trial.name)

    def all(self, call: Call) -> Iterator[Check]:
        """Compare on the given inputs, at other sizes, with gradients, and in train mode.

        Raises:
            VerificationError: the models differ.
            DoesNotRun: the original does not take the given inputs in this precision.
        """
        taken: dict[str, Call] = {}
        for name, calls in self._tries(call):
            if name == OTHER_VALUES and OTHER_BATCH in taken:
                continue
            refused = DoesNotRun("")
            for inputs in calls:
                try:
                    yield from self._untrained(name, inputs)
                except DoesNotRun as error:
                    refused = error
                else:
                    taken[name] = inputs
                    break
            if EXAMPLE not in taken:
                raise refused
        if self.dtype == torch.float64:
            random = OTHER_BATCH if OTHER_BATCH in taken else OTHER_VALUES
            order = [name for name in (random, EXAMPLE, OTHER_SIDE) if name in taken]
            for training in (False, True):
                if training or not self.stepped:
                    yield from self._step([(name, taken[name]) for name in order], training)

    def _untrained(self, name: str, inputs: Call) -> list[Check]:
        """Compare in eval mode; on random inputs with gradients, where the original has any."""
        if self.dtype == torch.float64 and name in (OTHER_BATCH, OTHER_VALUES):
            try:
                found = self.compare(Trial(f"eval mode, {name}", inputs, backward=True))
            except DoesNotRun:
                pass
            else:
                self.stepped = True
                return found
        return self.compare(Trial(name, inputs))

    def _tries(self, call: Call) -> Iterator[tuple[str, list[Call]]]:
        """Kinds of inputs, each with inputs to try until the original takes some."""
        if not any(tensor.is_meta for tensor in call.tensors()):
            yield EXAMPLE, [given(self, call)]
            yield from others(self, call)
            yield OTHER_VALUES, alike(self, call)
        else:
            yield EXAMPLE, alike(self, call)
            yield from others(self, call)

    def _step(self, inputs: list[tuple[str, Call]], training: bool) -> Iterator[Check]:
        """Gradients, on the first inputs on which the original trains."""
        mode = "train mode" if training else "eval mode"
        reason = DoesNotRun("")
        for name, call in inputs:
            try:
                yield from self.compare(Trial(f"{mode}, {name}", call, training, backward=True))
                return
            except DoesNotRun as error:
                reason = error
        text = f"{mode}: the original does not train ({first_line(reason)})"
        yield Check(text, "", 0.0, decided=False)

    def constant(self) -> str:
        """Why equal outputs are no proof; empty when they are one."""
        depend = [depends(trial.call, outputs) for trial, outputs in self.seen]
        if self.seen and not any(finite(outputs) for _, outputs in self.seen):
            return "no output is finite"
        if depend and False in depend and True not in depend:
            return "the outputs are the same for all inputs, whatever the layers before do"
        return ""


def depends(call: Call, outputs: list[Tensor]) -> bool | None:
    """Whether outputs differ along the batch; ``None`` when the inputs do not or it is not told."""
    inputs = call.tensors()
    sizes = {tensor.shape[0] for tensor in inputs if tensor.dim()}
    rows = next(iter(sizes)) if len(sizes) == 1 else 0
    if rows < 2 or not any(_varies(tensor) for tensor in inputs):
        return None
    found = [t for t in outputs if t.is_floating_point() and t.dim() and t.shape[0] == rows]
    found = [t for t in found if t.numel()]
    return any(map(_varies, found)) if found else None


def _varies(tensor: Tensor) -> bool:
    """Whether the rows of a tensor differ by more than rounding."""
    tensor = tensor.to_dense()
    if not tensor.is_floating_point():
        return bool((tensor != tensor[:1]).any())
    gap = (tensor - tensor[:1]).abs()
    step = 64 * torch.finfo(tensor.dtype).eps
    return bool((gap > step * tensor.abs().nan_to_num(0.0, 0.0, 0.0).max()).any())


def finite(outputs: list[Tensor]) -> bool:
    """Whether any output is a finite number, or a whole one."""
    return not outputs or any(bool(tensor.isfinite().any()) for tensor in outputs)


def first_line(error: object) -> str:
    """The first line of an error."""
    return (str(error).splitlines() or [""])[0]
