"""Distillation: the numbers of the loss, corresponding channels, and what must not change."""

import copy
from types import SimpleNamespace

import pytest
import torch
from support.loops import X, Y, build
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import InputError, PlanError
from graphprune.training import Distillation, Pruner, divergence

BATCH = (X, Y)


def pair(ratio=0.5):
    """An original, and a small model of it that differs from the masked original."""
    model = build()
    small = graphprune.rebuild(model, ratio, X[:2])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model, small


def test_the_divergence_is_the_formula():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p = (teacher / 3).softmax(1)
    wanted = 9 * (p * (p.log() - (student / 3).softmax(1).log())).sum(1).mean()
    torch.testing.assert_close(divergence(student, teacher, 3.0), wanted)
    assert divergence(teacher, teacher, 3.0).abs() < 1e-6
    places = torch.randn(5, 7, 4)
    other = torch.randn(5, 7, 4)
    flat = [divergence(places[..., i], other[..., i]) for i in range(4)]
    torch.testing.assert_close(divergence(places, other), torch.stack(flat).mean())


def test_the_loss_is_the_weighted_sum():
    model, small = pair()
    distil = Distillation(model, temperature=2.0, alpha=0.3)
    loss = distil(small, BATCH)
    model.eval()
    with torch.no_grad():
        theirs = model(X)
    ours = copy.deepcopy(small)(X)  # in train mode, as it was
    wanted = 0.7 * F.cross_entropy(ours, Y) + 0.3 * divergence(ours, theirs, 2.0)
    torch.testing.assert_close(loss, wanted)


def test_gradients_reach_the_student_alone_and_the_teacher_rests():
    model, small = pair()
    model.train()
    state = copy.deepcopy(model.state_dict())
    Distillation(model, features=["stem"])(small, BATCH).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in small.parameters())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in (*model.modules(), *small.modules()))


def test_hooks_and_modes_come_back_after_an_error():
    model, small = pair()
    distil = Distillation(model, features=["stem"])
    with pytest.raises(InputError, match="does not run on a batch"):
        distil(small, (torch.randn(2, 5, 8, 8).double(), Y[:2]))
    assert not any(m._forward_hooks for m in (*model.modules(), *small.modules()))
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("layer", ["stem", "norm", "inner", "inner_norm", "back", "gate"])
def test_features_are_compared_with_the_channels_that_stayed(layer):
    """Right after the cut, a layer's output equals the masked original's on the kept channels."""
    model = build().eval()
    small = graphprune.rebuild(model, 0.5, X[:2])
    masked = graphprune.mask(model, small.graphprune_plan)
    found = {}

    def compare(ours, theirs):
        found["shapes"] = ours.shape, theirs.shape
        return (ours - theirs).abs().max()

    distil = Distillation(masked, alpha=0.0, features=[layer], compare=compare)
    distil.loss = lambda m, batch: 0 * m(batch[0]).sum()
    assert distil(small, BATCH) < 1e-12
    assert found["shapes"][0] == found["shapes"][1]


def test_features_of_a_block_need_the_name_of_a_layer():
    torch.manual_seed(0)

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 8)

        def forward(self, x):
            return self.layer(x).relu()

    model = nn.Sequential(Body(), nn.Linear(8, 3))
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    small = graphprune.rebuild(model, 0.5, x)
    with pytest.raises(
        InputError, match=r"dimension 1 of what '0' returns is 8 in the teacher and"
    ):
        Distillation(model, features=["0"])(small, (x, y))
    loss = Distillation(model, alpha=0.0, features={"0": "0.layer"})(small, (x, y))
    assert loss > F.cross_entropy(small(x), y) - 1e-6


def test_training_with_it_comes_nearer_to_the_teacher():
    model, small = pair(0.25)
    model.eval()
    distil = Distillation(model, alpha=1.0, features=["inner_norm"])
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = distil(small, X)  # no targets are needed
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]


def test_a_student_that_is_pruned_while_it_trains():
    """The plan is read anew when channels have left."""
    model = build()
    student = copy.deepcopy(model)
    distil = Distillation(model, features=["inner", "stem"])
    pruner = Pruner(student, X[:2], schedule=0.5)
    for _ in range(2):
        distil(student, BATCH).backward()
        pruner.step()
    pruner.finish()
    assert student.inner.out_channels == 6
    distil(student, BATCH).backward()


def test_losses_of_ones_own():
    model, small = pair()
    plain = Distillation(model, alpha=1.0, soft=F.mse_loss)(small, X)
    torch.testing.assert_close(plain, F.mse_loss(copy.deepcopy(small)(X), model.eval()(X)))
    doubled = Distillation(
        model, alpha=0.0, loss=lambda m, batch: 2 * F.cross_entropy(m(batch[0]), batch[1])
    )
    torch.testing.assert_close(
        doubled(small, BATCH), 2 * F.cross_entropy(copy.deepcopy(small)(X), Y)
    )


def test_logits_of_language_models_have_their_classes_last():
    class Speaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return SimpleNamespace(logits=self.head(self.first(x).relu()))

    torch.manual_seed(0)
    model = Speaks()
    x = torch.randn(2, 3, 4)
    small = copy.deepcopy(model)
    with torch.no_grad():
        small.head.weight.mul_(0.5)
    loss = Distillation(model, alpha=1.0, temperature=1.0)(small, x)
    wanted = divergence(small(x).logits, model(x).logits, 1.0, -1)
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 0}, "temperature must be a positive number"),
        ({"temperature": float("nan")}, "temperature must be a positive number"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]"),
        ({"alpha": -0.1}, "alpha must be a non-negative number"),
        ({"beta": "1"}, "beta must be a non-negative number"),
        ({"features": ["layer9"]}, "the teacher has no module 'layer9'; it has stem, norm"),
    ],
)
def test_wrong_options_are_explained(options, text):
    with pytest.raises(InputError, match=text):
        Distillation(build(), **options)


def test_wrong_students_and_batches_are_explained():
    model, small = pair()
    with pytest.raises(InputError, match="student and teacher are the same model"):
        Distillation(model)(model, BATCH)
    with pytest.raises(InputError, match="no default loss: the batch has no targets"):
        Distillation(model)(small, X)
    with pytest.raises(InputError, match=r"loss\(model, batch\) did not run the model"):
        Distillation(model, loss=lambda m, b: torch.zeros(()))(small, BATCH)
    other = graphprune.rebuild(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), 0.5)
    with pytest.raises(PlanError, match="another architecture"):
        Distillation(model, features=["stem"])(other, BATCH)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()
    with pytest.raises(InputError, match=r"logits of student \[16, 4\] and teacher \[16, 3\]"):
        Distillation(model, alpha=1.0)(wide, BATCH)
