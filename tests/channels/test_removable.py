"""What the table lists as removable can be removed: alone, and in any number."""

import random

import pytest
import torch
from support.zoo.spellings import GroupedEinsum, Projected, ShuffledMean, TensorSplit
from torch import nn
from torch.nn import functional as F

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


class Borrowed(nn.Module):
    """A layer of which the code reads some tensors only."""

    def __init__(self, layer, use):
        super().__init__()
        self.first, self.layer = nn.Conv2d(3, 8, 1), layer
        self.last, self.use = nn.Conv2d(8, 2, 1), use

    def forward(self, x):
        return self.last(self.use(self.layer, self.first(x)))


BORROWED = {
    "statistics": (
        nn.BatchNorm2d(8),
        lambda norm, h: F.batch_norm(h, norm.running_mean, norm.running_var),
    ),
    "a weight of a norm": (nn.BatchNorm2d(8), lambda norm, h: h * norm.weight[:, None, None]),
    "a norm without its bias": (
        nn.GroupNorm(2, 8),
        lambda norm, h: F.group_norm(h, 2, norm.weight),
    ),
    "a kernel": (nn.Conv2d(8, 8, 1), lambda conv, h: F.conv2d(h, conv.weight)),
    "a kernel the other way": (
        nn.ConvTranspose2d(8, 8, 1),
        lambda conv, h: F.conv_transpose2d(h, conv.weight),
    ),
    "a bias": (nn.Linear(5, 8), lambda linear, h: h + linear.bias[:, None, None]),
    "a product": (
        nn.Bilinear(8, 8, 8),
        lambda both, h: h * torch.einsum(
            "bc,ocd,bd->bo", h.mean((2, 3)), both.weight, h.mean((2, 3))
        )[:, :, None, None],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BORROWED)
@pytest.mark.filterwarnings("ignore:.*as the model does not read them")
def test_tensors_that_nothing_reads_stay_as_long_as_the_others(name):
    model = Borrowed(*BORROWED[name]).double().eval()
    small = graphprune.rebuild(model, 0.5, X)
    assert graphprune.verify(model, small, X)
    assert small.first.out_channels == 4
    assert (
        len({len(vector) for vector in small.layer.state_dict().values() if vector.dim() == 1}) == 1
    )
    assert small.layer.bias.shape == (4,)
    second = graphprune.rebuild(small, graphprune.trace(small, X).plan(0.5))
    assert graphprune.verify(model, second, X)


class Latents(nn.Module):
    """A variational model by the classes of torch, which look whether their arguments are valid."""

    def __init__(self):
        super().__init__()
        self.mean, self.spread, self.out = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x):
        found = torch.distributions.Normal(self.mean(x), self.spread(x).exp())
        prior = torch.distributions.Normal(0.0, 1.0)
        divergence = torch.distributions.kl_divergence(found, prior)
        return self.out(found.rsample()), divergence.sum(-1)


def test_latents_of_a_distribution_leave_although_they_are_validated():
    torch.manual_seed(0)
    model, x = Latents().eval(), torch.randn(4, 6)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.mean.out_features == small.spread.out_features == 8
    assert graphprune.verify(model, small, x).verdict == "equal"
