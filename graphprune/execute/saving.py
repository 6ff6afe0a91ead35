"""What stands in for ``save_pretrained`` where the config of a model does not say its sizes.

Floors above know the layouts of libraries: what they can write, plan and all, they write.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from graphprune.errors import ModelError
from graphprune.plan.plan import Plan, plan_of
from graphprune.record.tensors import held_tensors, named_modules

ADVICE = "use graphprune.save and graphprune.load"


@dataclass
class Origin:
    """What the config of a model said before a plan, and after it.

    Of the fields that changed, a folder that holds the plan has the first values.
    """

    before: Any
    after: Any

    def of(self, config: Any) -> Any:
        """A copy of a config, with what it said before the plan where that changed it."""
        return _reverted(copy.deepcopy(config), self.before, self.after)


def _reverted(now: Any, before: Any, after: Any) -> Any:
    if isinstance(now, Mapping):
        items = dict(now)
        changed = {k: v for k, v in before.items() if k not in after or after[k] != v}
        kind: Any = type(now)
        return kind({**items, **changed})
    mine, was, then = vars(now), vars(before), vars(after)
    for key, value in was.items():
        if key in mine and key in then and callable(getattr(value, "to_dict", None)):
            _reverted(mine[key], value, then[key])
        elif key not in then or then[key] != value:
            mine[key] = copy.deepcopy(value)
    return now


@dataclass
class Offer:
    """What is known of a model whose config does not say its sizes.

    Attributes:
        module: a small model, or a part of one.
        plan: of the whole model, from its original.
        names: the tensors of the part, by their names in the whole.
        name: of the part in the whole.
        reason: why its config does not say it.
        origin: what its config said.
    """

    module: nn.Module
    plan: Plan
    names: Mapping[str, str]
    name: str
    reason: str
    origin: Origin | None


class Writer(Protocol):
    """Writes folders of some library."""

    def fits(self, offer: Offer) -> bool:
        """Whether it knows how."""

    def whole(self, offer: Offer) -> bool:
        """Whether the model's own ``save_pretrained`` does, as its parts are saved by theirs."""

    def write(self, offer: Offer, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Write a folder; arguments are those of ``save_pretrained``."""


WRITERS: list[Writer] = []  # bound by floors above


@dataclass
class Refusal:
    """Takes the place of ``save_pretrained`` where the config cannot express the sizes.

    Where a writer fits the model, the folder holds the plan; all others say what to do instead.
    """

    name: str
    reason: str = "its sizes have changed"
    offer: Offer | None = field(default=None, repr=False)

    @classmethod
    def of(cls, whole: nn.Module, name: str, reason: str, origin: Origin | None) -> Refusal:
        """For a part of a small model, by its name."""
        module = whole.get_submodule(name)
        plan = plan_of(whole)
        kind = type(module).__name__
        if plan is None:
            return cls(kind, reason)
        mine = {id(tensor): own for own, tensor in held_tensors(module)}
        names = {n: mine[id(tensor)] for n, tensor in held_tensors(whole) if id(tensor) in mine}
        return cls(kind, reason, Offer(module, plan, names, name, reason, origin))

    @property
    def writer(self) -> Writer | None:
        """What writes such a model all the same."""
        offer = getattr(self, "offer", None)
        return next((w for w in WRITERS if offer is not None and w.fits(offer)), None)

    @property
    def needed(self) -> bool:
        """Whether what it stands in for would write something wrong."""
        writer, offer = self.writer, getattr(self, "offer", None)
        return writer is None or offer is None or not writer.whole(offer)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Write a folder that holds the plan, or say what to do instead."""
        writer, offer = self.writer, getattr(self, "offer", None)
        if writer is not None and offer is not None:
            return writer.write(offer, args, options)
        reason = getattr(self, "reason", "its sizes have changed")
        raise ModelError(f"{cannot(self.name, reason)}; {ADVICE}")

    @property
    def warning(self) -> str:
        """What is told when it takes its place."""
        if self.writer is None:
            told = f"{ADVICE}; {self.name}.save_pretrained refuses"
        else:
            told = (
                f"{self.name}.save_pretrained writes the plan beside it: load such a folder with "
                "graphprune.from_pretrained, or with trust_remote_code=True"
            )
        return f"{cannot(self.name, self.reason)}; {told}"


def cannot(kind: str, reason: str) -> str:
    """Why a config does not do."""
    return f"the config of {kind} cannot express this model: {reason}"


def saved(module: nn.Module) -> bool:
    """Whether a model has a method that writes its config beside its weights."""
    return callable(getattr(type(module), "save_pretrained", None))


def configs_by_part(model: nn.Module) -> dict[str, Any]:
    """Copies of the configs of all parts that are saved."""
    memo: dict[int, Any] = {}
    return {
        name: copy.deepcopy(getattr(module, "config", None), memo)
        for name, module in named_modules(model)
        if saved(module)
    }


def remember(small: nn.Module, before: Mapping[str, Any]) -> None:
    """Let the parts of a small model remember what their configs said before the first plan."""
    now = configs_by_part(small)
    for name, config in before.items():
        if config is None or now.get(name) is None:
            continue
        mine = vars(small.get_submodule(name))
        known = mine.get("graphprune_origin")
        first = known.of(config) if isinstance(known, Origin) else config
        mine["graphprune_origin"] = Origin(first, now[name])


def origin_of(module: nn.Module) -> Origin | None:
    """What its config said."""
    found = vars(module).get("graphprune_origin")
    return found if isinstance(found, Origin) else None
