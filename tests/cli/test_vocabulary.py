"""``graphprune trim-vocabulary``: ids in, a small model and its tokenizer out."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import graphprune
from graphprune.cli.loading import load_model
from graphprune.cli.main import app
from graphprune.cli.session import MISTAKE, OK

SOURCE = """
from torch import nn

def words():
    embed = nn.Embedding(12, 8)
    return nn.Sequential(embed, nn.Linear(8, 12))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "words_for_tests.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(*words):
    return CliRunner().invoke(app, ["trim-vocabulary", "words_for_tests.py:words", *words])


def document(*words):
    result = ran(*words, "--json")
    return json.loads(result.stdout), result.exit_code


def test_ids_stay():
    Path("ids.txt").write_text("1-3, 7\n9")
    for ids in ("1-3,7,9", "ids.txt"):
        found, code = document("--ids", ids, "--out", "small.safetensors", "--plan", "plan.json")
        assert (code, found["ids"]) == (OK, [[1, 2, 3, 7, 9]])
        assert found["verified"]["difference"] <= 1e-10
        assert found["after"]["params"] == 5 * 8 + 5 * 9
        model = load_model("words_for_tests.py:words")
        small = graphprune.load("small.safetensors", model)
        wanted = model(torch.tensor([[7, 1]]))[..., [1, 2, 3, 7, 9]]
        assert torch.allclose(small(torch.tensor([[3, 0]])), wanted, atol=1e-6)
        assert graphprune.Plan.from_json("plan.json") == small.graphprune_plan
    shown = ran("--ids", "1,2", "--report", "report.html")
    assert "vocabulary 12 -&gt; 2 ids" in Path("report.html").read_text(encoding="utf-8")
    assert shown.exit_code == OK
    assert "vocabulary 12 -> 2 ids" in shown.stdout
    assert "verified" in shown.stdout


def test_texts_and_a_tokenizer():
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = [
        "[UNK]",
        *["the", "a", "model", "is", "small", "large", "cut", "and", "fine", "rows", "leave"],
    ]
    level = tokenizers.models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(level)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save("tokenizer.json")
    Path("text.txt").write_text("the model is small\na small model\n")
    told = ("--text", "text.txt", "--tokenizer", "tokenizer.json")
    found, code = document(*told, "--tokenizer-out", "new.json", "--ids", "11", "--no-verify")
    assert (code, found["ids"]) == (OK, [[0, 1, 2, 3, 4, 5, 11]])
    trimmed = tokenizers.Tokenizer.from_file("new.json")
    assert trimmed.encode("the small rows leave").ids == [1, 5, 0, 6]
    found, code = document(*told, "--min-count", "2")
    assert (code, found["ids"]) == (OK, [[0, 3, 5]])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "which ids stay"),
        (("--ids", "3-x"), "got '3-x'"),
        (("--ids", "5-3"), "no run of ids"),
        (("--ids", "3,12"), "id 12 is out of range"),
        (("--text", "text.txt"), "--text needs --tokenizer"),
        (("--ids", "3", "--tokenizer-out", "x.json"), "needs --tokenizer"),
        (("--ids", "3", "--tokenizer", "none.json"), "cannot read a tokenizer"),
        (("--ids", "3", "--out", "no/x.safetensors"), "no folder"),
    ],
)
def test_mistakes_are_told(words, told):
    if "none.json" in words:
        pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    found, code = document(*words)
    assert code == MISTAKE
    assert told in found["error"]["message"]
