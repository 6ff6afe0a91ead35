"""A certificate, checked once more: are these the same models and files, and do they agree?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from graphprune.arguments import as_path
from graphprune.deploy.agreeing import Agreement, Comparison, tolerance_for
from graphprune.deploy.axes import find_axes
from graphprune.deploy.certificate import (
    DIFFERENT,
    MASKED,
    Certificate,
    Compared,
    identity,
    of_agreement,
    plan_digest,
    versions,
    with_masked,
)
from graphprune.deploy.engines import load_engine
from graphprune.deploy.exporting import Ready
from graphprune.deploy.files import digest_of
from graphprune.errors import GraphPruneError, InputError
from graphprune.plan.plan import plan_of
from graphprune.record.batches import at_rest

_WIDE = 1000  # tolerances beyond so many times the usual one are no comparison


@dataclass(frozen=True)
class Repeated:
    """What a certificate says, and what is found now; ``print`` it.

    Attributes:
        compared: what was compared again.
        differences: what is not as the certificate says; empty when all is.
        notes: what else changed, such as versions.
    """

    compared: tuple[Compared, ...]
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Line by line."""
        lines = [one.told_in_a_line() for one in self.compared]
        return "\n".join([*lines, *self.notes, *(f"differs: {text}" for text in self.differences)])


def repeat(
    path: str | Path,
    small: nn.Module,
    original: nn.Module | None = None,
    example_inputs: object = None,
) -> Repeated:
    """Check what a certificate says: the same weights, plan and files, and the same verdicts.

    Args:
        path: the certificate; its files lie beside it.
        small: the model that the file was made from.
        original: the model that the small one was made from; without it, it is not compared.
        example_inputs: as for :func:`graphprune.deploy.export`.

    Returns:
        What was compared again, and what differs.

    Raises:
        CheckpointError: the certificate is damaged.

    Example:
        >>> import tempfile, torch, graphprune
        >>> from graphprune.deploy import export, repeat
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> small, x = graphprune.rebuild(net, 0.5), torch.randn(1, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = export(small, f"{folder}/small.pt2", x)
        ...     before = repeat(made.certificate, small, example_inputs=x).differences
        ...     _ = torch.nn.init.zeros_(small[0].bias)
        ...     after = repeat(made.certificate, small, example_inputs=x).differences
        >>> print(before, after[0])
        () the weights of the small model are others
    """
    path = as_path(path)
    known = Certificate.read(path)
    compared = [*_compared(known, path.parent, small, original, example_inputs)]
    differences = [*_identities(known, path.parent, small, original), *_unsaid(known, small)]
    before = {one.what: one for one in known.compared}
    for one in compared:
        if one.verdict != before[one.what].verdict:
            differences.append(
                f"{one.what}: {before[one.what].verdict} then, {one.verdict} now ({one.told})"
            )
    notes = [
        f"{name} {known.versions[name]} then, {now} now"
        for name, now in versions().items()
        if known.versions.get(name) not in (None, now)
    ]
    notes += [
        f"{one.what}: {before[one.what].engine} then, {one.engine} now"
        for one in compared
        if one.engine != before[one.what].engine
    ]
    left = [what for what in before if what not in {one.what for one in compared}]
    notes += [f"{what}: not compared again, as it is not at hand" for what in left]
    return Repeated(tuple(compared), tuple(differences), tuple(notes))


def _unsaid(known: Certificate, small: nn.Module) -> Iterator[str]:
    """What a certificate must say to be worth anything: it may have been cut short."""
    if not known.compared:
        yield "the certificate holds no comparison"
    usual = tolerance_for(small)
    for one in known.compared:
        if one.what == MASKED and known.original is None:
            yield "the certificate does not say which original was compared"
        if one.what != MASKED and one.what not in known.files:
            yield f"the certificate has no digest of {one.what}"
        if one.tolerance is not None and not 0 <= one.tolerance <= _WIDE * usual:
            yield f"{one.what} was compared within {one.tolerance:.0e}, which proves nothing"


def _identities(
    known: Certificate, folder: Path, small: nn.Module, original: nn.Module | None
) -> Iterator[str]:
    for name, model, then in (
        ("original", original, known.original),
        ("small model", small, known.small),
    ):
        if model is None or then is None:
            continue
        now = identity(model)
        if now["architecture"] != then["architecture"]:
            yield f"the {name} has other layers or widths ({then['class']} then)"
        elif now["weights"] != then["weights"]:
            yield f"the weights of the {name} are others"
    plan = plan_of(small)
    if known.plan != (None if plan is None else plan_digest(plan)):
        yield "the plan of the small model is another one"
    for name, then in known.files.items():
        file = folder / name
        if not file.is_file():
            yield f"{name} is not beside the certificate"
        elif digest_of(file) != then["sha256"]:
            yield f"the content of {name} is another one"


def _compared(
    known: Certificate,
    folder: Path,
    small: nn.Module,
    original: nn.Module | None,
    example_inputs: object,
) -> Iterator[Compared]:
    for then in known.compared:
        if then.what == MASKED:
            if original is not None:
                yield with_masked(original, small, example_inputs, known.seed)
        elif (folder / then.what).is_file():
            try:
                found = _in_engine(known, folder, small, example_inputs, then)
                yield of_agreement(then.what, found)
            except GraphPruneError as error:
                yield Compared(then.what, then.engine, then.tolerance, DIFFERENT, None, str(error))


def _in_engine(
    known: Certificate,
    folder: Path,
    small: nn.Module,
    example_inputs: object,
    then: Compared,
) -> Agreement:
    ran = known.ran
    if ran is None:
        raise InputError("the certificate does not say how the file is run")
    with at_rest(small):
        ready = Ready(small, example_inputs, None)
        ready.inputs = list(ran.inputs)
        ready.flat.chosen = ran.chosen
        axes = find_axes(ran.sizes or None, ran.inputs, ready.tensors)
        name = "openvino" if then.engine.startswith("OpenVINO") else "onnxruntime"
        engine = load_engine(folder / ran.file, engine=name)
        comparison = Comparison(ready.flat, ran.outputs, engine, then.tolerance, known.seed)
        return comparison.all(ready.tensors, axes)
