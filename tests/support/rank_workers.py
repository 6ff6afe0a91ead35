"""What each of two processes does for ``test_ranks.py``, in one start of them."""

import os
import warnings
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from graphprune.errors import RankError
from graphprune.training import (
    Pruner,
    RewindPoint,
    SparsePruner,
    cubic,
    iterate,
    lottery,
    sparsity_of,
)
from support.groups import join
from support.loops import X, Y, build

SIZE = 2


def worker(rank, folder):
    """Everything that two processes are needed for, in one start of them."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    join(rank, SIZE, folder)
    found = {}
    cases = together, own_data, disagreeing, other_models, unequal_steps, accelerated
    for case in (*cases, failing, single_weights, in_rounds, with_tickets):
        Path(f"{folder}/{case.__name__}").mkdir(exist_ok=True)
        found[case.__name__] = case(rank, Path(f"{folder}/{case.__name__}"))
        dist.barrier()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def together(rank, folder):
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


def own_data(rank, folder):
    model = build()
    found = {}
    for name, criterion, options in (
        ("taylor", "taylor", {"data": [(X[rank::SIZE], Y[rank::SIZE])]}),
        ("own", scaled_by_data, {}),
    ):
        pruner = Pruner(model, X[:2], schedule=0.5, criterion=criterion, **options)
        alone = pruner.graph.plan(0.5, criterion=criterion, process_group=False, **options)
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


def disagreeing(rank, folder):
    found = [
        message(lambda: Pruner(build(), X[:2], schedule=0.25 * (1 + rank))),
        message(lambda: Pruner(build(), X[:2], schedule=0.5, keep=["stem", "inner"][rank])),
        message(lambda: Pruner(build(), X[:2], schedule=0.5, criterion=["l1", "l2"][rank])),
    ]
    pruner = Pruner(build(), X[:2], schedule=lambda step: 0.25 * (1 + rank))
    found.append(message(pruner.step))
    other = Pruner(build(), X[:2], schedule=lambda step: 0.5 * rank)  # masks nothing on rank 0
    found.append(message(other.step))
    found.append(failure(lambda: Pruner(build(), X[:2], schedule=0.5, finish_at=3)))
    return found, pruner.soft.plan is None and other.soft.plan is None


def other_models(rank, folder):
    model = build()
    if rank == 1:
        model.head = nn.Linear(8, 4).double()
    return message(lambda: Pruner(model, X[:2], schedule=0.5))


def unequal_steps(rank, folder):
    pruner = Pruner(build(), X[:2], schedule=lambda step: 0.5 if step >= 2 else 0.0)
    pruner.steps += rank
    if rank == 0:  # one call more
        pruner.steps += 2
    return message(pruner.step)


def accelerated(rank, folder):
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


def failing(rank, folder):
    """One rank fails where the others go on: all of them say so, none waits for a timeout."""

    def apoz_sees(zeros):
        """ReLU is never closed where inputs, weights and biases are positive."""
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        net.append(nn.Linear(16, 3))
        with torch.no_grad():
            net[0].weight.abs_()
            net[0].bias.fill_(0.1)
        x = torch.rand(64, 8, generator=torch.Generator().manual_seed(1))
        data = [x - 0.7 if zeros else x]
        pruner = Pruner(net, x[:2], schedule=0.5, criterion="apoz", data=data)
        pruner.step()
        return [len(group.kept) for group in pruner.soft.plan.groups]

    def broken(group, evidence, generator):
        if rank == 1:
            raise ZeroDivisionError("a bug")
        return torch.arange(float(group.size))

    bad = [(X, Y)] if rank == 0 else [(X * float("nan"), Y)]
    torch.manual_seed(0)
    return {
        "unseen": apoz_sees(rank == 0),
        "criterion": failure(lambda: Pruner(build(), X[:2], schedule=0.5, criterion=broken).step()),
        "data": failure(
            lambda: Pruner(build(), X[:2], schedule=0.5, criterion="taylor", data=bad).step()
        ),
    }


def failure(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def single_weights(rank, folder):
    pruner = SparsePruner(build(), schedule=0.5)
    pruner.step()
    other = build()
    with torch.no_grad():
        other.stem.weight.mul_(1 + rank)
    return [
        sparsity_of(pruner.model).fraction,
        failure(lambda: SparsePruner(build(), schedule=0.25 * (1 + rank))),
        failure(SparsePruner(build(), schedule=lambda step: 0.25 * (1 + rank)).step),
        failure(SparsePruner(other, schedule=0.5).step),
    ]


def train_wrapped(model, yields=None):
    """Two steps on the data of the rank, under DDP."""
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.05)
    x, y = X[dist.get_rank() :: SIZE], Y[dist.get_rank() :: SIZE]
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(wrapped(x), y)
        loss.backward()
        optimizer.step()
        yield loss if yields is None else yields(loss)


def train_alone(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    F.cross_entropy(model(X[dist.get_rank() :: SIZE]), Y[dist.get_rank() :: SIZE]).backward()
    optimizer.step()


def share_right(model):
    x, y = X[dist.get_rank() :: SIZE], Y[dist.get_rank() :: SIZE]
    return (model(x).argmax(1) == y).double().mean() + dist.get_rank()


def in_rounds(rank, folder):
    data = [(X[rank::SIZE], Y[rank::SIZE])]
    options = {"example_inputs": X[:2], "criterion": "taylor", "data": data}

    def rounds(train=train_wrapped, evaluate=share_right, **more):
        return iterate(build(), 2, train, evaluate, **{**options, **more})

    outcome = rounds(folder=folder / "shared")
    resumed = rounds(folder=folder / "shared")

    def scores(model):  # of the examples of the rank
        return 0.1 * model(X[rank::SIZE])[:, 0]

    def lame(model):
        return float("nan") if rank else 1.0

    def poisoned(model):
        yield from train_wrapped(model, lambda loss: loss * float("nan") if rank else loss)

    bounded = rounds(evaluate=scores, max_drop=1e3)
    return {
        "kept": [group.kept for group in outcome.plan.groups],
        "state": {n: p.detach() for n, p in outcome.model.named_parameters()},
        "accuracy": [entry.values["accuracy"] for entry in outcome.history.entries],
        "files": sorted(path.name for path in (folder / "shared").iterdir()),
        "bounds": [e.values.get("at most") for e in bounded.history.entries],
        "mixed": failure(lambda: rounds(evaluate=lambda m: 1.0 if rank else scores(m), max_drop=9)),
        "resumed": resumed.history.entries == outcome.history.entries,
        "alone": failure(lambda: rounds(train_alone)),
        "loss": failure(lambda: rounds(poisoned)),
        "evaluation": failure(lambda: rounds(evaluate=lame)),
        "folders": failure(lambda: rounds(folder=folder / ("shared" if rank else "empty"))),
        "broken": failure(lambda: rounds(train_alone if rank else broken_training)),
    }


def broken_training(model):
    raise ZeroDivisionError("a bug")


def with_tickets(rank, folder):
    def train(model, step):
        yield from train_wrapped(model)

    found = {}
    for kind in ("filters", "weights"):
        options = {"example_inputs": X[:2]} if kind == "filters" else {}
        point = RewindPoint(build())
        ticket = lottery(point, train, share_right, sparsity=0.5, kind=kind, **options)
        found[kind] = ticket.accuracy, {n: t for n, t in ticket.ticket.named_parameters()}
    other = build()
    with torch.no_grad():
        other.stem.weight.mul_(1 + rank)
    found["other"] = failure(
        lambda: lottery(RewindPoint(other), train, share_right, sparsity=0.5, **options)
    )
    return found
