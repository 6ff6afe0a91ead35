"""Where a run of rounds stands, in a folder: the last good model, and what has happened."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.arguments import as_path
from graphprune.errors import CheckpointError, InputError
from graphprune.execute.checkpoint import load, save
from graphprune.plan.plan import Plan, carry
from graphprune.training.history import Entry

FORMAT, VERSION = "graphprune-rounds", 1
STATE = "state.json"
_CLOSE = 1e-4  # of marks of the same weights


@dataclass(frozen=True)
class State:
    """Everything that is not in the model.

    Attributes:
        done: how many rounds of the schedule are finished.
        attempts: how many models were trained.
        sparsity: of the last good model, as it was asked for.
        pace: by what the steps of the schedule are multiplied since the floor was broken.
        retries: how often the floor may still be broken.
        reason: why no more rounds follow; empty when they do.
        plan: from the original to the last good model, as JSON; empty for the original.
        file: of the last good model; empty for the original.
        entries: the history.
    """

    done: int = 0
    attempts: int = 0
    sparsity: float = 0.0
    pace: float = 1.0
    retries: int = 0
    reason: str = ""
    plan: str = ""
    file: str = ""
    entries: tuple[Entry, ...] = field(default=())


class Folder:
    """Keeps the state on disk; with no path nowhere.

    A model is written to a file of its own before the state that names it takes the place of the
    one before: whenever a process dies, the folder holds a state and its model.

    Args:
        path: made if it is not there.
        settings: of the run; a state of other settings is refused.
        writes: otherwise another process writes the same.
    """

    def __init__(
        self, path: str | Path | None, settings: Mapping[str, Any], writes: bool = True
    ) -> None:
        self.writes = writes
        self.path = None if path is None else as_path(path)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, default=repr))

    def read(self) -> State | None:
        """The state, if there is one.

        Raises:
            CheckpointError: the file is damaged.
            InputError: it belongs to a run of another model or of other settings.
        """
        file = None if self.path is None else self.path / STATE
        if file is None or not file.exists():
            return None
        try:
            outer = json.loads(file.read_text(encoding="utf-8"))
            if outer["format"] != FORMAT or outer["version"] != VERSION:
                raise KeyError("format")
            found, settings = outer["state"], outer["settings"]
            entries = tuple(Entry(**entry) for entry in found.pop("entries"))
            state = State(**found, entries=entries)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{str(file)!r} is damaged or no state of rounds ({type(error).__name__} {error}): "
                "pass another folder"
            ) from None
        self._compare(settings)
        return state

    def _compare(self, found: Mapping[str, Any]) -> None:
        for name, mine in self.settings.items():
            theirs = found.get(name)
            near = isinstance(mine, float) and isinstance(theirs, float)
            if theirs == mine or (near and abs(theirs - mine) < _CLOSE):
                continue
            what = "" if name in ("architecture", "weights") else f": {theirs!r}, now {mine!r}"
            raise InputError(
                f"{str(self.path)!r} holds rounds of another run (other {name}{what}): pass the "
                "same model and settings to go on with it, or another folder"
            )

    def write(self, state: State, model: nn.Module | None = None) -> State:
        """Keep a state, with a new model or the one before.

        Returns:
            The state, which names the file of the model.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        if self.path is None:
            return state
        before = state.file
        if model is not None:
            state = replace(state, file=f"model-{state.attempts}.safetensors")
        if not self.writes:
            return state
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if model is not None:
                save(model, self.path / state.file)
            content = {"settings": self.settings, "state": asdict(state)}
            text = json.dumps({"format": FORMAT, "version": VERSION, **content}, indent=1)
            _replace(self.path / STATE, text)
        except OSError as error:
            raise CheckpointError(f"cannot write to {str(self.path)!r}: {error}") from error
        if before and before != state.file:
            (self.path / before).unlink(missing_ok=True)
        return state

    def model(self, state: State, original: nn.Module) -> tuple[nn.Module, Plan | None]:
        """The last good model, and the plan from the original to it.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        if not state.file or self.path is None:
            return original, None
        plan = Plan.from_text(state.plan)
        small = load(self.path / state.file, original)
        carry(small, plan)
        return small, plan


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
