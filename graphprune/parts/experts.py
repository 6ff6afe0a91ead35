"""Which experts leave: of every mixture the same share, those first that matter least."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from graphprune.errors import InputError, warn
from graphprune.parts.depth import Alone
from graphprune.parts.losses import without_losses
from graphprune.parts.mixtures import Experts, Mixtures
from graphprune.parts.score import Evidence
from graphprune.parts.stream import covers
from graphprune.parts.trial import goes_on
from graphprune.parts.usage import scores
from graphprune.plan.plan import Plan, SizeChange
from graphprune.planning.options import Request
from graphprune.record.tensors import fingerprint
from graphprune.text import shorten


def _free(mixture: Experts) -> list[list[int]]:
    """The experts of every group that can leave."""
    each = mixture.size // mixture.groups
    starts = range(0, mixture.size, each)
    return [[e for e in range(s, s + each) if e not in mixture.fixed] for s in starts]


def _each(mixture: Experts) -> int:
    """How many of a group can leave one after the other."""
    return len(_free(mixture)[0])


@dataclass
class MixtureLadder:
    """The experts of a model, in the order in which they leave.

    Args:
        found: the mixtures of a model.
        request: what is asked for.
        evidence: what experts are scored on.
    """

    found: Mixtures
    request: Request
    evidence: Evidence

    @cached_property
    def mixtures(self) -> tuple[Experts, ...]:
        """The mixtures of which experts may leave.

        Raises:
            InputError: there is none.
        """
        known = self.found.found
        if not known:
            reasons: dict[str, list[str]] = {}
            for name, why in self.found.refused.items():
                reasons.setdefault(why, []).append(name or "the model")
            told = [f"{shorten(names, 4)}: {why}" for why, names in reasons.items()]
            why = "; ".join(told) or "no mixture of them was found"
            raise InputError(f"no experts of this model can leave: {why}")
        left = tuple(mixture for mixture in known if not self._spared(mixture))
        if not left:
            raise InputError("no experts of this model can leave: all are kept")
        if not self._runs(left):
            left = tuple(mixture for mixture in left if self._runs([mixture]))
        if not left:
            raise InputError(
                "experts cannot leave: the outputs of the model would have other shapes, or its "
                "code does not run; say which outputs count, such as outputs='logits'"
            )
        return left

    def _runs(self, mixtures: Sequence[Experts]) -> bool:
        """Whether the code goes on when an expert of each group leaves."""
        kept = {
            m.name: [e for e in range(m.size) if e not in {g[0] for g in _free(m)}]
            for m in mixtures
        }
        plan = self._joined({m.name: m for m in mixtures}, kept)
        return goes_on(self.found.model, self.found.call, self.found.finder.record, plan)

    def _spared(self, mixture: Experts) -> bool:
        """Whether a pattern names a mixture, or something in it that is no expert."""
        containers = [container.name for container in mixture.whole.containers]
        names = [
            name
            for name in self.found.finder.modules
            if covers(mixture.name, name) and not any(name.startswith(f"{c}.") for c in containers)
        ]
        return any(fnmatch.filter(names, pattern) for pattern in self.request.keep)

    def _held(self, mixture: Experts) -> set[int]:
        """The experts that must be kept by their names."""
        return {
            expert
            for container in mixture.whole.containers
            for expert, key in enumerate(container.keys)
            for pattern in self.request.keep
            if any(
                fnmatch.fnmatchcase(name, pattern)
                for name in self._inside(f"{container.name}.{key}")
            )
        }

    def _inside(self, name: str) -> list[str]:
        """The names of an expert, its layers and its parameters."""
        module = self.found.model.get_submodule(name)
        return [
            ".".join(filter(None, (name, each)))
            for each, _ in (*module.named_modules(), *module.named_parameters())
        ]

    # --- how many -----------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """How often an expert of every group of a mixture can leave."""
        return max(self._most(mixture) for mixture in self.mixtures)

    def _most(self, mixture: Experts) -> int:
        return min((mixture.size - mixture.least) // mixture.groups, self._free(mixture))

    def _free(self, mixture: Experts) -> int:
        """How many of the experts of a group need not be kept."""
        return min(len(order) for order in self.order[mixture.name])

    def plan(self, count: int) -> Plan:
        """The plan after so many steps."""
        return self._without({m.name: min(count, self._most(m)) for m in self.mixtures})

    def share(self, ratio: float) -> Plan:
        """The plan by which a fraction of the experts of every mixture leaves.

        Raises:
            InputError: more would leave than can.
        """
        counts = {}
        for mixture in self.mixtures:
            counts[mixture.name] = count = round(ratio * _each(mixture))
            if count > self._most(mixture):
                stay = mixture.size - count * mixture.groups
                most = self._most(mixture) * mixture.groups
                raise InputError(
                    f"of the {mixture.size} experts of {mixture.name!r} {stay} would stay, and "
                    f"{mixture.size - most} must: so many are chosen at once, or kept; the largest "
                    f"ratio is {most / mixture.size:.3g}"
                )
        if ratio and not any(counts.values()):
            warn(f"no expert leaves: {ratio:.3g} of those of a mixture is less than half of one")
        return self._without(counts)

    def alone(self, fractions: Sequence[float]) -> Iterator[Alone]:
        """Every mixture, with the plans by which some of its experts leave."""
        for mixture in self.mixtures:
            each = _each(mixture)
            counts = dict.fromkeys(round(fraction * each) for fraction in fractions)
            plans = {
                count / each: self._without(dict.fromkeys(self.order, 0) | {mixture.name: count})
                for count in counts
                if 0 < count <= self._most(mixture)
            }
            yield "experts", mixture.name, mixture.modules, mixture.size, plans

    # --- which --------------------------------------------------------------------------------

    @cached_property
    def order(self) -> dict[str, list[list[int]]]:
        """The experts of every group of every mixture that may leave, in this order."""
        found = scores(self.found.model, self.mixtures, self.evidence, self.request)
        order = {}
        for mixture in self.mixtures:
            values, held = found[mixture.name], self._held(mixture)
            order[mixture.name] = [
                sorted((e for e in group if e not in held), key=lambda e: (values[e], -e))
                for group in _free(mixture)
            ]
        return order

    def _without(self, counts: dict[str, int]) -> Plan:
        kept = {}
        for mixture in self.mixtures:
            gone = {e for g in self.order[mixture.name] for e in g[: counts[mixture.name]]}
            kept[mixture.name] = [e for e in range(mixture.size) if e not in gone]
        return self._joined({mixture.name: mixture for mixture in self.mixtures}, kept)

    def _joined(self, mixtures: dict[str, Experts], kept: dict[str, list[int]]) -> Plan:
        """The plan by which these experts stay."""
        made = [mixtures[name].keeping(experts, self.found.model) for name, experts in kept.items()]
        made = [plan for plan in made if plan.experts[0].gone]
        plan = Plan(
            fingerprint(self.found.model),
            (),
            tuple(slot for plan in made for slot in plan.slots),
            tuple(change for plan in made for change in plan.sizes),
            experts=tuple(experts for plan in made for experts in plan.experts),
        )
        plan = replace(plan, sizes=(*plan.sizes, *self._outer(mixtures, kept)))
        if not self._losses or not plan.experts:
            return plan
        text = "outputs that are losses of mixtures count their experts: they are not compared"
        return replace(plan, request={"outputs": self._losses}, notes=(text,))

    @cached_property
    def _losses(self) -> dict[str, list[int]]:
        """The outputs that count where others are losses of mixtures, by mode."""
        return without_losses(self.found.model, self.found.call, self.found.found)

    def _outer(self, mixtures: dict[str, Experts], kept: dict[str, list[int]]) -> list[SizeChange]:
        """Attributes of modules around mixtures that say the same as those within."""
        found = []
        for name, module in self.found.finder.modules.items():
            around = [m for m in mixtures if (m != name and covers(name, m)) or (not name and m)]
            sizes = {(mixtures[m].size, len(kept[m])) for m in around}
            if len(sizes) != 1:
                continue
            old, new = sizes.pop()
            known = {attribute for m in around for _, attribute in mixtures[m].numbers}
            found += [
                SizeChange(name, attribute, (), old, new)
                for attribute, value in vars(module).items()
                if attribute in known and type(value) is int and value == old != new
            ]
        return found
