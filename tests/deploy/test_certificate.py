"""Certificates: what they say, and what is found when they are checked again."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.deploy import Certificate, export, repeat
from graphprune.deploy.certificate import weights_digest
from graphprune.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inside torch's exporters
    pytest.mark.filterwarnings(r"ignore::RuntimeWarning:torch\b"),  # of some versions of Python
]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.body(x).relu()
        return {"scores": self.head(y), "sum": self.head(y).sum(1)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(2, 4)
    small = graphprune.rebuild(model, 0.5, x)
    sizes = {"rows": 0}
    path = tmp_path_factory.mktemp("exported") / "small.pt2"
    found = export(small, path, x, original=model, dynamic=sizes, outputs="scores")
    return {"path": found.certificate, "small": small, "original": model, "example_inputs": x}


@pytest.fixture
def made(exported: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Files and models that a test may change."""
    shutil.copytree(exported["path"].parent, tmp_path, dirs_exist_ok=True)
    path = tmp_path / exported["path"].name
    return copy.deepcopy({**exported, "path": path})


def test_it_says_what_was_made_and_compared(made: dict[str, Any]) -> None:
    known = Certificate.read(made["path"])
    assert [(one.what, one.verdict) for one in known.compared] == [
        ("masked original", "equal"),
        ("small.pt2", "equal"),
    ]
    assert list(known.files) == ["small.pt2"]
    assert known.original is not None
    assert known.original["class"] == "Pair"
    assert known.small["weights"] != known.original["weights"]
    assert known.ran is not None
    assert known.ran.sizes == {"rows": {"x": 0}}
    assert known.ran.outputs == ("scores",)
    assert set(known.versions) >= {"python", "torch", "graphprune"}
    assert json.loads(made["path"].read_text())["version"] == 1


def test_nothing_differs_when_nothing_changed(made: dict[str, Any]) -> None:
    found = repeat(**made)
    assert found.differences == ()
    assert [one.what for one in found.compared] == ["masked original", "small.pt2"]
    found = repeat(made["path"], made["small"], example_inputs=made["example_inputs"])
    assert found.differences == ()
    assert found.notes == ("masked original: not compared again, as it is not at hand",)


def change_weights(made: dict[str, Any]) -> None:
    with torch.no_grad():
        made["small"].head.bias.add_(1)


def change_original(made: dict[str, Any]) -> None:
    with torch.no_grad():
        made["original"].body.weight.mul_(2)


def change_file(made: dict[str, Any]) -> None:
    other = graphprune.rebuild(made["original"], 0.25, made["example_inputs"])
    path = made["path"].parent / "small.pt2"
    export(other, path, made["example_inputs"], certificate=False, outputs="scores")


def lose_file(made: dict[str, Any]) -> None:
    (made["path"].parent / "small.pt2").unlink()


def another_plan(made: dict[str, Any]) -> None:
    made["small"] = graphprune.rebuild(made["original"], 0.25, made["example_inputs"])


CHANGES = {
    change_weights: {"weights of the small model are others", "masked original: equal then, differ"}
    | {"small.pt2: equal then, different now"},
    change_original: {"weights of the original are others", "masked original: equal then, differ"},
    change_file: {"content of small.pt2 is another one", "small.pt2: equal then, different now"},
    lose_file: {"small.pt2 is not beside the certificate"},
    another_plan: {"small model has other layers or widths", "plan of the small model is another"}
    | {"small.pt2: equal then, different now"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_told(made: dict[str, Any], change: Any) -> None:
    change(made)
    differences = repeat(**made).differences
    assert len(differences) == len(CHANGES[change])
    for told in CHANGES[change]:
        assert any(told in text for text in differences), (told, differences)


def test_a_fine_tuned_model_is_exported_and_told(tmp_path: Path) -> None:
    model, x = Pair(), torch.randn(2, 4)
    small = graphprune.rebuild(model, 0.5, x)
    with torch.no_grad():
        small.head.bias.add_(1)
    path = export(small, tmp_path / "small.pt2", x, original=model).certificate
    assert path is not None
    assert [one.verdict for one in Certificate.read(path).compared] == ["different", "equal"]
    assert repeat(path, small, model, x).differences == ()


DAMAGED = {
    "no file": (None, "cannot read"),
    "no JSON": ("{", "is no certificate"),
    "other JSON": ("{}", "is no certificate: pass what export wrote"),
    "later": ('{"format": "graphprune certificate", "version": 2}', "is of version 2"),
    "lacks": ('{"format": "graphprune certificate", "version": 1}', "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_certificates_are_told(tmp_path: Path, name: str) -> None:
    text, told = DAMAGED[name]
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        Certificate.read(path)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"compared": []}, "holds no comparison"),
        ({"files": {}}, "has no digest of small.pt2"),
        ({"original": None}, "does not say which original"),
        ("tolerance", "which proves nothing"),
    ],
    ids=str,
)
def test_what_a_certificate_does_not_say_is_a_difference(
    made: dict[str, Any], change: Any, told: str
) -> None:
    content = json.loads(made["path"].read_text())
    if change == "tolerance":
        content["compared"][-1]["tolerance"] = 1e9
    else:
        content.update(change)
    made["path"].write_text(json.dumps(content))
    assert told in "\n".join(repeat(**made).differences)


@pytest.mark.parametrize("wrong", [3, [], {}, "text", None], ids=repr)
@pytest.mark.parametrize("field", ["versions", "files", "small", "compared", "seed", "date"])
def test_fields_of_another_type_are_told(made: dict[str, Any], field: str, wrong: Any) -> None:
    content = json.loads(made["path"].read_text())
    if isinstance(wrong, type(content[field])):
        pytest.skip("it is of this type")
    made["path"].write_text(json.dumps({**content, field: wrong}))
    with pytest.raises(CheckpointError, match="is damaged"):
        Certificate.read(made["path"])


def test_digests_see_names_shapes_and_values() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    digests = {
        weights_digest(tensors),
        weights_digest({**tensors, "a": torch.arange(6.0).view(2, 3)}),
        weights_digest({**tensors, "a": torch.arange(6.0) + 1e-6}),
        weights_digest({"c": tensors["a"], "b": tensors["b"]}),
        weights_digest({**tensors, "b": torch.ones(2)}),
    }
    assert len(digests) == 5
    assert weights_digest(dict(reversed(tensors.items()))) in digests
