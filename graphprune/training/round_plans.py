"""The plan of one round: from the present model to a sparsity of the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from graphprune.api import ChannelGraph, trace
from graphprune.criteria import check_needs, find
from graphprune.errors import InputError
from graphprune.plan.plan import Plan
from graphprune.planning.draft import Draft, matching
from graphprune.planning.kinds import check_channels_alone
from graphprune.planning.naming import named
from graphprune.planning.options import Request
from graphprune.record.batches import check_data

QUANTITIES = ("channels", "macs", "params", "bytes")
_OWN = ("ratio", "ratios", "target")  # options of a plan that the sparsity takes the place of


class RoundPlans:
    """Plans for smaller and smaller models, all measured by the original.

    A fraction is always one of the original: small steps add up exactly, however they are rounded,
    and ``min_kept`` and ``max_kept`` mean the original's channels.

    Args:
        model: the original.
        example_inputs: as for ``graphprune.trace``.
        quantity: of what a sparsity is a fraction.
        attention: as for ``graphprune.trace``.
        options: as for ``graph.plan``.
        rounds: how many plans will be made.

    Raises:
        InputError: an option that has no place here.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        quantity: str,
        attention: str,
        options: Mapping[str, Any],
        rounds: int,
    ) -> None:
        if quantity not in QUANTITIES:
            raise InputError(f"quantity must be one of {', '.join(QUANTITIES)}, not {quantity!r}")
        for name in _OWN:
            if name in options:
                raise InputError(f"{name} is what the sparsity says round by round: leave it out")
        check_channels_alone(options)
        options = named(options, model)
        self.request = Request.of(0.0, options)
        if self.request.data is not None:
            check_data(self.request.data, passes=rounds)
        check_needs(find(self.request.criterion), self.request.data)
        told = {**self.request.said(), "criterion": self.request.named}
        self.told = {name: told[name] for name in sorted(told)}  # what another run is compared with
        self.quantity, self.attention = quantity, attention
        self.options = dict(options)
        graph = trace(model, example_inputs, attention=attention)
        self.call = graph.call
        self.cost = graph.plan(0.0, criterion="random").before
        self.sizes = {group.layers: group.size for group in graph.groups}

    def plan(self, model: nn.Module, sparsity: float) -> Plan:
        """What leaves a model so that this fraction of the original is gone.

        Raises:
            InputError: as ``graph.plan``.
        """
        graph = trace(model, self.call, attention=self.attention)
        options = {**self.options, **self._limits(graph)}
        if self.quantity != "channels":
            amount = (1 - sparsity) * getattr(self.cost, self.quantity)
            now = getattr(graph.plan(0.0, criterion="random").before, self.quantity)
            if amount >= now:
                return graph.plan(0.0, **options)
            return graph.plan(target={self.quantity: amount}, **options)
        if options.get("scope", "local") in (None, "local"):
            draft = Draft(model, graph.call, graph.settled, self.request)
            ratios = {
                group.name: self._ratio(group.size, self._size(group), sparsity)
                for group in graph.groups
                if group.name not in draft.spared and draft.may_leave(group)
            }
            return graph.plan(0.0, ratios=ratios, **options)
        now = sum(group.size for group in graph.groups)
        size = sum(self._size(group) for group in graph.groups)
        return graph.plan(self._ratio(now, size, sparsity), **options)

    def _ratio(self, now: int, size: int, sparsity: float) -> float:
        """The fraction of the channels there are now that still has to go."""
        wanted = int(sparsity * size + 1e-9) - (size - now)
        return max(0, min(wanted, now - 1)) / now

    def _size(self, group: Any) -> int:
        """How many channels a group had in the original."""
        return max(self.sizes.get(group.layers, 0), group.size)

    def _limits(self, graph: ChannelGraph) -> dict[str, object]:
        """Fractions of the original's channels as fractions of those there are now."""
        limits: dict[str, Any] = {}
        for name in ("min_kept", "max_kept"):
            if name not in self.options:
                continue
            given = self.options[name]
            limits[name] = {}
            for pattern, fraction in (
                given if isinstance(given, Mapping) else {"*": given}
            ).items():
                for group in matching(graph.analysis, pattern, f"{name} pattern"):
                    if not group.frozen:
                        now = min(1.0, fraction * self._size(group) / group.size)
                        limits[name][group.name] = now
        return {name: limit for name, limit in limits.items() if limit}
