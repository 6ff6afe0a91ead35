"""``shrink --max-drop``: the smallest model that loses at most so much."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import graphprune
from graphprune.cli.main import app
from graphprune.cli.searching import batches_of
from graphprune.cli.session import MISTAKE, OK
from graphprune.errors import InputError

SOURCE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))

def share(model):
    return model[0].out_features / 40

def right(model):
    wrong = 40 - model[0].out_features
    return torch.cat([torch.zeros(wrong), torch.ones(1000 - wrong)]) > 0

def batches():
    return [torch.ones(32, 6)]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "searched.py").write_text(SOURCE)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(100, 6)).astype("float32"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "searched", raising=False)
    return tmp_path


def shrink(*options: str) -> Result:
    return CliRunner().invoke(app, ["shrink", "searched.py:net", *options])


def test_the_smallest_model_is_searched_saved_and_verified() -> None:
    found = shrink("--max-drop", "0.3", "--evaluate", "searched.py:share", "--out", "s.safetensors")
    assert found.exit_code == OK, found.output
    assert "of the MACs: loses" in found.stdout
    assert "verified: the small model equals the masked original" in found.stdout
    small = graphprune.load(
        "s.safetensors", nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))
    )
    assert 28 <= small[0].out_features <= 29


@pytest.mark.parametrize("data", ["x.npy", "searched.py:batches"])
def test_a_repaired_model_is_verified_as_it_was_before_that(data: str) -> None:
    options = ["--evaluate", "searched.py:right", "--data", data, "--search", "state.json"]
    found = shrink("--max-drop", "0.02", *options, "--json", "--target", "params=0.5")
    assert found.exit_code == OK, found.output
    document = json.loads(found.stdout)
    assert document["search"]["quantity"] == "params"
    assert document["search"]["chosen"]["most"] <= 0.02
    assert document["verified"]["difference"] < 1e-5
    assert json.loads(Path("state.json").read_text())["tried"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--max-drop", "1"], "--max-drop needs --evaluate"),
        (["--evaluate", "searched.py:share", "--ratio", "0.5"], "--max-drop, which is missing"),
        (["--max-drop", "0.1", "--evaluate", "searched.py:no"], "has no 'no'"),
        (["--max-drop", "0.1", "--evaluate", "share"], "must be path/to/file.py:name"),
        (["--max-drop", "0.1", "--evaluate", "searched.py:share", "--ratio", "0.5"], "not with"),
        (["--max-drop", "0", "--evaluate", "searched.py:share"], "the original stays"),
        (
            ["--max-drop", "0.1", "--evaluate", "searched.py:share", "--data", "x.npy",
             "--certificate", "c.json"],
            "no longer equals",
        ),
        (["--max-drop", "0.1", "--evaluate", "searched.py:share", "--data", "y.npz"], "no file"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(options: list[str], text: str) -> None:
    found = shrink(*options)
    assert found.exit_code == MISTAKE
    assert text in " ".join(found.stderr.split())


def test_batches_of_several_inputs(folder: Path) -> None:
    np.savez(folder / "two.npz", a=np.zeros((100, 2)), b=np.zeros((100, 3)), labels=np.zeros(100))
    found = batches_of("two.npz")
    assert [sorted(batch) for batch in found] == [["a", "b"], ["a", "b"]]
    assert [len(batch["a"]) for batch in found] == [64, 36]
    assert torch.equal(torch.cat(batches_of("x.npy")), torch.from_numpy(np.load("x.npy")))
    np.savez(folder / "uneven.npz", a=np.zeros((4, 2)), b=np.zeros((5, 3)))
    with pytest.raises(InputError, match="different numbers"):
        batches_of("uneven.npz")
