"""The demo of the command line: train, shrink and fine-tune a network on real digits."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from graphprune.cli.main import app
from graphprune.cli.session import MISTAKE, OK


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_demo(folder: Path) -> None:
    result = call("demo", "--epochs", "1", "--out", "here/demo")
    assert result.exit_code == OK, result.output
    for text in ("original", "shrunk + fine-tuned", "accuracy", "MACs per image", "file size"):
        assert text in result.stdout
    assert re.search(r"largest relative difference \d\.\de-1\d", result.stdout)
    assert (folder / "here/demo/widths.png").stat().st_size > 10_000
    from graphprune.cli.demo import DigitsResNet, widths
    from graphprune.execute.checkpoint import load

    small = load(folder / "here/demo/small.safetensors", DigitsResNet)
    assert list(widths(small).values())[-1] == 64


def test_demo_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = call("demo")
    assert result.exit_code == MISTAKE
    assert 'pip install "graphprune[demo]"' in result.stderr
    assert not Path("graphprune-demo").exists()


def test_demo_cannot_write() -> None:
    Path("file").write_text("")
    result = call("demo", "--out", "file")
    assert result.exit_code == MISTAKE
    assert "cannot make the folder 'file'" in result.stderr
