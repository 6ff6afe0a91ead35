"""What each of several processes does for ``test_several_processes.py``, in one start of them."""

import copy
import functools
import warnings

import torch
from torch import distributed as dist
from torch import nn

import graphprune
from graphprune.calibration import repair
from graphprune.calibration.statistics import reestimate
from graphprune.criteria import gather, scores
from graphprune.ranks import Ranks
from support.calibration import residual
from support.groups import join
from support.mixtures import Listed
from support.rank_workers import failure

D = torch.float64
CRITERIA = ("taylor", "wanda", "taylor_activation", "reconstruction")  # one of every statistic
CALIBRATIONS = {
    "repair": {"rows": 700},
    "joint": {"sweeps": 1},
    "few": {"held_out": 0.0},
    "bias": {"method": "bias"},
    "batchnorm": {"method": "batchnorm"},
    "wide": {"rows": 300},
}


def batches(count=9, items=4, dtype=D):
    """Batches with targets, the same on every process."""
    numbers = torch.Generator().manual_seed(3)
    x = torch.randn(count, items, 3, 10, 10, generator=numbers, dtype=D).to(dtype)
    return [(part, (torch.arange(items) + n) % 3) for n, part in enumerate(x)]


def kept(plan):
    """What a plan decides."""
    return [group.kept for group in plan.groups], plan.to_json()


def scored(data, ranks, criteria=CRITERIA):
    """The scores by every statistic of data."""
    model = residual()
    graph = graphprune.trace(model, batches()[0][0])
    found = {}
    for name in criteria:
        evidence = gather(model, name, graph.groups, data, ranks=ranks)
        found[name] = scores(name, graph.groups, evidence, 0)
    return found


def planned(data, *criteria):
    """Plans that look at data once."""
    graph = graphprune.trace(residual(), batches()[0][0])
    target = {"macs": 0.6}
    return {
        name: kept(graph.plan(target=target, criterion=name, data=iter(data))) for name in criteria
    }


def rebuilt(data):
    """A model made in one call."""
    x = batches()[0][0]
    return graphprune.rebuild(residual(), 0.4, x, criterion="wanda", data=data).state_dict()


@functools.cache
def smaller(ratio):
    """A network whose norms know the data, and a plan for it."""
    model = residual()
    reestimate(model, batches())
    graph = graphprune.trace(model, batches()[0][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some groups are too small to lose a channel
        return model, graph.plan(ratio)


def calibrated(data, dtype=D, name="", **options):
    """The numbers of a small model after a calibration, and the report."""
    model, plan = smaller(0.15 if name == "batchnorm" else 0.4)
    model = copy.deepcopy(model).to(dtype)
    small = graphprune.rebuild(model, plan)
    known = repair.WIDEST
    try:
        repair.WIDEST = 50 if name == "wide" else known
        options = {**CALIBRATIONS.get(name, {}), **options}
        report = graphprune.calibrate(small, model, [x.to(dtype) for x, _ in data], **options)
    finally:
        repair.WIDEST = known
    return small.state_dict(), report


class Chosen(nn.Module):
    """A stream that a mixture of experts adds to, which chooses them by values."""

    def __init__(self):
        super().__init__()
        self.first, self.mixture = nn.Linear(6, 8), Listed(experts=4, chosen=1)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.mixture(x))


def mixed(data):
    """Experts that leave, and channels of experts that not every rank has seen."""
    torch.manual_seed(0)
    model = Chosen().double()
    graph = graphprune.trace(model, data[0] if data else tokens()[0])
    plan = graph.plan(0.4, criterion="wanda", data=data)
    small = graphprune.rebuild(model, plan)
    report = graphprune.calibrate(small, model, data)
    return {
        "experts": graph.plan(0.5, parts="experts", data=data).to_json(),
        "channels": kept(plan),
        "repaired": small.state_dict(),
        "after": report.after,
    }


def tokens():
    """A few tokens by batch: not all experts are chosen in each."""
    numbers = torch.Generator().manual_seed(5)
    return list(torch.randn(6, 3, 6, generator=numbers, dtype=D))


def drops(data):
    """A sensitivity by an evaluation of single items."""
    model = residual()
    graph = graphprune.trace(model, batches()[0][0])

    def right(model):
        with torch.no_grad():
            rows = [-nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in data]
        return torch.cat(rows) if rows else torch.zeros(0)

    return graph.sensitivity(model, right, (0.25, 0.5))


def searched(data, path=None, **options):
    """A search by an evaluation of single items, that goes on from a file."""
    model = residual()

    def scores(model):
        rows = [-nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in data]
        return torch.cat(rows) if rows else torch.zeros(0)

    options = {"criterion": "wanda", "example_inputs": batches()[0][0], "path": path, **options}
    inputs = [x for x, _ in data]
    search = functools.partial(graphprune.smallest, model, scores, inputs, 0.6, **options)
    first = search(evaluations=2)
    found = search(evaluations=3)
    return [first.to_dict(), found.to_dict()], found.model.state_dict()


def started(rank, size, folder):
    """Join the group."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    join(rank, size, folder)


def two(rank, folder):
    """What one of two processes finds."""
    started(rank, 2, folder)
    data, uneven = batches()[rank::2], batches(8)[rank * 8 :]  # the second has none
    found = {
        "scores": scored(data, Ranks()),
        "plans": planned(data, "auto", "taylor"),
        "model": rebuilt(data),
        "calibrated": {name: calibrated(data, name=name) for name in CALIBRATIONS},
        "uneven": [calibrated(uneven, name=name)[0] for name in ("repair", "batchnorm")],
        "few": planned(uneven, "taylor"),
        "mixed": mixed(tokens()[rank::2]),
        "drops": drops(data),
        "searched": searched(data, f"{folder}/search.json"),
        "single": calibrated(data, torch.float32)[0],
        "half": calibrated(data, torch.bfloat16)[0],
        "failing": failing(rank, data),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def three(rank, folder):
    """What one of three processes finds; two of them form a group of their own, too."""
    started(rank, 3, folder)
    data = batches(7)[rank::3]
    pair = dist.new_group([0, 2])
    found = {"scores": scored(data, Ranks(), ["wanda"])["wanda"], "calibrated": calibrated(data)}
    alone = calibrated(batches(7), process_group=False)
    if rank == 1:
        found["pair"], found["wrong"] = alone, failure(lambda: calibrated(data, process_group=pair))
    else:
        found["pair"] = calibrated(batches(7)[rank // 2 :: 2], process_group=pair)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def failing(rank, data):
    """One rank fails or has something else where the others go on."""
    x = batches()[0][0]
    model = residual()
    small = graphprune.rebuild(model, 0.4, x)
    before = copy.deepcopy(small.state_dict())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.last.weight.mul_(1 + rank)
    bad = [x * float("nan")] if rank else [x]

    def loss(model, batch):
        if rank == 0:
            raise ZeroDivisionError("a bug")
        return model(batch[0]).square().mean()

    def plan(model=model, **options):
        return graphprune.trace(model, x).plan(0.4, **{"criterion": "taylor", **options})

    def lame(model):
        return float("nan") if rank else 1.0

    odd = model if rank else nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(256, 3))
    found = {
        "data": failure(lambda: graphprune.calibrate(small, model, bad)),
        "loss": failure(lambda: plan(data=data, loss=loss)),
        "auto": failure(lambda: plan(data=bad * 20, criterion="auto")),
        "options": failure(lambda: plan(data=data, keep=["stem.0", "up"][rank])),
        "unknown": failure(lambda: plan(data=data, scope=["global", "here"][rank])),
        "weights": failure(lambda: plan(other, data=data)),
        "model": failure(lambda: plan(odd.double(), data=data)),
        "arguments": failure(lambda: graphprune.calibrate(small, model, data, rows=100 + rank)),
        "original": failure(lambda: graphprune.calibrate(small, other, data)),
        "none": failure(lambda: graphprune.calibrate(small, model, [])),
        "nothing": failure(lambda: plan(data=[])),
        "evaluation": failure(lambda: graphprune.trace(model, x).sensitivity(model, lame)),
    }
    same = all(torch.equal(t, before[name]) for name, t in small.state_dict().items())
    first = kept(plan(criterion="l1")) if rank == 0 else None  # without data nobody waits
    alone = kept(plan(data=data, process_group=False))
    return found, same, first, alone
