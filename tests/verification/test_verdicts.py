"""``verify`` on models of which more than one thing may be true: no false alarm, no empty proof."""

import random
import warnings

import numpy as np
import pytest
import torch
from support.zoo import randomise
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import graphprune
from graphprune.errors import PruningWarning, VerificationError
from graphprune.verification.running import Functions

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def proven(model, x=X, **options):
    """The report of a right small model."""
    small = graphprune.rebuild(model, 0.5, x)
    report = graphprune.verify(model, small, x, **options)
    assert report.verdict == "equal"
    assert report.difference < 1e-10
    return report


class Sampled(nn.Module):
    """A variational model: it draws in a shape that shrinks."""

    def __init__(self, draw):
        super().__init__()
        self.mean, self.spread, self.out = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6)
        self.draw = draw

    def forward(self, x):
        mean = self.mean(x)
        return self.out(mean + self.draw(mean) * self.spread(x).exp())


@pytest.mark.parametrize(
    "draw",
    [
        torch.randn_like,
        lambda x: torch.rand(x.shape, dtype=x.dtype),
        lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x: nn.functional.rrelu(x, training=True),
    ],
    ids=["randn_like", "rand", "bernoulli", "rrelu"],
)
def test_random_numbers_in_shapes_that_shrink(draw):
    torch.manual_seed(0)
    model = Sampled(draw)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    proven(model)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]
    assert random.getstate() == state[2]


def test_a_wrong_model_that_draws_is_caught():
    torch.manual_seed(0)
    model = Sampled(torch.randn_like)
    small = graphprune.rebuild(model, 0.5, X)
    with torch.no_grad():
        small.mean.bias[0] += 1e-4
    with pytest.raises(VerificationError, match="'mean'"):
        graphprune.verify(model, small, X)


class Drawn(nn.Module):
    """Numbers that torch does not draw."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(self.a(x) * (1 + float(np.random.rand())) * random.random())


def test_numbers_of_numpy_and_random():
    proven(Drawn())


class Ranged(nn.Module):
    """It takes numbers between 0 and 1 alone."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise ValueError("not in [0, 1]")
        return self.net(x)


def test_given_values_come_first_and_ranges_are_kept():
    report = proven(Ranged(), torch.rand(3, 6))
    names = [check.name for check in report.checks]
    assert names[0] == "output, example inputs"
    assert "gradients, eval mode, another batch size" in names


class InPlace(nn.Module):
    """It overwrites what its own backward needs, in eval mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Linear(4, 4)

    def forward(self, x):
        if self.training:
            return torch.cat([self.conv(x[:, :4]), x[:, 4:]], 1)
        x[:, :4] = self.conv(x[:, :4])
        return x


def test_where_the_original_has_no_gradient_none_is_asked_for():
    model = nn.Sequential(nn.Linear(6, 16), InPlace(), nn.LayerNorm(16), nn.Linear(16, 3))
    report = proven(randomise(model).eval())
    assert any(c.name.startswith("eval mode: the original does not train") for c in report.checks)
    assert any(c.name.startswith("gradients, train mode") for c in report.checks)


def test_a_parameter_without_elements():
    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 2)
            self.prompt = nn.Parameter(torch.empty(1, 0, 16))

        def forward(self, x):
            prompt = self.prompt.expand(len(x), -1, -1)
            return self.b(torch.cat([prompt, self.a(x)], 1).relu())

    proven(Prompted(), torch.randn(2, 3, 6))


def test_a_masked_weight_that_torch_never_computes_anew():
    class Attended(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.o = nn.Linear(6, 16), nn.Linear(16, 3)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x):
            y = self.i(x)
            return self.o(self.attention(y, y, y, need_weights=False)[0])

    model = Attended().eval()
    prune.l1_unstructured(model.attention.out_proj, "weight", 0.4)
    proven(model, torch.randn(2, 5, 6))


class Mixed(nn.Module):
    """A view that moves pixels into channels: at another resolution it moves others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 1), nn.Conv2d(32, 1, 1)

    def forward(self, x):
        return self.last(self.first(x).view(-1, 32, 4, 4))


def test_a_resolution_at_which_the_plan_means_other_channels():
    report = proven(Mixed().double(), torch.randn(1, 1, 8, 8).double())
    (check,) = [c for c in report.checks if not c.decided]
    assert "another resolution" in check.name
    assert check.note in str(report)


def test_two_rows_under_a_batch_norm():
    """Their normalised values are one and minus one: the gradient is rounding alone."""
    torch.manual_seed(0)
    proven(nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)), X[:1])


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(self.a(x) * 0)


def test_constant_outputs_prove_nothing():
    model = Constant()
    small = graphprune.rebuild(model, 0.5, X)
    with pytest.warns(PruningWarning, match="the outputs are the same for all inputs"):
        report = graphprune.verify(model, small, X)
    assert report.verdict == "not decided"
    assert str(report).startswith("not decided")


def test_a_reference_that_cannot_follow_decides_nothing(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))
    small = graphprune.rebuild(model, 0.5, X)

    def fails(*args):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(Functions, "_masked", fails)
    with pytest.warns(PruningWarning, match="no kernel"):
        report = graphprune.verify(model, small, X)
    assert report.verdict == "not decided"
    assert not any(check.decided for check in report.checks if check.name.startswith("output"))


class Single(nn.Module):
    """A model whose code insists on float32."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return self.b(self.a(x).relu())


def test_a_model_of_float32_is_compared_in_float32():
    model = Single()
    small = graphprune.rebuild(model, 0.5, X)
    report = graphprune.verify(model, small, X)
    assert report.verdict == "equal"
    assert report.tolerance == 1e-5
    assert "in float64 the original does not run (TypeError: float32 only)" in str(report)
    with torch.no_grad():
        small.b.bias[0] += 0.1
    with pytest.raises(VerificationError):
        graphprune.verify(model, small, X)


def test_nothing_is_warned_of_when_all_is_proven():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        proven(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)))


class Streams(nn.Module):
    """Whole rows leave; what their columns are divided by is zero where all of them left."""

    def __init__(self, divide):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.mix, self.out = (nn.Parameter(torch.randn(4, n)) for n in (8, 1))
        self.scale, self.divide = nn.Parameter(torch.randn(8)), divide

    def forward(self, x):
        h = self.divide(self.stem(x)[:, None] * self.mix) * self.scale
        return self.head((h * self.out).sum(1))


DIVISIONS = {
    "layer norm": lambda h: F.layer_norm(h, (h.shape[-1],)),
    "norm": lambda h: h / h.norm(dim=-1, keepdim=True),
    "standard deviation": lambda h: h / h.std(-1, keepdim=True),
    "mean": lambda h: h / h.square().mean(-1, keepdim=True),
    "root of a sum": lambda h: h / h.square().sum(-1, keepdim=True).sqrt(),
    "maximum": lambda h: h / h.abs().amax(-1, keepdim=True),
    "softmax": lambda h: h.log_softmax(-1),
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_statistics_of_rows_that_leave_have_gradients(name):
    torch.manual_seed(0)
    model, x = Streams(DIVISIONS[name]).eval(), torch.randn(4, 6)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.mix.shape == (2, 4)
    assert graphprune.verify(model, small, x).verdict == "equal"


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_inputs_may_be_sparse(layout):
    """Other values of an adjacency matrix stand where those of the example do."""

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, adjacency, x):
            assert adjacency.layout == layout
            x = torch.relu(torch.sparse.mm(adjacency, self.first(x)))
            return torch.sparse.mm(adjacency, self.second(x))

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        adjacency = torch.rand(5, 5).round().to_sparse(layout=layout)
        model, x = Graph().eval(), torch.randn(5, 6)
        small = graphprune.rebuild(model, 0.5, (adjacency, x))
        assert small.first.out_features == 8
        assert graphprune.verify(model, small, (adjacency, x)).verdict == "equal"
