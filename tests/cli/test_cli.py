"""The command line: its outputs, exit codes and messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from typer.testing import CliRunner, Result

import graphprune
from graphprune.cli.loading import load_model, load_weights, parse_inputs
from graphprune.cli.main import app
from graphprune.cli.session import DIFFERS, MISTAKE, OK
from graphprune.errors import CheckpointError, InputError

SOURCE = """
import torch
from torch import nn

def net():
    print("building")
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

def text():
    return "a model"

def broken():
    return nn.Linear(3)

def whole():
    return nn.Sequential(nn.Softmax(1))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 9)
        self.head.weight = self.embed.weight
    def forward(self, x):
        return self.head(self.body(self.embed(x)))

class Space:
    net = staticmethod(net)

instance = nn.Linear(3, 4)
number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "zoo_for_tests.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delitem(sys.modules, "zoo_for_tests", raising=False)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def document(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout)


def shrink(*arguments: str) -> Result:
    return call("shrink", "zoo_for_tests:net", "--ratio", "0.5", *arguments)


def test_shrink_writes_what_verify_accepts() -> None:
    result = shrink("--out", "small.safetensors", "--plan", "plan.json")
    assert result.exit_code == OK, result.output
    assert "12 -> 6" in result.stdout
    assert "verified: the small model equals the masked original" in result.stdout
    assert graphprune.Plan.from_json(Path("plan.json")).removed == 6
    result = call("verify", "zoo_for_tests:net", "small.safetensors")
    assert result.exit_code == OK, result.output
    assert "gradients, train mode" in result.stdout


def test_verify_finds_other_weights() -> None:
    shrink("--out", "small.safetensors")
    result = call("verify", "zoo_for_tests:net", "small.safetensors", "--seed", "1")
    assert result.exit_code == DIFFERS
    assert "the first module that differs is '0'" in result.stderr
    result = call("verify", "zoo_for_tests:net", "small.safetensors", "--seed", "1", "--json")
    assert result.exit_code == DIFFERS
    assert document(result)["error"]["type"] == "VerificationError"


def test_json_is_one_document() -> None:
    found = document(shrink("--json", "--out", "small.safetensors"))
    assert found["ok"]
    assert found["after"]["parameters"] == 6 * 6 + 6 + 6 * 3 + 3
    assert found["verified"]["difference"] < 1e-10
    assert found["out"] == "small.safetensors"
    assert graphprune.Plan.from_json(json.dumps(found["plan"])).removed == 6
    found = document(call("verify", "zoo_for_tests:net", "small.safetensors", "--json"))
    assert found["ok"]
    assert found["verified"]["exact"]
    found = document(call("inspect", "zoo_for_tests:net", "--json"))
    assert [group["kind"] for group in found["groups"]].count("exact") == 1
    assert found["cost"]["macs"] == 6 * 12 + 12 * 3


def test_report() -> None:
    result = shrink("--report", "report.html")
    assert result.exit_code == OK, result.output
    assert "report written to report.html" in result.stdout
    text = Path("report.html").read_text(encoding="utf-8")
    for part in ("<b>Verified.</b>", "latency on cpu", "12 <span", "reads a model input"):
        assert part in text
    found = document(shrink("--report", "report.html", "--json"))
    assert found["report"] == "report.html"
    result = shrink("--report", "nowhere/report.html")
    assert result.exit_code == MISTAKE
    assert "no folder 'nowhere'" in result.stderr


def test_no_verify() -> None:
    result = shrink("--no-verify")
    assert result.exit_code == OK
    assert "not verified" in result.stdout
    assert "nothing was saved" in result.stdout


def test_nothing_is_written_when_the_comparison_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise graphprune.errors.VerificationError("differs")

    monkeypatch.setattr("graphprune.cli.main.compare", fail)
    assert shrink("--out", "small.safetensors", "--plan", "plan.json").exit_code == DIFFERS
    assert not Path("small.safetensors").exists()
    assert not Path("plan.json").exists()


def test_options_reach_the_plan() -> None:
    result = shrink("--json", "--criterion", "random", "--scope", "global", "--seed", "5")
    request = document(result)["plan"]["plan"]["request"]
    wanted = {"ratio": 0.5, "criterion": "random", "scope": "global", "seed": 5}
    assert request == wanted | {"exact_only": False, "attention": "heads", "columns": "aligned"}


NARROW = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
"""


def test_a_warning_is_on_stderr_and_in_the_document() -> None:
    Path("narrow.py").write_text(NARROW)
    result = call("shrink", "narrow.py:net", "--ratio", "0.3", "--json")
    assert result.exit_code == OK, result.output
    assert result.stderr.startswith("warning: 0 of 9 channels were removed")
    assert "too small to lose a channel" in document(result)["warnings"][0]


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    result = call("inspect", "torchvision:resnet18", "--input", "1,3,64,64")
    assert result.exit_code == OK
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "layer1.0.conv1" in result.stdout
    assert "model output" in result.stdout


def test_inspect_draws(folder: Path) -> None:
    assert call("inspect", "zoo_for_tests:net", "--draw", "a.svg").exit_code == OK
    assert "<svg" in Path("a.svg").read_text()


def test_inputs_of_other_types() -> None:
    result = call("inspect", "zoo_for_tests:Words", "--input", "2,5:int64", "--json")
    assert document(result)["cost"]["inputs"] == "int64[2, 5]"


MISTAKES = {
    "no colon": (
        ("shrink", "resnet18"),
        "MODEL must be torchvision:NAME, timm:NAME, hf:FOLDER, onnx:FILE, package.module:factory",
    ),
    "unknown torchvision": (("shrink", "torchvision:resnet19"), "did you mean resnet1"),
    "no module": (("shrink", "no_such_module:net"), "no module 'no_such_module' can be imported"),
    "no package": (("shrink", "no_such.module:net"), "no module 'no_such.module'"),
    "not a name": (("shrink", "a b:net"), "'a b' is no module name"),
    "no file": (("shrink", "no/such.py:net"), "no file 'no/such.py'"),
    "no factory": (("shrink", "zoo_for_tests:nett"), "has no 'nett'; did you mean net"),
    "no model": (("shrink", "zoo_for_tests:text"), "returned a str instead of a torch module"),
    "no function": (("shrink", "zoo_for_tests:number"), "is a int: name a function or a class"),
    "broken": (("shrink", "zoo_for_tests:broken"), "broken() failed: TypeError"),
    "no parameters": (("shrink", "zoo_for_tests:whole"), "has no parameters"),
    "ratio": (("shrink", "zoo_for_tests:net", "--ratio", "1.5"), "ratio must be in [0, 1)"),
    "criterion": (("shrink", "zoo_for_tests:net", "--criterion", "x"), "unknown criterion 'x'"),
    "scope": (("shrink", "zoo_for_tests:net", "--scope", "x"), "unknown scope 'x'"),
    "keep": (("shrink", "zoo_for_tests:net", "--keep", "x"), "keep pattern 'x' matches no layer"),
    "input": (("shrink", "zoo_for_tests:net", "--input", "1,x"), "--input must be positive sizes"),
    "dtype": (("shrink", "zoo_for_tests:net", "--input", "1,6:f"), "unknown dtype 'f' in '1,6:f'"),
    "shape": (("shrink", "zoo_for_tests:net", "--input", "1,7"), "does not run on the example"),
    "folder": (("shrink", "zoo_for_tests:net", "--out", "no/a"), "no folder 'no' to write 'a'"),
    "is folder": (("shrink", "zoo_for_tests:net", "--out", "."), "is a folder: name a file"),
    "its file": (("shrink", "zoo_for_tests.py:net", "--out", "zoo_for_tests.py"), "command reads"),
    "its weights": (
        ("shrink", "zoo_for_tests:net", "--weights", "w", "--plan", "./w"),
        "--plan w is the file",
    ),
    "another format": (("shrink", "zoo_for_tests:net", "--out", "a.PT2"), "export writes .pt2"),
    "of torch": (("shrink", "zoo_for_tests:net", "--out", "a.pth"), "--out writes .safetensors or"),
    "weights": (("shrink", "zoo_for_tests:net", "--weights", "no.pt"), "cannot read 'no.pt'"),
    "picture": (("inspect", "zoo_for_tests:net", "--draw", "a.xyz"), "cannot draw to 'a.xyz'"),
    "small": (("verify", "zoo_for_tests:net", "zoo_for_tests.py"), "no safetensors file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(name: str) -> None:
    arguments, message = MISTAKES[name]
    ratio = ["--ratio", "0.5"] if arguments[0] == "shrink" and "--ratio" not in arguments else []
    result = call(*arguments, *ratio)
    assert result.exit_code == MISTAKE, result.output
    assert message in result.stderr
    assert result.stderr.startswith(("error: ", "building"))
    assert "Traceback" not in result.output
    failed = document(call(*arguments, *ratio, "--json"))
    assert not failed["ok"]
    assert message in failed["error"]["message"]


def test_a_real_process(folder: Path) -> None:
    command = [sys.executable, "-m", "graphprune"]
    arguments = ["inspect", f"{folder}/zoo_for_tests.py:net", "--json"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["ok"]


def test_nothing_says_how_much() -> None:
    result = call("shrink", "zoo_for_tests:net")
    assert result.exit_code == MISTAKE
    assert "nothing says how much to remove" in result.stderr


def test_a_budget_with_constraints() -> None:
    options = "--target", "macs=0.6", "--target", "params=80", "--round-to", "2", "--json"
    more = "--min-kept", "0.25", "--max-kept", "0.9", "--uniform", "--threads", "1"
    result = call("shrink", "zoo_for_tests:net", *options, *more, "--scope", "isomorphic")
    plan = document(result)["plan"]["plan"]
    assert plan["after"]["macs"] <= 0.6 * plan["before"]["macs"]
    assert plan["after"]["params"] <= 80
    assert plan["request"]["target"] == {"macs": 0.6, "params": 80}
    assert plan["request"]["round_to"] == 2


def test_ratios_of_layers() -> None:
    result = call("shrink", "zoo_for_tests:net", "--ratios", "0=0.75", "--json")
    assert document(result)["plan"]["plan"]["after"]["params"] == 3 * 7 + 3 * 4


def test_a_scope_is_left_to_the_target_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    scopes: list[object] = []

    def stopped(*args: object, **options: object) -> None:
        scopes.append(options.get("scope"))
        raise LookupError

    monkeypatch.setattr("graphprune.cli.runtime.rebuild", stopped)
    for options in ((), ("--scope", "global")):
        assert isinstance(call("shrink", "zoo_for_tests:net", *options).exception, LookupError)
    assert scopes == [None, "global"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "macs"), "--target is written name=value, such as macs=0.5; got 'macs'"),
        (("--target", "flops=2"), "unknown target 'flops'"),
        (("--ratios", "0"), "--ratios is written name=value, such as 'layer3.*=0.6'; got '0'"),
        (("--criterion", "wanda"), "and the command line takes none: call graphprune.rebuild("),
        (("--ratios", "0=half"), "--ratios needs a number after the sign =, got 'half'"),
        (("--ratio", "0.5", "--target", "macs=0.5"), "both a ratio (0.5) and a target (macs)"),
    ],
)
def test_wrong_budgets(options: tuple[str, ...], message: str) -> None:
    result = call("shrink", "zoo_for_tests:net", *options)
    assert result.exit_code == MISTAKE
    assert message in result.stderr


# --- models, weights and inputs ---------------------------------------------------------------


def test_models_by_name(folder: Path) -> None:
    assert isinstance(load_model("zoo_for_tests:net"), nn.Sequential)
    assert isinstance(load_model("zoo_for_tests:Space.net"), nn.Sequential)
    assert isinstance(load_model(f"{folder}/zoo_for_tests.py:Words"), nn.Module)
    assert load_model("zoo_for_tests:instance").out_features == 4
    assert load_model("torchvision:lraspp_mobilenet_v3_large").training


def test_the_seed_makes_the_weights() -> None:
    first, again, other = (load_model("zoo_for_tests:net", seed) for seed in (0, 0, 1))
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


@pytest.mark.parametrize("form", ["plain", "state_dict", "module", "both", "safetensors"])
def test_weights(form: str) -> None:
    wanted = load_model("zoo_for_tests:net", 1)
    state: dict[str, Any] = wanted.state_dict()
    if form in ("module", "both"):
        state = {f"module.{name}": value for name, value in state.items()}
    if form in ("state_dict", "both"):
        state = {"state_dict": state, "epoch": 3}
    path = f"weights.{'safetensors' if form == 'safetensors' else 'pt'}"
    save_file(state, path) if form == "safetensors" else torch.save(state, path)
    model = load_model("zoo_for_tests:net", 0)
    load_weights(model, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters()))


def test_weights_of_tied_parameters() -> None:
    wanted, model = (load_model("zoo_for_tests:Words", seed) for seed in (1, 0))
    save_model(wanted, "tied.safetensors")
    load_weights(model, "tied.safetensors")
    assert torch.equal(model.head.weight, wanted.embed.weight)


def test_weights_of_old_files_without_batch_counters() -> None:
    wanted, model = (load_model("torchvision:mnasnet0_5", seed) for seed in (1, 0))
    state = {n: v for n, v in wanted.state_dict().items() if "num_batches" not in n}
    save_file(state, "old.safetensors")
    load_weights(model, "old.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters()))


class Unsafe:
    """Cannot be loaded without running code."""


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ({"a": torch.ones(1)}, r"missing in the file: 0.weight.*; not in the model: a"),
        ({"0.weight": torch.ones(2, 2)}, r"0.weight is \[2, 2\] in the file, \[12, 6\] in the m"),
        ({"0.weight": 3}, "is no state_dict: 0.weight are no tensors"),
        ([1, 2], "holds a list without tensors"),
        ({}, "holds a dict without tensors"),
        (Unsafe(), "holds more than tensors"),
        (b"hello", "holds more than tensors"),
    ],
)
def test_weights_that_do_not_fit(content: object, pattern: str) -> None:
    path = Path("weights.pt")
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=pattern):
        load_weights(load_model("zoo_for_tests:net"), path)


def test_example_inputs() -> None:
    model = nn.Linear(4, 2).half()
    inputs = parse_inputs(["1,4", "2:long", "3:float32"], model)
    assert inputs is not None
    assert [tuple(t.shape) for t in inputs] == [(1, 4), (2,), (3,)]
    assert [t.dtype for t in inputs] == [torch.float16, torch.int64, torch.float32]
    assert parse_inputs([], model) is None


def test_messages_are_of_the_tree() -> None:
    with pytest.raises(InputError):
        load_model("nothing")


ATTENTION = """
from torch import nn

def layer():
    return nn.TransformerEncoderLayer(16, 4, 16, batch_first=True)
"""


@pytest.mark.parametrize(("kind", "sizes"), [("heads", [4]), ("head_dim", [4, 4])])
def test_attention_is_pruned_as_asked(folder: Path, kind: str, sizes: list[int]) -> None:
    (folder / "attention_for_tests.py").write_text(ATTENTION)
    options = ("--input", "1,5,16", "--attention", kind, "--json")
    groups = document(call("inspect", "attention_for_tests:layer", *options))["groups"]
    inside = [g for g in groups if g["kind"] != "frozen" and "self_attn" in g["layers"]]
    assert sorted(group["channels"] for group in inside) == sizes


def test_random_plans_are_tried(folder: Path) -> None:
    found = document(call("check", "zoo_for_tests:net", "--plans", "3", "--json"))
    assert found["tried"]["verify"] == 3
    assert found["ok"]
    result = call("check", "zoo_for_tests:net", "--plans", "0")
    assert result.exit_code == MISTAKE
    assert "plans must be a positive int, not 0" in result.stderr


def test_a_plan_that_fails_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphprune.testing.rebuild", lambda *_: torch.nn.Linear(6, 1))
    result = call("check", "zoo_for_tests:net", "--plans", "2")
    assert result.exit_code == DIFFERS
    assert "fails at 'run'" in result.stderr
