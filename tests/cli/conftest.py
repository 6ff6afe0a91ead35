"""Latencies are measured for a moment only: how they are is tested where they are measured."""

import pytest

from graphprune.cli import measuring
from graphprune.deploy import timing


@pytest.fixture(autouse=True)
def moments(monkeypatch):
    monkeypatch.setattr(measuring, "_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_TURN", 0.0)
