"""Files that appear under their names whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from graphprune.errors import ExportError

_ABANDONED = 86_400.0  # seconds after which what a killed process was writing is left over
_BLOCK = 1 << 20


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A folder to write files into that are moved to where ``path`` is, when all went well.

    The file named as ``path`` is moved last. What had its name before leaves first, so that it is
    never seen beside a data file of another model.

    Raises:
        ExportError: the files cannot be written.
    """
    if path.is_dir():
        raise ExportError(f"{str(path)!r} is a folder: name a file")
    _tidy(path)
    try:
        folder = Path(tempfile.mkdtemp(".part", f".{path.name}.", path.parent))
    except OSError as error:
        raise ExportError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    try:
        yield folder
        parts = sorted(folder.iterdir(), key=lambda part: part.name == path.name)
        if any(part.name == f"{path.name}.data" for part in parts):
            path.unlink(missing_ok=True)
        for part in parts:
            _sync(part)
            os.replace(part, path.with_name(part.name))
    except OSError as error:
        raise ExportError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        ExportError: it cannot be written.
    """
    with written_beside(path) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tidy(path: Path) -> None:
    """Remove what processes left behind that were killed."""
    for part in path.parent.glob("*.part"):
        mine = part.name.startswith(f".{path.name}.") and part.is_dir()
        if mine and time.time() - part.stat().st_mtime > _ABANDONED:
            shutil.rmtree(part, ignore_errors=True)
