"""A file in its engine beside the model it was made from: the same outputs?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from graphprune.deploy.axes import Axis, other_sizes, redrawn, resized
from graphprune.deploy.engines import Engine
from graphprune.deploy.flat import Flat, on_cpu
from graphprune.errors import ExportError, VerificationError
from graphprune.record.batches import describe
from graphprune.record.inputs import Call
from graphprune.record.random_numbers import same_numbers
from graphprune.verification.comparing import depends, finite
from graphprune.verification.models import Check, difference
from graphprune.verification.report import TOLERANCES
from graphprune.verification.setting import Precision, copied

EXAMPLE, OTHER_VALUES = "example inputs", "other values"
_ROUNDING = 8  # how many times the error of float32 itself an engine's error may be


@dataclass(frozen=True)
class Agreement:
    """How the outputs of an engine compare with those of the model.

    ``reason`` says why equal outputs are no proof; it is empty when they are one.
    """

    engine: str
    checks: tuple[Check, ...]
    tolerance: float
    reason: str = ""

    @property
    def verdict(self) -> str:
        """``"equal"`` or ``"not decided"``; what differs raises ``VerificationError``."""
        return "not decided" if self.reason else "equal"

    @property
    def difference(self) -> float:
        """The largest relative difference found."""
        return max((check.difference for check in self.checks), default=0.0)


class Comparison:
    """A model and an engine on the same inputs."""

    def __init__(
        self, flat: Flat, names: Sequence[str], engine: Engine, tolerance: float | None, seed: int
    ) -> None:
        self.flat, self.names, self.engine, self.seed = flat, names, engine, seed
        self.tolerance = tolerance_for(flat) if tolerance is None else tolerance
        self.seen: list[tuple[Sequence[Tensor], list[Tensor]]] = []
        self.exact: nn.Module | None = None

    def all(self, tensors: Sequence[Tensor], axes: Sequence[Axis]) -> Agreement:
        """Compare on the example inputs, on other values, and at another size of every axis.

        Raises:
            VerificationError: the engine computes something else, or fails.
        """
        trials = [(EXAMPLE, tensors), (OTHER_VALUES, redrawn(tensors, self.seed))]
        checks = [check for name, inputs in trials for check in self.compare(name, inputs)]
        for axis in axes:
            checks += self.at_another_size(tensors, axis)
        reason = ""
        if not any(check.decided for check in checks):
            reason = checks[0].note
        elif not any(finite(outputs) for _, outputs in self.seen):
            reason = "no output is finite"
        elif False in (depend := [depends(Call((*i,)), o) for i, o in self.seen]) and (
            True not in depend
        ):
            reason = "the outputs are the same for all inputs, whatever the layers before do"
        return Agreement(self.engine.name, tuple(checks), self.tolerance, reason)

    def at_another_size(self, tensors: Sequence[Tensor], axis: Axis) -> list[Check]:
        """Compare at the first other size that the model takes."""
        for size in other_sizes(axis.size):
            inputs = resized(tensors, axis, size)
            for given in (redrawn(inputs, self.seed), inputs):
                try:
                    self.reference(given)
                except Exception:  # whatever the user's code raises: it takes no such input
                    continue
                return [*self.compare(f"{axis.name} {size}", given)]
        note = f"the model itself takes no other {axis.name} than {axis.size}"
        return [Check(f"output, other {axis.name}", "", 0.0, note, decided=False)]

    def compare(self, name: str, inputs: Sequence[Tensor]) -> Iterator[Check]:
        """Compare once; every output that differs is looked at twice.

        Raises:
            VerificationError: the engine computes something else, or fails.
        """
        shown = ", ".join(map(describe, inputs))
        wanted = self.reference(inputs)
        if not finite(wanted):
            note = "no output is finite on these inputs"
            yield Check(f"output, {name}", shown, 0.0, note, decided=False)
            return
        try:
            found = self.engine.run(inputs)
        except ExportError as error:
            raise VerificationError(
                f"{self.engine.name} fails on {name} ({shown}), where the model runs: {error}"
            ) from error
        if len(found) != len(wanted):
            raise VerificationError(
                f"{self.engine.name} returns {len(found)} outputs, the model {len(wanted)}"
            )
        self.seen.append((inputs, wanted))
        gaps = [difference(w, f.to(w.dtype)) for w, f in zip(wanted, found)]
        worst = max(range(len(gaps)), key=lambda place: gaps[place])
        check = Check(f"output, {name}", shown, gaps[worst])
        if gaps[worst] > self.tolerance:
            check = self.second_look(check, inputs, wanted, found, worst)
        yield check

    def second_look(
        self,
        check: Check,
        inputs: Sequence[Tensor],
        wanted: list[Tensor],
        found: list[Tensor],
        worst: int,
    ) -> Check:
        """Whether a difference is the model's own: random numbers, or rounding.

        Raises:
            VerificationError: it is not.
        """
        again = self.reference(inputs, self.seed + 1)
        if any(difference(w, a) > self.tolerance for w, a in zip(wanted, again)):
            note = "the model draws random numbers, which engines draw otherwise"
            return replace(check, difference=0.0, note=note, decided=False)
        bound = self.tolerance
        if precise := self.in_double(inputs):
            errors = [difference(p, w.to(p.dtype)) for p, w in zip(precise, wanted)]
            theirs = [difference(p, f.to(p.dtype)) for p, f in zip(precise, found)]
            bound = max(bound, _ROUNDING * max(errors))
            if max(theirs) <= bound < 1e-2:
                note = f"within {bound:.0e}, {_ROUNDING} times what rounding does to the model"
                return replace(check, note=note)
        shapes = ""
        if found[worst].shape != wanted[worst].shape:
            shapes = f": shape {list(found[worst].shape)} instead of {list(wanted[worst].shape)}"
        raise VerificationError(
            f"{self.engine.name} computes something else than the model on {check.name}: output "
            f"{self.names[worst]!r} differs by {check.difference:.1e} of its size (bound "
            f"{bound:.0e}){shapes}"
        )

    def reference(self, inputs: Sequence[Tensor], seed: int | None = None) -> list[Tensor]:
        """The outputs of the model."""
        return outputs_of(self.flat, inputs, self.seed if seed is None else seed)

    def in_double(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs in float64; none where the model does not run so."""
        kinds = (torch.float32, torch.float16, torch.bfloat16)
        try:
            if self.exact is None:
                self.exact = copied(self.flat, torch.float64)
            raised = [t.double() if t.dtype in kinds else t for t in inputs]
            with Precision(torch.float64):
                return outputs_of(self.exact, raised, self.seed)
        except Exception:  # whatever the user's code raises
            return []


def outputs_of(flat: nn.Module, inputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The outputs of a model in PyTorch."""
    with torch.no_grad(), same_numbers(seed):
        return on_cpu(flat(*(tensor.clone() for tensor in inputs)))


def tolerance_for(flat: nn.Module) -> float:
    """The largest relative difference that is none, by the precision of the model."""
    kinds = {t.dtype for t in (*flat.parameters(), *flat.buffers()) if t.is_floating_point()}
    found = [TOLERANCES[kind] for kind in kinds if kind in TOLERANCES]
    return max([TOLERANCES[torch.float32], *found])
