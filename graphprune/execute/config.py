"""Models that are built from a config: let the config of a small model say its sizes.

Which field sizes what is found out by building the model on ``meta`` with one field doubled at a
time; nothing is known of any library beyond ``model.config.to_dict()`` and ``type(model)(config)``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from graphprune.errors import ModelError
from graphprune.record.skeleton import named_modules, named_tensors

Sizes = dict[Any, float]
Field = tuple[str, ...]  # names that lead from the config to a number
_NUMBERS = (int, float)


def has_config(model: nn.Module) -> bool:
    """Whether a model carries a config that it can be built from."""
    return callable(getattr(getattr(model, "config", None), "to_dict", None))


def follow_config(small: nn.Module, before: Sizes) -> None:
    """Write the sizes of a small model into its config, or make ``save_pretrained`` say why not.

    Args:
        small: its ``config`` is changed, when a model built from the changed one has the same
            parameters and sizes everywhere.
        before: the sizes of the model that it was made of.
    """
    wanted = sizes_of(small)
    if wanted == before:
        return
    values = _solve(type(small), small.config, before, wanted)
    if values is not None:
        for field, value in values.items():
            _set(small.config, field, value)
    elif hasattr(type(small), "save_pretrained"):
        vars(small)["save_pretrained"] = Refusal(type(small).__name__)


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes of all parameters and buffers, and the numbers that modules compute with."""
    sizes: Sizes = {}
    for name, tensor in named_tensors(model):
        sizes.update({(name, dim): size for dim, size in enumerate(tensor.shape)})
    for name, module in named_modules(model):
        kind: Any = type(module)
        used = _used(kind)
        sizes.update(
            {(name, k): n for k, n in vars(module).items() if type(n) in _NUMBERS and k in used}
        )
    return sizes


@functools.cache
def _used(kind: type) -> frozenset[str]:
    """The names that the methods of a class read, apart from its constructor."""
    names: set[str] = set()
    for base in kind.__mro__:
        for key, value in vars(base).items() if base is not nn.Module else ():
            code = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
            if isinstance(code, types.CodeType) and key not in ("__init__", "extra_repr"):
                names.update(code.co_names)
    return frozenset(names)


def _solve(kind: type, config: Any, base: Sizes, wanted: Sizes) -> dict[Field, float] | None:
    """New values of fields for which the model has the wanted sizes, if there are any."""
    build = functools.partial(_built, kind, config)
    if build({}) != base:
        return None
    moving = {key for key, size in base.items() if wanted.get(key) != size}
    fields = {field: value for field, value in _numbers(config) if _matters(value, base, moving)}
    effects = {}
    for field, value in fields.items():
        doubled = build({field: 2 * value}) or base
        effects[field] = {key for key in base if doubled.get(key, base[key]) != base[key]}
    changes: dict[Field, float] = {}
    for field, value in fields.items():
        alone = effects[field].difference(*(effects[f] for f in fields if f != field))
        guess = _guess(value, base, wanted, alone or effects[field])
        if guess is not None:
            changes[field] = guess
    ratios = {Fraction(int(wanted.get(k, 0)), int(base[k])) for k in moving if type(base[k]) is int}
    while wrong := _wrong(build(changes), wanted):
        trials = (
            {**changes, field: int(fields[field] * ratio)}
            for field in fields
            if effects[field] & wrong and type(fields[field]) is int
            for ratio in ratios
        )
        better = next((t for t in trials if len(_wrong(build(t), wanted)) < len(wrong)), None)
        if better is None:
            return None
        changes = better
    return changes


def _built(kind: type, config: Any, changes: Mapping[Field, float]) -> Sizes | None:
    """The sizes of a model with some fields of its config changed."""
    changed = copy.deepcopy(config)
    try:
        for field, value in changes.items():
            _set(changed, field, value)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sizes_of(kind(changed))
    except Exception:  # there is no model of these sizes
        return None


def _wrong(found: Sizes | None, wanted: Sizes) -> set[Any]:
    """What has another size than wanted; everything when there is no such model."""
    return set(wanted) if found is None else {k for k, n in wanted.items() if found.get(k) != n}


def _guess(value: float, base: Sizes, wanted: Sizes, keys: set[Any]) -> float | None:
    """The value of a field by which most of the sizes that follow it would come out right."""
    votes: Counter[float] = Counter()
    for key in keys:
        new, old = value * wanted.get(key, 0), base[key]
        if type(value) is float and old == value:
            votes[wanted.get(key, 0)] += 1
        elif type(new) is type(old) is int and old and new and new % old == 0:
            votes[new // old] += 1
    return votes.most_common(1)[0][0] if votes else None


def _matters(value: float, base: Sizes, moving: set[Any]) -> bool:
    if type(value) is float:
        return any(base[key] == value for key in moving)
    return any(base[key] % value == 0 for key in moving)


def _numbers(config: Any, path: Field = ()) -> Iterator[tuple[Field, float]]:
    """The floats of a config and of the configs inside it, and the ints larger than one."""
    for name, value in vars(config).items():
        number = type(value) is float or (type(value) is int and value > 1)
        if number and not name.startswith("_"):
            yield (*path, name), value
        elif callable(getattr(value, "to_dict", None)) and len(path) < 3:
            yield from _numbers(value, (*path, name))


def _set(config: Any, field: Field, value: float) -> None:
    for name in field[:-1]:
        config = getattr(config, name)
    setattr(config, field[-1], value)


class Refusal:
    """Takes the place of ``save_pretrained`` where the config cannot express the sizes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Say what to do instead."""
        raise ModelError(
            f"the config of {self.name} cannot express the sizes of this model (layers of one kind "
            "kept different numbers of channels): use graphprune.save and graphprune.load"
        )
