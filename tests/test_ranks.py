"""Two processes on gloo that train one model: the same channels leave, or all of them say why."""

import os
import warnings
from datetime import timedelta

import pytest
import torch
from loops import X, Y, build
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import graphprune
from graphprune.errors import PruningWarning, RankError
from graphprune.training import Pruner, cubic
from graphprune.training.ranks import Averaged, Ranks

SIZE = 2


def worker(rank, folder):
    """Everything that two processes are needed for, in one start of them."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=60),
    )
    found = {}
    for case in (together, own_data, disagreeing, other_models, unequal_steps, accelerated):
        found[case.__name__] = case(rank)
        dist.barrier()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def together(rank):
    """Masked under DDP, removed, wrapped anew, trained on; the other half of the data each."""
    model = build()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), 1e-2)
    schedule = cubic(0.5, end=4, frequency=2)
    pruner = Pruner(wrapped, X[:2], optimizer, schedule=schedule)
    x, y = X[rank::SIZE], Y[rank::SIZE]
    for step in range(8):
        if step == 5:
            pruner.finish()
            try:
                wrapped(x)
            except RankError as error:
                said = str(error)
            wrapped = DistributedDataParallel(pruner.model)
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        pruner.step()
    return {"state": model.state_dict(), "plan": pruner.plan.to_json(), "said": said}


def scaled_by_data(group, evidence, generator):
    """Scores that depend on what a rank has seen: a rank of its own would keep its own half."""
    ranks = torch.arange(group.size) % SIZE == dist.get_rank()
    return ranks.double() * 4 + torch.arange(group.size) * (1 + dist.get_rank())


def own_data(rank):
    model = build()
    found = {}
    for name, criterion, options in (
        ("taylor", "taylor", {"data": [(X[rank::SIZE], Y[rank::SIZE])]}),
        ("own", scaled_by_data, {}),
    ):
        pruner = Pruner(model, X[:2], schedule=0.5, criterion=criterion, **options)
        alone = pruner.graph.plan(0.5, criterion=criterion, **options)
        pruner.step()
        found[name] = (
            [group.kept for group in pruner.soft.plan.groups],
            [group.kept for group in alone.groups],
        )
        pruner.soft.lift()
    return found


def message(call):
    try:
        call()
    except RankError as error:
        return str(error)
    return ""


def disagreeing(rank):
    found = [
        message(lambda: Pruner(build(), X[:2], schedule=0.25 * (1 + rank))),
        message(lambda: Pruner(build(), X[:2], schedule=0.5, keep=["stem", "inner"][rank])),
        message(lambda: Pruner(build(), X[:2], schedule=0.5, criterion=["l1", "l2"][rank])),
    ]
    pruner = Pruner(build(), X[:2], schedule=lambda step: 0.25 * (1 + rank))
    found.append(message(pruner.step))
    other = Pruner(build(), X[:2], schedule=lambda step: 0.5 * rank)  # masks nothing on rank 0
    found.append(message(other.step))
    return found, pruner.soft.plan is None and other.soft.plan is None


def other_models(rank):
    model = build()
    if rank == 1:
        model.head = nn.Linear(8, 4).double()
    return message(lambda: Pruner(model, X[:2], schedule=0.5))


def unequal_steps(rank):
    pruner = Pruner(build(), X[:2], schedule=lambda step: 0.5 if step >= 2 else 0.0)
    pruner.steps += rank
    if rank == 0:  # one call more
        pruner.steps += 2
    return message(pruner.step)


def accelerated(rank):
    """The same under Accelerate, where it is installed."""
    try:
        from accelerate import Accelerator
    except ImportError:
        return None
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "MASTER_PORT": 29500}
    os.environ.update({name: str(n) for name, n in numbers.items()}, MASTER_ADDR="localhost")
    accelerator = Accelerator(cpu=True)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    pruner = Pruner(prepared, X[:2], optimizer, schedule=0.5)
    for step in range(4):
        if step == 2:
            prepared = accelerator.prepare_model(pruner.finish())
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(prepared(X[rank::SIZE]), Y[rank::SIZE]))
        optimizer.step()
        pruner.step()
    return accelerator.num_processes, type(prepared).__name__, model.state_dict()


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
        assert unmasked
        assert found["other_models"].startswith("the ranks disagree on the model: rank 0 has ")
        assert "rank 0 has (3, 0.5), rank 1 has (2, 0.5)" in found["unequal_steps"]


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
    assert ranks.criterion("l1") == "l1"


def test_an_averaged_criterion_is_still_that_criterion():
    averaged = Averaged("taylor", lambda scores: scores)
    assert averaged.__name__ == "taylor"
    assert "gradients" in " ".join(averaged.needs)
    model = build()
    graph = graphprune.trace(model, X[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)
        data = [(X, Y)]
        left = graph.plan(0.5, criterion=averaged, data=data)
        right = graph.plan(0.5, criterion="taylor", data=data)
    assert left == right
