"""Tensors of a folder of safetensors, each read when it is asked for, and written shard by shard.

Files are data of strangers: what an index says is checked against what the files hold before any
tensor is read, and files outside of the folder are not opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from graphprune.arguments import as_path
from graphprune.errors import CheckpointError, InputError
from graphprune.record.tensors import aliases
from graphprune.text import shorten

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LONGEST = 100 << 20  # bytes of an index or a header: more is no list of names


class Kind(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder, by the names that its files give them.

    Memory is that of the tensors which are in use; none is kept here.

    Args:
        folder: with ``model.safetensors``, or with ``model.safetensors.index.json`` and the files
            that it names.

    Raises:
        InputError: it is no such folder.
        CheckpointError: a file is missing, truncated or damaged, lies outside of the folder, holds
            a tensor that another one holds too, or index and files disagree.

    Example:
        >>> import torch, safetensors.torch, tempfile
        >>> from graphprune.deploy.folders.shards import Shards
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file({"a": torch.ones(2, 3)}, f"{folder}/model.safetensors")
        ...     Shards(folder)["a"].shape
        torch.Size([2, 3])
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = as_path(folder, "folder")
        if not self.folder.is_dir():
            raise InputError(f"{str(folder)!r} is no folder: pass one that save_pretrained wrote")
        listed = self._listed()
        self.files: dict[str, str] = {}  # by name of a tensor
        self.kinds: dict[str, Kind] = {}
        for file in dict.fromkeys(listed.values()):
            self._look_into(file)
        if (self.folder / INDEX).is_file():
            self._compare(listed)

    def _listed(self) -> dict[str, str]:
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / SINGLE).is_file():
                raise InputError(
                    f"{str(self.folder)!r} has neither {SINGLE} nor {INDEX}: save the model with "
                    "save_pretrained, which writes safetensors"
                )
            return {"": SINGLE}
        try:
            if index.stat().st_size > _LONGEST:
                raise ValueError("it is too long to be an index")
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            fits = listed and all(isinstance(v, str) for pair in listed.items() for v in pair)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"cannot read {str(index)!r}: {error}") from error
        if not fits:
            raise CheckpointError(f"{str(index)!r} does not say which file holds which tensor")
        return dict(listed)

    def _look_into(self, file: str) -> None:
        path = self.folder / file
        plain = file == os.path.basename(file) and file not in ("", ".", "..")
        if not plain or not _inside(path, self.folder):
            raise CheckpointError(f"{file!r}, a shard of {str(self.folder)!r}, lies outside of it")
        if not path.is_file():
            raise CheckpointError(
                f"{str(self.folder)!r} has no file {file}, which its index names: the folder is "
                "not whole; copy it again"
            )
        for name, kind in _header(path).items():
            if name in self.files:
                raise CheckpointError(
                    f"{name!r} is in {self.files[name]} and in {file}: which one?"
                )
            self.files[name], self.kinds[name] = file, kind

    def _compare(self, listed: Mapping[str, str]) -> None:
        wrong = [name for name, file in listed.items() if self.files.get(name) != file]
        wrong += [name for name in self.files if name not in listed]
        if wrong:
            raise CheckpointError(
                f"the index of {str(self.folder)!r} and its files disagree on {shorten(wrong, 4)}: "
                "files of two models were mixed; copy the folder again"
            )

    def __getitem__(self, name: str) -> Tensor:
        path = self.folder / self.files[name]
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {name!r} from {str(path)!r}: {error}") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def state(self) -> list[tuple[str, int, int]]:
        """What tells these files from changed ones: names, sizes and times."""
        files = sorted(set(self.files.values()))
        stats = [(file, (self.folder / file).stat()) for file in files]
        return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]


class Named(Mapping[str, Tensor]):
    """Tensors of files by the names that a model gives them.

    Args:
        shards: the files.
        model: a model of the architecture; on the meta device, as its values are not looked at.
        spelled: what files call its tensors, where that is something else.

    Raises:
        CheckpointError: parameters are missing or have other shapes.
    """

    def __init__(
        self, shards: Shards, model: nn.Module, spelled: Mapping[str, str] | None = None
    ) -> None:
        self.shards = shards
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.first = aliases(model)
        self.inside: dict[str, str] = {}  # names in files, by those in the model
        for name, first in self.first.items():
            for inside in (name, (spelled or {}).get(name, name)):
                if inside in shards and name in shapes:
                    self.inside.setdefault(first, inside)
        wanted = {self.first[name] for name in shapes if name in self.first}
        missing = sorted(wanted - self.inside.keys())
        found = {name: shards.kinds[inside].shape for name, inside in self.inside.items()}
        other = [f"{n} is {list(found[n])}, not {list(shapes[n])}" for n in found
                 if n in shapes and found[n] != shapes[n]]  # fmt: skip
        if missing or other:
            parts = [f"missing: {shorten(missing, 4)}"] if missing else []
            parts += [f"other shapes: {shorten(other, 3)}"] if other else []
            raise CheckpointError(
                f"the files of {str(shards.folder)!r} do not hold the tensors of "
                f"{type(model).__name__} as it names them ({'; '.join(parts)}): load the model, "
                "which may convert them, and prune it in memory"
            )

    def __getitem__(self, name: str) -> Tensor:
        return self.shards[self.inside[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inside)

    def __len__(self) -> int:
        return len(self.inside)


def _inside(path: Path, folder: Path) -> bool:
    """Whether a file is in a folder, or in the store that the cache of the hub links to."""
    real, home = path.resolve(), folder.resolve()
    return real.parent == home or real.parent == home.parent.parent / "blobs"


def _header(path: Path) -> dict[str, Kind]:
    """What a file says it holds, compared with how long it is."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _LONGEST):
                raise ValueError("its header is longer than the file")
            entries: dict[str, Any] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        kinds, end = {}, 0
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            end = max(end, stop)
            kinds[name] = Kind(tuple(entry["shape"]), entry["dtype"], stop - start)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes, and should have {8 + length + end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{str(path)!r} is damaged or truncated: {error}") from error
    return kinds


# --- writing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Which tensors go into which file.

    Attributes:
        files: names of tensors by names of files.
        bytes: of all tensors.
    """

    files: dict[str, list[str]]
    bytes: int

    @classmethod
    def of(cls, sizes: Mapping[str, int], most: int) -> Layout:
        """In order, files of at most so many bytes, or of one tensor."""
        parts: list[list[str]] = [[]]
        filled = 0
        for name, size in sizes.items():
            if parts[-1] and filled + size > most:
                parts.append([])
                filled = 0
            parts[-1].append(name)
            filled += size
        total = len(parts)
        names = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
        return cls(dict(zip(names if total > 1 else [SINGLE], parts)), sum(sizes.values()))

    def index(self) -> str:
        """The text of the index."""
        where = {name: file for file, names in self.files.items() for name in names}
        return json.dumps({"metadata": {"total_size": self.bytes}, "weight_map": where}, indent=2)


def write_shard(path: Path, names: Sequence[str], read: Callable[[str], Tensor]) -> None:
    """Write one file under a temporary name, sync it and move it.

    Raises:
        CheckpointError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        save_file({name: read(name).contiguous() for name in names}, part, {"format": "pt"})
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
