"""The commands ``export`` and ``bench``: files, what they say, mistakes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import graphprune
from graphprune.cli.export import open_sizes
from graphprune.cli.main import app
from graphprune.cli.measuring import measured
from graphprune.cli.session import DIFFERS, MISTAKE, OK
from graphprune.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's exporters
SOURCE = """
from torch import nn

def net():
    print("building")
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets_of_export.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delitem(sys.modules, "nets_of_export", raising=False)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_what_shrink_wrote_is_exported() -> None:
    made = "nets_of_export:net", "--input", "1,3,16,16"
    shrunk = call("shrink", *made, "--ratio", "0.5", "--out", "small.safetensors")
    assert shrunk.exit_code == OK
    exported = call(
        "export", made[0], "small.safetensors", *made[1:], "--out", "small.pt2",
        "--dynamic", "n=0", "--dynamic", "rows=input.2", "--json",
    )  # fmt: skip
    assert exported.exit_code == OK, exported.output
    found = json.loads(exported.stdout)
    assert found["verdict"] == "equal"
    assert found["inputs"][0]["shape"] == ["n", 3, "rows", 16]
    loaded = torch.export.load("small.pt2")
    assert sum(tensor.numel() for tensor in loaded.state_dict.values()) == 4 * 28 + 4 * 37
    assert loaded.module()(torch.randn(3, 3, 20, 16)).shape == (3, 4, 16, 12)


def test_people_are_told_what_was_compared() -> None:
    exported = call("export", "nets_of_export:net", "--input", "1,3,16,16", "--out", "a.pt2")
    assert exported.exit_code == OK, exported.output
    assert "output, batch 2" in exported.stdout
    assert "equal in the engine" in exported.stdout
    assert exported.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--out", "a.tflite"), "path must end in .onnx or .pt2"),
        (("--out", "no/a.pt2"), "no folder 'no'"),
        (("--out", "a.pt2", "--dynamic", "batch"), "--dynamic is written batch=0"),
        (("--out", "a.pt2", "--dynamic", "batch=9"), "no input has a dimension 9"),
        (("--out", "a.pt2", "--output", "logits"), "it is a tensor"),
    ],
)
def test_mistakes_are_one_message(arguments: tuple[str, ...], told: str) -> None:
    result = call("export", "nets_of_export:net", "--input", "1,3,16,16", *arguments)
    assert result.exit_code == MISTAKE
    assert told in result.stderr
    assert not list(Path().glob("a.*"))


def test_sizes_in_words() -> None:
    assert open_sizes([]) == "batch"
    assert open_sizes(["none"]) is None
    assert open_sizes(["n=0", "m=a.1", "m=b.-1"]) == {"n": 0, "m": {"a": 1, "b": -1}}
    with pytest.raises(InputError, match="for every input and for one"):
        open_sizes(["n=0", "n=a.1"])


def test_files_and_models_are_measured() -> None:
    made = "nets_of_export:net", "--input", "1,3,16,16"
    call("shrink", *made, "--ratio", "0.5", "--out", "small.safetensors")
    call("export", made[0], "small.safetensors", *made[1:], "--out", "small.pt2")
    models = made[0], f"{made[0]}=small.safetensors", "small.pt2"
    result = call("bench", *models, *made[1:], "--seconds", "0", "--json")
    assert result.exit_code == OK, result.output
    found = json.loads(result.stdout)
    assert [row["name"] for row in found["rows"]] == list(models)
    assert found["rows"][0]["share"] == 1
    assert found["load"]
    result = call("bench", "small.pt2", "--seconds", "0", "--threads", "1,all")
    assert result.exit_code == OK, result.output
    assert "small.pt2" in result.stdout
    for arguments, told in (
        (("small.pt2", "--threads", "few"), "--threads is written 1, all or 1,all"),
        (("no.pt2",), "cannot load 'no.pt2'"),
        (("no",), "MODEL must be"),
    ):
        result = call("bench", *arguments)
        assert result.exit_code == MISTAKE
        assert told in result.stderr


def test_shrink_tells_the_latency_that_the_plan_was_accepted_by() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(1, 4)
    small = graphprune.rebuild(model, 0.5, x)
    plan = small.graphprune_plan
    told = {"device": "here", "before": 3.0, "predicted": 2.0, "measured": 1.0}
    small.graphprune_plan = replace(plan, request={**plan.request, "latency": told})
    before, after = measured(model, small, x, 1)
    assert (before.latency, after.latency) == (3.0, 1.0)
    small.graphprune_plan = plan
    before, after = measured(model, small, x, 1)
    assert before.latency != 3.0
    assert after.spread is not None


def test_certificates_are_checked_again(tmp_path: Path) -> None:
    made = "nets_of_export.py:net", "--input", "1,3,16,16"
    Path("small").mkdir()
    files = "--out", "small/small.safetensors", "--certificate", "small/shrunk.json"
    assert call("shrink", *made, "--ratio", "0.5", *files).exit_code == OK
    exported = call("export", made[0], files[1], *made[1:], "--out", "small/small.pt2")
    assert "the small model equals the masked original" in exported.stdout
    for name in ("shrunk.json", "small.pt2.certificate.json"):
        result = call("verify", "--certificate", f"small/{name}")
        assert result.exit_code == OK, result.output
        assert "masked original: equal" in result.stdout
        assert "verified" in result.stdout
    Path("small/small.pt2").write_text("something else")
    result = call("verify", "--certificate", "small/small.pt2.certificate.json", "--json")
    assert result.exit_code == DIFFERS
    assert (
        "the content of small.pt2 is another one" in json.loads(result.stdout)["error"]["message"]
    )
    result = call("verify", made[0])
    assert result.exit_code == MISTAKE
    assert "or --certificate" in result.stderr
