"""The exception tree: every error that graphprune raises on purpose."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings

PACKAGE = os.path.dirname(__file__) + os.sep  # frames in it are not the user's
_INSIDE = (PACKAGE, functools.__file__, contextlib.__file__)


class GraphPruneError(Exception):
    """Base class of all errors raised on purpose by graphprune."""


class ModelError(GraphPruneError, ValueError):
    """The model cannot be analysed as it is (quantized, scripted, wrapped, lazy, not finite)."""


class InputError(GraphPruneError, ValueError):
    """An argument is wrong: ratio, criterion, keep pattern, example inputs."""


class TraceError(GraphPruneError, RuntimeError):
    """The model did not run on the example inputs."""

    record: object = None  # what was recorded until it failed, if recording had begun


class PlanError(GraphPruneError, ValueError):
    """A plan is damaged, or belongs to another architecture, or was applied already."""


class RewriteError(GraphPruneError, RuntimeError):
    """A shrunk model does not run or does not have the shapes the plan foresees."""


class VerificationError(GraphPruneError, AssertionError):
    """A shrunk model and its masked reference differ."""


class OpError(GraphPruneError, AssertionError):
    """What is declared of an op does not hold; see ``graphprune.ops.check``."""


class CheckFailed(GraphPruneError, AssertionError):
    """A step of ``graphprune.testing.check`` does not hold for ``plan``, the smallest found."""

    def __init__(self, text: str, plan: object = None, step: str = "") -> None:
        super().__init__(text)
        self.plan, self.step = plan, step


class CheckpointError(GraphPruneError, ValueError):
    """A saved file is damaged or does not fit the model."""


class ExportError(GraphPruneError, RuntimeError):
    """A model could not be written for an engine, or the engine does not run what was written."""


class RankError(GraphPruneError, RuntimeError):
    """Processes that train one model together do not agree on what to remove."""


class RoundError(GraphPruneError, RuntimeError):
    """A round of pruning and training went wrong; ``outcome`` holds the last good model."""

    def __init__(self, text: str, outcome: object = None) -> None:
        super().__init__(text)
        self.outcome = outcome


class PruningWarning(UserWarning):
    """A request could not be met as asked; the text names the groups and the reasons."""


def warn(text: str) -> None:
    """Give a ``PruningWarning`` at the line of the user's code that called the package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, PruningWarning, stacklevel=level)
