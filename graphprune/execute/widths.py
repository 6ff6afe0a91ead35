"""Which numbers in a config give a model its sizes: by trial, one field doubled at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import nn

from graphprune.execute.building import Field, Recipe
from graphprune.execute.likeness import plain_of, shapes_of

Sizes = dict[Any, float]


@dataclass
class Widths:
    """For which numbers in a config a model has the sizes that it should have."""

    recipe: Recipe
    base: Sizes
    wanted: Sizes
    wished: Sizes  # numbers that may be wrong as well, because no code reads them
    best: dict[Field, float] = field(default_factory=dict)
    effects: dict[Field, set[object]] = field(default_factory=dict)

    def sizes(self, changes: Mapping[Field, float]) -> Sizes | None:
        """The sizes of a model with some fields of its config changed."""
        try:
            return sizes_of(self.recipe.build(self.recipe.changed(changes)))
        except Exception:  # there is no model of these sizes
            return None

    def wrong(self, changes: Mapping[Field, float]) -> tuple[set[object], set[object]]:
        """What is not as wanted, and as wished; everything when there is no such model."""
        found = self.sizes(changes)
        if found is None:
            return set(self.wanted), set(self.wished)
        wanted = {key for key, size in self.wanted.items() if found.get(key) != size}
        return wanted, {key for key, size in self.wished.items() if found.get(key) != size}

    def run(self) -> set[Any]:
        """Search; what is still wrong with the ``best`` numbers."""
        moving = {key for key, size in self.wanted.items() if self.base.get(key) != size}
        if not moving:
            return set()
        numbers = self.recipe.numbers
        fields = {f: n for f, n in numbers.items() if _matters(n, self.base, moving)}
        for path, value in fields.items():
            doubled = self.sizes({path: 2 * value}) or self.base
            changed = {k for k, n in self.base.items() if doubled.get(k, n) != n}
            self.effects[path] = changed
        changes: dict[Field, float] = {}
        for path, value in fields.items():
            others = (self.effects[f] for f in fields if f != path)
            alone = self.effects[path].difference(*others)
            keys = (alone or self.effects[path]) & self.wanted.keys()
            guess = _guess(value, self.base, self.wanted, keys)
            if guess is not None:
                changes[path] = guess
        return self._improve(changes, fields, moving)

    def _improve(
        self, changes: dict[Field, float], fields: Mapping[Field, float], moving: set[object]
    ) -> set[object]:
        """Change one field after the other as long as less is wrong."""
        self.best, wrong = changes, self.wrong(changes)
        while any(wrong):
            for trial in self._trials(fields, moving, wrong):
                found = self.wrong(trial)
                if [*map(len, found)] < [*map(len, wrong)]:
                    self.best, wrong = trial, found
                    break
            else:
                break
        return wrong[0]

    def _trials(
        self,
        fields: Mapping[Field, float],
        moving: set[Any],
        wrong: tuple[set[object], set[object]],
    ) -> Iterator[dict[Field, float]]:
        """The best numbers with one field changed, of those that size what is wrong."""
        wanted, base = self.wanted, self.base
        ratios = {
            Fraction(int(wanted[key]), int(base[key]))
            for key in moving
            if type(base.get(key)) is int and base[key]
        }
        best = self.best
        nothing = len(wrong[0]) == len(wanted)  # there is no such model: any field may be to blame
        keys = wrong[0] | wrong[1] if nothing else wrong[0] or wrong[1]
        for path in fields:
            if self.effects[path] & keys and type(fields[path]) is int:
                yield from ({**best, path: int(fields[path] * ratio)} for ratio in ratios)

    def others(self) -> Iterator[dict[Field, float]]:
        """Other numbers by which no more is wrong: of what no code reads, either may be right."""
        wrong = self.wrong(self.best)
        if not wrong[1] or wrong[0]:
            return
        moving = {key for key, size in self.wanted.items() if self.base.get(key) != size}
        fields = {f: n for f, n in self.recipe.numbers.items() if f in self.effects}
        for trial in self._trials(fields, moving, wrong):
            found = self.wrong(trial)
            if trial != self.best and not found[0] and len(found[1]) <= len(wrong[1]):
                yield trial

    def explain(self, wrong: set[object]) -> str:
        """Why no numbers do."""
        key = min(wrong, key=str)
        size = self.wanted[key]
        found = (self.sizes(self.best) or self.base).get(key)
        for path, effect in self.effects.items():
            if key not in effect:
                continue
            for other in sorted(effect - {key}, key=str):
                same = self.base.get(other) == self.base.get(key)
                if same and self.wanted.get(other, size) != size:
                    return (
                        f"layers of one kind kept different numbers of channels ({_called(key)} "
                        f"{size}, {_called(other)} {self.wanted[other]}), which "
                        f"{'.'.join(map(str, path))} sizes together"
                    )
        if found is None or not self.best:
            return f"no field of it sizes {_called(key)}, which is {size} in this model"
        return (
            f"it cannot be {size} for {_called(key)} together with all other sizes "
            f"(it would be {found})"
        )


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes of tensors, and the numbers that modules hold."""
    numbers = {k: v for k, v in plain_of(model).items() if type(v) in (int, float)}
    return {**shapes_of(model), **numbers}


def _called(key: Any) -> str:
    owner, part = key
    return f"{owner}[{part}]" if isinstance(part, int) else ".".join(filter(None, key))


def _guess(value: float, base: Sizes, wanted: Sizes, keys: set[object]) -> float | None:
    """The value of a field by which most of the sizes that follow it would come out right."""
    votes: Counter[float] = Counter()
    for key in keys:
        new, old = value * wanted[key], base[key]
        if type(value) is float and old == value:
            votes[wanted[key]] += 1
        elif type(new) is type(old) is int and old and new and new % old == 0:
            votes[new // old] += 1
    return votes.most_common(1)[0][0] if votes else None


def _matters(value: float, base: Sizes, moving: set[object]) -> bool:
    if type(value) is float:
        return any(base.get(key) == value for key in moving)
    return any(type(n) is int and n % value == 0 for n in map(base.get, moving))
