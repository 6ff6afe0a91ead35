"""Ids that modules and configs remember: those of a small vocabulary follow the plan.

An ``nn.Embedding`` remembers which row is padding. Configs are objects with ``to_dict``; of their
fields those count whose names end as ids of tokens and sizes of vocabularies are called everywhere
(``pad_token_id``, ``vocab_size``). No more is known of any library.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import nn

from graphprune.arguments import is_int
from graphprune.errors import PlanError
from graphprune.plan.plan import Plan
from graphprune.plan.vocabulary import Vocabulary
from graphprune.record.tensors import held_tensors, named_modules

_SIZE = re.compile(r"(^|_)vocab_size$")
_ID = re.compile(r"(^|_)token_(id|ids|index)$")
_OWN = re.compile(r"(^|_)(pad|padding|bos|eos|unk)_(id|idx|index)$")  # of modules
_FORBIDDEN = frozenset({"suppress_tokens", "begin_suppress_tokens", "bad_words_ids"})
_PAIRS = frozenset({"forced_decoder_ids"})  # of places and ids


def follow_ids(model: nn.Module, plan: Plan) -> None:
    """Let the modules and configs of a small model hold new ids and the new size, in place."""
    for vocabulary in plan.vocabularies:
        changed = {(change.module, change.name) for change in plan.sizes}
        for name, key, old in _attributes(model, vocabulary):
            if (name, key) in changed:
                continue
            new = vocabulary.new_id(old)
            if new is None:
                raise PlanError(
                    f"the plan removes id {old}, which {f'{name}.{key}'.lstrip('.')} names"
                )
            vars(model.get_submodule(name))[key] = new
        memo: dict[int, tuple[object, object]] = {}
        for _, module in named_modules(model):
            for key, value in [*vars(module).items()]:
                if _is_config(value):
                    vars(module)[key] = _followed(value, vocabulary, memo)


def embeddings(model: nn.Module, vocabulary: Vocabulary) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold a table with a row for every id."""
    names = {name for name, dim in vocabulary.rows if dim == 0}
    tables = {id(tensor) for name, tensor in held_tensors(model) if name in names}
    for name, module in named_modules(model):
        if any(id(tensor) in tables for tensor in module._parameters.values()):
            yield name, module


def _attributes(model: nn.Module, vocabulary: Vocabulary) -> Iterator[tuple[str, str, int]]:
    """The attributes of modules that are ids by their names: ``pad_token_id``, say.

    An embedding of torch names padding in its own table only.
    """
    tables = {name for name, _ in embeddings(model, vocabulary)}
    for name, module in named_modules(model):
        own = not type(module).__module__.startswith("torch.nn")
        sizes = vocabulary.size, len(vocabulary.kept)  # before and after it was made smaller
        for key, value in [*vars(module).items()] if own and _concerned(module, sizes) else ():
            named = bool(_ID.search(key) or _OWN.search(key))
            if named and is_int(value) and 0 <= value < vocabulary.size:
                yield name, key, int(value)
        padding: Any = vars(module).get("padding_idx")
        if name in tables and not own and is_int(padding):
            yield name, "padding_idx", int(padding)


def _followed(
    config: Any, vocabulary: Vocabulary, memo: dict[int, tuple[object, object]]
) -> object:
    """A copy of a config, with those inside it, that says new ids."""
    if id(config) in memo:
        return memo[id(config)][1]
    made = copy.copy(config)
    memo[id(config)] = memo[id(made)] = config, made  # which keeps both alive
    for key, value in vars(config).items():
        if _is_config(value):
            vars(made)[key] = _followed(value, vocabulary, memo)
        elif type(value) in (dict, list):
            vars(made)[key] = copy.deepcopy(value)
    if _concerned(config, (vocabulary.size,)):
        for key, value in vars(config).items():
            if _SIZE.search(key) and value == vocabulary.size:
                vars(made)[key] = len(vocabulary.kept)
            elif not key.startswith("_") and _holds_ids(key):
                vars(made)[key] = _new(key, value, vocabulary)
    return made


def _is_config(value: object) -> bool:
    """Whether something is a config: an object that can be written as a dictionary."""
    if isinstance(value, nn.Module | type) or not hasattr(value, "__dict__"):
        return False
    return is_dataclass(value) or callable(getattr(value, "to_dict", None))


def _concerned(config: Any, sizes: tuple[int, ...]) -> bool:
    """Whether a config, or a module, speaks of a vocabulary of some size, or of none."""
    told = [value for key, value in vars(config).items() if _SIZE.search(key) and is_int(value)]
    return not told or any(size in told for size in sizes)


def _holds_ids(key: str) -> bool:
    return bool(_ID.search(key)) or key in _FORBIDDEN or key in _PAIRS


def _new(key: str, value: Any, vocabulary: Vocabulary) -> Any:
    """New ids in a field; of lists those that left are gone."""
    if is_int(value):
        return vocabulary.new_id(int(value))
    if key in _PAIRS and isinstance(value, list | tuple):
        return type(value)([place, _new("", item, vocabulary)] for place, item in value)
    if isinstance(value, list | tuple):
        found = [_new("", item, vocabulary) for item in value]
        if key == "bad_words_ids":
            found = [word for word in found if None not in word]
        kept = [item for item in found if item is not None or not key]
        return type(value)(kept)
    return value


def special_ids(model: nn.Module, vocabulary: Vocabulary) -> dict[int, str]:
    """The ids that modules and configs name, each with what names it: they must stay."""
    found: dict[int, str] = {}
    for name, key, old in _attributes(model, vocabulary):
        found.setdefault(old, f"{name}.{key}".lstrip("."))
    seen: set[int] = set()
    for _, module in named_modules(model):
        for value in vars(module).values():
            if _is_config(value):
                for number, key in _named(value, vocabulary, seen):
                    found.setdefault(number, key)
    return {number: name for number, name in found.items() if 0 <= number < vocabulary.size}


def _named(config: Any, vocabulary: Vocabulary, seen: set[int]) -> Iterator[tuple[int, str]]:
    if id(config) in seen:
        return
    seen.add(id(config))
    for key, value in vars(config).items():
        if _is_config(value):
            yield from _named(value, vocabulary, seen)
        elif not key.startswith("_") and _concerned(config, (vocabulary.size,)):
            if _ID.search(key):
                yield from ((number, key) for number in _numbers(value))
            elif key in _PAIRS and isinstance(value, list | tuple):
                yield from ((number, key) for _, item in value for number in _numbers(item))


def _numbers(value: Any) -> Iterator[int]:
    if is_int(value):
        yield int(value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, Mapping):
        yield from _numbers([*value.values()])
