"""Ids of a vocabulary, and tokenizers, as the command line is given them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graphprune.errors import InputError
from graphprune.vocabulary.counting import kept_ids_by_count

_RUN = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)
_MOST = 10_000_000


def load_tokenizer(path: Path) -> Any:
    """A tokenizer of the library ``tokenizers``.

    Raises:
        InputError: the library is not installed, or the file is none of its files.
    """
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            "--tokenizer needs the library tokenizers: pip install tokenizers"
        ) from None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no class of its own
        raise InputError(f"cannot read a tokenizer from {str(path)!r}: {error}") from None


def chosen_ids(
    ids: str | None,
    texts: Sequence[Path],
    tokenizer: Any,
    min_count: int,
    top: int | None,
    share: float | None,
) -> list[int]:
    """The ids that ``--ids`` names, and those that ``--text`` needs.

    Raises:
        InputError: neither is given, or one of them cannot be read.
    """
    if ids is None and not texts:
        raise InputError("which ids stay? pass --ids 0-99,512, or --text FILE with --tokenizer")
    found = set() if ids is None else set(_numbers(ids))
    if texts:
        if tokenizer is None:
            raise InputError("--text needs --tokenizer, the tokenizer.json that makes ids of it")
        lines = _lines(texts)
        found |= {*kept_ids_by_count(lines, tokenizer, min_count=min_count, top=top, share=share)}
    return sorted(found)


def _lines(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:
                yield from (line.rstrip("\n") for line in file)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read texts from {str(path)!r}: {error}") from None


def _numbers(text: str) -> Iterator[int]:
    """Numbers and runs of them, in a text or in the file that it names."""
    path = Path(text)
    if path.is_file():
        text = "".join(f"{line} " for line in _lines([path]))
    for part in filter(None, re.split(r"[\s,]+", text)):
        run = _RUN.fullmatch(part)
        if run is None:
            raise InputError(f"--ids must be such as 0-99,512, or a file; got {part[:40]!r}")
        first, last = int(run[1]), int(run[2] or run[1])
        if not first <= last < first + _MOST:
            raise InputError(f"--ids must be such as 0-99,512; {part!r} is no run of ids")
        yield from range(first, last + 1)
