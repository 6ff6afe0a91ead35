"""How many entries lists of modules have, by the config that a model is built from: by trial.

A number that is as large as a list was is made as small as the list is, and lists in the config of
that length lose the places of what left. What then builds the modules of the small model is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphprune.execute.building import Field, Recipe, computed_from, lists_of, numbers_of
from graphprune.execute.likeness import plain_of, shapes_of
from graphprune.execute.numbering import Entries, Numbering
from graphprune.record.tensors import named_modules
from graphprune.text import shorten

Changes = dict[Field, Any]
Wrong = tuple[int, int, int]  # modules, attributes, sizes


@dataclass
class Depths:
    """The search for a config that builds lists without what left them.

    Args:
        recipe: how the model is made; its config is not changed.
        small: the model, its entries numbered one after the other.
        numbering: the lists.
    """

    recipe: Recipe
    small: nn.Module
    numbering: Numbering

    def __post_init__(self) -> None:
        self.modules = {name for name, _ in named_modules(self.small)}
        self.plain, self.shapes = plain_of(self.small), shapes_of(self.small)
        self.numbers = dict(numbers_of(self.recipe.config))
        self.lists = dict(lists_of(self.recipe.config))

    def search(self) -> tuple[Changes, str]:
        """What to change in the config; or why nothing does."""
        short = [each for each in self.numbering.lists if len(each.kept) < len(each.held)]
        best: Changes = {}
        wrong = self._wrong(best)
        for trials in (self._lengths, self._places):
            while wrong[:2] > (0, 0):
                for trial in trials(short, best):
                    found = self._wrong(trial)
                    if found[:2] < wrong[:2]:
                        best, wrong = trial, found
                        break
                else:
                    break
        return best, "" if wrong[0] == 0 else self._explained(short, best)

    def _wrong(self, changes: Mapping[Field, Any]) -> Wrong:
        """How many modules, attributes that are no whole numbers, and sizes are not as wanted."""
        try:
            built = self.recipe.build(self.recipe.changed(changes))
        except Exception:  # there is no such model
            return 2 * len(self.modules), 0, 0
        names = {name for name, _ in named_modules(built)}
        plain, shapes = plain_of(built), shapes_of(built)
        others = (
            key
            for key in plain.keys() & self.plain.keys()
            if type(plain[key]) is not int and plain[key] != self.plain[key]
        )
        sizes = (key for key, size in shapes.items() if self.shapes.get(key) != size)
        return len(names ^ self.modules), sum(1 for _ in others), sum(1 for _ in sizes)

    def _lengths(self, short: Sequence[Entries], known: Changes) -> Iterator[Changes]:
        """Numbers that are as large as a list was, with lists in the config of that length."""
        for each in short:
            size, kept = len(each.held), each.kept
            for path, number in self.numbers.items():
                if type(number) is int and number == size and not self._inside(path, known):
                    beside = {
                        other: type(items)(items[place] for place in kept)
                        for other, items in self.lists.items()
                        if other[:-1] == path[:-1] and len(items) == size
                    }
                    best = self._beside({**known, path: len(kept)}, beside)
                    more = computed_from(self.recipe.config, path, len(kept))
                    more = {p: item for p, item in more.items() if p not in best}
                    fits = more and self._wrong({**best, **more}) <= self._wrong(best)
                    yield {**best, **more} if fits else best

    def _beside(self, changes: Changes, lists: Changes) -> Changes:
        """Changes with those of some lists by which least is wrong."""
        best = {**changes, **lists}
        if not lists:
            return best
        wrong = self._wrong(best)
        trials = [changes]
        trials += [{**changes, **{p: v for p, v in lists.items() if p != one}} for one in lists]
        trials += [{**changes, one: lists[one]} for one in lists]
        for trial in trials if len(lists) > 1 else trials[:1]:
            found = self._wrong(trial)
            if found < wrong:
                best, wrong = trial, found
        return best

    def _places(self, short: Sequence[Entries], known: Changes) -> Iterator[Changes]:
        """Numbers and lists that name places in a list: those behind what left move up."""
        for each in short:
            new = {place: number for number, place in enumerate(each.kept)}
            size = len(each.held)
            for path, items in self.lists.items():
                named = all(type(item) is int and 0 <= item < size for item in items)
                if items and named and len({*items}) == len(items) and path not in known:
                    yield {**known, path: type(items)(new[item] for item in items if item in new)}
            for path, number in self.numbers.items():
                free = path not in known and not self._inside(path, known)
                if free and type(number) is int and 0 < number <= size:
                    before = sum(place < number for place in each.kept)
                    if before != number:
                        yield {**known, path: before}

    def _inside(self, path: Field, known: Changes) -> bool:
        """Whether a number lies in a list that changes as a whole."""
        return any(path[: len(other)] == other for other in known if other in self.lists)

    def _explained(self, short: Sequence[Entries], best: Changes) -> str:
        """Why no numbers do."""
        sizes = _sizes(self.small)
        first, found = self._built_sizes({}), self._built_sizes(best)
        for each in short:
            for path, number in self.numbers.items():
                made = self._built_sizes({path: len(each.kept)} if number == len(each.held) else {})
                moved = [name for name, size in made.items() if first.get(name, size) != size]
                shared = [name for name in moved if sizes.get(name, -1) != made[name]]
                if shared and each.name in moved and each.name not in shared:
                    return (
                        f"{'.'.join(map(str, path))} of it says how many entries {each.name} has "
                        f"together with {shorten(shared, 3)}"
                    )
        for each in short:
            if found.get(each.name, len(each.held)) != len(each.kept):
                return (
                    f"no field of it says that {each.name or 'the model'} has {len(each.kept)} of "
                    f"{len(each.held)} entries"
                )
        names = shorten([each.name for each in short], 3)
        return f"no field of it says which entries of {names} left, and they are not alike"

    def _built_sizes(self, changes: Changes) -> dict[str, int]:
        try:
            return _sizes(self.recipe.build(self.recipe.changed(changes)))
        except Exception:  # there is no such model
            return {}


def _sizes(model: nn.Module) -> dict[str, int]:
    """How many entries the lists of a model have."""
    lists = (nn.ModuleList, nn.Sequential)
    return {n: len(m._modules) for n, m in named_modules(model) if isinstance(m, lists)}
