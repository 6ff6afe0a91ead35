"""The doors: ``trace`` a model into a ``ChannelGraph``, plan with it, ``rebuild`` in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Unpack
from weakref import WeakValueDictionary

from torch import Tensor, nn

from graphprune.channels import drawing
from graphprune.channels.analysis import Analysis, Group
from graphprune.errors import InputError
from graphprune.execute.config import Before, follow_config
from graphprune.execute.rollback import whole_or_not
from graphprune.execute.shrink import shrink, written
from graphprune.masks.plans import check_request, dead_channels, told_of_nothing
from graphprune.parts.choose import Chooser
from graphprune.parts.find import Finder, Part
from graphprune.parts.mixtures import Experts, Mixtures
from graphprune.plan.plan import CELL, MAKERS, Cost, Plan
from graphprune.plan.vocabulary import for_small
from graphprune.planning.costs import cost
from graphprune.planning.make import assemble, check_kept, counted_outputs, followed, make_plan
from graphprune.planning.naming import named
from graphprune.planning.options import Options, Request, ranks_of
from graphprune.planning.sensitivity import Sensitivity, of_parts, sensitivity
from graphprune.planning.settle import Settled, analyse
from graphprune.planning.unread import with_unread
from graphprune.record.agreement import agree
from graphprune.record.checks import check_model, check_weights
from graphprune.record.collecting import uncollected
from graphprune.record.cost import peak_activations
from graphprune.record.inputs import Call, called
from graphprune.record.outputs import Outputs
from graphprune.record.recorder import Record
from graphprune.record.recording import inferred, record
from graphprune.text import render, shorten

if TYPE_CHECKING:
    import networkx as nx

# The graphs in use, by architecture and inputs: a plan is plain data, and a report finds them here.
GRAPHS: WeakValueDictionary[tuple[str, str], ChannelGraph] = WeakValueDictionary()
ATTENTION = ("heads", "queries", "head_dim")


@uncollected
def trace(
    model: nn.Module,
    example_inputs: object = None,
    *,
    attention: str = "heads",
    outputs: object = None,
    weights: Mapping[str, Tensor] | None = None,
) -> ChannelGraph:
    """Find out which channels of a model live and die together.

    Args:
        model: any module that runs; it is not touched and its weights are not needed.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword
            arguments, nested structures included. When absent, usual shapes are tried for the
            first layer.
        attention: ``"heads"`` removes whole attention heads, grouped queries with their key and
            value; ``"queries"`` removes equally many queries of each such group, and keeps keys and
            values; ``"head_dim"`` keeps all heads and makes them narrower: queries and keys
            together, values and the output projection together, rotary pairs together. The scale
            of the scores stays the original's.
        outputs: which outputs count; all by default. A key, an attribute or a place of the output
            (``"logits"``, ``0``), several of them, tuples that lead into nested ones; or a function
            of the output, such as a loss: what its result is made of counts. Other outputs may
            lose channels, and ``verify`` does not compare them.
        weights: of a model on the meta device its parameters by name, for criteria: a mapping that
            may read each when it is asked for (:class:`graphprune.deploy.folders.Shards`).

    Returns:
        The channel graph; ``print`` it to see the groups.

    Raises:
        ModelError: the model is quantized, scripted, compiled, wrapped, lazy or not finite.
        InputError: no example inputs could be inferred, ``attention`` is none of these,
            ``outputs`` names what the output lacks, or ``weights`` lack parameters.
        TraceError: the model does not run on the example inputs.

    Example:
        >>> import torch, graphprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = graphprune.trace(net)
        >>> graph.group_of("0").size
        8
    """
    check_model(model, weightless=True)
    check_weights(model, weights)
    if attention not in ATTENTION:
        raise InputError(f"attention must be one of {', '.join(ATTENTION)}, not {attention!r}")
    counted = Outputs.of(outputs)
    if example_inputs is None:
        call, first = inferred(model)
    else:
        call, first = called(example_inputs, lambda c: record(model, c, training=False))
    return _traced(model, call, first, attention, counted, weights)


def _traced(
    model: nn.Module,
    call: Call,
    first: Record,
    attention: str,
    counted: Outputs | None,
    weights: Mapping[str, Tensor] | None = None,
) -> ChannelGraph:
    """The graph of a model that was recorded once; once more where not all outputs count."""
    if counted is not None:
        call = replace(call, outputs=counted)
        first = record(model, call, training=False)
    settled = replace(analyse(model, call, first, attention), weights=weights)
    return ChannelGraph(model, call, settled, attention)


@dataclass
class ChannelGraph:
    """Groups of channels that live and die together; made by :func:`trace`."""

    model: nn.Module = field(repr=False)
    call: Call
    settled: Settled = field(repr=False)
    attention: str = "heads"

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

    @cached_property
    def finder(self) -> Finder:
        """What finds the parts that can leave whole; the model is recorded once more for it."""
        return Finder(self.model, self.call, self.settled)

    @property
    def branches(self) -> tuple[Part, ...]:
        """What is added to a stream, or concatenated, and can leave, in the order in which it runs.

        Example:
            >>> import torchvision, graphprune
            >>> graph = graphprune.trace(torchvision.models.resnet18())
            >>> len(graph.branches), graph.branches[0].name
            (5, 'layer1.0')
        """
        return self.finder.branches

    @property
    def blocks(self) -> tuple[Part, ...]:
        """The modules that can leave whole: without their branches they hand on what they get.

        Blocks may lie within others: a stage of a ResNet in which every block can leave is one.

        Example:
            >>> import torchvision, graphprune
            >>> graph = graphprune.trace(torchvision.models.resnet18())
            >>> [block.name for block in graph.blocks][:3]
            ['layer1', 'layer1.0', 'layer1.1']
        """
        return self.finder.blocks

    @property
    def experts(self) -> tuple[Experts, ...]:
        """The mixtures of which experts can leave, in the order in which they run.

        What an expert is made of, and whether the code goes on with fewer, is tried on a copy of
        every mixture with drawn weights.
        """
        return self.mixtures.found

    @cached_property
    def mixtures(self) -> Mixtures:
        """What finds the mixtures."""
        return Mixtures(self.model, self.call, self.finder)

    @property
    def counted(self) -> dict[str, object]:
        """Which outputs count, as a plan says it; empty where all do."""
        return counted_outputs(self.analysis)

    @property
    def cost(self) -> Cost:
        """Parameters, MACs of the example inputs, and bytes of the model."""
        return cost(self.analysis)

    @property
    def memory(self) -> int:
        """The peak of the bytes of activations."""
        return peak_activations(self.analysis.records[0])

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
        """Draw the groups and the layers they tie, and the blocks and experts that can leave.

        Args:
            path: where to write; the suffix chooses the format (``.svg``, ``.png``, ``.pdf``).
        """
        parts = [part.modules for part in self.finder.single_blocks]
        parts += [mixture.modules for mixture in self.experts]
        return drawing.draw(self.analysis, type(self.model).__name__, Path(path), parts)

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
        with ranks_of(options).together():
            plan = self.widths(Request.of(ratio, named(options, self.model)))
        GRAPHS[plan.architecture, plan.inputs] = self
        return plan

    def widths(self, request: Request) -> Plan:
        """The plan for a request that was checked."""
        agree(request.ranks, request.told, model=self.model)
        if request.parts != ("channels",):
            return self._chooser(request).plan()
        return make_plan(self.model, self.call, self.settled, request)

    def _chooser(self, request: Request) -> Chooser:
        return Chooser(self.model, self.call, request, self.mixtures, self, self._again)

    def _again(self, model: nn.Module) -> ChannelGraph:
        """The graph of a smaller model."""
        outputs = self.call.outputs
        return _traced(model, self.call, record(model, self.call, False), self.attention, outputs)

    def plan_of(
        self,
        kept: Mapping[str, Iterable[int]],
        request: Mapping[str, object] | None = None,
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
            plan = followed(self.model, self.call, self.settled, chosen, plan)
        return plan

    def sensitivity(
        self,
        model: nn.Module,
        evaluate: Callable[[nn.Module], float],
        fractions: Sequence[float] = (0.1, 0.25, 0.5, 0.75),
        **options: Unpack[Options],
    ) -> Sensitivity:
        """Measure how much an evaluation drops when each group alone loses channels.

        With ``parts="blocks"``, say, when each part alone leaves.

        Args:
            model: the model, of the architecture that was traced.
            evaluate: a number for a model, larger for better ones, or a tensor of one for each
                item: the mean counts, over all processes as well. It is called with the model and
                with one smaller model for each group and fraction, in the mode of the model.
            fractions: how much to remove, each in (0, 1); branches and blocks leave whole.
            options: criterion, keep, exact_only and others; see :class:`graphprune.Options`.

        Returns:
            The drops. They print, plot, and can be planned with:
            ``graph.plan(ratios=sensitivity.allocation(0.5))``, or
            ``graph.plan(target={"macs": 0.5}, ratios=sensitivity)``, by which channels leave
            first where that costs least; as ``ratios`` for the same ``parts``, these leave in
            the order of their drops.

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
        request = Request.of(0.0, named(options, model))
        found = sensitivity(model, self.call, self.settled, evaluate, fractions, request)
        if request.parts == ("channels",):
            return found
        alone = self._chooser(request).alone(fractions)
        parts = of_parts(model, evaluate, found.base, alone, request)
        return replace(found, curves=(*found.curves, *parts))

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
        removable = f"{sum(group.size for group in self)} removable channels"
        title = f"{type(self.model).__name__} on {self.call}: {len(self)} groups of {removable}"
        heads = "group", "channels", "kind", "layers", "why"
        return "\n".join((render(title, heads, rows), *self.told_parts()))

    def told_parts(self) -> list[str]:
        """The parts that can leave whole, a line for each kind there is."""
        kinds = {"branches": self.branches, "blocks": self.blocks}
        found = {kind: [part.name for part in parts] for kind, parts in kinds.items() if parts}
        lines = [f"{kind} that can leave: {shorten(parts, 12)}" for kind, parts in found.items()]
        return [*lines, self.mixtures.told] if self.mixtures.told else lines


@uncollected
def rebuild(
    model: nn.Module,
    ratio_or_plan: float | Plan | None = None,
    example_inputs: object = None,
    *,
    inplace: bool = False,
    attention: str = "heads",
    outputs: object = None,
    ratio: float | None = None,
    max_drop: float | None = None,
    evaluate: Callable[[nn.Module], object] | None = None,
    **options: Unpack[Options],
) -> nn.Module:
    """Make a genuinely smaller model whose output equals the masked original.

    Args:
        model: the trained model; not touched unless ``inplace``.
        ratio_or_plan: the fraction of channels to remove in [0, 1), or a plan; leave it out and
            name a ``target`` for a budget.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword
            arguments; inferred from the first layer when absent. Not needed with a plan.
        inplace: change ``model`` itself; its parameters stay the same objects.
        attention: whether heads leave or become narrower: as for :func:`trace`.
        outputs: which outputs count: see :func:`trace`; all by default.
        ratio: the fraction, by name.
        max_drop: by how much ``evaluate`` may fall: the smallest such model, calibrated if there is
            ``data``; see :func:`smallest`.
        evaluate: says how good a model is.
        options: criterion, scope, targets and constraints: see :class:`graphprune.Options`.

    Returns:
        A model of the same classes and ``state_dict`` names with its own, smaller parameters;
        dtype, device, memory format, hooks and train/eval state are kept. Its
        ``graphprune_plan`` says which channels stayed.

    Raises:
        ModelError: the model is quantized, scripted, compiled, wrapped, lazy or not finite.
        InputError: an argument is wrong, no channel can be removed, or ``max_drop`` is not met.
        TraceError: the model does not run on the example inputs.
        PlanError: the plan belongs to another architecture, or was applied already.

    Warns:
        PruningWarning: much less was removed than asked for.

    Example:
        >>> import torch, torchvision, graphprune
        >>> model = torchvision.models.resnet18(weights=None)
        >>> small = graphprune.rebuild(model, 0.5)
        >>> sum(p.numel() for p in small.parameters()) < 0.3 * 11_700_000
        True
    """
    if ratio is not None:
        if ratio_or_plan is not None:
            kind = "a plan" if isinstance(ratio_or_plan, Plan) else "a ratio by place"
            raise InputError(f"both {kind} and ratio={ratio!r} were given: leave one of them out")
        ratio_or_plan = ratio
    if max_drop is not None or evaluate is not None:
        traced = {"example_inputs": example_inputs, "attention": attention, "outputs": outputs}
        given = ratio_or_plan, inplace, max_drop, evaluate, {**traced, **options}
        small: nn.Module = MAKERS["smallest"](model, *given)
        return small
    if isinstance(ratio_or_plan, Plan):
        if options:
            raise InputError(
                f"a plan was given, which is complete: leave out {', '.join(options)}, or pass "
                "them to graph.plan"
            )
        check_model(model, values=False, weightless=True)
        call = None if example_inputs is None else Call.of(example_inputs)
        return _shrunk(model, ratio_or_plan, call, inplace)
    if isinstance(model, nn.Module):
        options = named(options, model)
    with ranks_of(options).together():
        Request.of(ratio_or_plan, options)  # a wrong option is told before anything long is done
        graph = trace(model, example_inputs, attention=attention, outputs=outputs)
        plan = graph.plan(ratio_or_plan, **options)
    return _shrunk(model, plan, graph.call, inplace)


def _shrunk(model: nn.Module, plan: Plan, call: Call | None, inplace: bool) -> nn.Module:
    before = Before.of(model)
    with whole_or_not(model, written(plan)) if inplace else contextlib.nullcontext():
        small = shrink(model, plan, inplace=inplace)
        if before is not None:
            call = None if call is None else for_small(call, small, plan.vocabularies)
            follow_config(small, before, call)
        return small


def _from_masks(
    model: nn.Module,
    example_inputs: object,
    masks: Mapping[str, object] | None,
    fold: str,
    attention: str,
) -> Plan:
    """What stands behind :meth:`graphprune.Plan.from_masks`."""
    check_request(masks, fold)
    graph = trace(model, example_inputs, attention=attention)
    plan = dead_channels(model, graph.call, graph.settled, masks or {}, fold, attention)
    plan = told_of_nothing(model, plan)
    return with_unread(model, graph.call, graph.analysis, plan)


MAKERS["from_masks"] = _from_masks
