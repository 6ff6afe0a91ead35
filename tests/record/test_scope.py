"""What a recording changes in torch is undone, whatever line it is interrupted at."""

import math

import pytest
import torch
import torch.nn.modules.module as nn_module
from support.interrupt import Interrupt
from torch import Tensor

from graphprune.record import scope


def held():
    """Everything that a recording changes."""
    hooks = {key: found for key, found in vars(nn_module).items() if key.startswith("_global")}
    return (
        torch.backends.mha.get_fastpath_enabled(), vars(torch.autograd.Function)["apply"],
        vars(Tensor)["__reduce_ex__"], math.sqrt, math.floor, scope.current(),
        {key: dict(found) for key, found in hooks.items() if isinstance(found, dict)},
    )  # fmt: skip


def record():
    with scope.recording("a recorder"):
        assert scope.current() == "a recorder"
        math.sqrt(2.0)


# Python says so of what is raised while it closes a generator or an object that nobody knows of.
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_at_any_line_leaves_nothing_behind():
    before, lines = held(), Interrupt(10**9, scope.__file__.__eq__)
    with lines:
        record()
    assert held() == before
    total = 10**9 - lines.left
    assert total > 20
    for number in range(1, total + 1):
        with Interrupt(number, scope.__file__.__eq__):
            record()
        assert held() == before, f"line {number} of {total}"
    record()
    assert held() == before


def test_changes_stay_while_another_recording_runs():
    with scope.recording("outer"):
        changed = held()
        with scope.recording("inner"):
            assert scope.current() == "inner"
        assert held() == changed
    assert scope.current() is None
