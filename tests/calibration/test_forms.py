"""Calibration on what loaders yield: masks and padding, dictionaries, lists; values that decide."""

import collections
import copy
import warnings

import pytest
import torch
from support.residual import D, error, small_of
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.calibration import calibrate


class Encoder(nn.Module):
    """Attention under a mask; looks at the values of the mask, as tokenizers' models do."""

    def __init__(self, masked=True):
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.masked = masked

    def forward(self, input_ids, attention_mask=None):
        x = self.words(input_ids)
        mask = None
        if self.masked and attention_mask is not None and not bool(attention_mask.all()):
            mask = attention_mask[:, None, :].bool()
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask))
        return {"last_hidden_state": x + self.down(F.gelu(self.up(x)))}


def texts(count=24, longest=7, padding=0):
    ids = torch.randint(1, 30, (count, longest))
    lengths = torch.randint(2, longest + 1, (count, 1))
    mask = (torch.arange(longest) < lengths).long()
    return {"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}


KEEP = ("words", "qkv", "out", "down")


def encoder(masked=True):
    torch.manual_seed(0)
    net = Encoder(masked).double().eval()
    return net, graphprune.rebuild(net, 0.5, texts(2), keep=KEEP)


def distances(small, net, batch):
    """The squared errors where the mask is one, and where it is zero."""
    with torch.no_grad():
        gap = (small(**batch)["last_hidden_state"] - net(**batch)["last_hidden_state"]).square()
    mask = batch["attention_mask"].bool()
    return float(gap[mask].mean()), float(gap[~mask].mean())


@pytest.mark.parametrize("kind", [dict, collections.UserDict, lambda b: (b, torch.zeros(24))])
def test_a_tokenizers_batches(kind):
    net, small = encoder()
    data = [texts(), texts(longest=9)]
    data[1]["attention_mask"].fill_(1)  # this one runs another way
    before = [distances(small, net, batch)[0] for batch in data]
    report = calibrate(small, net, [kind(batch) for batch in data])
    assert "down" in report.changed
    for batch, worst in zip(data, before):
        assert distances(small, net, batch)[0] < worst


@pytest.mark.parametrize("masked", [True, False])
def test_padded_positions_count_only_where_nothing_says_that_they_do_not(masked):
    """Another token pads than the texts hold: only where the mask is used is it of no account."""
    net, small = encoder(masked)
    with torch.no_grad():
        net.words.weight[0] *= 30
        small.words.weight[0] *= 30
    data = texts(200, 8)
    before, other = distances(small, net, data)
    calibrate(small, net, [data])
    after, padded = distances(small, net, data)
    if masked:
        assert after < 0.8 * before
        assert after / before < padded / other
    else:
        assert padded / other < after / before


def images(*sides):
    return [torch.randn(3, side, side, dtype=D) for side in sides]


class Detector(nn.Module):
    """Takes a list of images of different sizes; what it returns depends on values."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 6, 3, padding=1)
        self.scores = nn.Conv2d(6, 1, 1)

    def forward(self, images, targets=None):
        if not isinstance(images, list | tuple):
            raise ValueError("images must be a list of tensors")
        x = torch.stack([F.interpolate(i[None], (8, 8))[0] for i in images])
        scores = self.scores(torch.relu(self.second(torch.relu(self.first(x))))).flatten(1)
        return [row[row > row.mean()] for row in scores]


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: (tuple(x), ({"boxes": torch.zeros(1, 4)},) * len(x)),
        lambda x: (x, None),
        lambda x: ((x,),),
        lambda x: {"images": x},
    ],
)
@pytest.mark.parametrize("method", ["repair", "bias"])
def test_lists_of_images(form, method):
    net = Detector().double().eval()
    small = graphprune.rebuild(net, 0.5, images(9, 11), keep=["second"])
    data = [images(9, 11, 8), images(10, 10), images(12, 9, 8, 8)]

    def gap():
        scores = []

        def keep(*given):
            return scores.append(given[2].detach())

        handles = [model.scores.register_forward_hook(keep) for model in (net, small)]
        for batch in data:
            net(batch)
            small(batch)
        for handle in handles:
            handle.remove()
        return sum(float((a - b).square().mean()) for a, b in zip(scores[::2], scores[1::2]))

    before = gap()
    report = calibrate(small, net, [form(batch) for batch in data], method=method)
    assert report.changed
    assert gap() < before
    graph = graphprune.trace(net, images(9, 11))
    plan = graph.plan(0.25, criterion="wanda", data=[form(batch) for batch in data])
    assert plan.removed


class Chooser(nn.Module):
    """Half of the rows, those with the lowest scores, go on: how many depends on values."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 16)
        self.score, self.last = nn.Linear(16, 1), nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.head(torch.relu(self.body(x))))
        order = self.score(x)[:, 0].argsort()
        return self.last(x[order[: int((order >= 0).sum()) // 2]])


def test_rows_that_the_models_choose_differently_are_not_compared():
    torch.manual_seed(0)
    net = Chooser().double().eval()
    x = torch.randn(64, 6, dtype=D)
    small = graphprune.rebuild(net, 0.5, x, keep=["head"])
    weight = small.last.weight.detach().clone()
    report = calibrate(small, net, list(x.split(16)))
    notes = {refit.layer: refit.note for refit in report.refits}
    assert "head" in report.changed
    assert notes["last"] == "in no batch do both models compute it for the same rows"
    assert torch.equal(small.last.weight, weight)


class Gated(nn.Module):
    """A decision between two layers, on what the first one computes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.b(torch.relu(self.a(x)))
        x = torch.relu(x) if float(x.mean()) > 0.05 else torch.tanh(x) * 0.5
        return self.c(x)


def test_a_decision_that_the_refit_changes_is_taken_anew():
    torch.manual_seed(3)
    net = Gated().double().eval()
    x = torch.randn(160, 6, dtype=D)
    small = graphprune.rebuild(net, 0.5, x, keep=["b"])
    with torch.no_grad():
        small.b.bias += 3 if float(net.b(torch.relu(net.a(x))).mean()) <= 0.05 else -3
    before = error(small, net, x)
    report = calibrate(small, net, list(x.split(20)))
    assert {"b", "c"} & set(report.changed)
    assert error(small, net, x) < 0.2 * before


def test_inputs_that_are_written_to_stay():
    net = nn.Sequential(
        nn.ReLU(inplace=True), nn.Linear(6, 12), nn.ReLU(inplace=True), nn.Linear(12, 3)
    )
    x = torch.randn(40, 6, dtype=D)
    net, small = small_of(net, x.clone())
    kept = copy.deepcopy(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(small, net, [x])
    assert torch.equal(x, kept)
