"""Names of modules up to 0.2, for code that imports them and for pickles that hold them."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {  # not those of public functions, which importing would replace
    "analysis": "channels.analysis",
    "attention": "record.attention",
    "batches": "record.batches",
    "blocks": "channels.blocks",
    "changes": "plan.changes",
    "checkpoint": "execute.checkpoint",
    "comparing": "verification.comparing",
    "costs": "planning.costs",
    "graph": "api",
    "inputs": "record.inputs",
    "latency": "planning.latency",
    "observe": "record.observe",
    "options": "planning.options",
    "recorder": "record.recorder",
    "rewrite": "execute",
    "rewrite.config": "execute.config",
    "rewrite.forward": "execute.forward",
    "rewrite.shrink": "execute.shrink",
    "sensitivity": "planning.sensitivity",
    "sites": "record.sites",
    "sizes": "record.sizes",
}
_ROOT = __package__ + "."


class _Finder(MetaPathFinder, Loader):
    """Gives the module that has taken the place of another."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answers for the old names alone."""
        known = name.startswith(_ROOT) and name.removeprefix(_ROOT) in MOVED
        return ModuleSpec(name, self) if known else None

    def create_module(self, spec: ModuleSpec) -> Any:
        """The module of the new name, itself."""
        new = _ROOT + MOVED[spec.name.removeprefix(_ROOT)]
        warnings.warn(f"{spec.name} is {new} since 0.3", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self.own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already, and keeps its own spec."""
        module.__spec__ = self.own


def find_moved() -> None:
    """Let the import system know the old names."""
    if not any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before those that look into the folder of a new name
