"""Models of libraries and of folders by name, and what other libraries have to say."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.exported import write
from typer.testing import CliRunner, Result

import graphprune
from graphprune.cli.loading import load_model
from graphprune.cli.main import app
from graphprune.cli.session import MISTAKE, OK, of_the_user, session
from graphprune.errors import InputError

SOURCE = """
import logging
import warnings
import torch
import loud

def net():
    loud.speak()
    warnings.warn("a warning of the user")
    logging.getLogger("mine").warning("a remark of the user")
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
"""
LOUD = """
import logging
import warnings

def speak():
    warnings.warn("a warning of a library")
    logging.getLogger("loud").warning("a remark of a library")
    logging.getLogger("loud").error("an error of a library")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_random_weights_are_said() -> None:
    pytest.importorskip("torchvision")
    given = ("shrink", "torchvision:squeezenet1_1", "--input", "1,3,32,32", "--ratio", "0.5")
    result = call(*given, "--no-verify", "--report", "report.html")
    assert result.exit_code == OK, result.output
    assert "the weights of the original are random" in Path("report.html").read_text("utf-8")
    assert "the weights are random: torchvision:squeezenet1_1 names" in " ".join(
        result.stdout.split()
    )
    torch.save(load_model("torchvision:squeezenet1_1").state_dict(), "weights.pt")
    found = call(*given, "--no-verify", "--json", "--weights", "weights.pt")
    assert json.loads(found.stdout)["random_weights"] is False


def test_other_libraries_are_not_heard(folder: Path, monkeypatch) -> None:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    monkeypatch.setattr(logging.root, "handlers", [handler])
    (folder / "net.py").write_text(SOURCE)
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "loud.py").write_text(LOUD)
    monkeypatch.syspath_prepend(str(folder / "site-packages"))
    monkeypatch.delitem(sys.modules, "loud", raising=False)
    before = logging.Logger.callHandlers
    result = call("shrink", "net.py:net", "--ratio", "0.5", "--no-verify")
    assert result.exit_code == OK, result.output
    assert "a warning of the user" in result.stderr
    assert "of a library" not in result.stderr
    assert heard == ["an error of a library", "a remark of the user"]
    assert logging.Logger.callHandlers is before


def test_whose_a_file_is(folder: Path) -> None:
    assert of_the_user(str(folder / "train.py"))
    assert not of_the_user(torch.__file__)
    assert not of_the_user(logging.__file__)
    assert not of_the_user(sys.modules["graphprune.cli.main"].__file__)


def test_logging_is_as_before_when_a_command_fails() -> None:
    before = logging.Logger.callHandlers
    with pytest.raises(RuntimeError), session(as_json=True):
        raise RuntimeError
    assert logging.Logger.callHandlers is before


@pytest.mark.parametrize("library", ["timm", "transformers", "torchvision"])
def test_libraries_that_are_not_installed(library: str, folder: Path, monkeypatch) -> None:
    (folder / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, library, None)
    text = {"transformers": "hf:."}.get(library, f"{library}:resnet18")
    with pytest.raises(InputError, match=f"needs {library} .*pip install {library}"):
        load_model(text)


def test_models_of_timm() -> None:
    pytest.importorskip("timm")
    first, second = (load_model("timm:test_resnet", seed) for seed in (0, 0))
    pairs = zip(first.state_dict().values(), second.state_dict().values())
    assert all(map(torch.equal, *zip(*pairs)))
    with pytest.raises(InputError, match="timm has no model 'test_resnt'; did you mean test_res"):
        load_model("timm:test_resnt")


def test_folders_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=4, intermediate_size=24,
        vocab_size=50,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "bert")
    loaded = load_model("hf:bert")
    assert type(loaded) is type(model)
    pairs = zip(loaded.state_dict().values(), model.state_dict().values())
    assert all(map(torch.equal, *zip(*pairs)))
    result = call("shrink", "hf:bert", "--ratio", "0.5", "--no-verify")
    assert result.exit_code == OK, result.output
    assert "random" not in result.stdout

    path = folder / "bert" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "architectures": ["NewModelForEverything"]}))
    with pytest.raises(InputError, match="NewModelForEverything, which transformers"):
        load_model("hf:bert")
    path.write_text(json.dumps({**content, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(InputError, match="has no weights for cls"):
        load_model("hf:bert")
    path.write_text("[]")
    with pytest.raises(InputError, match=r"config\.json holds no object"):
        load_model("hf:bert")


def test_folders_of_small_models(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=4, intermediate_size=24,
        vocab_size=50,
    )  # fmt: skip
    ids = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = graphprune.rebuild(transformers.BertModel(config), 0.5, ids)
        small.save_pretrained(folder / "small")
    loaded = load_model("hf:small")
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {
        n: t.shape for n, t in small.state_dict().items()
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's exporters
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_file_of_onnx_becomes_a_smaller_one(folder: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    write(net, (torch.randn(2, 4),), folder / "net.onnx", "script", names=("given",))
    result = call("shrink", "onnx:net.onnx", "--ratio", "0.5", "--out", "small.onnx", "--json")
    assert result.exit_code == OK, result.output
    told = json.loads(result.stdout)
    assert told["exported"]["verdict"] == "equal"
    assert told["verified"]["difference"] < 1e-10
    assert told["random_weights"] is False
    small = onnx.load("small.onnx").graph
    assert [value.name for value in (*small.input, *small.output)] == ["given", "y"]
    assert sorted(tuple(w.dims) for w in small.initializer) == [(2,), (2, 4), (4,), (4, 4)]
    before = (folder / "net.onnx").read_bytes()
    Path("link.onnx").symlink_to("net.onnx")
    for out in ("net.onnx", str(folder / "net.onnx"), "link.onnx"):
        for command in (("shrink", "onnx:net.onnx", "--ratio", "0.5"), ("export", "onnx:net.onnx")):
            result = call(*command, "--out", out)
            assert result.exit_code == MISTAKE
            assert "is the file that the command reads" in result.stderr
    assert (folder / "net.onnx").read_bytes() == before
    assert call("shrink", "onnx:net.onnx", "--ratio", "0.5", "--out", "B.ONNX").exit_code == OK
    assert len(onnx.load("B.ONNX", "protobuf").graph.node) == 3
    result = call("bench", "onnx:net.onnx", "net.onnx", "--seconds", "0", "--json")
    assert result.exit_code == OK, result.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("onnx:absent.onnx",), "no file 'absent.onnx'"),
        (("onnx:text.onnx",), "'text.onnx' cannot be read as ONNX"),
        (
            ("onnx:text.onnx", "--out", "a.onnx", "--certificate", "a.json"),
            "--certificate needs the small model itself",
        ),
    ],
)
def test_what_is_wrong_with_a_file_of_onnx_is_told(
    folder: Path, arguments: tuple[str, ...], told: str
) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    (folder / "text.onnx").write_text("no model", encoding="utf-8")
    result = call("shrink", *arguments, "--ratio", "0.5")
    assert result.exit_code == MISTAKE
    assert told in result.stderr
    assert not (folder / "a.onnx").exists()
