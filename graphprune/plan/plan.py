"""Plans: which channels stay, as plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graphprune.errors import PlanError
from graphprune.plan.changes import (
    FREE,
    BiasChange,
    Cost,
    GroupPlan,
    IndexChange,
    LiteralChange,
    MergeChange,
    Rescale,
    SizeChange,
    SlotPlan,
    compose,
    compose_biases,
    compose_groups,
    compose_indices,
    compose_scales,
    compose_zeroed,
)
from graphprune.record.sites import Site
from graphprune.record.skeleton import mark, named_tensors
from graphprune.text import render, share, shorten

FORMAT = "graphprune-plan"
VERSION = 3
SAME_WEIGHTS = 1e-2  # how far the mark of equal weights differs in a lower precision
MAKERS: dict[str, Callable[..., Plan]] = {}  # what floors above make plans of, bound in ``api``
CELL = 50  # characters for the layers of a group: a table of deep names fits into a terminal
__all__ = ["BiasChange", "Cost", "GroupPlan", "IndexChange", "LiteralChange", "MergeChange", "Plan",
           "Rescale", "SizeChange", "SlotPlan", "carry", "fingerprint", "plan_of", "runs",
           "tensors_of", "unrun"]  # fmt: skip


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
    biases: tuple[BiasChange, ...] = ()
    merges: tuple[MergeChange, ...] = ()
    zeroed: tuple[SlotPlan, ...] = ()  # slices that count as zero: all but ``kept``
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
    def free_columns(self) -> bool:
        """Whether blocks keep channels of their own; ``groups`` then name the equal columns."""
        request: Any = self.request
        while request:
            if request.get("columns") == "free":
                return True
            request = request.get("after")
        return False

    @property
    def removed(self) -> int:
        """How many channels leave."""
        return sum(group.size - len(group.kept) for group in self.groups)

    def __deepcopy__(self, memo: object) -> Plan:
        """Plans are immutable."""
        return self

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan as JSON text, also written to ``path`` when given."""
        content = {key: _ranges(value) for key, value in asdict(self).items()}
        body = json.dumps(content, sort_keys=True)
        text = json.dumps(
            {"format": FORMAT, "version": VERSION, "digest": _digest(body), "plan": content}
        )
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Plan:
        """Read a plan back.

        Args:
            source: JSON text, or the path of a file that holds it.

        Raises:
            PlanError: the text is not a plan of this version, or was changed or cut off.
        """
        text, name = _text(source)
        try:
            outer = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"{name} is not JSON ({error}): pass what Plan.to_json wrote") from None
        if not isinstance(outer, dict) or outer.get("format") != FORMAT:
            raise PlanError(f"{name} is not a graphprune plan: pass what Plan.to_json wrote")
        if outer.get("version") != VERSION:
            raise PlanError(
                f"{name} has plan version {outer.get('version')!r}; this graphprune reads {VERSION}"
            )
        body: Any = outer.get("plan")
        if _digest(json.dumps(body, sort_keys=True)) != outer.get("digest"):
            raise PlanError(f"{name} is damaged: its content does not match its digest")
        try:
            return _plan(body)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{name} is damaged: {type(error).__name__} {error}") from None

    @classmethod
    def from_masks(
        cls,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        masks: Mapping[str, Any] | None = None,
        fold: str = "exact",
        attention: str = "heads",
    ) -> Plan:
        """A plan that removes what is dead in a masked model, with the same output in eval mode.

        A channel is dead when its readers multiply it by zero or leave as well, or when it is
        constant: a zeroed filter behind a bias, a BatchNorm, an activation. Constants are added to
        the biases of the readers (or taken from the running mean of the BatchNorm behind them).
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

    def check(self, model: nn.Module) -> None:
        """Raise unless the plan was made for the architecture of ``model``.

        Raises:
            PlanError: names the first tensors that differ.
        """
        if fingerprint(model) == self.architecture:
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
        first = {(slot.tensor, slot.dim): slot for slot in self.slots}
        slots = dict(first)
        for slot in later.slots:
            key = slot.tensor, slot.dim
            if slot.blocks > 1 and (slot.tensor, 0) in first:
                slot = slot.before(first[slot.tensor, 0])
            slots[key] = first[key].then(slot) if key in first else slot
        made = {change.tensor for change in self.biases if change.like is not None}
        return Plan(
            architecture=self.architecture,
            groups=compose_groups(self.groups, later.groups),
            slots=tuple(slot for slot in slots.values() if slot.tensor not in made),
            sizes=compose(self.sizes, later.sizes, lambda c: (c.module, c.name, c.path)),
            literals=compose(self.literals, later.literals, lambda c: (c.module, c.site, c.path)),
            indices=compose_indices(self.indices, later.indices),
            scales=compose_scales(self.scales, later.scales),
            biases=compose_biases(self.biases, later.biases, first),
            merges=(*self.merges, *(change.before(first) for change in later.merges)),
            zeroed=(*self.zeroed, *(compose_zeroed(slot, first) for slot in later.zeroed)),
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
        ]
        title = (
            f"parameters {self.before.params:,} -> {self.after.params:,} "
            f"({share(self.after.params, self.before.params)}), "
            f"MACs {self.before.macs:,} -> {self.after.macs:,} "
            f"({share(self.after.macs, self.before.macs)})"
        )
        names = dict.fromkeys([b.tensor for b in self.biases] + [m.tensor for m in self.merges])
        folded = [f"constants go to {shorten(names)}"] if names else []
        table = render(title, ("group", "channels", "kind", "layers"), rows)
        return "\n".join((table, *folded, *self.notes))


def plan_of(model: object) -> Plan | None:
    """The plan that a model made by ``rebuild`` carries, from the original to it."""
    found = getattr(model, "graphprune_plan", None)
    return found if isinstance(found, Plan) else None


def carry(model: nn.Module, plan: Plan) -> None:
    """Let a small model carry the plan that it was made by, as ``graphprune_plan``."""
    vars(model)["graphprune_plan"] = plan


def fingerprint(model: nn.Module) -> str:
    """A digest of the names and shapes of all parameters and buffers."""
    text = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors_of(model))
    return _digest(text)


def tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name, sorted."""
    return sorted(named_tensors(model), key=lambda item: item[0])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _text(source: str | Path) -> tuple[str, str]:
    if not isinstance(source, str) or not source.lstrip().startswith(("{", "[")):
        try:
            return Path(source).read_text(), str(source)
        except (OSError, TypeError, ValueError) as error:
            raise PlanError(f"cannot read a plan from {str(source)[:80]!r}: {error}") from None
    return source, "the text"


def _ranges(value: Any) -> Any:
    """Nested data with every ``kept`` written as runs, so that plans stay small."""
    if isinstance(value, dict):
        return {k: runs(v) if k == "kept" else _ranges(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_ranges(item) for item in value]
    return value


def runs(indices: Iterable[int]) -> str:
    """Increasing indices as text: ``0-3,7,9-12``."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and parts[-1][1] == index - 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def unrun(text: str) -> tuple[int, ...]:
    """The inverse of :func:`runs`."""
    indices: list[int] = []
    for part in filter(None, text.split(",")):
        start, _, stop = part.partition("-")
        indices.extend(range(int(start), int(stop or start) + 1))
    return tuple(indices)


def _literal(body: Mapping[str, Any]) -> LiteralChange:
    change = _tuples(dict(body))
    return LiteralChange(**{**change, "site": Site(**change["site"])})


def _tuples(value: Any) -> Any:
    """Nested data with tuples for lists."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _plan(body: Mapping[str, Any]) -> Plan:
    unknown = set(body) - {f.name for f in fields(Plan)}
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    return Plan(
        architecture=body["architecture"],
        groups=tuple(
            GroupPlan(**{**g, "kept": unrun(g["kept"]), "layers": tuple(g["layers"])})
            for g in body["groups"]
        ),
        slots=tuple(SlotPlan(**{**s, "kept": unrun(s["kept"])}) for s in body["slots"]),
        sizes=tuple(SizeChange(**{**s, "path": tuple(s["path"])}) for s in body["sizes"]),
        literals=tuple(map(_literal, body["literals"])),
        indices=tuple(
            IndexChange(i["tensor"], tuple(i["values"]), unrun(i["kept"])) for i in body["indices"]
        ),
        scales=tuple(Rescale(**item) for item in body["scales"]),
        biases=tuple(BiasChange(**_tuples(item)) for item in body["biases"]),
        merges=tuple(MergeChange(**_tuples(item)) for item in body["merges"]),
        zeroed=tuple(SlotPlan(**{**s, "kept": unrun(s["kept"])}) for s in body["zeroed"]),
        weights=body["weights"],
        notes=tuple(body["notes"]),
        evaluated=bool(body["evaluated"]),
        before=Cost(**body["before"]),
        after=Cost(**body["after"]),
        inputs=body["inputs"],
        request=dict(body["request"]),
    )
