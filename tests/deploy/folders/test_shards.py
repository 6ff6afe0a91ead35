"""Tensors of folders by name: read one at a time, and nothing believed that files do not say."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graphprune
from graphprune.deploy.folders.shards import INDEX, SINGLE, Layout, Named, Shards, write_shard
from graphprune.errors import CheckpointError, InputError, ModelError, TraceError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture
def folder(tmp_path):
    """Two shards and an index."""
    tensors = {name: tensor.clone() for name, tensor in net().state_dict().items()}
    names = [*tensors]
    parts = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, tmp_path / file)
    listed = {name: file for file, inside in parts.items() for name in inside}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    return tmp_path


def edit(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_tensors_of_several_files(folder):
    shards, state = Shards(folder), net().state_dict()
    assert set(shards) == set(state)
    assert all(torch.equal(shards[name], tensor) for name, tensor in state.items())
    assert shards.kinds["0.weight"][:2] == ((8, 4), "F32")


def test_a_plan_from_files_is_the_plan_of_the_model(folder):
    """Of a model on the meta device, whatever criterion of weights."""
    model, x = net(), torch.randn(2, 4)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    for criterion in ("l1", "l2", "lamp", "geometric_median"):
        weights = Named(Shards(folder), empty)
        plan = graphprune.trace(empty, x, weights=weights).plan(0.5, criterion=criterion)
        assert plan == graphprune.trace(model, x).plan(0.5, criterion=criterion)
    small = graphprune.rebuild(empty, plan)
    assert small[0].weight.is_meta
    assert small[0].out_features == 4


def test_a_model_without_weights_says_what_needs_them():
    with torch.device("meta"):
        empty = net()
    x = torch.randn(2, 4)
    graph = graphprune.trace(empty, x)
    assert graph.plan(0.5, criterion="random").removed == 4
    with pytest.raises(InputError, match=r"'l2' reads weights.*on the meta device: load it"):
        graph.plan(0.5)
    with pytest.raises(InputError, match="runs the model"):
        graph.plan(0.5, criterion="wanda", data=[x])
    with pytest.raises(ModelError, match="meta device"):
        graphprune.verify(empty, graph.plan(0.5, criterion="random"), x)


def test_wrong_weights_are_told():
    with torch.device("meta"):
        empty = net()
    x, state = torch.randn(2, 4), net().state_dict()
    for weights, text in (
        (5, "weights must map names to tensors, such as a state_dict; got int"),
        ({}, r"weights have no 0\.weight, 0\.bias"),
    ):
        with pytest.raises(InputError, match=text):
            graphprune.trace(empty, x, weights=weights)
    with pytest.raises(InputError, match="this one has its own: leave it out"):
        graphprune.trace(net(), x, weights=state)
    graph = graphprune.trace(empty, x, weights={**state, "0.weight": torch.zeros(9, 4)})
    with pytest.raises(InputError, match=r"'0\.weight' is \[9, 4\] in weights, and \[8, 4\]"):
        graph.plan(0.5)


def test_a_model_that_reads_values_says_that_it_needs_weights():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 8)

        def forward(self, x):
            out = self.layer(x)
            return out * 2 if float(out.sum()) > 0 else out

    with torch.device("meta"):
        model = Reads()
    with pytest.raises(TraceError, match="its weights are on the meta device: load"):
        graphprune.trace(model, torch.randn(2, 4))


def missing(folder):
    (folder / "model-2.safetensors").unlink()


def truncated(folder):
    path = folder / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def no_header(folder):
    (folder / "model-2.safetensors").write_bytes(b"\xff" * 64)


def twice(folder):
    save_file(load_file(folder / "model-1.safetensors"), folder / "model-2.safetensors")
    edit(folder, lambda listed: listed.update({"2.bias": "model-2.safetensors"}))


def other_names(folder):
    edit(folder, lambda listed: listed.update({"9.weight": "model-2.safetensors"}))


def swapped(folder):
    edit(folder, lambda listed: listed.update({"0.weight": "model-2.safetensors"}))


def above(folder):
    edit(folder, lambda listed: listed.update({"0.weight": "../model-1.safetensors"}))


def linked(folder):
    outside = folder.parent / "elsewhere.safetensors"
    os.replace(folder / "model-2.safetensors", outside)
    (folder / "model-2.safetensors").symlink_to(outside)


def no_index(folder):
    (folder / INDEX).write_text("[1, 2]")


WRONG = {
    missing: "has no file model-2",
    truncated: "damaged or truncated: it has",
    no_header: "damaged or truncated",
    twice: "is in model-1.safetensors and in model-2",
    other_names: r"disagree on 9\.weight",
    swapped: r"disagree on 0\.weight",
    above: "lies outside of it",
    linked: "lies outside of it",
    no_index: "cannot read",
}


@pytest.mark.parametrize("damage", WRONG, ids=lambda damage: damage.__name__)
def test_damaged_folders(folder, damage):
    damage(folder)
    with pytest.raises(CheckpointError, match=WRONG[damage]):
        Shards(folder)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        Shards(tmp_path / "nothing")
    with pytest.raises(InputError, match=rf"has neither {SINGLE}"):
        Shards(tmp_path)


def test_files_of_another_model(folder):
    other = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3), nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match=r"missing: 3\.bias, 3\.weight; other shapes: 0\."):
        Named(Shards(folder), other)


def test_tied_weights_are_found_by_any_of_their_names(tmp_path):
    model = net()
    model.extra = nn.Linear(4, 8)
    model.extra.weight = model[0].weight
    save_file({n: t.clone() for n, t in model.state_dict().items() if n != "0.weight"},
              tmp_path / SINGLE)  # fmt: skip
    named = Named(Shards(tmp_path), model)
    assert torch.equal(named["0.weight"], model[0].weight)


def test_files_of_bounded_size(tmp_path):
    layout = Layout.of({"a": 6, "b": 3, "c": 2, "d": 9}, 6)
    assert [*layout.files.values()] == [["a"], ["b", "c"], ["d"]]
    assert json.loads(layout.index())["weight_map"]["c"] == "model-00002-of-00003.safetensors"
    assert Layout.of({"a": 6}, 6).files == {SINGLE: ["a"]}
    path = tmp_path / SINGLE
    write_shard(path, ["a"], lambda name: torch.ones(2, 3).T)
    assert load_file(path)["a"].shape == (3, 2)
    assert [*tmp_path.iterdir()] == [path]


def test_an_interrupted_file_is_none(tmp_path):
    def read(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / SINGLE, ["a"], read)
    assert not [*tmp_path.iterdir()]
