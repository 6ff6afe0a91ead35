"""Models that are built from a config: let the config of a small model say its sizes.

Which field sizes what is found out by building the model with one field doubled at a time; nothing
is known of any library beyond ``model.config`` and ``type(model)(config)``. A config changes only
when the model that it builds is the small model; otherwise it stays, and what would write it into
a file that nobody can load refuses, and says why.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import nn

from graphprune.errors import ModelError, warn
from graphprune.execute.building import (
    Field,
    Recipe,
    configs_of,
    numbers_of,
    put,
    reread,
)
from graphprune.execute.emptied import Emptied
from graphprune.execute.forward import Rewritten
from graphprune.execute.likeness import (
    Likeness,
    Plain,
    Seen,
    compare,
    filled,
    plain_of,
    reader,
    same_outputs,
    shapes_of,
    used,
    watch,
)
from graphprune.record.inputs import Call
from graphprune.record.norms import EXACT
from graphprune.record.tensors import named_modules
from graphprune.text import shorten

Sizes = dict[Any, float]
ADVICE = "use graphprune.save and graphprune.load"


@dataclass
class Before:
    """What is to be known of a model before it is made smaller."""

    shapes: Sizes
    plain: Plain

    @classmethod
    def of(cls, model: nn.Module) -> Before | None:
        """What configs must follow; ``None`` where no part of the model has or writes one."""
        found = any(_saved(module) or Recipe.of(module) for _, module in named_modules(model))
        return cls(dict(shapes_of(model)), plain_of(model)) if found else None

    def part(self, name: str) -> Plain:
        """The attributes of a part of the model, named from there."""
        return _below(self.plain, name)


def _below(plain: Plain, name: str) -> Plain:
    head = f"{name}." if name else ""
    return {
        ("" if owner == name else owner.removeprefix(head), key): value
        for (owner, key), value in plain.items()
        if owner == name or owner.startswith(head)
    }


def _saved(module: nn.Module) -> bool:
    """Whether a model has a method that writes its config beside its weights."""
    return callable(getattr(type(module), "save_pretrained", None))


def follow_config(small: nn.Module, before: Before, call: Call | None = None) -> None:
    """Write the sizes of a small model into its config, or make ``save_pretrained`` say why not.

    Args:
        small: the configs in it are replaced by others, when a model built from these is the
            same: shapes, attributes, values that no file holds, and outputs.
        before: the model that it was made of.
        call: example inputs; without them the code must not read what changes in the config.

    Warns:
        PruningWarning: a config stays, and something would write it into a file.
    """
    if dict(shapes_of(small)) == before.shapes and plain_of(small) == before.plain:
        return
    parts = dict(_parts(small))
    seen = _watched(small, list(parts), call)
    refused: dict[int, str] = {}
    told: dict[str, str] = {}
    for name, module in parts.items():
        vars(module).pop("save_pretrained", None)
        config = getattr(module, "config", None)
        reason = refused.get(id(config)) or _gone(module)
        reason = reason or _follow(module, _below(before.plain, name), name, seen)
        if reason:
            refused[id(config)] = reason
        if reason and _saved(module):
            vars(module)["save_pretrained"] = Refusal(type(module).__name__, reason)
            told.setdefault(reason, type(module).__name__)
    for reason, kind in told.items():
        warn(f"{_refusal(kind, reason)}; {kind}.save_pretrained refuses")


def _gone(module: nn.Module) -> str:
    """Which modules have left, and would be built again, or count no channels that left."""
    gone = [name for name, part in named_modules(module) if isinstance(part, Emptied)]
    if gone:
        return f"a model built from it has {shorten(gone, 3)}"
    exact = [name for name, part in named_modules(module) if type(part) in EXACT.values()]
    plain = f"the norms of a model built from it do not count what left: {shorten(exact, 3)}"
    return plain if exact else ""


def _parts(small: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are built from a config of their own, or saved by one, outer ones first."""
    known: set[int] = set()
    for name, module in named_modules(small):
        config = getattr(module, "config", None)
        recipe = Recipe.of(module)
        inside = recipe is not None and (id(config) in known or not _saved(module))
        if (recipe or _saved(module)) and not (name and inside):
            yield name, module
        if recipe is not None:
            known.update(_identities(module, config))


def _identities(module: nn.Module, config: object) -> set[int]:
    """All configs that a module and its parts hold: they change with its own."""
    return {id(config), *(id(value) for _, _, value in configs_of(module, config))}


def _watched(small: nn.Module, parts: list[str], call: Call | None) -> Seen | None:
    """One run of the small model; ``None`` when there are no inputs, or it does not run on them."""
    if call is None:
        return None
    try:
        return watch(small, parts, call)
    except Exception:  # whoever calls the model will see the error
        return None


@dataclass
class _Search:
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
            return _sizes(self.recipe.build(self.recipe.changed(changes)))
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
        wanted, base = self.wanted, self.base
        ratios = {
            Fraction(int(wanted[key]), int(base[key]))
            for key in moving
            if type(base.get(key)) is int and base[key]
        }
        self.best, wrong = changes, self.wrong(changes)
        while any(wrong):
            trials = (
                {**self.best, path: int(fields[path] * ratio)}
                for path in fields
                if self.effects[path] & (wrong[0] or wrong[1]) and type(fields[path]) is int
                for ratio in ratios
            )
            for trial in trials:
                found = self.wrong(trial)
                if [*map(len, found)] < [*map(len, wrong)]:
                    self.best, wrong = trial, found
                    break
            else:
                break
        return wrong[0]

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


def _called(key: Any) -> str:
    owner, part = key
    return f"{owner}[{part}]" if isinstance(part, int) else ".".join(filter(None, key))


def _sizes(model: nn.Module) -> Sizes:
    """The sizes of tensors, and the numbers that modules hold."""
    numbers = {k: v for k, v in plain_of(model).items() if type(v) in (int, float)}
    return {**shapes_of(model), **numbers}


def _follow(small: nn.Module, before: Plain, name: str, seen: Seen | None) -> str:
    """Change the configs of a part of a small model; why that cannot be done, else nothing."""
    recipe = Recipe.of(small)
    if recipe is None:
        return "it has no config that says sizes"
    try:
        original = _base(recipe, small)
    except Exception as error:
        return f"it cannot be built from that alone ({type(error).__name__}: {error})"[:300]
    now = plain_of(small)
    numbers = {key: n for key, n in now.items() if type(n) in (int, float)}
    moved = {key: n for key, n in numbers.items() if before.get(key) != n}
    wanted: Sizes = {**shapes_of(small), **moved}
    base = _sizes(original)
    wished = {key: n for key, n in numbers.items() if key in base and key not in moved}
    odd = sorted({owner for owner, _ in shapes_of(small).keys() ^ shapes_of(original).keys()})
    if odd:
        return f"it builds other tensors: {shorten(odd, 3)}"
    search = _Search(recipe, base, wanted, wished)
    wrong = search.run()
    if wrong:
        return search.explain(wrong)
    changed = recipe.changed(search.best)
    try:
        written = reread(changed)
        built = recipe.build(written, real=recipe.real)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"it refuses these sizes ({type(error).__name__}: {' '.join(lines)})"[:400]
    return _adopt(small, built, original, before, recipe, search.best, name, seen)


def _base(recipe: Recipe, small: nn.Module) -> nn.Module:
    """What the config builds as it is, without the parts that the model was made without."""
    try:
        original = recipe.build(recipe.config)
        if _unknown(original):
            raise ValueError("values are needed")
    except Exception:
        recipe.real = True
        original = recipe.build(recipe.config)
    mine = {name for name, _ in named_modules(small)}
    extra: list[str] = []
    for name, _ in named_modules(original):
        if name not in mine and not any(name.startswith(f"{other}.") for other in extra):
            extra.append(name)
    if extra:
        recipe.without = tuple(extra)
        original = recipe.build(recipe.config)
    return original


def _unknown(model: nn.Module) -> bool:
    """Whether tensors that no file holds were left without values."""
    saved = set(model.state_dict(keep_vars=True))
    return any(
        tensor is not None
        and tensor.is_meta
        and (f"{prefix}.{name}" if prefix else name) not in saved
        for prefix, module in named_modules(model)
        for name, tensor in module._buffers.items()
    )


def _adopt(
    small: nn.Module,
    built: nn.Module,
    original: nn.Module,
    before: Plain,
    recipe: Recipe,
    changes: Mapping[Field, float],
    name: str,
    seen: Seen | None,
) -> str:
    """Take over the configs of what was built when it is the small model; else say what differs."""
    found = compare(small, built, before, plain_of(original))
    if found.problem:  # a file may forget what the config of the original says, too
        forgetful = recipe.build(reread(recipe.config), real=recipe.real)
        found = compare(small, built, before, plain_of(forgetful))
    if found.problem:
        return found.problem
    inputs = seen.inputs.get(name) if seen is not None else None
    if seen is None or inputs is None or name not in seen.outputs:
        problem = _unread(small, recipe, changes, found)
    else:
        problem = same_outputs(filled(built, small), inputs, seen.outputs[name], training=False)
        problem = problem or _in_training(small, built, inputs, found)
    if problem:
        return problem
    for (owner, key), value in found.follow.items():
        vars(small.get_submodule(owner))[key] = value
    _replace_configs(small, original, built, recipe.config)
    return ""


def _in_training(small: nn.Module, built: nn.Module, inputs: Call, found: Likeness) -> str:
    """Attributes that only train mode may read are compared there."""
    modules = dict(named_modules(small))
    kinds: list[tuple[object, str]] = [(type(modules[owner]), key) for owner, key in found.follow]
    if not any(key in used(kind) for kind, key in kinds):
        return ""
    try:
        other = watch(small, [""], inputs, training=True)
    except Exception:  # it trains on other inputs, such as those with labels
        return ""
    return same_outputs(filled(built, small), inputs, other.outputs[""], training=True)


def _unread(
    small: nn.Module, recipe: Recipe, changes: Mapping[Field, float], found: Likeness
) -> str:
    """Why code may see that the config has changed; there are no inputs that show it does not."""
    advice = "pass example_inputs to rebuild, which show whether that matters"
    held = {"config", *(key for _, key, _ in configs_of(small, recipe.config))}
    names = held | {str(step) for path in changes for step in path[:-1]}
    for path in changes:
        method = reader(small, str([step for step in path if isinstance(step, str)][-1]), names)
        if method:
            return f"{method} reads {'.'.join(map(str, path))} of it: {advice}"
    modules = dict(named_modules(small))
    for owner, key in found.follow:
        kind: object = type(modules[owner])
        if key in used(kind):
            return f"it changes {'.'.join(filter(None, (owner, key)))}, which is read: {advice}"
    if any(isinstance(vars(module).get("forward"), Rewritten) for module in modules.values()):
        return f"numbers in the code of this model were changed: {advice}"
    return ""


def _replace_configs(
    small: nn.Module, original: nn.Module, built: nn.Module, config: object
) -> None:
    """Give the modules of a small model new configs with the numbers of those in ``built``."""
    old = {(name, key): value for name, key, value in configs_of(original, config)}
    new = {(name, key): value for name, key, value in configs_of(built, config)}
    held = list(configs_of(small, config))
    memo: dict[int, object] = {}
    made: dict[int, object] = {}
    for name, key, value in held:
        if (name, key) not in old or (name, key) not in new:
            continue
        copied = made.get(id(value))
        if copied is None:
            copied = copy.deepcopy(value, memo)
        was, now = (dict(numbers_of(configs[name, key])) for configs in (old, new))
        for path, number in now.items():
            if path in was and was[path] != number:
                copied = put(copied, path, number)
        made[id(value)] = copied
    for name, key, value in held:
        if id(value) in made:
            vars(small.get_submodule(name))[key] = made[id(value)]


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


def _refusal(kind: str, reason: str) -> str:
    return f"the config of {kind} cannot express this model: {reason}; {ADVICE}"


class Refusal:
    """Takes the place of ``save_pretrained`` where the config cannot express the sizes."""

    def __init__(self, name: str, reason: str = "its sizes have changed") -> None:
        self.name, self.reason = name, reason

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Say what to do instead."""
        raise ModelError(_refusal(self.name, getattr(self, "reason", "its sizes have changed")))
