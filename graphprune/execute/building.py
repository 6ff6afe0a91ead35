"""Models built anew from their config, cheaply and without a trace of it."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graphprune.ops.calls import Args, Function
from graphprune.record.tensors import named_modules

Field = tuple[str | int, ...]  # names and places that lead from a config to a number
_SMALL = 4096  # elements of an empty tensor that is made for real
_DRAWS = frozenset({
    "normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_",
    "xavier_uniform_", "orthogonal_", "constant_", "ones_", "zeros_", "fill_", "zero_", "erfinv_",
})  # fmt: skip
_DEEP = 4


@dataclass
class Recipe:
    """How a model is made: its class, its config, and the parts that it did without.

    A config is an object with ``to_dict``, which the class takes, or a mapping, which its
    ``from_config`` takes. No more is known of any library.
    """

    kind: Any
    config: Any
    without: tuple[str, ...] = ()  # parts of what the class builds that the model does not have
    real: bool = field(default=False)  # whether building needs all its tensors

    @classmethod
    def of(cls, model: nn.Module) -> Recipe | None:
        """The recipe of a model, if it carries a config that it can be built from."""
        config = getattr(model, "config", None)
        if config is None or _of_a_part(model, config):
            return None
        if callable(getattr(config, "to_dict", None)):
            return cls(type(model), config)
        if isinstance(config, Mapping) and callable(getattr(type(model), "from_config", None)):
            return cls(type(model), config)
        return None

    @property
    def numbers(self) -> dict[Field, float]:
        """The numbers in the config that may be sizes, or be computed with."""
        found = numbers_of(self.config)
        return {path: value for path, value in found if type(value) is float or value > 1}

    def changed(self, changes: Mapping[Field, Any]) -> Any:
        """A copy of the config with other numbers, or lists."""
        config = dict(self.config) if isinstance(self.config, Mapping) else self.config
        config = copy.deepcopy(config)
        for path, value in changes.items():
            config = put(config, path, value)
        return config

    def build(self, config: object, *, real: bool = False) -> nn.Module:
        """A model of a config; large tensors that nobody fills are on meta unless ``real``."""
        make = self.kind.from_config if isinstance(config, Mapping) else self.kind
        config = copy.deepcopy(config)  # constructors may write into it
        with untouched(), contextlib.nullcontext() if real or self.real else _Empty():
            model: nn.Module = make(config)
        for name in self.without:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._modules[leaf] = None
        return model


def _of_a_part(model: nn.Module, config: object) -> bool:
    """Whether a config is that of a part, which the model merely hands out."""
    if any(value is config for value in vars(model).values()):
        return False
    held = (vars(module).values() for _, module in named_modules(model) if module is not model)
    return any(value is config for values in held for value in values)


def reread(config: Any) -> object:
    """A config as its own file gives it back, where it can be written; it may refuse."""
    kind = type(config)
    if not all(
        callable(getattr(kind, name, None)) for name in ("save_pretrained", "from_pretrained")
    ):
        return config
    with tempfile.TemporaryDirectory() as folder, untouched():
        config.save_pretrained(folder)
        return kind.from_pretrained(folder)


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """No random number is drawn from the user's generators, and no warning is given."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class _Empty(TorchFunctionMode):
    """Weights are made empty before they are drawn: when shapes are asked they need no memory."""

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: Args = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None and "size" not in kwargs:
            shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            if math.prod(shape) >= _SMALL:
                kwargs["device"] = "meta"
        elif getattr(func, "__name__", "") in _DRAWS:  # libraries wrap them
            drawn = next(iter((*args, *kwargs.values())), None)
            if isinstance(drawn, Tensor) and drawn.is_meta:
                return drawn
        return func(*args, **kwargs)


def numbers_of(value: Any, path: Field = ()) -> Iterator[tuple[Field, float]]:
    """The numbers in a config, in its lists, and in the configs inside it."""
    if len(path) > _DEEP:
        return
    if type(value) in (int, float):
        yield path, value
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from numbers_of(item, (*path, place))
    for key, item in _fields_of(value):
        yield from numbers_of(item, (*path, key))


def lists_of(value: Any, path: Field = (), hidden: bool = False) -> Iterator[tuple[Field, Any]]:
    """The lists in a config, and in the configs inside it; ``hidden`` ones as well."""
    if len(path) > _DEEP:
        return
    if isinstance(value, list | tuple) and path:
        yield path, value
    for key, item in _fields_of(value, hidden):
        yield from lists_of(item, (*path, key), hidden)


def _fields_of(value: Any, hidden: bool = False) -> Iterator[tuple[str, Any]]:
    """The fields of a config, or of a mapping in one."""
    mapping = isinstance(value, Mapping)
    configured = callable(getattr(value, "to_dict", None)) and hasattr(value, "__dict__")
    items = value if mapping else vars(value) if configured else {}
    for key, item in items.items():
        if isinstance(key, str) and (not key.startswith("_") or (hidden and not mapping)):
            yield key, item


def computed_from(config: Any, path: Field, value: Any) -> dict[Field, Any]:
    """Fields that the class of a config computes from another one: what they would then be.

    Args:
        config: it is not changed.
        path: of the other field.
        value: what that is to be.
    """
    at = max(place for place, step in enumerate(path) if isinstance(step, str))
    holder = config
    for step in path[:at]:
        holder = holder[step] if isinstance(holder, Mapping) else getattr(holder, str(step))
    if isinstance(holder, Mapping):
        return {}
    mine, name = vars(holder), str(path[at])
    new = put(copy.deepcopy(mine[name]), path[at + 1 :], value)
    kind: Any = type(holder)
    try:
        with untouched():
            was, now = (vars(kind(**{name: each})) for each in (copy.deepcopy(mine[name]), new))
    except Exception:  # it is not made of fields, or not of this one alone
        return {}
    return {
        (*path[:at], key): item
        for key, item in now.items()
        if key != name and key in was and was[key] != item and mine.get(key) == was[key]
    }


def put(holder: object, path: Field, value: Any) -> Any:
    """A config, or what lies in one, with another field; objects are changed, all else copied."""
    if not path:
        return value
    first, rest = path[0], path[1:]
    if isinstance(holder, Mapping):
        kind: Any = type(holder)  # made of a dict, as all mappings of configs are
        return kind({**holder, first: put(holder[first], rest, value)})
    if isinstance(holder, list | tuple) and isinstance(first, int):
        inside = list(holder)
        inside[first] = put(inside[first], rest, value)
        return type(holder)(inside)
    setattr(holder, str(first), put(getattr(holder, str(first)), rest, value))
    return holder


def is_config(value: object, config: object) -> bool:
    """Whether a module's attribute is a config of the kind of ``config``."""
    if isinstance(config, Mapping):
        return type(value) is type(config) and type(value) is not dict
    return callable(getattr(value, "to_dict", None)) and not isinstance(value, nn.Module | type)


def configs_of(model: nn.Module, config: object) -> Iterator[tuple[str, str, object]]:
    """All configs that the modules of a model hold: module, attribute, config."""
    for name, module in named_modules(model):
        for key, value in vars(module).items():
            if is_config(value, config):
                yield name, key, value
