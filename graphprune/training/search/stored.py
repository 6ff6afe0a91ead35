"""What a search has found out so far, in a file: no evaluation is made twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.arguments import as_path, is_number
from graphprune.errors import CheckpointError, GraphPruneError, InputError
from graphprune.plan.plan import Plan
from graphprune.ranks import Ranks
from graphprune.training.search.outcome import Tried

FORMAT, VERSION = "graphprune-search", 1
_CLOSE = 1e-4  # of marks of the same weights
_LARGEST = 1e100  # of a score
_SAMPLE = 1 << 16  # numbers of a tensor that a digest looks at


class Stored:
    """The scores of the original, and the budgets that were tried; with no path nowhere.

    Args:
        path: the file, made if it is not there.
        settings: of the search; a file of others is refused.
        ranks: the first of them writes the file, which all of them see.

    Raises:
        CheckpointError: the file is damaged.
        RankError: the ranks see different files.
        InputError: it belongs to another search.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any], ranks: Ranks) -> None:
        self.ranks = ranks
        self.path = None if path is None else as_path(path)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, default=repr))
        self.base: np.ndarray | None = None
        self.tried: dict[float, Tried] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)
        ranks.check(
            "the search in the file", sorted(self.tried), "pass a file that all of them see"
        )

    def _read(self, path: Path) -> None:
        try:
            outer = json.loads(path.read_text(encoding="utf-8"))
            if outer["format"] != FORMAT or outer["version"] != VERSION:
                raise KeyError("format")
            _check_types(outer)
            base = np.array(outer["base"], np.float64)
            tried = [Tried(**{**t, "plan": Plan.from_text(t["plan"])}) for t in outer["tried"]]
            settings = dict(outer["settings"])
        except (OSError, ValueError, TypeError, KeyError, GraphPruneError) as error:
            raise CheckpointError(
                f"{str(path)!r} is damaged or no state of a search ({type(error).__name__} "
                f"{error}): pass another path"
            ) from None
        for name, mine in self.settings.items():
            theirs = settings.get(name)
            near = isinstance(mine, float) and isinstance(theirs, float)
            if theirs != mine and not (near and abs(theirs - mine) < _CLOSE):
                raise self._other(name, theirs, mine)
        self.base, self.tried = base, {t.budget: t for t in tried}

    def _other(self, name: str, theirs: object, mine: object) -> InputError:
        what = (
            f" {name}"
            if name in ("architecture", "weights")
            else f" {name}: {theirs!r}, now {mine!r}"
        )
        if name == "data":
            what = " data; a DataLoader that shuffles yields others every time"
        return InputError(
            f"{str(self.path)!r} holds another search (other{what}): pass the same model, data and "
            "options to go on with it, or another path"
        )

    def begin(self, base: np.ndarray) -> None:
        """Keep the scores of the original."""
        self.base = base
        self._write()

    def add(self, tried: Tried) -> None:
        """Keep one more budget."""
        self.tried[tried.budget] = tried
        self._write()

    def _write(self) -> None:
        """Write all of it beside the file, and put it in its place."""
        if self.path is None or self.base is None or not self.ranks.first:
            return
        names = ("budget", "reached", "drop", "most")
        tried = [
            {**{name: getattr(t, name) for name in names}, "plan": t.plan.to_json()}
            for t in self.tried.values()
        ]
        content = {"settings": self.settings, "base": self.base.tolist(), "tried": tried}
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "w", encoding="utf-8") as file:
                json.dump({"format": FORMAT, "version": VERSION, **content}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except OSError as error:
            raise CheckpointError(f"cannot write to {str(self.path)!r}: {error}") from error


def _check_types(outer: Mapping[str, Any]) -> None:
    """Raise a ``TypeError`` unless scores and budgets are numbers that a search can have found."""
    base, tried, limit = outer["base"], outer["tried"], _LARGEST
    if not isinstance(base, list) or not base or not all(is_number(v, -limit, limit) for v in base):
        raise TypeError("base is no list of finite numbers")
    if not isinstance(tried, list) or not isinstance(outer["settings"], dict):
        raise TypeError("tried is no list, or settings no mapping")
    for one in tried:
        if not isinstance(one, dict) or not isinstance(one.get("plan"), str):
            raise TypeError("a budget has no plan")
        fits = is_number(one.get("budget"), 0.0, 1.0) and is_number(one.get("reached"), 0.0, 2.0)
        most = one.get("most")
        bound = most is None or is_number(most, -limit, limit)
        if not fits or not bound or not is_number(one.get("drop"), -limit, limit):
            raise TypeError(f"budget {one.get('budget')!r} has values that no search finds")


def digest(batches: Iterable[object]) -> str:
    """What tells one list of batches from another: shapes, and numbers spread over every tensor."""
    state = hashlib.sha256()
    for leaf in pytree.tree_leaves([_plain(batch) for batch in batches]):
        if not isinstance(leaf, Tensor):
            state.update(repr(leaf).encode() if isinstance(leaf, int | float | str) else b"?")
            continue
        state.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
        numbers = leaf.detach().reshape(-1)[:: leaf.numel() // _SAMPLE + 1].cpu()
        kind = torch.complex128 if leaf.is_complex() else torch.float64
        state.update(numbers.to(kind).numpy().tobytes())
    return state.hexdigest()


def _plain(batch: object) -> object:
    """A batch whose mappings are dicts, whatever a tokenizer made."""
    return dict(batch) if isinstance(batch, Mapping) else batch
