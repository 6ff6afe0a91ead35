"""Ids that modules and configs remember: those of a small vocabulary follow the plan.

An ``nn.Embedding`` remembers which row is padding. Configs are objects with ``to_dict``; of their
fields those count whose names end as ids of tokens and sizes of vocabularies are called everywhere
(``pad_token_id``, ``vocab_size``), and mappings from names to ids (``lang_to_id``). A loss that
ignores a target ignores an id, where the vocabulary has logits. No more is known of any library.
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
_ID = re.compile(r"(^|_)(token_(id|ids|index)|words_ids)$")
_OWN = re.compile(r"(^|_)(pad|padding|bos|eos|unk)_(id|idx|index)$")  # of modules
_MAP = re.compile(r"(^|_)to_ids?$")  # from names
_IGNORED = "ignore_index"  # of targets, which are ids where there are logits
_GUESS = re.compile(r"(^|_)(pad|bos|sos|eos|unk|sep|cls|mask)(_(id|idx|index|token))?$")
_FORBIDDEN = frozenset({"suppress_tokens", "begin_suppress_tokens", "bad_words_ids"})
_PAIRS = frozenset({"forced_decoder_ids"})  # of places and ids
_BIASES = frozenset({"sequence_bias"})  # of ids that follow each other, each with a number


def follow_ids(model: nn.Module, plan: Plan) -> None:
    """Let the modules and configs of a small model hold new ids and the new size, in place."""
    for vocabulary in plan.vocabularies:
        changed = {(change.module, change.name) for change in plan.sizes}
        for name, key, old in _attributes(model, vocabulary):
            if (name, key) in changed:
                continue
            for number in _numbers(old):
                if vocabulary.new_id(number) is None:
                    named = f"{name}.{key}".lstrip(".")
                    raise PlanError(f"the plan removes id {number}, which {named} names")
            vars(model.get_submodule(name))[key] = _new(key, old, vocabulary)
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


def _attributes(model: nn.Module, vocabulary: Vocabulary) -> Iterator[tuple[str, str, Any]]:
    """The attributes of modules that hold ids by their names: ``pad_token_id``, say.

    An embedding of torch names padding in its own table only, a loss what it ignores.
    """
    tables = {name for name, _ in embeddings(model, vocabulary)}
    for name, module in named_modules(model):
        for key, value in _own(module, vocabulary):
            named = bool(_ID.search(key) or _OWN.search(key)) or _maps(key, value, vocabulary)
            if named and key not in _FORBIDDEN and _fits(value, vocabulary):
                yield name, key, value
        mine = vars(module)
        padding, ignored = mine.get("padding_idx"), mine.get(_IGNORED)
        if name in tables and _of_torch(module) and is_int(padding):
            yield name, "padding_idx", padding
        if vocabulary.outputs and is_int(ignored) and _fits(ignored, vocabulary):
            yield name, _IGNORED, ignored


def doubtful(model: nn.Module, vocabulary: Vocabulary) -> Iterator[tuple[str, str, int]]:
    """The attributes of modules that may be ids which change or leave: their names alone say it."""
    sure = {(name, key) for name, key, _ in _attributes(model, vocabulary)}
    for name, module in named_modules(model):
        for key, value in _own(module, vocabulary):
            guessed = _GUESS.search(key) and (name, key) not in sure
            if guessed and is_int(value) and vocabulary.new_id(value) != value:
                yield name, key, int(value)


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn")


def _own(module: nn.Module, vocabulary: Vocabulary) -> list[tuple[str, Any]]:
    """The attributes of a module of the user's own, where it may speak of this vocabulary."""
    sizes = vocabulary.size, len(vocabulary.kept)  # before and after it was made smaller
    return [] if _of_torch(module) or not _concerned(module, sizes) else [*vars(module).items()]


def _fits(value: Any, vocabulary: Vocabulary) -> bool:
    """Whether a number, or all numbers in something, are ids."""
    numbers = [*_numbers(value)]
    return bool(numbers) and all(0 <= number < vocabulary.size for number in numbers)


def _maps(key: str, value: Any, vocabulary: Vocabulary) -> bool:
    """Whether something maps names to ids; 0, 1, 2 and so on count the names themselves."""
    if not _MAP.search(key) or not isinstance(value, Mapping) or not _fits(value, vocabulary):
        return False
    plain = all(isinstance(name, str) and is_int(number) for name, number in value.items())
    return plain and sorted(value.values()) != [*range(len(value))]


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
            elif not key.startswith("_") and _holds_ids(key, value, vocabulary):
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


def _holds_ids(key: str, value: Any, vocabulary: Vocabulary) -> bool:
    """Whether a field of a config holds ids."""
    if key == _IGNORED:
        return bool(vocabulary.outputs)
    known = key in _FORBIDDEN | _PAIRS | _BIASES
    return known or bool(_ID.search(key)) or _maps(key, value, vocabulary)


def _new(key: str, value: Any, vocabulary: Vocabulary) -> Any:
    """New ids in a field; of lists those that left are gone."""
    if is_int(value):
        return vocabulary.new_id(int(value))
    if key in _PAIRS and isinstance(value, list | tuple):
        return type(value)([place, _new("", item, vocabulary)] for place, item in value)
    if key in _BIASES:
        return _biased(value, vocabulary)
    if isinstance(value, list | tuple):
        found = [_new("", item, vocabulary) for item in value]
        if key == "bad_words_ids":
            found = [word for word in found if None not in word]
        kept = [item for item in found if item is not None or not key]
        return type(value)(kept)
    if isinstance(value, Mapping):
        changed = {name: _new("", item, vocabulary) for name, item in value.items()}
        return {
            name: item for name, item in changed.items() if item is not None or value[name] is None
        }
    return value


def _biased(value: Any, vocabulary: Vocabulary) -> Any:
    """Numbers that are added to logits after some ids; gone where one of these is."""
    if not isinstance(value, list | tuple | Mapping):
        return value
    pairs = value.items() if isinstance(value, Mapping) else value
    changed = [(_new("", words, vocabulary), number) for words, number in pairs]
    kept = [(words, number) for words, number in changed if None not in words]
    if isinstance(value, Mapping):
        return dict(kept)
    return type(value)([words, number] for words, number in kept)


def special_ids(model: nn.Module, vocabulary: Vocabulary) -> dict[int, str]:
    """The ids that modules and configs name, each with what names it: they must stay."""
    found: dict[int, str] = {}
    for name, key, old in _attributes(model, vocabulary):
        for number in _numbers(old):
            found.setdefault(number, f"{name}.{key}".lstrip("."))
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
            listed = key not in _FORBIDDEN | _PAIRS | _BIASES
            if listed and _holds_ids(key, value, vocabulary):
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
