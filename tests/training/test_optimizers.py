"""State of optimizers follows the parameters: sliced exactly, or refused."""

import copy

import pytest
import torch
from support.loops import OPTIMIZERS, X, Y, build, train
from torch.nn import functional as F

import graphprune
from graphprune.errors import InputError
from graphprune.training import Pruner, follow


@pytest.mark.parametrize(
    "make",
    [
        *OPTIMIZERS.values(),
        lambda p: torch.optim.Rprop(p, 1e-3),
        lambda p: torch.optim.RAdam(p, 1e-3),
        lambda p: torch.optim.Adadelta(p, 1e-1),
        lambda p: torch.optim.Adafactor(p, 1e-2),
    ],
)
@pytest.mark.parametrize("when", ["before", "after", "apart"])
def test_state_follows(make, when):
    model = build()
    optimizer = make(model.parameters())
    train(model, optimizer, steps=2)
    wide = {n: optimizer.state[p].copy() for n, p in model.named_parameters()}
    plan = graphprune.trace(model, X[:2]).plan(0.5)
    if when == "before":
        follow(optimizer, model, plan)
    small = graphprune.rebuild(model, plan, inplace=when != "apart")
    if when == "after":
        follow(optimizer, model, plan)
    elif when == "apart":
        assert follow(optimizer, model, plan, small=small) is optimizer
    slots = {(slot.tensor, slot.dim): list(slot.kept) for slot in plan.slots}
    for name, parameter in small.named_parameters():
        assert parameter in optimizer.state
        for key, value in optimizer.state[parameter].items():
            wanted = wide[name][key]
            for dim in range(wanted.dim() if isinstance(wanted, torch.Tensor) else 0):
                if (name, dim) in slots and wanted.shape[dim] > 1:
                    wanted = wanted.index_select(dim, torch.tensor(slots[name, dim]))
            assert torch.equal(torch.as_tensor(wanted), torch.as_tensor(value)), (name, key)
    assert len(optimizer.state) == len(list(small.parameters()))
    before = [p.detach().clone() for p in small.parameters()]
    train(small, optimizer, steps=1)
    assert all(not torch.equal(a, b) for a, b in zip(before, small.parameters()))
    if when == "after":
        follow(optimizer, model, plan)  # follows already


def test_state_that_cannot_be_sliced_is_refused_before_anything_is_changed():
    model = build()
    lbfgs = torch.optim.LBFGS(model.parameters())
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, optimizer, steps=1)

    def closure():
        lbfgs.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    lbfgs.step(closure)
    pruner = Pruner(model, X[:2], [optimizer, lbfgs], schedule=0.5)
    pruner.step()
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(InputError, match=r"LBFGS keeps for 'stem.weight' of shape \[8, 1, 3, 3\]"):
        pruner.finish()
    assert (model.stem.out_channels, pruner.finished) == (8, False)
    torch.testing.assert_close(optimizer.state_dict()["state"], kept)
    pruner.optimizers.pop()
    assert pruner.finish().stem.out_channels == 4
