"""Models and files measured in turns: order, what rows say, mistakes. No test looks at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.deploy import bench, export, timing
from graphprune.deploy.load import Load, busy_seconds
from graphprune.errors import ExportError, InputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's exporters


class Two(nn.Module):
    """Two inputs, one of them ids."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(9, 4), nn.Linear(4, width)
        self.drop, self.head = nn.Dropout(), nn.Linear(width, 2)

    def forward(self, words: Tensor, weights: Tensor) -> Tensor:
        pooled = (self.words(words) * weights[..., None]).sum(1)
        return self.head(self.drop(self.body(pooled)))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_TURN", 0.0)


def two() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 9, (3, 5)), torch.rand(3, 5)


def test_models_and_files_have_their_turns(tmp_path: Path) -> None:
    model = Two().train()
    small = graphprune.rebuild(model, 0.5, two())
    made = export(small, tmp_path / "small.pt2", two())
    models = {"original": model, "small": small, "file": made.path}
    found = bench(models, two(), threads=[1, None], seconds=0.0)
    names = ["original", "small", "file"]
    assert [row.name for row in found.rows] == names * len({1, timing.cores()})
    assert {row.threads for row in found.rows} == {1, timing.cores()}
    for row in found.rows:
        assert 0 < row.latency <= row.p95
        assert row.spread >= 0
        assert row.throughput == pytest.approx(3000 / row.latency)
        assert (row.share == 1) or row.name != "original"
        assert row.bytes == (made.bytes if row.name == "file" else None)
    assert "eager" in found.rows[0].engine
    assert "torch.export" in found.rows[2].engine
    assert "small" in str(found)
    assert model.training, "measured in eval mode, but left as it was"


def test_turns_go_round() -> None:
    calls: list[str] = []
    runs = [lambda name=name: calls.append(name) for name in "ab"]
    turns = timing.in_turns(runs, 0.0)
    assert calls[:8] == ["a", "a", "b", "b", "a", "a", "b", "b"], "one run warms up, one counts"
    assert [len(found) for found in turns] == [10, 10]
    assert all(len(turn) == 1 for found in turns for turn in found)


def test_shares_are_of_the_turn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine slows down for all, nothing is said of the models."""
    slow = [1.0] * 5 + [100.0] * 6
    monkeypatch.setattr(
        timing,
        "in_turns",
        lambda runs, *_: [[[2 * factor] for factor in slow], [[factor] for factor in slow]],
    )
    found = bench({"a": Two(), "b": Two()}, two())
    assert [row.share for row in found.rows] == [1.0, 0.5]
    assert [row.latency for row in found.rows] == [200.0, 100.0]


def test_an_onnx_file_by_itself(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the onnx extra is not installed")
    made = export(Two(), tmp_path / "two.onnx", two())
    found = bench({"file": str(made.path)}, seconds=0.0)
    assert found.inputs == "int64[1, 5], float32[1, 5]"
    assert found.rows[0].engine.startswith("ONNX Runtime")
    with pytest.raises(InputError, match="takes 2 inputs, words, weights; got 1"):
        bench({"file": made.path}, torch.randn(1, 4), seconds=0.0)
    with pytest.raises(ExportError, match="file does not run in ONNX Runtime"):
        bench({"file": made.path}, (torch.randn(1, 4), torch.randn(1, 4)), seconds=0.0)
    sizes = {"batch": 0, "length": 1}
    made = export(Two(), tmp_path / "open.onnx", two(), dynamic=sizes)
    with pytest.raises(InputError, match=r"leaves sizes open, words \[batch, length\]"):
        bench({"file": made.path}, seconds=0.0)


MISTAKES: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "none": (({},), {}, "models must be modules and files by name"),
    "list": (([Two()],), {}, "models must be modules and files by name"),
    "suffix": (({"a": "a.txt"}, two()), {}, "'a.txt' is no file of an engine"),
    "threads": (({"a": Two()}, two()), {"threads": 0}, "threads must be positive ints"),
    "no threads": (({"a": Two()}, two()), {"threads": []}, "threads must be positive ints"),
    "clock": (({"a": Two()}, two()), {"clock": "sun"}, "clock must be 'wall'"),
    "threads' clock": (
        ({"a": Two()}, two()),
        {"clock": "processor", "threads": 2},
        "with threads=1",
    ),
    "seconds": (({"a": Two()}, two()), {"seconds": -1}, "seconds must be a number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str) -> None:
    arguments, options, told = MISTAKES[name]
    with pytest.raises(InputError) as caught:
        bench(*arguments, **options)
    assert told in str(caught.value)


def test_the_load_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([100.0, 103.0])
    clock = iter([10.0, 14.0])
    mine = iter([1.0, 2.0])
    monkeypatch.setattr("graphprune.deploy.load.busy_seconds", lambda: next(busy))
    monkeypatch.setattr("graphprune.deploy.load.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("graphprune.deploy.load.time.process_time", lambda: next(mine))
    with Load() as load:
        pass
    assert load.others == 0.5, "three seconds of work in four, one of them mine"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="told by Linux alone")
def test_the_machine_tells_its_load() -> None:
    seconds = busy_seconds()
    assert seconds is not None
    assert seconds > 0
