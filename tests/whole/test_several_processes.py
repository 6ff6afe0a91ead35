"""Plans, sensitivities and calibrations of several processes are those of one on all data."""

import pytest
import torch
from support.planning_workers import (
    CALIBRATIONS,
    CRITERIA,
    batches,
    calibrated,
    drops,
    mixed,
    planned,
    rebuilt,
    scored,
    searched,
    three,
    tokens,
    two,
)
from torch import multiprocessing as mp

from graphprune.ranks import Ranks


def run(worker, size, folder):
    mp.spawn(worker, (str(folder),), size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What each of two processes found."""
    return run(two, 2, tmp_path_factory.mktemp("two"))


def same(first, second):
    """All numbers of two models are the same to the last bit."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def near(found, wanted):
    """All numbers of two models are the same but for rounding."""
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-10, atol=1e-10, msg=name)


def test_scores_are_those_of_one_process(pair):
    wanted = scored(batches(), Ranks())
    for name in CRITERIA:
        assert wanted[name].keys() == pair[0]["scores"][name].keys()
        same(pair[0]["scores"][name], pair[1]["scores"][name])
        near(pair[0]["scores"][name], wanted[name])


def test_plans_are_those_of_one_process(pair):
    wanted = planned(batches(), "auto", "taylor")
    first, second = (found["plans"] for found in pair)
    assert first == second
    for name, (kept, _) in wanted.items():
        assert first[name][0] == kept
    model = rebuilt(batches())
    for found in pair:
        same(found["model"], model)


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_calibrations_are_those_of_one_process(pair, name):
    wanted, report = calibrated(batches(), name=name)
    (first, one), (second, other) = (found["calibrated"][name] for found in pair)
    same(first, second)
    near(first, wanted)
    assert one == other
    assert one.changed == report.changed
    assert one.changed
    assert one.after == pytest.approx(report.after, rel=1e-9)


def test_a_rank_without_batches(pair):
    first, second = pair
    assert first["few"] == second["few"]
    assert first["few"]["taylor"][0] == planned(batches(8), "taylor")["taylor"][0]
    for number, name in enumerate(("repair", "batchnorm")):
        same(first["uneven"][number], second["uneven"][number])
        near(first["uneven"][number], calibrated(batches(8), name=name)[0])


def test_experts_that_not_every_rank_has_seen(pair):
    wanted = mixed(tokens())
    first, second = (found["mixed"] for found in pair)
    assert first["experts"] == second["experts"] == wanted["experts"]
    assert first["channels"] == second["channels"]
    assert first["channels"][0] == wanted["channels"][0]
    same(first["repaired"], second["repaired"])
    near(first["repaired"], wanted["repaired"])


def test_a_sensitivity_of_all_items(pair):
    wanted = drops(batches())
    assert pair[0]["drops"] == pair[1]["drops"]
    assert pair[0]["drops"].base == pytest.approx(wanted.base, rel=1e-12)
    for found, curve in zip(pair[0]["drops"].curves, wanted.curves, strict=True):
        assert found.key == curve.key
        assert found.drops == pytest.approx(curve.drops, abs=1e-12)


def test_a_search_of_all_items(pair, tmp_path):
    wanted, model = searched(batches(), tmp_path / "search.json")
    (first, small), (second, other) = (found["searched"] for found in pair)
    assert first == second
    same(small, other)
    near(small, model)
    for found, one in zip(first, wanted, strict=True):
        assert found["examples"] == one["examples"] == 36
        for tried, alone in zip(found["curve"], one["curve"], strict=True):
            assert tried == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize("name", ["single", "half"])
def test_other_precisions_are_the_same_on_all_ranks(pair, name):
    same(*(found[name] for found in pair))


def test_what_one_rank_has_otherwise_is_told_to_all(pair):
    (first, unchanged, plan, alone), (second, kept, none, other) = (f["failing"] for f in pair)
    assert unchanged
    assert kept
    assert plan is not None
    assert none is None
    assert alone != other, "each on its own data"
    text = "InputError: batch 0 of data holds NaN or infinite values"
    for name in ("data", "auto"):
        assert second[name] == text
        assert first[name] == f"RankError: rank 1 has failed: {text}"
    assert first["loss"] == "ZeroDivisionError: a bug"
    assert second["loss"] == "RankError: rank 0 has failed: ZeroDivisionError: a bug"
    assert second["unknown"].startswith("InputError: unknown scope 'here'")
    assert first["unknown"].startswith("RankError: rank 1 has failed: InputError: unknown scope")
    assert second["evaluation"].startswith("InputError: evaluate(model) must return a finite")
    assert "rank 1 has failed: InputError: evaluate(model)" in first["evaluation"]
    for found in (first, second):
        assert found["options"].startswith("RankError: the ranks disagree on the options: rank 0")
        assert "pass the same options on every rank" in found["options"]
        assert "disagree on the weights of the model" in found["weights"]
        assert "load the same weights on every rank" in found["weights"]
        assert "disagree on the architecture of the model" in found["model"]
        assert "disagree on the options" in found["arguments"]
        assert "disagree on the weights of the original" in found["original"]
        for name in ("none", "nothing"):
            assert found[name].startswith("InputError: data holds no batches")


@pytest.mark.slow
def test_three_processes_and_a_group_of_two(tmp_path):
    first, second, third = run(three, 3, tmp_path)
    wanted = calibrated(batches(7))[0]
    near(first["scores"], scored(batches(7), Ranks(), ["wanda"])["wanda"])
    same(first["scores"], third["scores"])
    near(first["calibrated"][0], wanted)
    same(first["calibrated"][0], second["calibrated"][0])
    same(first["pair"][0], third["pair"][0])
    near(first["pair"][0], wanted)
    same(second["pair"][0], wanted)
    assert second["wrong"].startswith("InputError: process_group must be a group of")
