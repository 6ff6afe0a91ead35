"""Files of every released version load: plans, small models, histories, rounds, rewind points."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.released.models import INPUTS, MODELS, mlp, seeded

import graphprune
from graphprune.training import History, RewindPoint, iterate

FOLDER = Path(__file__).parents[1] / "support" / "released"
VERSIONS = sorted(path.name for path in FOLDER.iterdir() if (path / "outputs.json").exists())


def outputs(version, name):
    return torch.tensor(json.loads((FOLDER / version / "outputs.json").read_text())[name])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_and_a_small_model_load_and_compute_what_they_did(version, name):
    model, x = seeded(MODELS[name]), INPUTS[name]
    plan = graphprune.Plan.from_json(FOLDER / version / f"{name}.json")
    small = graphprune.load(FOLDER / version / f"{name}.safetensors", model)
    assert small.graphprune_plan == plan
    torch.testing.assert_close(small(x).flatten(), outputs(version, name), rtol=1e-4, atol=1e-5)
    again = graphprune.rebuild(model, plan)
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in small.named_parameters()
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_rounds_go_on_and_histories_are_read(version, tmp_path):
    history = History.from_json((FOLDER / version / "history.json").read_text(encoding="utf-8"))
    assert len(history.entries) == 3
    shutil.copytree(FOLDER / version / "rounds", tmp_path / "rounds")
    x, y = torch.linspace(-1, 1, 48).reshape(8, 6), torch.linspace(0, 1, 24).reshape(8, 3)
    outcome = iterate(
        seeded(mlp), 2, None, lambda m: -float((m(x) - y).square().mean().detach()), sparsity=0.5,
        example_inputs=x, folder=tmp_path / "rounds",
    )  # fmt: skip
    assert [e.values["sparsity"] for e in outcome.history.entries] == [
        e.values["sparsity"] for e in history.entries
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_rewind_point_is_read(version):
    point = RewindPoint.load(FOLDER / version / "rewind.pt", seeded(mlp))
    small = graphprune.rebuild(seeded(mlp), 0.5, INPUTS["second_round"])
    assert point.rewind_weights(small) is small
