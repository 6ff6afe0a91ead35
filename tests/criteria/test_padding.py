"""Positions that are padding tell nothing of what a layer reads."""

import pytest
import torch
from torch import nn

import graphprune
from graphprune.criteria import find, gather, scores
from graphprune.record.batches import Batch
from graphprune.record.padding import masks_of


class Words(nn.Module):
    """Layers of positions; with ``mixed`` the mask does not keep padding from the others."""

    def __init__(self, mixed=False):
        super().__init__()
        self.first, self.last, self.mixed = nn.Linear(4, 8), nn.Linear(8, 3), mixed

    def forward(self, words, attention_mask=None):
        hidden = self.first(words).relu()
        return self.last(hidden + hidden.mean(1, keepdim=True) if self.mixed else hidden)


def batch(filling):
    words = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(6, 5, dtype=torch.int64)
    mask[:3, 2:] = 0
    words = torch.where(mask[:, :, None] == 1, words, filling)
    return {"words": words, "attention_mask": mask}


@pytest.mark.parametrize("criterion", ["reconstruction", "auto", "wanda", "mean_activation"])
def test_what_stands_in_padding_changes_no_score(criterion):
    torch.manual_seed(0)
    model = Words().eval()
    graph = graphprune.trace(model, batch(0.0))
    found = []
    for filling in (0.0, 30.0):
        evidence = gather(model, criterion, graph.groups, [batch(filling)])
        found.append(scores(find(criterion).function, graph.groups, evidence, 0))
    assert found[0].keys() == found[1].keys()
    for name, score in found[0].items():
        torch.testing.assert_close(score, found[1][name], rtol=1e-5, atol=1e-6)


def test_moments_are_those_of_what_counts():
    """Against rows picked by hand."""
    torch.manual_seed(0)
    model, data = Words().eval(), batch(30.0)
    graph = graphprune.trace(model, data)
    evidence = gather(model, "reconstruction", graph.groups, [data])
    reader = evidence.statistics["reconstruction"]["last.weight", 1][0]
    rows = model.first(data["words"]).relu()[data["attention_mask"] == 1].double().detach()
    torch.testing.assert_close(reader.moment.sum(0)[0], rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert int(reader.count.sum()) == len(rows) == 21


def test_a_mask_is_believed_if_the_model_keeps_to_it():
    torch.manual_seed(0)
    for mixed in (False, True):
        (mask,) = masks_of(Words(mixed).eval(), [Batch.of(batch(0.0))])
        assert (mask is None) == mixed
