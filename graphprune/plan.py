"""Plans: which channels stay, as plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from graphprune.errors import PlanError
from graphprune.sites import Site
from graphprune.sizes import Attribute
from graphprune.skeleton import named_tensors
from graphprune.table import render

FORMAT = "graphprune-plan"
VERSION = 3


@dataclass(frozen=True)
class GroupPlan:
    """The kept channels of one group, of ``size`` channels."""

    name: str
    size: int
    kept: tuple[int, ...]
    layers: tuple[str, ...] = ()
    exact: bool = True


@dataclass(frozen=True)
class SlotPlan:
    """The kept indices along one dimension of one parameter or buffer."""

    tensor: str
    dim: int
    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class SizeChange:
    """A size that a module remembers: ``path`` indexes into a tuple or list."""

    module: str
    name: str
    path: tuple[int, ...]
    old: int
    new: int

    @property
    def attribute(self) -> Attribute:
        """The attribute that changes."""
        return Attribute(self.module, self.name, self.path)


@dataclass(frozen=True)
class LiteralChange:
    """A number in the code that a module runs: ``path`` of the arguments given at a site."""

    module: str
    site: Site
    path: tuple[int | str, ...]
    old: float
    new: float
    digest: str = ""  # of the source of the function


@dataclass(frozen=True)
class IndexChange:
    """A buffer that permutes channels: its numbers, and which of the numbered channels stay."""

    tensor: str
    values: tuple[int, ...]
    kept: tuple[int, ...]

    def then(self, later: IndexChange) -> IndexChange:
        """This change followed by one of the small model."""
        return replace(self, kept=tuple(self.kept[channel] for channel in later.kept))


@dataclass(frozen=True)
class Rescale:
    """A weight to multiply, and the eps of its norm, so that statistics are the masked ones."""

    tensor: str
    factor: float
    module: str
    attribute: str  # empty when there is no eps to change
    old: float
    new: float


@dataclass(frozen=True)
class Cost:
    """Parameters, MACs and bytes of parameters and buffers."""

    params: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Which channels of which layers stay.

    A plan is independent of the weights: it applies to every instance of the architecture it
    was made for. ``print(plan)`` shows it as a table.

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
    evaluated: bool = False  # zeroed parameters do not make the masked model
    before: Cost = Cost(0, 0, 0)
    after: Cost = Cost(0, 0, 0)
    inputs: str = ""
    request: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether no statistics change (no renormalising group loses channels)."""
        return all(group.exact or len(group.kept) == group.size for group in self.groups)

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

    def check(self, model: nn.Module) -> None:
        """Raise unless the plan was made for the architecture of ``model``.

        Raises:
            PlanError: names the first tensors that differ.
        """
        if fingerprint(model) == self.architecture:
            return
        applied = getattr(model, "graphprune_plan", None)
        if applied == self:
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

    def then(self, later: Plan) -> Plan:
        """This plan followed by one for the model it makes, as one plan for the original.

        Args:
            later: a plan for a model made by this one.
        """
        first = {(slot.tensor, slot.dim): slot for slot in self.slots}
        slots = dict(first)
        for slot in later.slots:
            key = slot.tensor, slot.dim
            kept = first[key].kept if key in first else tuple(range(slot.size))
            size = first[key].size if key in first else slot.size
            slots[key] = replace(slot, size=size, kept=tuple(kept[index] for index in slot.kept))
        return Plan(
            architecture=self.architecture,
            groups=_compose_groups(self.groups, later.groups),
            slots=tuple(slots.values()),
            sizes=_compose(self.sizes, later.sizes, lambda c: (c.module, c.name, c.path)),
            literals=_compose(self.literals, later.literals, lambda c: (c.module, c.site, c.path)),
            indices=_compose_indices(self.indices, later.indices),
            scales=_compose_scales(self.scales, later.scales),
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
                shorten(group.layers),
            )
            for group in self.groups
        ]
        title = (
            f"parameters {self.before.params:,} -> {self.after.params:,} "
            f"({share(self.after.params, self.before.params)}), "
            f"MACs {self.before.macs:,} -> {self.after.macs:,} "
            f"({share(self.after.macs, self.before.macs)})"
        )
        return render(title, ("group", "channels", "kind", "layers"), rows)


Change = TypeVar("Change", SizeChange, LiteralChange)


def _compose(
    first: Sequence[Change], later: Sequence[Change], key: Callable[[Change], Hashable]
) -> tuple[Change, ...]:
    changes = {key(change): change for change in first}
    for change in later:
        old = changes[key(change)].old if key(change) in changes else change.old
        changes[key(change)] = replace(change, old=old)
    return tuple(changes.values())


def _compose_indices(
    first: Sequence[IndexChange], later: Sequence[IndexChange]
) -> tuple[IndexChange, ...]:
    changes = {change.tensor: change for change in first}
    for change in later:
        known = changes.get(change.tensor)
        changes[change.tensor] = change if known is None else known.then(change)
    return tuple(changes.values())


def _compose_scales(first: Sequence[Rescale], later: Sequence[Rescale]) -> tuple[Rescale, ...]:
    changes = {change.tensor: change for change in first}
    for change in later:
        known = changes.get(change.tensor, change)
        factor = change.factor if known is change else known.factor * change.factor
        changes[change.tensor] = replace(change, factor=factor, old=known.old)
    return tuple(changes.values())


def _compose_groups(
    first: Sequence[GroupPlan], later: Sequence[GroupPlan]
) -> tuple[GroupPlan, ...]:
    """Groups are matched by the layers they tie; one that cannot be matched is kept as it is."""
    known = {group.layers: group for group in first}
    groups = []
    for group in later:
        old = known.get(group.layers)
        if old is not None and len(old.kept) == group.size:
            kept = tuple(old.kept[index] for index in group.kept)
            exact = group.exact and (old.exact or len(old.kept) == old.size)
            group = replace(group, name=old.name, size=old.size, kept=kept, exact=exact)
        groups.append(group)
    return tuple(groups)


def share(part: float, whole: float) -> str:
    """A percentage, for tables."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def shorten(names: Iterable[str], most: int = 4) -> str:
    """A list of names for a table cell."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f", ... ({rest} more)" if rest > 0 else "")


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
    if isinstance(source, Path) or not source.lstrip().startswith(("{", "[")):
        try:
            return Path(source).read_text(), str(source)
        except (OSError, UnicodeDecodeError, ValueError) as error:
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
        evaluated=bool(body["evaluated"]),
        before=Cost(**body["before"]),
        after=Cost(**body["after"]),
        inputs=body["inputs"],
        request=dict(body["request"]),
    )
