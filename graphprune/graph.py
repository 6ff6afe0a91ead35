"""The channel graph of a model: what a person queries, prints and plans with."""

from __future__ import annotations

import fnmatch
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from torch import nn

from graphprune import drawing
from graphprune.analysis import Analysis, Group
from graphprune.checks import check_model
from graphprune.collecting import uncollected
from graphprune.counting import macs
from graphprune.criteria import Criterion, scores
from graphprune.errors import InputError, PruningWarning
from graphprune.feasible import (
    Settled,
    analyse,
    bare_plan,
    feasible,
    follows,
)
from graphprune.inputs import Call, infer
from graphprune.plan import Cost, GroupPlan, Plan, shorten
from graphprune.select import Kept, check_ratio, select
from graphprune.skeleton import named_tensors
from graphprune.table import render
from graphprune.trace import record

ATTENTION = ("heads", "head_dim")
_HERE = str(Path(__file__).parent) + os.sep
_NATURAL = ("model output", "reads a model input", "rows of an embedding table")


@uncollected
def trace(
    model: nn.Module, example_inputs: Any = None, *, attention: str = "heads"
) -> ChannelGraph:
    """Find out which channels of a model live and die together.

    Args:
        model: any module that runs; it is not touched and its weights are not needed.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword
            arguments, nested structures included. When absent, usual shapes are tried for the
            first layer.
        attention: ``"heads"`` removes whole attention heads; ``"head_dim"`` keeps all heads and
            makes them narrower: queries and keys together, values and the output projection
            together, rotary pairs together. The scale of the scores stays the original's.

    Returns:
        The channel graph; ``print`` it to see the groups.

    Raises:
        ModelError: the model is quantized, scripted, compiled, wrapped, lazy or not finite.
        InputError: no example inputs could be inferred, or ``attention`` is neither of the two.
        TraceError: the model does not run on the example inputs.

    Example:
        >>> import torch, graphprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = graphprune.trace(net)
        >>> graph.group_of("0").size
        8
    """
    check_model(model)
    if attention not in ATTENTION:
        raise InputError(f"attention must be one of {', '.join(ATTENTION)}, not {attention!r}")
    if example_inputs is None:
        call, first = infer(model, lambda c: record(model, c, False, devices=("meta",)))
    else:
        call = Call.of(example_inputs)
        first = record(model, call, training=False)
    return ChannelGraph(model, call, analyse(model, call, first, attention))


@dataclass
class ChannelGraph:
    """Groups of channels that live and die together; made by :func:`trace`."""

    model: nn.Module = field(repr=False)
    call: Call
    settled: Settled = field(repr=False)

    @property
    def analysis(self) -> Analysis:
        """The channel ids behind the groups."""
        return self.settled.analysis

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups whose channels can be removed."""
        return self.analysis.groups

    @property
    def frozen(self) -> tuple[Group, ...]:
        """The groups whose channels must stay, each with its ``reason``."""
        return tuple(group for group in self.analysis.all_groups if group.frozen)

    def group_of(self, name: str) -> Group:
        """The group that the output channels of a layer belong to.

        Args:
            name: a module (``"layer1.0.conv1"``) or a parameter. For a layer whose channels
                fall into several groups, the largest one is returned.

        Raises:
            InputError: no such layer, or it has no channels.
        """
        names = self.analysis.names
        tensors = {names.get(tensor, tensor) for tensor in (name, f"{name}.weight")}
        found: list[tuple[int, int, Group]] = []
        for position, group in enumerate(self.analysis.all_groups):
            for member in group.members:
                slot = member.slot
                if slot.tensor in tensors and slot.dim == 0:
                    found.append((2 * member.index.size + 1, -position, group))
                elif slot.module == name and not member.reads:
                    found.append((1, -position, group))
        if not found:
            layers = shorten(sorted({slot.module for slot in self.analysis.slots}), 12)
            raise InputError(f"no channels of {name!r} in this graph; layers: {layers}")
        return max(found, key=lambda item: item[:2])[2]

    def to_networkx(self) -> nx.Graph:
        """Groups and the slots they tie as nodes, the ops that tie them as edges.

        Returns:
            An undirected graph. Group nodes are named ``g3`` and have ``kind="group"``,
            ``channels`` and ``state``; slot nodes are ``(tensor, dim)`` pairs and have
            ``kind="slot"``. Each edge has ``ops``, the ATen ops that read the tensor.
        """
        return drawing.to_networkx(self.analysis)

    def draw(self, path: str | Path) -> Path:
        """Draw the groups and the layers they tie.

        Args:
            path: where to write; the suffix chooses the format (``.svg``, ``.png``, ``.pdf``).
        """
        return drawing.draw(self.analysis, type(self.model).__name__, Path(path))

    @uncollected
    def plan(
        self,
        ratio: float,
        *,
        criterion: str | Criterion = "l2",
        scope: str = "local",
        keep: str | Iterable[str] = (),
        seed: int = 0,
        exact_only: bool = False,
    ) -> Plan:
        """Choose which channels stay.

        Args:
            ratio: the fraction of channels to remove, in [0, 1).
            criterion: a registered name or a callable; see ``graphprune.criteria``.
            scope: ``"local"`` removes the fraction from every group, ``"global"`` over all groups.
            keep: glob patterns of layers whose channels all stay.
            seed: for criteria that draw random numbers.
            exact_only: leave renormalising groups whole.

        Raises:
            InputError: an argument is wrong, or no group can be pruned.

        Warns:
            PruningWarning: much less was removed than asked for; names the reasons.

        Example:
            >>> import torch, graphprune
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            >>> graphprune.trace(net).plan(0.25).removed
            2
        """
        ratio = check_ratio(ratio)
        request = {
            "ratio": ratio,
            "criterion": criterion if isinstance(criterion, str) else _name(criterion),
            "scope": scope,
            "seed": seed,
            "exact_only": exact_only,
            "attention": self.analysis.walk.attention,
        }
        tensors = dict(named_tensors(self.model))
        draft = ChannelGraph(self.model, self.call, self.settled.copy())
        while True:
            spared = draft._kept_groups(keep)
            groups = [g for g in draft.groups if g.name not in spared]
            groups = [g for g in groups if g.exact or not exact_only]
            if not draft.groups:
                raise InputError(f"no channel of this model can be removed:\n{draft._why()}")
            kept = select(scores(criterion, groups, tensors, seed), ratio, scope)
            if feasible(self.model, self.call, draft.settled, kept):
                plan = draft.plan_of(kept, request, check=False)
                draft._warn(plan, ratio, spared)
                return plan

    def plan_of(
        self,
        kept: Mapping[str, Iterable[int]],
        request: Mapping[str, Any] | None = None,
        *,
        check: bool = True,
    ) -> Plan:
        """A plan from kept channels by group name; groups not named stay whole.

        Args:
            kept: indices of channels by the name of their group.
            request: what the plan says of how it was made.
            check: run a shrunk copy without weights where the code of the model demands it.

        Raises:
            InputError: an unknown or emptied group, channels it does not have, or a size in the
                code of the model that cannot follow.
        """
        by_name = {group.name: group for group in self.groups}
        chosen: Kept = {}
        for name, wanted in kept.items():
            if name not in by_name:
                raise InputError(f"no removable group {name!r}; groups: {shorten(by_name, 12)}")
            chosen[name] = tuple(sorted({int(channel) for channel in wanted}))
            size = by_name[name].size
            if not chosen[name] or not 0 <= chosen[name][0] <= chosen[name][-1] < size:
                channels = f"0..{size - 1}"
                raise InputError(f"group {name} must keep at least one of its channels {channels}")
        alive = self.analysis.alive(chosen)
        found = self.settled.changes(alive)
        if found.problems:
            raise InputError(f"these channels cannot leave: {found.problems[0].reason}")
        if check and found.unsure:
            settled = self.settled.copy()
            if not follows(self.model, self.call, settled, alive):
                reason = settled.analysis.walk.ties.frozen[-1][1]
                raise InputError(f"these channels cannot leave: {reason}")
        bare = bare_plan(self.analysis, alive, found)
        masked = self.analysis.walk.masked.values()
        return Plan(
            bare.architecture,
            tuple(
                GroupPlan(
                    group.name,
                    group.size,
                    chosen.get(group.name, tuple(range(group.size))),
                    group.layers,
                    group.exact,
                )
                for group in self.groups
            ),
            bare.slots,
            bare.sizes,
            bare.literals,
            bare.indices,
            any(not alive[ids.numpy()].all() for layers in masked for ids in layers),
            self._cost(None),
            self._cost(alive),
            str(self.call),
            {"attention": self.analysis.walk.attention, **(request or {})},
        )

    def _cost(self, alive: np.ndarray | None) -> Cost:
        params = size = 0
        lost: dict[str, list[int]] = {}
        for slot in self.analysis.slots:
            if alive is not None:
                keep = int(alive[slot.start : slot.start + slot.size].sum())
                lost.setdefault(slot.tensor, []).append(keep)
        for name, (shape, width, parameter) in self.analysis.shapes.items():
            kept = lost.get(name) if alive is not None else list(shape)
            count = int(np.prod(kept)) if kept else 1
            params += count * parameter
            size += count * width
        first = self.analysis.records[0]
        count = (
            macs(first)
            if alive is None
            else macs(first, lambda node: self.analysis.shape(node, alive))
        )
        return Cost(params, count, size)

    def _kept_groups(self, keep: str | Iterable[str]) -> set[str]:
        patterns = [keep] if isinstance(keep, str) else list(keep)
        spared = set()
        for pattern in patterns:
            names = [name for name in self.analysis.names if _matches(pattern, name)]
            if not names:
                layers = sorted({name.rpartition(".")[0] for name in self.analysis.names})
                text = f"keep pattern {pattern!r} matches no layer; layers: {shorten(layers, 12)}"
                raise InputError(text)
            tensors = {self.analysis.names[name] for name in names}
            for group in self.analysis.all_groups:
                if any(m.slot.tensor in tensors and not m.reads for m in group.members):
                    spared.add(group.name)
        return spared

    def _why(self, groups: Iterable[Group] | None = None, most: int = 6) -> str:
        lines: dict[str, list[str]] = {}
        for group in self.frozen if groups is None else groups:
            lines.setdefault(group.note, []).append(shorten(group.layers, 2))
        shown = list(lines.items())[:most]
        return "\n".join(f"  {reason}: {shorten(layers, 3)}" for reason, layers in shown)

    def _warn(self, plan: Plan, ratio: float, spared: set[str]) -> None:
        unusual = [g for g in self.frozen if not str(g.reason).startswith(_NATURAL)]
        free = [group for group in self.groups if group.name not in spared]
        total = sum(g.size for g in free) + sum(
            g.size for g in unusual if any(m.slot.weight and not m.reads for m in g.members)
        )
        if ratio * total < 1 or plan.removed >= 0.5 * ratio * total:
            return
        small = [group for group in free if group.size * ratio < 1]
        whole = [g for g in free if not g.exact and plan.request["exact_only"]]
        text = f"{plan.removed} of {total} channels were removed where {ratio:.0%} was asked for"
        if unusual:
            text += f"; frozen:\n{self._why(unusual)}"
        if whole:
            names = shorten([group.layers[0] for group in whole], 6)
            text += f"\n  left whole by exact_only: {names}"
        if small:
            names = shorten([group.layers[0] for group in small], 6)
            text += f"\n  too small to lose a channel at this ratio: {names}"
        warnings.warn(text, PruningWarning, stacklevel=_outside())

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __str__(self) -> str:
        """A table of all groups."""
        rows = [
            (group.name, group.size, group.kind, shorten(group.layers), group.note)
            for group in self.analysis.all_groups
        ]
        title = (
            f"{type(self.model).__name__} on {self.call}: {len(self)} groups of "
            f"{sum(group.size for group in self)} removable channels"
        )
        return render(title, ("group", "channels", "kind", "layers", "why"), rows)


def _outside() -> int:
    """The stack level of the first caller outside this package, for warnings."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        level, frame = level + 1, frame.f_back
    return level


def _name(criterion: Criterion) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)


def _matches(pattern: str, tensor: str) -> bool:
    parts = tensor.split(".")
    return any(
        fnmatch.fnmatchcase(".".join(parts[:stop]), pattern) for stop in range(1, len(parts) + 1)
    )
