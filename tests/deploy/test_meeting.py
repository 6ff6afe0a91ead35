"""A latency in ONNX Runtime: the search, on times that are made up; no test looks at a clock."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.cli.runtime import smaller
from graphprune.deploy import engines, meet_latency, meeting
from graphprune.errors import InputError


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.Linear(256, 2))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Latencies by the parameters of a model: 2 ms and 8 ms more for the whole one."""
    whole = sum(p.numel() for p in net().parameters())
    seen: list[float] = []

    def export(model: nn.Module, path: Path, *_: object, **__: object) -> Any:
        path.write_text(str(sum(p.numel() for p in model.parameters())))
        return SimpleNamespace(path=path)

    def bench(files: dict[str, Path], *_: object, **__: object) -> Any:
        times = [2 + 8 * int(path.read_text()) / whole for path in files.values()]
        seen.append(times[-1])
        rows = [SimpleNamespace(latency=ms, share=ms / times[0]) for ms in times]
        return SimpleNamespace(rows=tuple(rows))

    monkeypatch.setattr(meeting, "export", export)
    monkeypatch.setattr(meeting, "bench", bench)
    monkeypatch.setattr(meeting, "needed", lambda *_: None)
    for runtime in engines.ENGINES:
        named = SimpleNamespace(name=f"an engine, {runtime}")
        monkeypatch.setitem(engines.ENGINES, runtime, lambda _, named=named: named)
    return seen


@pytest.mark.parametrize("latency", [0.6, "6 ms", "60%"])
def test_the_largest_model_that_is_fast_enough(made_up: list[float], latency: Any) -> None:
    model, x = net(), torch.randn(1, 8)
    met = meet_latency(model, latency, x, round_to=4)
    assert met.before == 10
    assert met.limit == 6
    assert 0.95 * 6 <= met.measured <= 6
    assert len(met.tries) < 8
    assert abs(met.predicted / met.measured - 1) < 0.05
    assert graphprune.verify(model, met.small, x).verdict == "equal"
    told = met.small.graphprune_plan.request["latency"]
    assert (told["before"], told["measured"]) == (met.before, met.measured)
    assert graphprune.Plan.from_json(met.small.graphprune_plan.to_json()).request["latency"] == told
    assert "asked for" in str(met)
    assert met.small.graphprune_plan.notes[-1].startswith("latency on an engine, onnxruntime, ")


def test_widths_are_those_that_the_engine_likes(made_up: list[float]) -> None:
    small = meet_latency(net(), 0.5, torch.randn(1, 8)).small
    assert small[0].out_features % 16 == 0
    assert small[2].out_features % 16 == 0


def test_in_another_engine(made_up: list[float]) -> None:
    met = meet_latency(net(), 0.5, torch.randn(1, 8), runtime="openvino")
    assert met.engine.startswith("an engine, openvino, threads: 1")
    assert met.measured <= 5


def test_what_is_out_of_reach_is_told(made_up: list[float]) -> None:
    with pytest.raises(InputError, match="was not met: the nearest model took 2"):
        meet_latency(net(), 0.1, torch.randn(1, 8))


@pytest.mark.parametrize(
    ("latency", "options", "told"),
    [
        (0.0, {}, "target 'latency' must be"),
        ("fast", {}, "target 'latency' must be"),
        (0.5, {"threads": 0}, "threads must be a positive int"),
        (0.5, {"target": {"macs": 0.5}}, "target= is what is searched for"),
        (0.5, {"runtime": "tensorrt"}, "runtime must be 'onnxruntime' or 'openvino'; got 'tenso"),
    ],
)
def test_mistakes_are_told(latency: Any, options: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        meet_latency(net(), latency, torch.randn(1, 8), **options)


def test_on_the_command_line(made_up: list[float]) -> None:
    model, x = net(), torch.randn(1, 8)
    small = smaller("onnxruntime", model, None, x, "heads", {"target": {"latency": "0.6"},
                    "round_to": 1, "threads": None})  # fmt: skip
    assert small[0].out_features % 16 == 0
    assert small.graphprune_plan.request["latency"]["measured"] <= 6
    small = smaller("pytorch", model, 0.5, x, "heads", {})
    assert small[0].out_features == 128
    for runtime, ratio, options in (
        ("tensorrt", 0.5, {}),
        ("onnxruntime", 0.5, {}),
        ("onnxruntime", None, {"target": {"macs": "0.5"}}),
    ):
        with pytest.raises(InputError, match="--runtime"):
            smaller(runtime, model, ratio, x, "heads", options)
