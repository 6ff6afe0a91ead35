"""Tokenizers for small vocabularies: the user's own with its ids mapped, or a trimmed one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, MutableMapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.arguments import is_int
from graphprune.errors import InputError
from graphprune.plan.plan import Plan, plan_of
from graphprune.plan.vocabulary import GONE, Vocabulary
from graphprune.text import shorten
from graphprune.vocabulary.pieces import Pieces

Tokenizer = Any  # of any library
_TARGETS = frozenset({"labels", "overflowing_tokens"})  # ids as well, where a tokenizer makes them


def trim_tokenizer(tokenizer: Tokenizer, small: nn.Module | Plan | Vocabulary) -> Any:
    """The tokenizer of a small vocabulary: it makes new ids, and knows no other tokens.

    Of texts whose tokens all stay it makes the same tokens as the original. Other texts are cut
    into smaller tokens, as far as these stay, or into bytes.

    Args:
        tokenizer: of the library ``tokenizers`` (BPE, WordPiece, unigram or words), or one of
            ``transformers`` with such a tokenizer inside; it is not touched.
        small: what :func:`trim_vocabulary` returned, its plan, or one vocabulary of that.

    Returns:
        A tokenizer of the same class, which can be saved like the original.

    Raises:
        InputError: another kind of tokenizer, one that is trimmed already, tokens that must stay as
            well, or ids that its file cannot say; what to do instead.

    Example:
        >>> import graphprune, tokenizers
        >>> from torch import nn
        >>> words = {"[UNK]": 0, "a": 1, "rose": 2, "is": 3, "red": 4}
        >>> tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
        >>> tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> net = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))
        >>> small = graphprune.trim_vocabulary(net, [2, 4], tokenizer=tokenizer)
        >>> graphprune.trim_tokenizer(tokenizer, small).encode("a red rose").ids
        [0, 2, 1]
    """
    vocabulary = vocabulary_of(small)
    backend = backend_of(tokenizer)
    if backend is None:
        raise InputError(
            f"{type(tokenizer).__name__} has no tokenizer of the library tokenizers inside, which "
            "alone can be trimmed: use graphprune.MappedTokenizer"
        )
    pieces = Pieces(json.loads(backend.to_str()))
    _check_original(tokenizer, vocabulary)
    new = {old: place for place, old in enumerate(vocabulary.kept)}
    made = type(backend).from_str(json.dumps(pieces.trimmed(new)))
    for old in vocabulary.kept:
        token = backend.id_to_token(old)
        if token is not None and made.token_to_id(token) != new[old]:
            raise InputError(
                f"the file of this tokenizer has no place for id {new[old]} of {token!r}, as some "
                "ids that stay have no token: use graphprune.MappedTokenizer"
            )
    if made.__class__ is tokenizer.__class__:
        return made
    copied = copy.deepcopy(tokenizer)
    copied._tokenizer = made
    return copied


class MappedTokenizer:
    """The user's tokenizer, whose ids are those of a small vocabulary.

    Tokens that left become the unknown token, where the tokenizer has one that stayed.

    Args:
        tokenizer: of ``tokenizers`` or ``transformers``, or anything with ``encode``, which makes
            ids of a text, and ``decode``, which makes a text of ids.
        small: what :func:`trim_vocabulary` returned, its plan, or one vocabulary of that.
        unknown: the old id of the unknown token, where the tokenizer does not say it.

    Raises:
        InputError: no tokenizer, one that is trimmed already, or ``unknown`` is no id that stays.

    Example:
        >>> import graphprune
        >>> from torch import nn
        >>> class Letters:
        ...     def encode(self, text):
        ...         return [ord(letter) for letter in text]
        ...     def decode(self, ids):
        ...         return "".join(map(chr, ids))
        >>> net = nn.Sequential(nn.Embedding(128, 8), nn.Linear(8, 128))
        >>> small = graphprune.trim_vocabulary(net, Letters().encode("graph"))
        >>> tokenizer = graphprune.MappedTokenizer(Letters(), small)
        >>> tokenizer.encode("harp"), tokenizer.decode([1, 0, 4])
        ([2, 0, 4, 3], 'gar')
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        small: nn.Module | Plan | Vocabulary,
        *,
        unknown: int | None = None,
    ) -> None:
        self.tokenizer = checked(tokenizer, "encode", "decode")
        self.vocabulary = vocabulary_of(small)
        _check_original(tokenizer, self.vocabulary)
        known = {old: new for new, old in enumerate(self.vocabulary.kept)}
        if unknown is not None and not (is_int(unknown) and unknown in known):
            raise InputError(
                f"unknown={unknown!r} is none of the {len(known)} ids that stay: pass the old id "
                "of one, and keep it"
            )
        old = unknown_of(tokenizer) if unknown is None else unknown
        self.unknown = None if old is None else known.get(old)

    def encode(self, text: str, **options: object) -> list[int]:
        """The new ids of a text.

        Args:
            text: any text.
            options: handed on to the tokenizer.

        Raises:
            InputError: a token left, and there is no unknown token in its place.
        """
        return self._new(encoded(self.tokenizer, text, **options))

    def decode(self, ids: Iterable[int] | Tensor, **options: object) -> str:
        """The text of new ids.

        Args:
            ids: one after the other.
            options: handed on to the tokenizer.

        Raises:
            InputError: an id that the small vocabulary does not have, or several texts.
        """
        numbers = list(ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids)
        if not all(is_int(number) or isinstance(number, np.integer) for number in numbers):
            raise InputError(
                "decode takes the ids of one text, one after the other: call it for each of several"
            )
        text: str = self.tokenizer.decode(list(map(self.vocabulary.old_id, numbers)), **options)
        return text

    def __call__(self, texts: Any, **options: object) -> Any:
        """What the tokenizer makes when it is called, with new ids as ``input_ids`` and ``labels``.

        Args:
            texts: whatever it takes.
            options: handed on to it.

        Raises:
            InputError: as :meth:`encode`, or the tokenizer cannot be called.
        """
        if not callable(self.tokenizer):
            raise InputError(f"a {type(self.tokenizer).__name__} cannot be called: use encode")
        out = self.tokenizer(texts, **options)
        if not isinstance(out, MutableMapping):
            raise InputError(
                f"expected a mapping with input_ids of the tokenizer, got a {type(out).__name__}: "
                "use encode"
            )
        for key in [*out]:
            if str(key).endswith("input_ids") or key in _TARGETS:
                out[key] = self._new(out[key])
        return out

    def _new(self, ids: Any) -> Any:
        """New ids for old ones, in nested lists, an array or a tensor; negative ones stay."""
        if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":
            return self._new(torch.tensor(ids)).numpy()
        if isinstance(ids, Tensor):
            new, old = self.vocabulary.to_new(ids), ids.long()
            if bool((old >= self.vocabulary.size).any()):
                self._beyond(int(old.max()))
            lost = (new == GONE) & (old >= 0)
            if bool(lost.any()):
                new[lost] = self._lost(int(old[lost][0]))
            return new
        if isinstance(ids, list | tuple | np.ndarray):
            return [self._new(item) for item in ids]
        if not is_int(ids) and not isinstance(ids, np.integer):
            raise InputError(
                f"expected ids in lists, tensors or arrays of numpy, got a {type(ids).__name__}: "
                'pass return_tensors="pt" or "np"'
            )
        if ids >= self.vocabulary.size:
            self._beyond(int(ids))
        found = self.vocabulary.new_id(int(ids))
        return self._lost(int(ids)) if found is None else found

    def _beyond(self, old: int) -> NoReturn:
        raise InputError(
            f"the tokenizer made id {old} ({_shown(self.tokenizer, old)}), where the vocabulary of "
            f"the original has 0 to {self.vocabulary.size - 1}: it is larger than the table, or of "
            "another model"
        )

    def _lost(self, old: int) -> int:
        if self.unknown is None:
            raise InputError(
                f"id {old} ({_shown(self.tokenizer, old)}) left the vocabulary, and there is no "
                "unknown token in its place: keep it, or pass unknown= with the old id of one"
            )
        return self.unknown


def vocabulary_of(small: nn.Module | Plan | Vocabulary) -> Vocabulary:
    """The vocabulary of a small model or plan.

    Raises:
        InputError: it has none, or several.
    """
    if isinstance(small, Vocabulary):
        return small
    plan = small if isinstance(small, Plan) else plan_of(small)
    found = () if plan is None else plan.vocabularies
    if len(found) != 1:
        told = f"it has {len(found)}: pass one of plan.vocabularies" if found else "it has none"
        raise InputError(
            "expected a model made by graphprune.trim_vocabulary, its plan, or one vocabulary of "
            f"that, got a {type(small).__name__}; {told}"
        )
    return found[0]


def checked(tokenizer: Tokenizer, *needed: str) -> Tokenizer:
    """A tokenizer, if it is one.

    Raises:
        InputError: it lacks what is needed of it.
    """
    lacking = [
        name for name in needed or ("encode",) if not callable(getattr(tokenizer, name, None))
    ]
    if lacking or isinstance(tokenizer, str | bytes | type):
        raise InputError(
            f"expected a tokenizer, anything with {' and '.join(needed or ('encode',))}, got "
            f"{shorten([repr(tokenizer)[:40]])} ({type(tokenizer).__name__})"
        )
    return tokenizer


def known_ids(tokenizer: Tokenizer) -> set[int] | None:
    """The ids that a tokenizer has, where it says them."""
    backend = backend_of(tokenizer)
    listed = getattr(tokenizer if backend is None else backend, "get_vocab", None)
    found = listed() if callable(listed) else None
    return {*map(int, found.values())} if isinstance(found, dict) else None


def _check_original(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Raise where a tokenizer has no more ids than a vocabulary that was made smaller."""
    ids = known_ids(tokenizer)
    if not ids or vocabulary.kept == tuple(range(len(vocabulary.kept))):
        return  # the first ids, which are the same in both
    sizes = [size for size in (*vocabulary.between, len(vocabulary.kept)) if size >= len(ids)]
    if sizes:
        raise InputError(
            f"this tokenizer has {len(ids)} ids, no more than a vocabulary that was made smaller "
            f"({vocabulary.size} ids before, {sizes[-1]} after): pass the tokenizer of the "
            "original model, not a trimmed one"
        )


def backend_of(tokenizer: Tokenizer) -> Any:
    """The tokenizer of the library ``tokenizers`` that one is, or has inside; else ``None``."""
    inside = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return inside if callable(getattr(inside, "to_str", None)) else None


def encoded(tokenizer: Tokenizer, text: str, **options: object) -> list[int]:
    """The old ids of a text."""
    if not isinstance(text, str):
        raise InputError(f"expected a text, got a {type(text).__name__}")
    found = tokenizer.encode(text, **options)
    ids = getattr(found, "ids", found)
    return list(map(int, ids.tolist() if isinstance(ids, Tensor) else ids))


def unknown_of(tokenizer: Tokenizer) -> int | None:
    """The old id of the unknown token, if there is one."""
    known: Any = getattr(tokenizer, "unk_token_id", None)
    backend = backend_of(tokenizer)
    if is_int(known):
        return int(known)
    return None if backend is None else Pieces(json.loads(backend.to_str())).unknown


def beside(tokenizer: Tokenizer, ids: Iterable[int]) -> dict[int, str]:
    """The ids that a tokenizer needs beside some, each with why."""
    known, found = set(ids), dict[int, str]()
    backend = backend_of(tokenizer)
    if backend is not None:
        data = json.loads(backend.to_str())
        kind = data["model"].get("type")
        found |= Pieces(data).beside(known) if kind is not None else {}
    special: Any = getattr(tokenizer, "all_special_ids", None) or ()
    for number in special:
        if number not in known:
            found.setdefault(int(number), "a special token")
    return found


def _shown(tokenizer: Tokenizer, old: int) -> str:
    backend = backend_of(tokenizer)
    token = None if backend is None else backend.id_to_token(old)
    return "no token" if token is None else repr(token)


__all__ = ["MappedTokenizer", "beside", "encoded", "trim_tokenizer", "vocabulary_of"]
