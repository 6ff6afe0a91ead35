"""Batches: every form that data comes in, the default loss, and what is refused."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from support.comparing import untouched
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from graphprune.errors import InputError
from graphprune.record.batches import (
    Batch,
    at_rest,
    batches,
    check_data,
    count_of,
    forward,
    loss_of,
)

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, a, b=None):
        return self.layer(a if b is None else a + b)


@pytest.mark.parametrize(
    ("batch", "twice", "targets"),
    [
        (X, False, 0),
        ((X,), False, 0),
        ([X, Y], False, 1),
        ((X, Y, Y), False, 2),
        (((X, X), Y), True, 1),
        (([X, X],), True, 0),
        (({"a": X, "b": X}, Y), True, 1),
        ({"b": X, "a": X}, True, 0),
    ],
)
def test_forms_of_a_batch(batch, twice, targets):
    net = Sum()
    assert torch.equal(forward(net, batch), net.layer(2 * X if twice else X))
    assert len(Batch.of(batch).targets) == targets


def test_what_a_loader_yields():
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    assert count_of(loader) == 2
    assert [loss_of(Sum(), batch).shape for batch in batches(check_data(loader, passes=2))]


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (3, "found int"),
        ((), r"found ()"),
        (("a", X), "found (str, float32[4, 3])"),
        ({}, "found {}"),
        ({1: X}, "found {1: float32[4, 3]}"),
    ],
)
def test_what_is_no_batch(batch, found):
    text = "a batch must be a tensor, a tuple (input, targets...) or a dict of keyword arguments; "
    with pytest.raises(InputError, match=re.escape(text + found)):
        forward(Sum(), batch)


@pytest.mark.parametrize("batch", [X[:, :2], (X.long(),), ((X, X, X), Y), {"c": X}])
def test_a_batch_that_the_model_does_not_take(batch):
    with pytest.raises(InputError, match=r"Sum does not run on a batch .*\[4, [23]\]"):
        forward(Sum(), batch)


class Returns(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, *args, **kwargs):
        return self.output


LOGITS = torch.randn(4, 2)
MAPS = torch.randn(2, 3, 5, 5)
PLACES = torch.randint(0, 3, (2, 5, 5))


@pytest.mark.parametrize(
    ("output", "batch", "wanted"),
    [
        (LOGITS, (X, Y), F.cross_entropy(LOGITS, Y)),
        (LOGITS, (X, Y.int()), F.cross_entropy(LOGITS, Y)),
        (MAPS, (X, PLACES), F.cross_entropy(MAPS, PLACES)),
        (SimpleNamespace(logits=LOGITS, loss=None), (X, Y), F.cross_entropy(LOGITS, Y)),
        ({"logits": LOGITS}, (X, Y), F.cross_entropy(LOGITS, Y)),
        (SimpleNamespace(logits=LOGITS, loss=LOGITS.sum()), {"a": X}, LOGITS.sum()),
        ({"loss": LOGITS.sum()}, X, LOGITS.sum()),
        (LOGITS, (X, torch.tensor([0, -100, 1, -100])), F.cross_entropy(LOGITS[::2], Y[:2])),
    ],
)
def test_default_loss(output, batch, wanted):
    torch.testing.assert_close(loss_of(Returns(output), batch), wanted)


@pytest.mark.parametrize(
    ("output", "batch", "text"),
    [
        (LOGITS, X, "the batch has no targets, where one tensor was expected"),
        (LOGITS, (X, Y, Y), "the batch has 2 targets, where one tensor was expected"),
        (LOGITS, (X, LOGITS), "the target float32[4, 2] holds no class indices"),
        (LOGITS, (X, Y[:3]), "the target has shape [3] where logits [4, 2] need class indices of"),
        (LOGITS, (X, Y + 1), "the target holds classes 1..2 where the model has 2"),
        ((LOGITS, LOGITS), (X, Y), "the model returned (float32[4, 2], float32[4, 2]), neither a"),
        (LOGITS[:, 0], (X, Y), "the model returned float32[4], neither a loss nor logits"),
    ],
)
def test_no_default_loss(output, batch, text):
    with pytest.raises(InputError, match=re.escape(f"no default loss: {text}")) as caught:
        loss_of(Returns(output), batch)
    assert "pass loss=, a function (model, batch) -> scalar tensor" in str(caught.value)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


def test_kinds_of_data():
    for data in ([X], (X,), DataLoader(Stream()), TensorDataset(X)):
        assert check_data(data, passes=2) is data
    assert count_of([X, X]) == 2
    assert count_of(DataLoader(Stream())) is None
    assert check_data(iter([X]))
    with pytest.raises(
        InputError, match="gone through more than once, but a generator yields its batches"
    ):
        check_data((x for x in X), passes=2)
    with pytest.raises(InputError, match=r"found one batch float32\[4, 3\]: pass \[batch\]"):
        check_data(X)
    with pytest.raises(InputError, match=r"found one batch {a: float32\[4, 3\]}"):
        check_data({"a": X})
    for wrong in (3, "images"):
        with pytest.raises(InputError, match=r"such as a list or a DataLoader, not (int|str)"):
            check_data(wrong)
    with pytest.raises(InputError, match=r"data holds no batches$"):
        list(batches([]))


def test_at_rest_restores_modes_buffers_and_random_states():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Sequential(nn.Linear(3, 2)))
    net[2].eval()
    state = torch.get_rng_state()

    def disturb():
        with at_rest(net):
            assert not any(module.training for module in net.modules())
            net.train()
            net(X)
            net[0].running_mean = torch.ones(3)
            raise KeyError

    with untouched(net), pytest.raises(KeyError):
        disturb()
    assert torch.equal(torch.get_rng_state(), state)
