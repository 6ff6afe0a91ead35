"""Rewinding of weights and learning rates, lottery tickets, and their controls."""

import copy
import math

import pytest
import torch
from support.loops import X, Y, build
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import CheckpointError, InputError, PlanError
from graphprune.training import RewindPoint, lottery, sparsify, sparsity_of

STEPS = 8


def train(model, step=0, until=STEPS):
    """From a step to the end, with the learning rate of that step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(step, until):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        yield loss


def evaluate(model):
    with torch.no_grad():
        return -float(F.cross_entropy(model(X), Y))


def trained(model, **steps):
    list(train(model, **steps))
    return model


def kept(small, tensor, dim):
    slots = {(slot.tensor, slot.dim): slot.kept for slot in small.graphprune_plan.slots}
    return torch.tensor(slots[tensor, dim])


def test_a_small_model_gets_the_weights_of_its_channels():
    model = trained(build(), until=2)
    early = copy.deepcopy(model)
    point = RewindPoint(model, step=2)
    small = graphprune.rebuild(trained(model, step=2), 0.5, X[:2])
    late = small.inner.weight.detach().clone()
    assert point.rewind_weights(small) is small
    wanted = early.inner.weight[kept(small, "inner.weight", 0)]
    assert torch.equal(small.inner.weight, wanted[:, kept(small, "inner.weight", 1)])
    assert not torch.equal(small.inner.weight, late)
    rows = kept(small, "norm.running_mean", 0)
    assert torch.equal(small.norm.running_mean, early.norm.running_mean[rows])
    masked = graphprune.mask(early.eval(), small.graphprune_plan)
    torch.testing.assert_close(small.eval()(X), masked(X), rtol=1e-10, atol=1e-10)


def test_a_masked_model_keeps_its_masks():
    model = build()
    point = RewindPoint(model)
    sparsify(trained(model), 0.6, scope="local")
    masks = {name: b.clone() for name, b in model.named_buffers() if name.endswith("_mask")}
    point.rewind_weights(model)
    assert torch.equal(model.inner.weight_orig, point.model.inner.weight)
    assert masks
    assert all(torch.equal(dict(model.named_buffers())[k], v) for k, v in masks.items())
    before = model.inner.weight.clone()
    model(X)
    assert torch.equal(model.inner.weight, before), "also before the next call"
    assert sparsity_of(model).fraction == pytest.approx(0.6, abs=5e-3)


def test_first_smaller_then_sparse_then_rewound():
    model = build()
    point = RewindPoint(model)
    small = graphprune.rebuild(trained(model), 0.5, X[:2])
    sparsify(small, 0.5, scope="local")
    point.rewind_weights(small)
    plain = point.rewind_weights(graphprune.rebuild(model, small.graphprune_plan))
    assert torch.equal(small.inner.weight_orig, plain.inner.weight)


def test_the_point_is_a_copy():
    model = build()
    point = RewindPoint(model)
    before = point.model.stem.weight.clone()
    trained(model)
    assert torch.equal(point.model.stem.weight, before)
    assert torch.equal(point.rewind_weights(model).stem.weight, before)
    trained(model)
    assert torch.equal(point.model.stem.weight, before)


def test_the_learning_rate_goes_back_and_the_weights_stay():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def advance(optimizer, scheduler, steps):
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    advance(optimizer, scheduler, 3)
    point = RewindPoint(model, optimizer, scheduler, step=3)
    wanted = advance(optimizer, scheduler, 7)
    small = graphprune.rebuild(model, 0.5, X[:2])
    weights = small.stem.weight.detach().clone()
    fresh = torch.optim.SGD(small.parameters(), 1.0)
    again = torch.optim.lr_scheduler.CosineAnnealingLR(fresh, 10)
    point.rewind_rate(fresh, again)
    assert advance(fresh, again, 7) == pytest.approx(wanted)
    assert fresh.param_groups[0]["momentum"] == 0.9
    assert {id(p) for p in fresh.param_groups[0]["params"]} == {id(p) for p in small.parameters()}
    assert torch.equal(small.stem.weight, weights)
    point.rewind_rate(optimizer, scheduler)
    assert advance(optimizer, scheduler, 7) == pytest.approx(wanted), "the same optimizer, too"


def test_a_point_comes_back_from_a_file(tmp_path):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    point = RewindPoint(model, optimizer, scheduler, step=7)
    path = point.save(tmp_path / "point.pt")
    found = RewindPoint.load(path, trained(build()))
    assert found.step == 7
    for left, right in zip(found.model.state_dict().values(), point.model.state_dict().values()):
        assert torch.equal(left, right)
    found.rewind_rate(optimizer, scheduler)
    with pytest.raises(PlanError, match="another architecture"):
        RewindPoint.load(path, nn.Linear(2, 2))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot read"):
        RewindPoint.load(path, build())
    torch.save({"weights": 1}, path)
    with pytest.raises(CheckpointError, match="is no rewind point"):
        RewindPoint.load(path, build())


def test_wrong_rewinds_are_explained():
    model = build()
    point = RewindPoint(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match="the point has no learning rate"):
        point.rewind_rate(optimizer)
    with pytest.raises(InputError, match="is one of Residual"):
        RewindPoint(model, torch.optim.SGD(build().parameters(), 0.1))
    point = RewindPoint(model, optimizer)
    two = torch.optim.SGD([{"params": [p]} for p in (model.stem.weight, model.head.weight)], 0.1)
    with pytest.raises(InputError, match="has 2 parameter groups, at the point there were 1"):
        point.rewind_rate(two)
    with pytest.raises(InputError, match="the point has no scheduler"):
        point.rewind_rate(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2))
    with pytest.raises(PlanError, match=r"'weight' is \[3, 2\] in the model and nothing at the"):
        point.rewind_weights(nn.Linear(2, 3).double())


@pytest.mark.parametrize("rounds", [1, 2])
def test_tickets_of_filters_and_their_controls(rounds):
    model = trained(build(), until=2)
    point = RewindPoint(model, step=2)
    starts = []

    def watched(small, step):
        starts.append((step, copy.deepcopy(small).eval()))
        yield from train(small, step)

    found = lottery(point, watched, evaluate, sparsity=0.75, rounds=rounds, example_inputs=X[:2])
    notes = [entry.note for entry in found.history.entries]
    assert notes == ["whole", *["ticket of round 1"] * (rounds - 1), "ticket", "random mask",
                     "random reinit"]  # fmt: skip
    assert [step for step, _ in starts] == [2] * (rounds + 2) + [0]
    entries = {entry.note: entry for entry in found.history.entries}
    assert entries["ticket"].widths == entries["random mask"].widths
    assert entries["ticket"].widths == entries["random reinit"].widths
    assert entries["ticket"].widths["inner"] == 3
    assert entries["ticket"].values["sparsity"] == pytest.approx(0.75, abs=0.05)
    whole, ticket, mask, reinit = (starts[i][1] for i in (0, -3, -2, -1))
    assert torch.equal(whole.stem.weight, point.model.stem.weight)
    rewound = graphprune.rebuild(point.model, ticket.graphprune_plan).eval()
    assert torch.equal(rewound(X), ticket(X))
    drawn = graphprune.rebuild(point.model, mask.graphprune_plan).eval()
    assert torch.equal(drawn(X), mask(X)), "a random mask over the weights of the point"
    assert mask.graphprune_plan.slots != ticket.graphprune_plan.slots
    assert reinit.graphprune_plan.slots == ticket.graphprune_plan.slots
    assert not torch.equal(reinit.inner.weight, ticket.inner.weight)
    assert found.accuracy["ticket"] == evaluate(found.ticket.eval())
    assert "random reinit" in str(found)


def test_tickets_of_single_weights_and_their_controls():
    point = RewindPoint(build())
    starts = []

    def watched(model, step):
        model(X)
        starts.append({n: t.detach().clone() for n, t in model.state_dict().items()})
        yield from train(model, step)

    found = lottery(
        point, watched, evaluate, sparsity=0.75, rounds=2, kind="weights", scope="local"
    )
    first, ticket, mask, reinit = starts[1:]
    weight = point.model.inner.weight
    assert torch.equal(ticket["inner.weight_orig"], weight)
    assert torch.equal(mask["inner.weight_orig"], weight)
    assert not torch.equal(reinit["inner.weight_orig"], weight)
    assert torch.equal(reinit["inner.weight_mask"], ticket["inner.weight_mask"])
    assert (ticket["inner.weight_mask"] <= first["inner.weight_mask"]).all(), "rounds go on"
    assert mask["inner.weight_mask"].sum() == ticket["inner.weight_mask"].sum()
    assert not torch.equal(mask["inner.weight_mask"], ticket["inner.weight_mask"])
    sparsities = [entry.values["sparsity"] for entry in found.history.entries]
    assert sparsities == pytest.approx([0, 0.5, 0.75, 0.75, 0.75], abs=5e-3)


def test_a_model_of_ones_own_for_the_reinit():
    point = RewindPoint(build())

    def factory():
        fresh = build()
        nn.init.constant_(fresh.head.weight, 0.125)
        return fresh

    starts = []

    def watched(model, step):
        starts.append(copy.deepcopy(model))
        yield from train(model, step)

    options = {"sparsity": 0.5, "example_inputs": X[:2]}
    lottery(point, watched, evaluate, factory=factory, **options)
    assert (starts[-1].head.weight == 0.125).all()
    found = lottery(point, train, evaluate, controls=False, **options)
    assert not found.controls

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.first(x) * self.scale)

    def nudge(model, step):
        with torch.no_grad():
            model.last.weight.mul_(1.1)

    trained = []
    options = {"sparsity": 0.5, "example_inputs": torch.ones(2, 4)}
    with pytest.raises(InputError, match="'Bare' has weights but no reset_parameters"):
        lottery(RewindPoint(Bare()), nudge, trained.append, **options)
    for factory in (lambda: None, lambda: nn.Linear(4, 8)):
        with pytest.raises(InputError, match="factory must make a model of the same architecture"):
            lottery(RewindPoint(Bare()), nudge, trained.append, factory=factory, **options)
    assert not trained, "it is found out before anything is trained"


def nothing(model, step):
    return math.nan


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"train": None}, "train must be a function of a model and a step"),
        ({"evaluate": 3}, "train and evaluate must be functions"),
        ({"sparsity": 0.0}, "sparsity must be above 0"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\)"),
        ({"rounds": 0}, "rounds of iterative must be an int of at least 1"),
        ({"kind": "layers"}, "kind must be one of filters, weights"),
        ({"kind": "weights", "criterion": "l1"}, "criterion: for single weights only scope and"),
        ({"ratios": {}}, "ratios is what the sparsity says"),
        ({"train": nothing}, "whole: the loss is nan"),
        ({"train": lambda m, step: None}, "train changed no weight"),
    ],
)
def test_wrong_lotteries_are_explained(change, text):
    arguments = {"train": train, "evaluate": evaluate, "sparsity": 0.5, "example_inputs": X[:2]}
    with pytest.raises(InputError, match=text):
        lottery(RewindPoint(build()), **{**arguments, **change})


def test_a_lottery_begins_with_an_original():
    small = graphprune.rebuild(build(), 0.5, X[:2])
    with pytest.raises(InputError, match="the rewind point is of a small model"):
        lottery(RewindPoint(small), train, evaluate, sparsity=0.5, example_inputs=X[:2])
