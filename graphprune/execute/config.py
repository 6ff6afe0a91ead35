"""Models that are built from a config: let the config of a small model say its sizes.

Which field sizes what is found out by building the model with one field doubled at a time; nothing
is known of any library beyond ``model.config`` and ``type(model)(config)``. A config changes only
when the model that it builds is the small model; otherwise it stays, and what would write it into
a file that nobody can load refuses, and says why.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from graphprune.errors import warn
from graphprune.execute.building import (
    Field,
    Recipe,
    configs_of,
    lists_of,
    numbers_of,
    put,
    reread,
)
from graphprune.execute.depths import Changes, Depths
from graphprune.execute.emptied import Emptied
from graphprune.execute.forward import Rewritten
from graphprune.execute.likeness import (
    Likeness,
    Plain,
    Seen,
    alike,
    compare,
    filled,
    plain_of,
    reader,
    same_outputs,
    shapes_of,
    used,
    watch,
)
from graphprune.execute.numbering import Counted, Numbering
from graphprune.execute.saving import Refusal, configs_by_part, origin_of, remember, saved
from graphprune.execute.widths import Sizes, Widths, sizes_of
from graphprune.record.inputs import Call
from graphprune.record.norms import EXACT
from graphprune.record.tensors import named_modules
from graphprune.text import shorten


@dataclass
class Before:
    """What is to be known of a model before it is made smaller."""

    shapes: Sizes
    plain: Plain
    configs: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module) -> Before | None:
        """What configs must follow; ``None`` where no part of the model has or writes one."""
        if not any(saved(module) or Recipe.of(module) for _, module in named_modules(model)):
            return None
        return cls(dict(shapes_of(model)), plain_of(model), configs_by_part(model))

    def changed(self, small: nn.Module) -> bool:
        """Whether a small model is another one."""
        return dict(shapes_of(small)) != self.shapes or plain_of(small) != self.plain

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
    if not before.changed(small):
        return
    reasons = _unsaid(small, before, call)
    remember(small, before.configs)
    for name, reason in reasons.items():
        _refuse(small, name, before, reason)
    told: dict[str, Refusal] = {}
    for name, reason in reasons.items():
        refusal = vars(small.get_submodule(name)).get("save_pretrained")
        if isinstance(refusal, Refusal):
            told.setdefault(reason, refusal)
    for refusal in told.values():
        warn(refusal.warning)


def unsaid(small: nn.Module, before: Before, call: Call | None = None) -> str:
    """Why the configs of a small model cannot say its sizes; nothing where they can.

    Args:
        small: its configs follow where they can.
        before: the model that it was made of.
        call: example inputs.
    """
    return next(iter(_unsaid(small, before, call).values()), "")


def _unsaid(small: nn.Module, before: Before, call: Call | None) -> dict[str, str]:
    """Why configs cannot follow, by the names of parts; all others follow."""
    parts = dict(_parts(small))
    seen = _watched(small, list(parts), call)
    refused: dict[int, str] = {}
    reasons: dict[str, str] = {}
    for name, module in parts.items():
        config = getattr(module, "config", None)
        reason = refused.get(id(config)) or _counted(small, before.part(name), name, seen, call)
        if reason:
            reasons[name] = reason
            if Recipe.of(module) is not None:
                refused[id(config)] = reason
    return reasons


def _counted(
    small: nn.Module, before: Plain, name: str, seen: Seen | None, call: Call | None
) -> str:
    """Let the configs of a part follow, its lists without what left; why that cannot be done."""
    part = small.get_submodule(name)
    for _, module in named_modules(part):
        if isinstance(vars(module).get("save_pretrained"), Refusal | Counted):
            del vars(module)["save_pretrained"]
    numbering = Numbering.of(part)
    numbering.apply()
    reason = _gone(part, numbering)
    if reason:
        numbering.undo()
        return reason
    states = [(module, type(module), dict(vars(module))) for _, module in named_modules(part)]
    reason = _follow(part, numbering.now(before), name, seen, numbering)
    if reason or not numbering.lists:
        numbering.undo()
        return reason
    numbering.keep()
    if seen is not None and not _same(small, name, seen, call):
        for module, kind, state in states:
            module.__class__ = kind
            vars(module).update(state)
        numbering.undo()
        return "its code counts on entries of lists that have left"
    for _, module in named_modules(part):
        if saved(module):
            vars(module)["save_pretrained"] = Counted(module)
    return ""


def _refuse(small: nn.Module, name: str, before: Before, reason: str) -> None:
    """Let ``save_pretrained`` of a part refuse, and of all in it that has changed."""
    part = small.get_submodule(name)
    for inner, module in named_modules(part):
        head = ".".join(filter(None, (name, inner)))
        changed = any(isinstance(each, Emptied) for _, each in named_modules(module)) or any(
            before.shapes.get((f"{head}.{tensor}".lstrip("."), dim), size) != size
            for (tensor, dim), size in shapes_of(module).items()
        )
        if saved(module) and (module is part or changed):
            refusal = Refusal.of(small, head, reason, origin_of(module))
            if refusal.needed:
                vars(module)["save_pretrained"] = refusal


def _same(small: nn.Module, name: str, seen: Seen, call: Call | None) -> bool:
    """Whether a part of the small model still returns what it did."""
    again = _watched(small, [name], call)
    return again is not None and alike(seen.outputs.get(name, []), again.outputs.get(name, []))


def _gone(part: nn.Module, numbering: Numbering) -> str:
    """What a model built from the config has: modules that left otherwise, norms that are plain."""
    old = {new: name for name, new in numbering.names.items()}
    gone = [old[new] for new, module in named_modules(part) if isinstance(module, Emptied)]
    if gone:
        return f"a model built from it has {shorten(gone, 3)}"
    exact = [old[new] for new, module in named_modules(part) if type(module) in EXACT.values()]
    plain = f"the norms of a model built from it do not count what left: {shorten(exact, 3)}"
    return plain if exact else ""


def refuse_loaded(small: nn.Module, before: Before | None) -> None:
    """Let ``save_pretrained`` of a model that was loaded with a plan know of the plan.

    Its configs say what those of the original say.
    """
    if before is None or not before.changed(small):
        return
    remember(small, before.configs)
    for name, module in _parts(small):
        gone = [n for n, part in named_modules(module) if isinstance(part, Emptied)]
        built = shorten(gone, 3) if gone else "the sizes of the original"
        reason = (
            f"a model built from it has {built} (rebuild(model, plan, example_inputs) lets it "
            "follow where it can)"
        )
        _refuse(small, name, before, reason)


def _parts(small: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are built from a config of their own, or saved by one, outer ones first."""
    known: set[int] = set()
    for name, module in named_modules(small):
        config = getattr(module, "config", None)
        recipe = Recipe.of(module)
        inside = recipe is not None and (id(config) in known or not saved(module))
        if (recipe or saved(module)) and not (name and inside):
            yield name, module
        if recipe is not None:
            known.update(_identities(module, config))


def _identities(module: nn.Module, config: object) -> set[int]:
    """All configs that a module and its parts hold: they change with its own."""
    return {id(config), *(id(value) for _, _, value in configs_of(module, config))}


def _watched(small: nn.Module, parts: list[str], call: Call | None) -> Seen | None:
    """One run of the small model; ``None`` without inputs or weights, or where it does not run."""
    if call is None or any(tensor.is_meta for tensor in small.parameters()):
        return None
    try:
        return watch(small, parts, call)
    except Exception:  # whoever calls the model will see the error
        return None


def _follow(
    small: nn.Module, before: Plain, name: str, seen: Seen | None, numbering: Numbering
) -> str:
    """Change the configs of a part of a small model; why that cannot be done, else nothing."""
    recipe = Recipe.of(small)
    if recipe is None:
        return "it has no config that says sizes"
    try:
        first = original = _base(recipe, numbering)
    except Exception as error:
        return f"it cannot be built from that alone ({type(error).__name__}: {error})"[:300]
    fewer, original = Changes(), first
    short = replace(recipe, without=tuple(map(numbering.new_name, recipe.without)))
    if numbering.gone:
        fewer, reason = Depths(short, small, numbering).search()
        if reason:
            return reason
        short.config = short.changed(fewer)
        original = short.build(short.config)
    now = plain_of(small)
    numbers = {key: n for key, n in now.items() if type(n) in (int, float)}
    moved = {key: n for key, n in numbers.items() if before.get(key) != n}
    wanted: Sizes = {**shapes_of(small), **moved}
    base = sizes_of(original)
    wished = {key: n for key, n in numbers.items() if key in base and key not in moved}
    odd = sorted({owner for owner, _ in shapes_of(small).keys() ^ shapes_of(original).keys()})
    if odd:
        return f"it builds other tensors: {shorten(odd, 3)}"
    search = Widths(short, base, wanted, wished)
    wrong = search.run()
    if wrong:
        return search.explain(wrong)
    problem = ""
    for best in itertools.chain([search.best], search.others()):
        try:
            built = short.build(reread(short.changed(best)), real=recipe.real)
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            told = f"it refuses these sizes ({type(error).__name__}: {' '.join(lines)})"
            return problem or told[:400]
        found = compare(small, built, before, numbering.renamed(plain_of(first)))
        if found.problem:  # a file may forget what the config of the original says, too
            forgetful = recipe.build(reread(recipe.config), real=recipe.real)
            found = compare(small, built, before, numbering.renamed(plain_of(forgetful)))
        changes = {**fewer, **best}
        told = found.problem or _differs(built, recipe, changes, found, name, seen, numbering)
        if not told:
            break
        problem = problem or told
    else:
        return problem
    for (owner, key), value in found.follow.items():
        vars(small.get_submodule(owner))[key] = value
    _replace_configs(small, first, built, recipe.config, numbering)
    return ""


def _base(recipe: Recipe, numbering: Numbering) -> nn.Module:
    """What the config builds as it is, without the parts that the model was made without."""
    try:
        original = recipe.build(recipe.config)
        if _unknown(original):
            raise ValueError("values are needed")
    except Exception:
        recipe.real = True
        original = recipe.build(recipe.config)
    extra: list[str] = []
    for name, _ in named_modules(original):
        known = (*extra, *numbering.gone)
        if name not in numbering.counted and not f"{name}.".startswith(
            tuple(f"{other}." for other in known)
        ):
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


def _differs(
    built: nn.Module,
    recipe: Recipe,
    changes: Mapping[Field, Any],
    found: Likeness,
    name: str,
    seen: Seen | None,
    numbering: Numbering,
) -> str:
    """Why what was built is another function than a part of the small model."""
    small = numbering.model
    inputs = seen.inputs.get(name) if seen is not None else None
    if seen is None or inputs is None or name not in seen.outputs:
        return _unread(small, recipe, changes, found)
    problem = same_outputs(filled(built, small), inputs, seen.outputs[name], training=False)
    return problem or _in_training(built, inputs, found, numbering)


def _in_training(built: nn.Module, inputs: Call, found: Likeness, numbering: Numbering) -> str:
    """Attributes that only train mode may read are compared there."""
    small = numbering.model
    modules = dict(named_modules(small))
    kinds: list[tuple[object, str]] = [(type(modules[owner]), key) for owner, key in found.follow]
    if not any(key in used(kind) for kind, key in kinds):
        return ""
    numbering.undo()  # its config says what it did
    try:
        other = watch(small, [""], inputs, training=True)
    except Exception:  # it trains on other inputs, such as those with labels
        return ""
    finally:
        numbering.apply()
    return same_outputs(filled(built, small), inputs, other.outputs[""], training=True)


def _unread(small: nn.Module, recipe: Recipe, changes: Mapping[Field, Any], found: Likeness) -> str:
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
    small: nn.Module, first: nn.Module, built: nn.Module, config: object, numbering: Numbering
) -> None:
    """Give the modules of a small model new configs with the numbers of those in ``built``."""
    old = numbering.renamed({(name, key): value for name, key, value in configs_of(first, config)})
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
        lists = dict(lists_of(old[name, key], hidden=True))
        cut = {
            path: items
            for path, items in lists_of(new[name, key], hidden=True)
            if path in lists and _other_list(path, lists[path], items)
        }
        for path, number in now.items():
            whole = any(path[: len(other)] == other for other in cut)
            if path in was and was[path] != number and not whole:
                copied = put(copied, path, number)
        for path, items in cut.items():
            copied = put(copied, path, copy.copy(items))
        made[id(value)] = copied
    for name, key, value in held:
        if id(value) in made:
            vars(small.get_submodule(name))[key] = made[id(value)]


def _other_list(path: Field, was: Any, now: Any) -> bool:
    """Whether a list is another one, apart from numbers in it, which are changed one by one."""
    hidden = any(isinstance(step, str) and step.startswith("_") for step in path)
    texts = any(one != other and isinstance(one, str) for one, other in zip(was, now))
    return len(was) != len(now) or texts or (hidden and was != now)
