"""What a report says, as plain data: gathered from a plan and from what is given beside it."""

from __future__ import annotations

import base64
import linecache
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from torch import nn

from graphprune.api import ChannelGraph, rebuild
from graphprune.channels.analysis import Group
from graphprune.measurement import Measurement, bytes_text, count_text, latency_text
from graphprune.plan.plan import GroupPlan, Plan, runs
from graphprune.plan.vocabulary import for_small
from graphprune.record.recording import record
from graphprune.report.charts import Chart, charts_of
from graphprune.report.layers import Layer, layers_of
from graphprune.report.picture import Picture, picture_of
from graphprune.report.repeat import PLAN_CALL, call_of
from graphprune.text import share
from graphprune.training.history import History
from graphprune.verification.report import Report
from graphprune.version import __version__

_LARGEST = 2_000_000  # characters of a plan that is put into the file
_FEW = 0.01  # of the weights are zero in any model, such as biases that start there


@dataclass(frozen=True)
class Figure:
    """A number before and after.

    Attributes:
        name: what it is.
        headline: the change, large.
        before: for people, with its unit.
        after: for people, with its unit.
        fraction: after / before, for a bar; ``None`` where a bar would say nothing.
        note: what else there is to say.
    """

    name: str
    headline: str
    before: str
    after: str
    fraction: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Stays:
    """A group whose channels must stay."""

    name: str
    size: int
    layers: tuple[str, ...]
    reason: str
    module: str
    line: str
    code: str


@dataclass(frozen=True)
class Leaves:
    """A part that left."""

    name: str
    kind: str
    params: int
    macs: int
    detail: str = ""


@dataclass(frozen=True)
class Given:
    """What is given beside a plan; see :meth:`graphprune.Plan.report`."""

    graph: ChannelGraph | None = None
    small: nn.Module | None = None
    verification: Report | None = None
    measured: tuple[Measurement, Measurement] | None = None
    accuracy: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    history: History | None = None
    command: str = ""
    title: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Content:
    """Everything that a report shows."""

    title: str
    model: str
    inputs: str
    figures: tuple[Figure, ...]
    verification: Report | None
    layers: tuple[Layer, ...]
    picture: Picture | None
    groups: tuple[GroupPlan, ...]
    stays: tuple[Stays, ...] | None
    leaves: tuple[Leaves, ...]
    notes: tuple[str, ...]
    charts: tuple[Chart, ...]
    history: History | None
    call: str
    plan_call: str
    command: str
    plan_link: str
    versions: tuple[tuple[str, str], ...]
    date: str

    @property
    def most(self) -> int:
        """The multiply-accumulates of the largest layer, for bars."""
        return max((layer.macs[0] for layer in self.layers), default=0) or 1


def content_of(plan: Plan, given: Given) -> Content:
    """Gather what a report shows."""
    graph = given.graph
    small = given.small
    if graph is not None and small is None:
        small = rebuild(graph.model, plan)
    model = type(graph.model).__name__ if graph is not None else ""
    return Content(
        given.title or model or "A plan",
        model,
        plan.inputs,
        tuple(_figures(plan, given, small)),
        given.verification,
        () if graph is None or small is None else tuple(_layers(plan, graph, small)),
        None if graph is None else _picture(plan, graph),
        plan.groups,
        None if graph is None else tuple(map(_stays, graph.frozen)),
        tuple(_leaves(plan)),
        (*given.notes, *plan.notes),
        () if given.history is None else tuple(charts_of(given.history.entries)),
        given.history if given.history is not None and given.history.entries else None,
        call_of(plan),
        PLAN_CALL,
        given.command,
        _link(plan),
        (
            ("graphprune", __version__),
            ("torch", str(torch.__version__)),
            ("Python", platform.python_version()),
            ("system", f"{platform.system()} {platform.machine()}"),
        ),
        datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


# --- numbers ----------------------------------------------------------------------------------


def _figures(plan: Plan, given: Given, small: nn.Module | None) -> list[Figure]:
    before, after = plan.before, plan.after
    found = [
        _ratio("parameters", before.params, after.params, count_text),
        _ratio("MACs", before.macs, after.macs, count_text),
        _ratio("size of the weights", before.bytes, after.bytes, bytes_text),
    ]
    if given.measured is not None:
        first, last = given.measured
        found.append(
            _ratio("peak of activations", first.activation_bytes, last.activation_bytes, bytes_text)
        )
        if first.latency is not None and last.latency is not None:
            found.append(
                Figure(
                    f"latency on {last.device}",
                    share(last.latency, first.latency),
                    latency_text(first.latency, None),
                    latency_text(last.latency, None),
                    last.latency / first.latency if first.latency else None,
                    _spread(first, last),
                )
            )
    found += [_accuracy(name, *pair) for name, pair in given.accuracy.items()]
    if given.graph is not None and small is not None:
        zeros = _zeros(given.graph.model), _zeros(small)
        if max(zeros) >= _FEW:
            first_share, last_share = (f"{100 * number:.1f} %" for number in zeros)
            note = "of all parameters; a dense model computes with them all the same"
            name = "weights that are zero"
            found.append(Figure(name, last_share, first_share, last_share, note=note))
    return found


def _spread(first: Measurement, last: Measurement) -> str:
    spreads = (latency_text(m.spread, None) for m in (first, last) if m.spread is not None)
    text = " and ".join(spreads)
    told = f"medians of one forward pass on {last.inputs}"
    return told + (f"; interquartile ranges {text}" if text else "")


def _ratio(name: str, before: int, after: int, text: object) -> Figure:
    assert callable(text)
    exact = f"{before:,} \N{RIGHTWARDS ARROW} {after:,}"
    fraction = after / before if before else None
    return Figure(name, share(after, before), text(before), text(after), fraction, exact)


def _accuracy(name: str, before: float, after: float) -> Figure:
    if min(before, after) >= 0 and max(before, after) <= 1:
        change = f"{100 * (after - before):+.1f} points".replace("-", "\N{MINUS SIGN}")
        first, last = (f"{100 * number:.1f} %" for number in (before, after))
        return Figure(name, last, first, last, note=change)
    change = f"{after - before:+.4g}".replace("-", "\N{MINUS SIGN}")
    return Figure(name, f"{after:.4g}", f"{before:.4g}", f"{after:.4g}", None, change)


def _zeros(model: nn.Module) -> float:
    """The share of the parameters that is zero."""
    tensors = [p for p in model.parameters() if not p.is_meta]
    total = sum(tensor.numel() for tensor in tensors)
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors)
    return zeros / total if total else 0.0


# --- what the graph knows ---------------------------------------------------------------------


def _layers(plan: Plan, graph: ChannelGraph, small: nn.Module) -> list[Layer]:
    call = for_small(graph.call, small, plan.vocabularies)
    after = record(small, call, training=False)
    return layers_of(graph.model, graph.analysis.records[0], small, after, plan)


def _picture(plan: Plan, graph: ChannelGraph) -> Picture:
    parts = [part.modules for part in graph.finder.single_blocks]
    parts += [mixture.modules for mixture in graph.experts]
    return picture_of(graph.analysis, plan.groups, parts, [part.name for part in plan.parts])


def _stays(group: Group) -> Stays:
    reason = group.reason
    assert reason is not None
    line, code = _source(reason.line or "")
    return Stays(group.name, group.size, group.layers, str(reason.text), reason.module, line, code)


def _source(line: str) -> tuple[str, str]:
    """A place in the source, short, and what stands there."""
    file, _, number = line.rpartition(":")
    if not file or not number.isdigit():
        return line, ""
    code = linecache.getline(file, int(number)).strip()
    packages = f"site-packages{os.sep}"
    if packages in file:
        return f"{file.rpartition(packages)[2]}:{number}", code
    here = str(Path.cwd()) + os.sep
    return f"{file.removeprefix(here)}:{number}", code


def _leaves(plan: Plan) -> list[Leaves]:
    found = [Leaves(p.name, p.kind, p.params, p.macs) for p in plan.parts]
    for change in plan.experts:
        if change.gone:
            text = f"experts {runs(change.gone)} of {change.size}"
            found.append(Leaves(change.mixture or "the model", "experts", 0, 0, text))
    for vocabulary in plan.vocabularies:
        found.append(Leaves("vocabulary", "ids", 0, 0, str(vocabulary)))
    return found


def _link(plan: Plan) -> str:
    """The plan itself, as an address that a browser saves."""
    text = plan.to_json()
    if len(text) > _LARGEST:
        return ""
    return "data:application/json;base64," + base64.b64encode(text.encode()).decode()


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command that is running, to be typed once more."""
    import shlex

    given = sys.argv if arguments is None else arguments
    return shlex.join([Path(given[0]).name, *given[1:]])
