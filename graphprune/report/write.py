"""The report as one HTML file: rendered from templates, written whole or not at all."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import nn

from graphprune.api import GRAPHS, ChannelGraph, trace
from graphprune.arguments import as_path, is_number
from graphprune.errors import InputError
from graphprune.measurement import Measurement, count_text
from graphprune.plan.plan import Plan
from graphprune.report.charts import path_of
from graphprune.report.content import Content, Given, content_of
from graphprune.training.history import History
from graphprune.verification.report import Report


def report(plan: Plan, path: str | Path, *args: Any, **options: Any) -> Path:
    """What stands behind :meth:`graphprune.Plan.report`."""
    where = _checked(path)
    return write_whole(where, page(content_of(plan, given(plan, *args, **options))))


def given(
    plan: Plan,
    model: nn.Module | ChannelGraph | None = None,
    example_inputs: object = None,
    *,
    small: nn.Module | None = None,
    verification: Report | None = None,
    measured: tuple[Measurement, Measurement] | None = None,
    accuracy: object = None,
    history: History | None = None,
    command: str = "",
    title: str = "",
    notes: Sequence[str] = (),
) -> Given:
    """Check what is given beside a plan.

    Raises:
        InputError: something is of another type than is expected.
        PlanError: the plan belongs to another model.
    """
    for name, value, kind in (
        ("verification", verification, Report), ("history", history, History),
        ("small", small, nn.Module), ("command", command, str), ("title", title, str),
    ):  # fmt: skip
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{name} must be a {kind.__name__}, not {type(value).__name__}")
    if measured is not None and not _pair(measured, Measurement):
        raise InputError(
            "measured must be two measurements, (graphprune.measure(model), "
            f"graphprune.measure(small)); got {type(measured).__name__}"
        )
    return Given(
        _graph(plan, model, example_inputs),
        small,
        verification,
        measured,
        _accuracy(accuracy),
        history,
        command,
        title,
        _notes(notes),
    )


def _graph(plan: Plan, model: object, example_inputs: object) -> ChannelGraph | None:
    if model is None:
        return GRAPHS.get((plan.architecture, plan.inputs))
    if isinstance(model, ChannelGraph):
        plan.check(model.model)
        return model
    if not isinstance(model, nn.Module):
        raise InputError(
            "model must be the original model, or its graph that graphprune.trace returned; got "
            f"{type(model).__name__}"
        )
    plan.check(model)
    attention = str(plan.request.get("attention", "heads"))
    return trace(model, example_inputs, attention=attention)


def _accuracy(found: Any) -> dict[str, tuple[float, float]]:
    by_name = found if isinstance(found, Mapping) else {} if found is None else {"accuracy": found}
    for name, pair in by_name.items():
        numbers = isinstance(pair, tuple | list) and len(pair) == 2 and all(map(is_number, pair))
        if not isinstance(name, str) or not numbers:
            raise InputError(
                "accuracy must be two numbers, (before, after), or such pairs by name "
                f'({{"top-1": (0.76, 0.75)}}); got {pair!r}'
            )
    return {name: (float(pair[0]), float(pair[1])) for name, pair in by_name.items()}


def _notes(found: Any) -> tuple[str, ...]:
    several = isinstance(found, tuple | list) and all(isinstance(note, str) for note in found)
    if not several:
        raise InputError(f'notes must be texts, such as ("trained on ...",); got {found!r}')
    return tuple(found)


def _pair(found: object, kind: type) -> bool:
    return (
        isinstance(found, tuple | list)
        and len(found) == 2
        and all(isinstance(item, kind) for item in found)
    )


# --- the file ---------------------------------------------------------------------------------


def page(content: Content) -> str:
    """The whole file. All that is shown is escaped; a browser runs the one script that is ours."""
    environment = Environment(
        loader=PackageLoader("graphprune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count_text, "path": path_of,
        "tiny": lambda number: f"{number:.1e}" if number else "0",
    }  # fmt: skip
    script = _asset(environment, "report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        report=content,
        style=_asset(environment, "report.css"),
        script=script,
        script_hash=digest,
    )


def _asset(environment: Environment, name: str) -> str:
    """A file of ours, which is put in as it stands."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _checked(path: str | Path) -> Path:
    """A wrong place is told before anything long is done."""
    where = as_path(path)
    if where.is_dir():
        raise InputError(f"{str(path)!r} is a folder: name a file in it, such as report.html")
    if not where.parent.is_dir():
        raise InputError(f"no folder {str(where.parent)!r} to write {where.name!r} into: make it")
    return where


def write_whole(path: Path, text: str) -> Path:
    """Write a file beside the place and move it there, so that no half of it is ever seen.

    Raises:
        InputError: it cannot be written; what was there before is still there.
    """
    name = ""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", newline="", dir=path.parent, suffix=".part", delete=False
        ) as file:
            name = file.name
            file.write(text)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except OSError as error:
        if name:
            with contextlib.suppress(OSError):
                os.unlink(name)
        raise InputError(
            f"cannot write {str(path)!r}: {error.strerror or error}; name another file"
        ) from None
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
