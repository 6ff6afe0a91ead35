"""Plans: which channels stay, as plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.errors import PlanError
from graphprune.plan.changes import (
    FREE,
    BiasChange,
    Cost,
    Cut,
    ExpertsPlan,
    GroupPlan,
    IndexChange,
    LiteralChange,
    MergeChange,
    NormChange,
    PartPlan,
    Rescale,
    SizeChange,
    SlotPlan,
    StandIn,
    chain,
)
from graphprune.plan.checks import check_alone, check_on
from graphprune.plan.coding import decode, encode, loads, runs
from graphprune.plan.leaving import names_before, renamed
from graphprune.plan.vocabulary import Vocabulary
from graphprune.record.sites import OF
from graphprune.record.tensors import fingerprint, mark, named_tensors
from graphprune.text import render, share, shorten

FORMAT = "graphprune-plan"
VERSION = 3
SAME_WEIGHTS = 1e-2  # how far the mark of equal weights differs in a lower precision
MAKERS: dict[str, Callable[..., Any]] = {}  # what floors above make of plans, bound by them
PLURAL = {"block": "blocks", "branch": "branches"}
CELL = 50  # characters for the layers of a group: a table of deep names fits into a terminal
__all__ = ["BiasChange", "Cost", "Cut", "ExpertsPlan", "GroupPlan", "IndexChange",
           "LiteralChange", "MergeChange", "NormChange", "PartPlan", "Plan", "Rescale",
           "SizeChange", "SlotPlan", "StandIn", "Vocabulary", "carry", "plan_of",
           "runs"]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Which channels of which layers stay.

    A plan is independent of the weights: it applies to every instance of the architecture it
    was made for. Only a plan :meth:`from_masks` may hold constants that belong to weights
    (``biases``, ``merges``, ``zeroed``); it applies to the model that it was made for, which
    ``weights`` marks. ``print(plan)`` shows a plan as a table.

    Example:
        >>> import torch, graphprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = graphprune.trace(net).plan(0.5)
        >>> graphprune.Plan.from_json(plan.to_json()) == plan
        True
    """

    architecture: str
    groups: tuple[GroupPlan, ...]
    slots: tuple[SlotPlan, ...]
    sizes: tuple[SizeChange, ...] = ()
    literals: tuple[LiteralChange, ...] = ()
    indices: tuple[IndexChange, ...] = ()
    scales: tuple[Rescale, ...] = ()
    norms: tuple[NormChange, ...] = ()  # that go on counting what left
    biases: tuple[BiasChange, ...] = ()
    merges: tuple[MergeChange, ...] = ()
    zeroed: tuple[SlotPlan, ...] = ()  # slices that count as zero: all but ``kept``
    parts: tuple[PartPlan, ...] = ()  # that leave whole
    cuts: tuple[Cut, ...] = ()  # what counts as zero for them
    stand_ins: tuple[StandIn, ...] = ()  # what takes the place of their modules
    vocabularies: tuple[Vocabulary, ...] = ()  # of which ids leave
    experts: tuple[ExpertsPlan, ...] = ()  # of which mixtures which ones stay
    weights: float | None = None  # a mark of the weights that these belong to
    notes: tuple[str, ...] = ()
    evaluated: bool = False  # zeroed parameters do not make the masked model
    before: Cost = FREE
    after: Cost = FREE
    inputs: str = ""
    request: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether no statistics change (no renormalising group loses channels)."""
        return all(group.exact or len(group.kept) == group.size for group in self.groups)

    @property
    def plain_statistics(self) -> bool:
        """Whether statistics count what left as zeroes, where groups would be renormalising."""
        counts = any(change.path == (OF,) for change in self.literals)
        return bool(self.scales or self.norms) or counts

    @property
    def free_columns(self) -> bool:
        """Whether blocks keep channels of their own; ``groups`` then name the equal columns."""
        request: Any = self.request
        while request:
            if request.get("columns") == "free":
                return True
            request = request.get("after")
        return False

    def counted(self, places: int, training: bool = False) -> list[int]:
        """Which of ``places`` tensors of an output must equal those of the masked model."""
        left, request = set(range(places)), self.request
        while request:
            modes = request.get("outputs", {})
            told = modes.get("train", modes.get("eval")) if training else modes.get("eval")
            left &= set(range(places) if told is None else told)
            request = request.get("after") or {}
        return sorted(left)

    @property
    def widths(self) -> tuple[SlotPlan, ...]:
        """The slots without the slices of what is chosen by ids, or by the scores of experts."""
        rows = {row for vocabulary in self.vocabularies for row in vocabulary.rows}
        rows |= {key for experts in self.experts for key in experts.slices}
        return tuple(slot for slot in self.slots if slot.key not in rows)

    @property
    def removed(self) -> int:
        """How many channels leave."""
        return sum(group.size - len(group.kept) for group in self.groups)

    def __deepcopy__(self, memo: object) -> Plan:
        """Plans are immutable."""
        return self

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan as JSON text, also written to ``path`` when given."""
        content = encode(self)
        body = json.dumps(content, sort_keys=True)
        text = json.dumps(
            {"format": FORMAT, "version": VERSION, "digest": _digest(body), "plan": content}
        )
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Plan:
        """Read a plan back.

        Args:
            source: JSON text, or the path of a file that holds it.

        Raises:
            PlanError: the text is not a plan of this version, or was changed or cut off.
        """
        return cls.from_text(*_text(source))

    @classmethod
    def from_text(cls, text: str, name: str = "the text") -> Plan:
        """Read a plan back from JSON text alone, which may come from a stranger.

        Args:
            text: what :meth:`to_json` returned; no file is opened, whatever it says.
            name: what to call it in errors.

        Raises:
            PlanError: the text is not a plan of this version, or was changed or cut off.
        """
        outer = loads(text, name)
        if not isinstance(outer, dict) or outer.get("format") != FORMAT:
            raise PlanError(f"{name} is not a graphprune plan: pass what Plan.to_json wrote")
        if outer.get("version") != VERSION:
            found = repr(outer.get("version"))[:20]
            raise PlanError(f"{name} has plan version {found}; this graphprune reads {VERSION}")
        body: object = outer.get("plan")
        if _digest(json.dumps(body, sort_keys=True)) != outer.get("digest"):
            raise PlanError(f"{name} is damaged: its content does not match its digest")
        plan: Plan = decode(cls, body, name, len(text))
        check_alone(plan, name)
        return plan

    @classmethod
    def from_masks(
        cls,
        model: nn.Module,
        example_inputs: object = None,
        *,
        masks: Mapping[str, object] | None = None,
        fold: str = "exact",
        attention: str = "heads",
    ) -> Plan:
        """A plan that removes what is dead in a masked model, with the same output in eval mode.

        A channel is dead when its readers multiply it by zero or leave as well, or when it is
        constant: a zeroed filter behind a bias, a BatchNorm, an activation. Constants are added to
        the biases of the readers (or taken from the running mean of the BatchNorm behind them).
        LayerNorm and GroupNorm go on counting zeroes that leave in front of them; what these become
        behind a LayerNorm goes to the weights of the linear layers that read it.
        Masks that remain (``weight_mask`` of ``torch.nn.utils.prune``) are cut with the weights.
        Activations are taken to be finite.

        Args:
            model: the masked model: pruned with ``torch.nn.utils.prune`` in any way, before or
                after ``prune.remove``, or with zeroed weights. It is not touched.
            example_inputs: as for :func:`trace`; inferred when absent.
            masks: boolean vectors by the name of a layer, one entry for each output channel, false
                for those whose weights and biases count as zero.
            fold: ``"exact"`` keeps one constant channel to stand for all those that come out
                different at the borders of a padded convolution; ``"approximate"`` takes their
                constants of the middle for all places; ``"none"`` removes only what contributes
                zeroes.
            attention: as for :func:`trace`.

        Returns:
            A plan for :func:`rebuild`. Its ``notes`` name constant channels that stay, and why.

        Raises:
            InputError: a wrong ``fold``, or a mask that fits no layer.
            ModelError: as for :func:`trace`.
            TraceError: the model does not run on the example inputs.

        Example:
            >>> import torch, graphprune
            >>> from torch.nn.utils import prune
            >>> net = torch.nn.Sequential(
            ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
            ... )
            >>> _ = prune.ln_structured(net[0], "weight", 0.5, n=2, dim=0)
            >>> small = graphprune.rebuild(net, graphprune.Plan.from_masks(net))
            >>> x = torch.randn(3, 4)
            >>> small[0].out_features, torch.allclose(small(x), net(x), atol=1e-6)
            (4, True)
        """
        return MAKERS["from_masks"](model, example_inputs, masks, fold, attention)

    def report(
        self,
        path: str | Path,
        model: object = None,
        example_inputs: object = None,
        *,
        small: nn.Module | None = None,
        verification: object = None,
        measured: object = None,
        accuracy: object = None,
        history: object = None,
        command: str = "",
        title: str = "",
        notes: tuple[str, ...] = (),
    ) -> Path:
        """Write a report: one HTML file, for people, that needs no network.

        Parameters, MACs and bytes before and after, what left, and how to repeat it are always
        there. With the model, or while the graph that made the plan is in use, there are also all
        layers by MACs and by the share that is kept, the drawn graph, and the frozen groups with
        the reason and the source line.

        Args:
            path: the file to write.
            model: the original, or its graph that :func:`trace` returned.
            example_inputs: as for :func:`trace`, where a model is given.
            small: what was made by the plan, perhaps fine-tuned; made anew when absent.
            verification: what :func:`verify` returned.
            measured: two results of :func:`measure`, before and after, for latency and activations.
            accuracy: two numbers, before and after, or such pairs by name.
            history: a ``graphprune.training.History``.
            command: the command that did all this, to be shown.
            title: above it all; the class of the model by default.
            notes: remarks to show beside those of the plan.

        Returns:
            The path.

        Raises:
            InputError: it cannot be written there, or something given is of the wrong type.
            PlanError: the plan belongs to another model.

        Example:
            >>> import torch, graphprune, tempfile
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            >>> plan = graphprune.trace(net).plan(0.5)
            >>> small = graphprune.rebuild(net, plan)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     page = plan.report(
            ...         folder + "/report.html", net, verification=graphprune.verify(net, small)
            ...     )
            ...     "<b>Verified.</b>" in page.read_text(encoding="utf-8")
            True
        """
        written: Path = MAKERS["report"](
            self,
            path,
            model,
            example_inputs,
            small=small,
            verification=verification,
            measured=measured,
            accuracy=accuracy,
            history=history,
            command=command,
            title=title,
            notes=notes,
        )
        return written

    def check(self, model: nn.Module) -> None:
        """Raise unless the plan may change ``model``: nothing but what such a plan can change.

        Its architecture, every tensor, dimension, module, attribute and number that the plan names,
        the old values and the range of the new ones are looked at; nothing is changed.

        Raises:
            PlanError: names the first thing that differs.
        """
        if fingerprint(model) == self.architecture:
            check_alone(self)
            check_on(self, model)
            self._check_weights(model)
            return
        if plan_of(model) == self:
            raise PlanError("this plan was applied to this model already; trace it for a new one")
        shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
        for slot in self.slots:
            found = shapes.get(slot.tensor)
            if found is None or len(found) <= slot.dim or found[slot.dim] != slot.size:
                raise PlanError(
                    f"the plan belongs to another architecture: it expects {slot.tensor!r} with "
                    f"size {slot.size} in dimension {slot.dim}, the model has "
                    f"{'no such tensor' if found is None else list(found)}; trace this model anew"
                )
        raise PlanError(
            "the plan belongs to another architecture: names or shapes of other tensors differ; "
            "trace this model anew"
        )

    def _check_weights(self, model: nn.Module) -> None:
        if self.weights is None or any(tensor.is_meta for tensor in model.parameters()):
            return
        if abs(mark(model) - self.weights) > SAME_WEIGHTS:
            raise PlanError(
                "the plan was made from the masks of a model with other weights: make a new one "
                "with Plan.from_masks(model)"
            )

    def then(self, later: Plan) -> Plan:
        """This plan followed by one for the model it makes, as one plan for the original.

        Args:
            later: a plan for a model made by this one; any other is a ``PlanError``.
        """
        if any(change.containers for change in self.experts):
            later = renamed(later, names_before(self))
        first = {slot.key: slot for slot in self.slots}
        made = {change.tensor: change.like for change in self.biases}
        groups = {group.key: group for group in self.groups}
        slots = (
            slot.before(first[slot.tensor, 0])
            if slot.blocks > 1 and (slot.tensor, 0) in first
            else slot
            for slot in later.slots
            if not made.get(slot.tensor)
        )
        return Plan(
            architecture=self.architecture,
            groups=tuple(groups[g.key].then(g) if g.key in groups else g for g in later.groups),
            slots=chain(self.slots, slots),
            sizes=chain(self.sizes, later.sizes),
            literals=chain(self.literals, later.literals),
            indices=chain(self.indices, later.indices),
            scales=chain(self.scales, later.scales),
            norms=chain(self.norms, later.norms),
            biases=chain(self.biases, (b.before(first, made.get(b.tensor)) for b in later.biases)),
            merges=(*self.merges, *(change.before(first) for change in later.merges)),
            zeroed=(*self.zeroed, *(slot.zeroing(first.get(slot.key)) for slot in later.zeroed)),
            parts=(*self.parts, *later.parts),
            cuts=chain(self.cuts, later.cuts),
            stand_ins=chain(self.stand_ins, later.stand_ins),
            vocabularies=chain(self.vocabularies, later.vocabularies),
            experts=chain(self.experts, later.experts),
            weights=self.weights,
            notes=(*self.notes, *later.notes),
            evaluated=self.evaluated or later.evaluated,
            before=self.before,
            after=later.after,
            inputs=later.inputs,
            request={**later.request, "after": dict(self.request)},
        )

    def __str__(self) -> str:
        """A table of the groups, with the cost before and after."""
        rows = [
            (
                group.name,
                f"{group.size} -> {len(group.kept)}",
                "exact" if group.exact else "renormalising",
                shorten(group.layers, width=CELL),
            )
            for group in self.groups
            if len(group.kept) < group.size or not self.vocabularies
        ]
        title = (
            f"parameters {self.before.params:,} -> {self.after.params:,} "
            f"({share(self.after.params, self.before.params)}), "
            f"MACs {self.before.macs:,} -> {self.after.macs:,} "
            f"({share(self.after.macs, self.before.macs)})"
        )
        names = dict.fromkeys([b.tensor for b in self.biases] + [m.tensor for m in self.merges])
        folded = [f"constants go to {shorten(names)}"] if names else []
        counting = [change.module for change in self.norms]
        counting += [change.module for change in self.literals if change.path == (OF,)]
        if counting:
            names = dict.fromkeys(name or "the model" for name in counting)
            folded.append(f"count what left as zeroes: {shorten(names)}")
        table = render(title, ("group", "channels", "kind", "layers"), rows)
        told = (*self.told_parts(), *map(str, self.vocabularies))
        table = title if told and not rows else table
        return "\n".join((table, *told, *folded, *self.notes))

    def told_parts(self) -> list[str]:
        """The parts that leave, a line for each kind."""
        kinds = dict.fromkeys(part.kind for part in self.parts)
        names = {kind: [part.name for part in self.parts if part.kind == kind] for kind in kinds}
        lines = [
            f"{PLURAL.get(kind, kind)} that leave: {shorten(names[kind], 12)}" for kind in kinds
        ]
        gone = [f"{e.mixture or 'model'}: {runs(e.gone)}" for e in self.experts if e.gone]
        return lines + ([f"experts that leave: {shorten(gone, 12)}"] if gone else [])


def plan_of(model: object) -> Plan | None:
    """The plan that a model made by ``rebuild`` carries, from the original to it."""
    found = getattr(model, "graphprune_plan", None)
    return found if isinstance(found, Plan) else None


def carry(model: nn.Module, plan: Plan) -> None:
    """Let a small model carry the plan that it was made by, as ``graphprune_plan``."""
    vars(model)["graphprune_plan"] = plan


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _text(source: str | Path) -> tuple[str, str]:
    if not isinstance(source, str) or not source.lstrip().startswith(("{", "[")):
        try:
            return Path(source).read_text(), str(source)
        except (OSError, TypeError, ValueError) as error:
            raise PlanError(f"cannot read a plan from {str(source)[:80]!r}: {error}") from None
    return source, "the text"
