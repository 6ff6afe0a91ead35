"""Plans in folders, without any library of models: entries, origins of configs, plans of parts."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import graphprune
from graphprune.deploy.folders.plans import (
    PLAN_FILE,
    Entry,
    fitting,
    not_installed,
    settle_values,
    small_of,
    tie,
    write_plan,
)
from graphprune.errors import CheckpointError, InputError, ModelError, PruningWarning
from graphprune.execute import saving
from graphprune.execute.building import Recipe
from graphprune.execute.saving import Origin
from graphprune.record.tensors import fingerprint

X = torch.arange(10).view(2, 5)


class Config:
    def __init__(self, width=16, hidden=24, labels=3):
        self.width, self.hidden, self.labels = width, hidden, labels

    def to_dict(self):
        return dict(vars(self))


class Saved(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def save_pretrained(self, folder):
        (Path(folder) / "config.json").write_text(json.dumps(self.config.to_dict()))


class Body(Saved):
    """Two hidden layers whose widths one field says, and a table that no file holds."""

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(11, config.width)
        self.up = nn.ModuleList(nn.Linear(config.width, config.hidden) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(config.hidden, config.width) for _ in range(2))
        self.register_buffer("places", torch.linspace(0, 1, config.width), persistent=False)

    def forward(self, tokens):
        x = self.words(tokens) + self.places
        for up, down in zip(self.up, self.down):
            x = x + down(up(x).relu())
        return x


class Model(Saved):
    """The body is a part with a config of its own; its table is tied to what comes before it."""

    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(config.width, 11, bias=False)
        self.body = Body(config)
        self.body.words.weight = self.score.weight
        self.head = nn.Linear(11, config.labels)

    def forward(self, tokens):
        return self.head(self.score(self.body(tokens)))


class Writer:
    """Writes folders for the models of this file."""

    def fits(self, offer):
        return isinstance(offer.module, Saved)

    def whole(self, offer):
        return False

    def write(self, offer, args, options):
        config = offer.origin.of(offer.module.config)
        return fitting(offer, config), config


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.setattr(saving, "WRITERS", [Writer()])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model(Config()).eval()


def uneven(model, first=5, second=24):
    """Smaller, by a plan that no config says."""
    graph = graphprune.trace(model, X)
    names = [graph.group_of(f"body.up.{n}").name for n in range(2)]
    stream = graph.group_of("body.down.0").name
    kept = {names[0]: range(first), names[1]: range(second), stream: range(1, 13)}
    with pytest.warns(PruningWarning, match="different numbers of channels"):
        return graphprune.rebuild(model, graph.plan_of(kept), X)


def loaded(kind, config, plan, state):
    """What a loader does: build, make small on meta, fill, and give back what no file holds."""
    reference = small_of(Recipe(kind, config).build(config), plan, "f")
    with torch.device("meta"):
        model = kind(config)
    model = small_of(model, plan, "f")
    model.load_state_dict(state, assign=True)
    settle_values(model, reference)
    return model.eval()


def test_a_folder_with_the_plan_gives_the_small_model(model, writer):
    small = uneven(model)
    plan, config = small.save_pretrained()
    assert vars(config) == vars(model.config)
    again = loaded(Model, config, plan, small.state_dict())
    assert again.body.places.shape == (12,)
    assert torch.equal(again(X), small(X))


def test_so_does_that_of_a_part(model, writer):
    small = uneven(model)
    plan, config = small.body.save_pretrained()
    assert {slot.tensor.partition(".")[0] for slot in plan.slots} == {
        "words",
        "up",
        "down",
        "places",
    }
    assert plan.architecture == fingerprint(Body(Config()))
    again = loaded(Body, config, plan, small.body.state_dict())
    assert torch.equal(again(X), small.body(X))
    assert again.graphprune_plan.groups


def test_rounds_go_back_to_what_the_config_said_first(model, writer):
    first = graphprune.rebuild(model, 0.25, X, keep=["score"])
    assert (first.config.width, first.config.hidden) == (16, 18)
    assert "save_pretrained" not in vars(first)
    graph = graphprune.trace(first, X)
    later = graph.plan_of({graph.group_of("body.up.1").name: range(7)})
    with pytest.warns(PruningWarning, match="cannot express"):
        small = graphprune.rebuild(first, later, X)
    small.config.note = "kept"  # of the user
    plan, config = small.save_pretrained()
    assert (config.width, config.hidden, config.note) == (16, 24, "kept")
    assert torch.equal(loaded(Model, config, plan, small.state_dict())(X), small(X))


def test_a_model_that_was_loaded_can_be_saved(model, writer, tmp_path):
    small = uneven(model)
    path = graphprune.save(small, tmp_path / "small.safetensors")
    again = graphprune.load(path, model)
    plan, config = again.save_pretrained()
    assert torch.equal(loaded(Model, config, plan, again.state_dict())(X), small(X))


def test_the_warning_says_where_the_plan_goes(model, writer):
    graph = graphprune.trace(model, X)
    plan = graph.plan_of({graph.group_of("body.up.1").name: range(7)})
    with pytest.warns(PruningWarning, match=r"writes the plan beside it.*from_pretrained"):
        graphprune.rebuild(model, plan)


def test_without_a_writer_it_refuses(model, tmp_path):
    small = uneven(model)
    with pytest.raises(ModelError, match=r"cannot express .* use graphprune\.save"):
        small.save_pretrained(tmp_path)
    path = graphprune.save(small, tmp_path / "small.safetensors")
    with pytest.raises(ModelError, match="has the sizes of the original"):
        graphprune.load(path, model).save_pretrained(tmp_path)


def test_what_config_and_plan_do_not_make_is_refused(model, writer):
    small = uneven(model)
    small.head = nn.Linear(11, 5)
    with pytest.raises(ModelError, match=r"make another model: head.bias, head.weight differ"):
        small.save_pretrained()
    changed = Model(Config()).eval()
    changed.head = nn.Linear(11, 5)
    with pytest.raises(ModelError, match="does not build the model that was pruned"):
        uneven(changed).save_pretrained()
    masked = uneven(model)
    prune.l1_unstructured(masked.head, "weight", 0.5)
    with pytest.raises(ModelError, match=r"masks of torch.nn.utils.prune.*prune\.remove"):
        masked.save_pretrained()


def test_copies_offer_themselves(model, writer):
    small = copy.deepcopy(uneven(model))
    small.head = nn.Linear(11, 5)
    with pytest.raises(ModelError, match="head"):
        small.save_pretrained()


def test_origins_reach_into_configs_and_mappings():
    class Nested(Config):
        def __init__(self, **fields):
            super().__init__(**fields)
            self.inner, self.sizes = Config(), {"a": [1, 2]}

    before, after = Nested(), Nested()
    after.width, after.inner.hidden, after.sizes = 8, 12, {"a": [1]}
    now = Nested(labels=7)
    now.width, now.inner.hidden, now.inner.labels, now.sizes = 8, 12, 9, {"a": [1]}
    found = Origin(before, after).of(now)
    assert (found.width, found.labels, found.inner.hidden, found.inner.labels) == (16, 7, 24, 9)
    assert found.sizes == {"a": [1, 2]}
    assert (now.width, now.inner.hidden) == (8, 12)
    assert Origin({"w": 2, "n": 1}, {"w": 1, "n": 1}).of({"w": 1, "n": 3}) == {"w": 2, "n": 3}


# --- files of strangers -----------------------------------------------------------------------


@pytest.fixture
def entry(model, tmp_path):
    plan = graphprune.trace(model, X).plan(0.5)
    write_plan(plan, tmp_path)
    return plan, Entry.of(plan, attention="eager")


def test_an_entry_names_its_plan(entry, tmp_path):
    plan, found = entry
    text = json.dumps(found.to_dict())
    read = Entry.read(json.loads(text), "f")
    assert read == found
    assert read.plan(tmp_path / PLAN_FILE, "f") == plan
    assert [path.name for path in tmp_path.iterdir()] == [PLAN_FILE], "nothing is left beside it"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "damaged"),
        ("plan", "damaged"),
        ({"format": 1}, "damaged"),
        ({"format": 1, "digest": 3}, "damaged"),
        ({"format": 2, "digest": "a"}, "has format 2; this graphprune reads 1"),
    ],
)
def test_entries_are_checked(value, said):
    with pytest.raises(CheckpointError, match=said):
        Entry.read(value, "folder")


def test_plans_are_checked(entry, tmp_path):
    plan, found = entry
    path = tmp_path / PLAN_FILE
    with pytest.raises(CheckpointError, match=r"has no file graphprune_plan\.json"):
        found.plan(tmp_path / "none", "f")
    with pytest.raises(CheckpointError, match="has no file"):
        found.plan(None, "f")
    text = path.read_text()
    path.write_text(text[:-40])
    with pytest.raises(CheckpointError, match="cannot read the plan"):
        found.plan(path, "f")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot read the plan"):
        found.plan(path, "f")
    path.write_text(replace(plan, notes=("another",)).to_json())
    with pytest.raises(CheckpointError, match="files of two models were mixed"):
        found.plan(path, "f")


def test_a_plan_that_does_not_fit_changes_nothing(entry):
    plan, _ = entry
    with pytest.raises(CheckpointError, match="the config was changed"):
        small_of(Model(Config(width=20)), plan, "f")
    slot = plan.slots[0]
    wrong = replace(plan, slots=(replace(slot, size=slot.size + 1), *plan.slots[1:]))
    model = Model(Config())
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match="does not fit"):
        small_of(model, wrong, "f")
    assert fingerprint(model) == before


def test_ties_are_made():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    tie(model, {"1.weight": "0.weight", "2.running_var": "2.running_mean"})
    assert model[1].weight is model[0].weight
    assert model[2].running_var is model[2].running_mean
    assert model[1].bias is not model[0].bias


def test_what_is_no_folder_of_a_model(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        graphprune.from_pretrained(tmp_path)


def test_a_folder_that_is_missing_is_told_before_its_library(tmp_path):
    missing = ModuleNotFoundError("No module named 'some_library'", name="some_library")
    said = str(not_installed(tmp_path / "gone", missing))
    assert said.startswith("there is no folder")
    assert "pip install some-library" in said
    assert "holds a model of a library that is not installed" in str(
        not_installed(tmp_path, missing)
    )
