"""Two processes on gloo that train one model: the same channels leave, or all of them say why."""

import warnings

import pytest
import torch
from support.loops import X, Y, build
from support.rank_workers import SIZE, worker
from torch import multiprocessing as mp
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.criteria.averaged import Averaged, averaged
from graphprune.errors import PruningWarning
from graphprune.ranks import Ranks
from graphprune.training import (
    Pruner,
    cubic,
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), SIZE)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(SIZE)]


def test_all_ranks_remove_the_same_channels(ranks):
    first, second = (found["together"] for found in ranks)
    assert first["plan"] == second["plan"]
    assert first["state"]["stem.weight"].shape == (4, 1, 3, 3)
    for name, tensor in first["state"].items():
        if "running" not in name:  # statistics are those of the own batches
            assert torch.equal(tensor, second["state"][name]), name
    for found in (first, second):
        assert "whose buckets have the old shapes: wrap pruner.model anew" in found["said"]


def test_masked_under_ddp_is_as_on_one_process(ranks):
    """Gradients of two halves, averaged, are those of the whole; masked ones stay zero."""
    model = Stat()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    pruner = Pruner(model.net, X[:2], optimizer, schedule=cubic(0.5, end=4, frequency=2))
    for step in range(8):
        if step == 5:
            pruner.finish()
        optimizer.zero_grad()
        halves = [F.cross_entropy(model.net(X[r::SIZE]), Y[r::SIZE]) for r in range(SIZE)]
        (sum(halves) / SIZE).backward()
        nn.utils.clip_grad_norm_(model.net.parameters(), 0.05)
        optimizer.step()
        pruner.step()
    for name, tensor in model.net.named_parameters():
        torch.testing.assert_close(
            tensor, ranks[0]["together"]["state"][name], rtol=0, atol=1e-8, msg=name
        )


class Stat(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build()


@pytest.mark.parametrize("name", ["taylor", "own"])
def test_importance_is_reduced_over_ranks(ranks, name):
    (first, alone), (second, other) = (found["own_data"][name] for found in ranks)
    assert first == second
    assert alone != other, "on their own, the ranks would not agree"


def test_ranks_that_disagree_are_told_so(ranks):
    for found in ranks:
        messages, unmasked = found["disagreeing"]
        for text in messages[:3]:
            assert text.startswith("the ranks disagree on options and schedule: rank 0 has ")
        assert "('keep', ['stem'])" in messages[1]
        assert "rank 1 has ('OneShot(final=0.5" in messages[0]
        assert messages[3].startswith(
            "the ranks disagree on step and sparsity: rank 0 has (1, 0.25), rank 1 has (1, 0.5); "
            "give every rank the same model, schedule and options"
        )
        assert "rank 0 has (1, 0.0), rank 1 has (1, 0.5)" in messages[4]
        assert messages[5].startswith("InputError: finish_at on several processes needs the")
        assert unmasked
        assert found["other_models"].startswith("the ranks disagree on the model: rank 0 has ")
        assert "rank 0 has (3, 0.5), rank 1 has (2, 0.5)" in found["unequal_steps"]


def test_one_rank_that_fails_is_heard_by_all(ranks):
    first, second = (found["failing"] for found in ranks)
    assert first["unseen"] == second["unseen"] == [8, 8], "zeros that one of them has seen"
    assert second["criterion"] == "ZeroDivisionError: a bug"
    assert first["criterion"] == "RankError: rank 1 has failed: ZeroDivisionError: a bug"
    assert second["data"].startswith("InputError: ")
    assert first["data"] == f"RankError: rank 1 has failed: {second['data']}"


def test_single_weights_are_masked_on_all_ranks(ranks):
    for found in ranks:
        fraction, schedules, steps, masks = found["single_weights"]
        assert fraction == pytest.approx(0.5, abs=0.01)
        assert schedules.startswith("RankError: the ranks disagree on options and schedule")
        assert steps.startswith("RankError: the ranks disagree on step and sparsity")
        assert masks.startswith("RankError: the ranks disagree on the weights to mask")


def test_rounds_on_several_ranks(ranks):
    first, second = (found["in_rounds"] for found in ranks)
    assert first["kept"] == second["kept"]
    assert all(
        torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items()
    )
    assert first["accuracy"] == second["accuracy"]
    assert 0.5 <= first["accuracy"][0] <= 1.5, "the mean of both"
    assert first["files"] == ["model-2.safetensors", "state.json"]
    assert first["resumed"]
    assert second["resumed"]
    for found in (first, second):
        assert "the ranks disagree on the weights after training" in found["alone"]
        assert "wrap the model in DistributedDataParallel inside train" in found["alone"]
        assert found["loss"].startswith("RoundError: round 1: the loss is nan (number 1) on rank 1")
        assert "the evaluation is nan on rank 1" in found["evaluation"]
        assert found["bounds"] == first["bounds"]
        assert found["bounds"][0] is None
        assert len(found["bounds"]) == 3
        assert "must always return the same" in found["mixed"]
        assert "the ranks disagree on the rounds in the folder: rank 0 has 0" in found["folders"]
    assert first["broken"] == "ZeroDivisionError: a bug"
    assert second["broken"] == "RankError: rank 0 has failed: ZeroDivisionError: a bug"


def test_tickets_on_several_ranks(ranks):
    first, second = (found["with_tickets"] for found in ranks)
    for kind in ("filters", "weights"):
        (accuracy, tensors), (other, others) = first[kind], second[kind]
        assert accuracy == other
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert first["other"].startswith("RankError: the ranks disagree on what is left of the whole")


def test_accelerate(ranks):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    (count, kind, state), (_, _, other) = (found["accelerated"] for found in ranks)
    assert (count, kind) == (SIZE, "DistributedDataParallel")
    assert state["stem.weight"].shape == (4, 1, 3, 3)
    assert all(torch.equal(t, other[n]) for n, t in state.items() if "running" not in n)


def test_one_process_needs_no_group():
    ranks = Ranks()
    assert ranks.size == 1
    ranks.check("anything", object())
    tensor = torch.ones(3)
    assert ranks.mean(tensor) is tensor
    assert averaged("l1", ranks) == "l1"


def test_an_averaged_criterion_is_still_that_criterion():
    mean = Averaged("taylor", Ranks())
    assert mean.__name__ == "taylor"
    assert "gradients" in " ".join(mean.needs)
    model = build()
    graph = graphprune.trace(model, X[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)
        data = [(X, Y)]
        left = graph.plan(0.5, criterion=mean, data=data)
        right = graph.plan(0.5, criterion="taylor", data=data)
    assert left == right
