"""The channel graph of a model: what a person queries, prints and plans with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import networkx as nx
from torch import nn

from graphprune import drawing
from graphprune.analysis import Analysis, Group
from graphprune.checks import check_model
from graphprune.collecting import uncollected
from graphprune.errors import InputError
from graphprune.feasible import Settled, analyse
from graphprune.inputs import Call, infer
from graphprune.options import Options, Request
from graphprune.plan import CELL, Plan
from graphprune.planning import assemble, check_follows, check_kept, make_plan
from graphprune.sensitivity import Sensitivity, sensitivity
from graphprune.table import render, shorten
from graphprune.trace import record

ATTENTION = ("heads", "head_dim")


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
            layers = shorten(sorted({slot.layer for slot in self.analysis.slots}), 12)
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
    def plan(self, ratio: float | None = None, **options: Unpack[Options]) -> Plan:
        """Choose which channels stay.

        Args:
            ratio: the fraction of channels to remove, in [0, 1); or name a ``target``.
            options: see :class:`graphprune.Options`.

        Raises:
            InputError: an argument is wrong, no group can be pruned, or a target cannot be met;
                then it says how near one can get, and what stands in the way.

        Warns:
            PruningWarning: much less was removed than asked for; names the reasons.

        Example:
            >>> import torch, graphprune
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            >>> graph = graphprune.trace(net)
            >>> graph.plan(0.25).removed
            2
            >>> graph.plan(target={"params": 0.7}).after.params
            37
        """
        return make_plan(self.model, self.call, self.settled, Request.of(ratio, options))

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
        chosen = check_kept(self.settled, kept)
        plan = assemble(self.call, self.settled, chosen, request)
        if check:
            check_follows(self.model, self.call, self.settled, chosen)
        return plan

    def sensitivity(
        self,
        model: nn.Module,
        evaluate: Callable[[nn.Module], float],
        fractions: Sequence[float] = (0.1, 0.25, 0.5, 0.75),
        **options: Unpack[Options],
    ) -> Sensitivity:
        """Measure how much an evaluation drops when each group alone loses channels.

        Args:
            model: the model, of the architecture that was traced.
            evaluate: a number for a model, larger for better ones; it is called with the model
                and with one smaller model for each group and fraction, in the mode of the model.
            fractions: how much to remove, each in (0, 1).
            options: criterion, keep, exact_only and others; see :class:`graphprune.Options`.

        Returns:
            The drops. They print, plot, and can be planned with:
            ``graph.plan(ratios=sensitivity.allocation(0.5))``, or
            ``graph.plan(target={"macs": 0.5}, ratios=sensitivity)``, by which channels leave
            first where that costs least.

        Raises:
            InputError: a wrong fraction, a model of another architecture, or an evaluation that is
                no finite number.

        Example:
            >>> import torch, graphprune
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            >>> x, y = torch.randn(64, 4), torch.randn(64, 2)
            >>> graph = graphprune.trace(net)
            >>> drops = graph.sensitivity(net, lambda m: -(m(x) - y).square().mean().item())
            >>> plan = graph.plan(target={"macs": 0.5}, ratios=drops)
        """
        if "target" in options:
            raise InputError("sensitivity takes no target: pass what it returns to a plan with one")
        request = Request.of(0.0, options)
        return sensitivity(model, self.call, self.settled, evaluate, fractions, request)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __str__(self) -> str:
        """A table of all groups."""
        rows = [
            (group.name, group.size, group.kind, shorten(group.layers, width=CELL), group.note)
            for group in self.analysis.all_groups
        ]
        title = (
            f"{type(self.model).__name__} on {self.call}: {len(self)} groups of "
            f"{sum(group.size for group in self)} removable channels"
        )
        return render(title, ("group", "channels", "kind", "layers", "why"), rows)
