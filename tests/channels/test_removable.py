"""What the table lists as removable can be removed: alone, and in any number."""

import random

import pytest
import torch
from support.zoo.spellings import GroupedEinsum, Projected, ShuffledMean, TensorSplit
from torch import nn

import graphprune
from graphprune.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # torch's own
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, width, step, out):
        super().__init__()
        self.stem, self.step, self.head = nn.Conv2d(3, width, 1), step, nn.Linear(out, 3)

    def forward(self, x):
        return self.head(self.step([x, self.stem(x)]).mean((2, 3)))


NETWORKS = {
    "product by groups": lambda: Net(8, GroupedEinsum(8, 2, 3), 8),
    "product by more groups": lambda: Net(8, GroupedEinsum(8, 4, 2), 8),
    "one channel behind a shuffle": lambda: Net(4, ShuffledMean(4), 4),
    "two channels behind a shuffle": lambda: Net(8, ShuffledMean(8), 8),
    "a tensor says how many parts": lambda: Net(8, TensorSplit(2, "tensor"), 8),
    "a tensor says which parts": lambda: Net(8, TensorSplit((3,), "tensor"), 8),
}


@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_group_alone_and_all_together(name):
    torch.manual_seed(0)
    model, drawn = NETWORKS[name]().double().eval(), random.Random(0)
    graph = graphprune.trace(model, X)
    assert sum(group.size for group in graph.groups) > 0

    def some(group):
        return sorted(drawn.sample(range(group.size), drawn.randint(1, max(group.size - 1, 1))))

    asked = [{group.name: some(group)} for group in graph.groups]
    asked += [{group.name: some(group) for group in graph.groups} for _ in range(3)]
    for kept in asked:
        small = graphprune.rebuild(model, graph.plan_of(kept))
        assert graphprune.verify(model, small, X).difference < 1e-10


def test_a_projection_is_told_to_forbid_a_number():
    torch.manual_seed(0)
    model = Net(4, Projected(4, 6, 3), 3).double().eval()
    graph = graphprune.trace(model, X)
    (state,) = [group for group in graph.groups if group.limit]
    assert "as many channels as the projection of step.rnn" in state.note
    assert state.note in str(graph)
    with pytest.raises(InputError, match=f"{state.name}: never as many channels as the projection"):
        graph.plan_of({state.name: [0, 2, 3]})
    for kept in ([1, 4], [0, 1, 2, 5]):
        small = graphprune.rebuild(model, graph.plan_of({state.name: kept}))
        assert small.step.rnn.hidden_size == len(kept)
        assert graphprune.verify(model, small, X).difference < 1e-10
