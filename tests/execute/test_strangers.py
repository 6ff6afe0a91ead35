"""Plans and files that a stranger changed: refused with an error of ours, and nothing has moved."""

import os
import random
import subprocess
import sys
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.interrupt import Interrupt
from support.strangers import (
    MODELS,
    body_of,
    difference,
    forged,
    mutated,
    plan_for,
    rewrite,
    seeded,
    state_of,
)
from torch import nn

import graphprune
from graphprune.errors import CheckpointError, GraphPruneError, PlanError
from graphprune.execute.checkpoint import _digest, load, save

PLANS = {name: plan_for(name) for name in MODELS}
QUICK, LONG = 60, 6000
SIZES = {  # what torch's own layers remember of their weights
    "in_channels", "out_channels", "in_features", "out_features", "num_features",
    "normalized_shape", "groups", "num_channels",
}  # fmt: skip


def attempt(name, text):
    """Let a text change a model in place: what it changed, and whether it was taken."""
    model = seeded(MODELS[name][0])
    before = state_of(model)
    try:
        plan = graphprune.Plan.from_json(text)
        graphprune.rebuild(model, plan, inplace=True)
    except GraphPruneError:
        plan = None
    after = state_of(model)
    assert plan or not difference(before, after), "refused, and changed"
    return plan and allowed(plan, before, after)


def allowed(plan, before, after):
    """That only what a plan names, in the range of sizes, is other than before."""
    named = {f"{c.module}:{c.name}" for c in plan.sizes}
    named |= {f"{c.module}:{c.attribute}" for c in plan.scales}
    named |= {f"{c.module}:of" for c in plan.norms}
    for name in difference(before, after):
        if ":" in name:
            key = name.partition(":")[2]
            mine = key in ("graphprune_plan", "forward") or key in SIZES or name in named
            mine |= key == "class" and issubclass(after[name], before[name])
            assert mine, f"{name} became {after[name]!r}"
            old = before.get(name)
            assert old is None or key == "class" or type(old) is type(after[name])
            if isinstance(old, int):
                assert not isinstance(old, bool)
        elif name in before and name in after:
            assert after[name].numel() <= before[name].numel()
    return plan


def fuzz(name, first, count):
    body = body_of(PLANS[name])
    taken = 0
    for seed in range(first, first + count):
        text = forged(mutated(body, random.Random(f"{name}{seed}")))
        try:
            taken += attempt(name, text) is not None
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {text}") from error
    return taken


@pytest.mark.parametrize("name", MODELS)
def test_the_real_plan_is_taken(name):
    assert attempt(name, PLANS[name].to_json()) == PLANS[name]


@pytest.mark.parametrize("name", MODELS)
def test_changed_plans_are_refused_or_harmless(name):
    assert fuzz(name, 0, QUICK) < QUICK  # notes and names of groups may be anything


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_many_changed_plans_are_refused_or_harmless(name):
    assert fuzz(name, 1000, LONG) < LONG


def fuzz_files(name, first, count, folder):
    factory = MODELS[name][0]
    small = graphprune.rebuild(seeded(factory), PLANS[name])
    path = save(small, folder / "small.safetensors")
    content = path.read_bytes()
    for seed in range(first, first + count):
        path.write_bytes(content)
        rewrite(path, random.Random(f"{name}{seed}"))
        original = seeded(factory)
        before = state_of(original)
        try:
            load(path, original)
        except CheckpointError:
            pass
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}") from error
        assert not difference(before, state_of(original))


@pytest.mark.parametrize("name", ["images", "masked"])
def test_changed_files_are_refused_or_harmless(name, tmp_path):
    fuzz_files(name, 0, 40, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_many_changed_files_are_refused_or_harmless(name, tmp_path):
    fuzz_files(name, 1000, 2000, tmp_path)


# --- by hand ----------------------------------------------------------------------------------


def size(module, name, old, new, path=()):
    return {"module": module, "name": name, "path": list(path), "old": old, "new": new}


def site(body):
    return body["literals"][0]["site"]


def first(items, **fields):
    """The first of some records that has these values."""
    return next(item for item in items if fields.items() <= item.items())


BY_HAND = {
    "no number": ("views", lambda b: b["sizes"].append(size("", "table", 0, 4))),
    "a text for a number": ("views", lambda b: b["sizes"][0].update(new="elsewhere.pt")),
    "a truth for a number": ("views", lambda b: b["sizes"].append(size("", "training", 0, 1))),
    "a place in torch": ("views", lambda b: b["sizes"].append(size("", "_modules", 0, 1))),
    "an attribute that is not there": ("views", lambda b: b["sizes"].append(size("", "x", 0, 1))),
    "another old value": ("views", lambda b: b["sizes"][0].update(old=3)),
    "a size beyond the model": ("views", lambda b: b["sizes"][0].update(new=10**6)),
    "a stride": ("images", lambda b: b["sizes"].append(size("0", "stride", 1, 2, [0]))),
    "padding": ("images", lambda b: b["sizes"].append(size("0", "padding", 0, 8, [0]))),
    "half of a group": ("images", lambda b: b["slots"].pop()),
    "a bias alone": ("images", lambda b: b["slots"].remove(first(b["slots"], dim=0))),
    "a number that is not written there": ("written", lambda b: b["literals"][0].update(old=99)),
    "a number out of range": ("written", lambda b: b["literals"][0].update(new=10**9)),
    "another function": ("written", lambda b: site(b).update(steps=[["global", "open"]])),
    "a function not called": ("written", lambda b: site(b).update(steps=[["method", "train"]])),
    "an argument not given": ("written", lambda b: b["literals"][0].update(path=["weights_only"])),
    "another source": ("written", lambda b: b["literals"][0].update(digest="0")),
    "an eps of one thousand": ("shuffled", lambda b: b["scales"][0].update(new=1e3)),
    "a factor of a million": ("shuffled", lambda b: b["scales"][0].update(factor=1e6)),
    "another attribute": ("shuffled", lambda b: b["scales"][0].update(attribute="training")),
    "channels that are not numbered": ("shuffled", lambda b: b["indices"][0].update(kept="0-9")),
    "a bias that is too long": ("masked", lambda b: b["biases"][0]["values"].append(1.0)),
    "an infinity": ("masked", lambda b: b["biases"][0]["values"].__setitem__(0, float("inf"))),
    "blocks of no rows": ("images", lambda b: b["slots"][0].update(blocks=0)),
    "a request in no object": ("images", lambda b: b["request"].update(after="x")),
}  # fmt: skip


@pytest.mark.parametrize("what", BY_HAND)
def test_a_plan_changes_only_what_plans_can(what):
    name, change = BY_HAND[what]
    body = body_of(PLANS[name])
    change(body)
    assert body != body_of(PLANS[name])
    assert attempt(name, forged(body)) is None


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "null", "1e999", "[" + "1" * 5000 + "]", "{", "\ud800"],
    ids=["lists", "objects", "nothing", "infinite", "digits", "cut off", "no text"],
)
def test_what_is_no_plan_is_told(text):
    with pytest.raises(PlanError):
        graphprune.Plan.from_text(text)


@pytest.mark.parametrize("kept", ["0-60000000", ",".join(["0-900000"] * 9), "0-999999999999999"])
def test_memory_is_bounded_by_the_text(kept):
    body = body_of(PLANS["images"])
    body["slots"][0]["kept"] = kept
    text = forged(body)
    tracemalloc.start()
    try:
        with pytest.raises(PlanError):
            graphprune.rebuild(seeded(MODELS["images"][0]), graphprune.Plan.from_json(text))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_large_plans_that_are_real_are_read():
    net = nn.Sequential(nn.Linear(1, 200_000, bias=False), nn.Linear(200_000, 1, bias=False))
    graph = graphprune.trace(net, torch.randn(1, 1))
    plan = graph.plan_of({graph.groups[0].name: range(100_000)})
    assert graphprune.Plan.from_text(plan.to_json()) == plan


def test_a_checkpoint_opens_no_other_file(tmp_path):
    small = graphprune.rebuild(seeded(MODELS["images"][0]), PLANS["images"])
    path = save(small, tmp_path / "small.safetensors")
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(PLANS["images"].to_json())
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), "plan": str(elsewhere)}
    tensors = load_file(path)
    metadata["digest"] = _digest(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="is not JSON"):
        load(path, MODELS["images"][0])


# --- interruption -----------------------------------------------------------------------------


def of_the_package(name):
    """Whether a file is one of graphprune's."""
    return os.sep + "graphprune" + os.sep in name


# Python says so of what is raised while it closes a generator that nobody reads on, and goes on.
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["images", "views", "masked"])
def test_an_interruption_leaves_the_old_model_or_the_new_one(name):
    factory, x = MODELS[name]
    small = graphprune.rebuild(seeded(factory), PLANS[name])
    lines = Interrupt(10**9, of_the_package)
    with lines:
        graphprune.rebuild(seeded(factory), PLANS[name], inplace=True)
    total = 10**9 - lines.left
    states = set()
    for number in range(1, total + 1, max(1, total // 60)):
        model = seeded(factory)
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        before = state_of(model)
        with Interrupt(number, of_the_package):
            graphprune.rebuild(model, PLANS[name], inplace=True)
        old = not difference(before, state_of(model))
        states.add(old)
        assert old or torch.equal(model(x), small(x))
        for key, parameter in model.named_parameters():
            assert parameter is parameters.get(key, parameter)
            assert parameter.grad is None or parameter.grad.shape == parameter.shape
    assert True in states


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    class Saved(nn.Sequential):
        def save_pretrained(self, folder):
            raise AssertionError

    model, x = Saved(nn.Linear(3, 8), nn.Linear(8, 2)), torch.randn(2, 3)
    plan = graphprune.trace(model, x).plan(0.5)
    before = state_of(model)
    with pytest.raises(graphprune.errors.PruningWarning):
        graphprune.rebuild(model, plan, inplace=True)
    assert not difference(before, state_of(model))


KILLED = """
import os, sys, torch, graphprune
import graphprune.execute.checkpoint as checkpoint
small = graphprune.rebuild(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)), 0.5)
checkpoint._sync = lambda path: os._exit(9)
graphprune.save(small, sys.argv[1])
"""


def test_what_a_killed_save_left_behind_is_cleaned_up(tmp_path):
    path = tmp_path / "small.safetensors"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == 9
    assert [part.suffix for part in tmp_path.iterdir()] == [".part"]
    save(graphprune.rebuild(seeded(MODELS["images"][0]), PLANS["images"]), path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_moved_is_synced_first(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("move"), replace(*paths)))
    save(graphprune.rebuild(seeded(MODELS["images"][0]), PLANS["images"]), tmp_path / "s")
    assert done[:2] == ["sync", "move"]
