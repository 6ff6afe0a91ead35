"""The demo of the command line: train, shrink and fine-tune a network on real digits."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from graphprune.cli.demo import _export, show
from graphprune.cli.main import app
from graphprune.cli.session import MISTAKE, OK


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> object:
        return None if name == "onnx" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("onnx", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_demo(folder: Path, monkeypatch: pytest.MonkeyPatch, onnx: bool) -> None:
    if onnx:
        pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    else:
        without_onnx(monkeypatch)
    result = call("demo", "--epochs", "1", "--out", "here/demo")
    assert result.exit_code == OK, result.output
    for text in (
        "Train", "Shrink", "Verify", "Calibrate", "Fine-tune", "Export",
        "original", "calibrated", "fine-tuned", "accuracy", "MACs per image", "file size",
    ):  # fmt: skip
        assert text in result.stdout
    assert re.search(r"largest relative\s+difference \d\.\de-1\d", result.stdout)
    assert (folder / "here/demo/widths.png").stat().st_size > 10_000
    page = (folder / "here/demo/report.html").read_text(encoding="utf-8")
    for text in (
        "<b>Verified.</b>",
        "blocks.<wbr>5.<wbr>conv2",
        "graphprune demo --epochs 1",
        "calibrated",
    ):
        assert text in page
    from graphprune.cli.demo import DigitsResNet, widths
    from graphprune.execute.checkpoint import load

    small = load(folder / "here/demo/small.safetensors", DigitsResNet)
    assert list(widths(small).values())[-1] == 64
    assert (folder / "here/demo/small.onnx").exists() == onnx
    assert (folder / "here/demo/small.int8.onnx").exists() == onnx


def test_the_report_is_opened_from_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert not show("report.html", Console(force_terminal=False))
    assert opened == []
    assert show("report.html", Console(force_terminal=True))
    assert opened == [Path("report.html").resolve().as_uri()]
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert not show("report.html", Console(force_terminal=True))


def test_demo_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    without_onnx(monkeypatch)
    console = Console(record=True, width=200)
    assert _export(torch.nn.Linear(2, 2), Path("small.onnx"), torch.zeros(1, 2), console) is None
    assert 'pip install "graphprune[onnx]"' in console.export_text()
    assert not Path("small.onnx").exists()


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
