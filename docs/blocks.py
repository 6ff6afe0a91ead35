"""Run the python blocks of Markdown files: ``docs/blocks.py [FILE ...]`` writes what they print.

A ``text`` block right after a ``python`` block is what that block prints; ``...`` stands for
anything. The blocks of one file share their names and run in a temporary directory.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import itertools
import linecache
import re
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
FILES = (HERE.parent / "README.md", *sorted(HERE.glob("*.md")))
FENCE = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One python block: what it prints, and what the file says that it prints."""

    line: int
    code: str
    printed: str
    shown: str | None

    @property
    def true(self) -> bool:
        """Whether the file shows what is printed, up to what may differ between machines."""
        if self.shown is None:
            return True
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        return doctest.OutputChecker().check_output(_plain(self.shown), _plain(self.printed), flags)


def _plain(text: str) -> str:
    """Text without line numbers of the file itself, rounding errors and widths of columns."""
    text = re.sub(r"\.md:\d+", ".md:N", text)
    return re.sub(r"-{3,}", "---", re.sub(r"\d\.\de[-+]\d\d", "E", text))


def run(path: Path) -> list[Block]:
    """Run all python blocks of a file, in order."""
    text = path.read_text(encoding="utf-8")
    module = types.ModuleType(path.stem.replace("-", "_"))
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    linecache.cache[path.name] = (len(text), None, _code(text), path.name)  # as a file of code
    torch.manual_seed(0)
    blocks = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start(1))
            code = compile("\n" * line + match[1], path.name, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, vars(module))
            blocks.append(Block(line + 1, match[1], out.getvalue(), match[2]))
    del sys.modules[module.__name__], linecache.cache[path.name]
    return blocks


def _code(text: str) -> list[str]:
    """The lines of a file, blank outside its python blocks: the source that models are read in."""
    inside = [range(*match.span(1)) for match in FENCE.finditer(text)]
    starts = itertools.accumulate(map(len, text.splitlines(keepends=True)), initial=0)
    lines = zip(starts, text.splitlines(keepends=True), strict=False)
    return [line if any(start in span for span in inside) else "\n" for start, line in lines]


def refresh(path: Path) -> None:
    """Write what the blocks of a file print below them, where it changed."""
    blocks = iter(run(path))

    def fill(match: re.Match[str]) -> str:
        block = next(blocks)
        if block.true:
            return match[0]
        lines = "\n".join(line.rstrip() for line in block.printed.splitlines())
        return f"```python\n{block.code}```\n\n```text\n{lines}\n```"

    text = path.read_text(encoding="utf-8")
    filled = FENCE.sub(fill, text)
    if filled != text:
        path.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]) if sys.argv[1:] else FILES:
        refresh(file.resolve())
