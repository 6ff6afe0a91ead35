"""Which ids a user's text needs, by how often they occur in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from graphprune.arguments import is_int, is_number
from graphprune.errors import InputError
from graphprune.vocabulary.tokenizer import beside, checked, encoded


def kept_ids_by_count(
    texts: Iterable[Any],
    tokenizer: Any = None,
    *,
    min_count: int = 1,
    top: int | None = None,
    share: float | None = None,
) -> list[int]:
    """The ids that are worth keeping for some text, for :func:`trim_vocabulary`.

    Ids that occur equally often stay or leave in the order of their numbers.

    Args:
        texts: texts, if a tokenizer is given, or the ids of texts: lists or tensors of any shape.
        tokenizer: of ``tokenizers`` or ``transformers``, or anything with ``encode``. Its special
            and added tokens, its bytes, and the parts that tokens are made of always stay.
        min_count: how often an id must occur.
        top: how many ids stay at most, the most frequent ones; what always stays comes on top.
        share: which part of all tokens of the text must be among the ids that stay, in (0, 1];
            the fewest ids by which that is so.

    Returns:
        The ids, in order.

    Raises:
        InputError: a number out of range, texts without a tokenizer, or nothing that stays.

    Example:
        >>> import graphprune
        >>> graphprune.kept_ids_by_count([[5, 5, 5, 2, 2, 9]], min_count=2)
        [2, 5]
        >>> graphprune.kept_ids_by_count([[5, 5, 5, 2, 2, 9]], share=0.5)
        [5]
    """
    if not is_int(min_count, 1):
        raise InputError(f"min_count must be a whole number of at least 1, got {min_count!r}")
    if top is not None and not is_int(top, 1):
        raise InputError(f"top must be a whole number of at least 1, got {top!r}")
    if share is not None and not (is_number(share, 0, 1) and share > 0):
        raise InputError(f"share must be a number in (0, 1], got {share!r}")
    if isinstance(texts, str):
        raise InputError("texts must be several texts, such as the lines of a file, not one")
    if not isinstance(texts, Iterable):
        raise InputError(f"texts must be texts, or lists of ids, not a {type(texts).__name__}")
    if tokenizer is not None:
        checked(tokenizer)
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(_ids(text, tokenizer))
    ranked = sorted(counts, key=lambda number: (-counts[number], number))
    chosen = [number for number in ranked if counts[number] >= min_count][:top]
    if share is not None:
        chosen = _covering(chosen, counts, share)
    if not chosen:
        raise InputError(
            f"no id occurs {min_count} times in these texts, which hold {sum(counts.values())} "
            "tokens: give more texts, or a smaller min_count"
        )
    more = {} if tokenizer is None else beside(tokenizer, chosen)
    return sorted({*chosen, *more})


def _ids(text: Any, tokenizer: Any) -> list[int]:
    """The ids of one text."""
    if isinstance(text, str):
        if tokenizer is None:
            raise InputError("texts are given as str: pass the tokenizer as well, or their ids")
        return encoded(tokenizer, text)
    try:
        found = text if isinstance(text, Tensor | np.ndarray) else np.asarray(text)
    except ValueError:  # lists of several lengths
        return [number for part in text for number in _ids(part, tokenizer)]
    flat = found.reshape(-1).tolist()
    wrong = [number for number in flat if not is_int(number)]
    if wrong:
        raise InputError(f"ids of texts must be whole numbers, found {wrong[0]!r}")
    return [number for number in flat if number >= 0]  # others are masked, as -100 is


def _covering(ranked: list[int], counts: Counter[int], share: float) -> list[int]:
    """The fewest of some ids that make up a part of all tokens; all of them where none do."""
    wanted, covered = share * sum(counts.values()), 0
    for place, number in enumerate(ranked):
        covered += counts[number]
        if covered >= wanted - 1e-9:
            return ranked[: place + 1]
    return ranked
