"""Tokenizers as data: which tokens must stay beside some, and what is left of a tokenizer.

The data is what ``tokenizers.Tokenizer.to_str`` writes. Of a text whose tokens all stay, the
trimmed tokenizer makes the same tokens:

* WordPiece takes the longest piece that fits, and unigram models the best way through a word: what
  was the longest or the best of all is so among some of them.
* BPE joins two tokens after the other, in the order of its merges: all tokens on the way stay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

from graphprune.arguments import is_int
from graphprune.errors import InputError
from graphprune.text import shorten

KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")

Json = Any  # what a file of a tokenizer holds


def byte_characters() -> frozenset[str]:
    """The characters that stand for the 256 bytes in byte-level BPE (Radford et al., 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return frozenset(map(chr, (*plain, *range(256, 512 - len(plain)))))


class Pieces:
    """The tokens of a tokenizer, and how they are made.

    Args:
        data: what its file holds.

    Raises:
        InputError: it is of a kind of which nothing is known.
    """

    def __init__(self, data: Mapping[str, Json]) -> None:
        self.data = data
        self.model: Json = data["model"]
        self.kind = self.model.get("type", "")
        if self.kind not in KINDS:
            raise InputError(
                f"tokenizers of kind {self.kind or 'unknown'!r} cannot be trimmed (known: "
                f"{', '.join(KINDS)}): use graphprune.MappedTokenizer"
            )
        listed = self.kind == "Unigram"
        vocabulary = self.model["vocab"]
        self.ids: dict[str, int] = (
            {token: number for number, (token, _) in enumerate(vocabulary)}
            if listed
            else dict(vocabulary)
        )
        self.tokens = {number: token for token, number in self.ids.items()}
        self.added = {item["id"]: item["content"] for item in data.get("added_tokens") or ()}

    @property
    def unknown(self) -> int | None:
        """The id that stands for what has no token."""
        if self.kind == "Unigram":
            number = self.model.get("unk_id")
            return number if is_int(number) else None
        return self.ids.get(self.model.get("unk_token") or "")

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        """The merges of BPE, in their order."""
        pairs = (
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
            for merge in self.model.get("merges") or ()
        )
        found: dict[tuple[str, str], int] = {}
        for rank, pair in enumerate(pairs):
            found.setdefault((pair[0], pair[1]), rank)
        return found

    def always(self) -> Iterator[tuple[int, str]]:
        """The ids that stay whatever is asked for, each with why."""
        yield from ((number, "an added token") for number in self.added)
        if self.unknown is not None:
            yield self.unknown, "the unknown token"
        if self.model.get("byte_fallback"):
            names = (f"<0x{byte:02X}>" for byte in range(256))
            yield from ((self.ids[name], "a byte") for name in names if name in self.ids)
        if self.kind == "BPE" and _mentions(self.data, "ByteLevel"):
            suffix = self.model.get("end_of_word_suffix") or ""
            for character in sorted(byte_characters()):
                for name in dict.fromkeys((character, character + suffix)):
                    if name in self.ids:
                        yield self.ids[name], "a byte"
        if self.kind == "Unigram" and self.model["vocab"]:
            scores = [score for _, score in self.model["vocab"]]
            yield scores.index(min(scores)), "the rarest piece, by which unknown ones are scored"

    def beside(self, ids: Iterable[int]) -> dict[int, str]:
        """The ids that must stay beside some, each with why."""
        known = set(ids)
        found: dict[int, str] = {}
        for number, why in self.always():
            if number not in known:
                found.setdefault(number, why)
        if self.kind == "BPE":
            for token in [self.tokens[n] for n in (*known, *found) if n in self.tokens]:
                for part in self.parts(token):
                    number = self.ids[part]
                    if number not in known:
                        found.setdefault(number, f"a part of {token!r}")
        return found

    def parts(self, token: str) -> list[str]:
        """The tokens that BPE makes on the way to one; none where it is made in no way."""
        prefix = self.model.get("continuing_subword_prefix") or ""
        row = self._characters(token, prefix)
        seen = [*row]
        while len(row) > 1:
            rank, place = min(
                (self.ranks.get(pair, len(self.ranks)), place)
                for place, pair in enumerate(pairwise(row))
            )
            if rank == len(self.ranks):
                return []
            joined = row[place] + row[place + 1].removeprefix(prefix)
            row[place : place + 2] = [joined]
            seen.append(joined)
        made = row == [token] and all(part in self.ids for part in seen)
        return seen[:-1] if made else []

    def _characters(self, token: str, prefix: str) -> list[str]:
        suffix = self.model.get("end_of_word_suffix") or ""
        body = token.removesuffix(suffix) if suffix and token != suffix else token
        inner = prefix and body.startswith(prefix) and body != prefix
        letters = [*(body.removeprefix(prefix) if inner else body)]
        row = [letter if not place and not inner else prefix + letter
               for place, letter in enumerate(letters)]  # fmt: skip
        if body != token and row:
            row[-1] += suffix
        return row

    def trimmed(self, new: Mapping[int, int]) -> dict[str, Json]:
        """The data of the tokenizer that is left.

        Args:
            new: new ids by old ones.

        Raises:
            InputError: tokens must stay as well, or its file has no place for these ids.
        """
        missing = self.beside(new)
        if missing:
            named = (f"{self.token(n)!r} ({why})" for n, why in missing.items())
            raise InputError(
                f"these tokens must stay as well: {shorten(list(named), 6)}; pass tokenizer= to "
                "graphprune.trim_vocabulary, which keeps them, or use graphprune.MappedTokenizer"
            )
        data: dict[str, Json] = copy.deepcopy(dict(self.data))
        model = data["model"]
        kept = {token: new[number] for token, number in self.ids.items() if number in new}
        if self.kind == "Unigram":
            model["vocab"] = [item for item in self.model["vocab"] if item[0] in kept]
            model["unk_id"] = None if self.unknown is None else new[self.unknown]
            if [kept[token] for token, _ in model["vocab"]] != [*range(len(kept))]:
                raise InputError(
                    "a unigram tokenizer numbers its pieces without gaps, which these ids have: "
                    "use graphprune.MappedTokenizer"
                )
        else:
            model["vocab"] = kept
        if self.kind == "BPE":
            model["merges"] = [m for m in self.model.get("merges") or () if self._stays(m, kept)]
        for item in data.get("added_tokens") or ():
            item["id"] = new[item["id"]]
        if data.get("padding"):
            data["padding"]["pad_id"] = new[data["padding"]["pad_id"]]
        _renumber(data.get("post_processor"), new)
        return data

    def token(self, number: int) -> str:
        """The text of a token."""
        return self.tokens.get(number) or self.added.get(number) or f"id {number}"

    def _stays(self, merge: Json, kept: Mapping[str, int]) -> bool:
        prefix = self.model.get("continuing_subword_prefix") or ""
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return {left, right, left + right.removeprefix(prefix)} <= kept.keys()


def _mentions(value: Json, kind: str) -> bool:
    """Whether a part of a tokenizer is of some kind."""
    if isinstance(value, dict):
        inside = (item for key, item in value.items() if key not in ("vocab", "merges"))
        return value.get("type") == kind or any(_mentions(item, kind) for item in inside)
    return isinstance(value, list) and any(_mentions(item, kind) for item in value)


def _renumber(processor: Json, new: Mapping[int, int]) -> None:
    """New ids in what puts special tokens around a text, in place."""
    for part in (processor or {}).get("processors") or ():
        _renumber(part, new)
    for item in ((processor or {}).get("special_tokens") or {}).values():
        item["ids"] = [new[number] for number in item["ids"]]
    for name in ("cls", "sep"):
        if name in (processor or {}):
            processor[name] = [processor[name][0], new[processor[name][1]]]
