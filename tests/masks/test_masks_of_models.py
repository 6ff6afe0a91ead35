"""Masks in, over the shapes that models take: what leaves, what stays, and why."""

import copy

import pytest
import torch
from support.comparing import assert_close, call
from support.masking import DOUBLE, kill, randomise, shrunk
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import graphprune
from graphprune import Plan


def removed(plan, layer):
    """How many output channels of a layer leave."""
    slots = [s for s in plan.slots if s.tensor.startswith(f"{layer}.weight") and s.dim == 0]
    return slots[0].size - len(slots[0].kept) if slots else 0


def built(*layers):
    torch.manual_seed(0)
    return randomise(nn.Sequential(*layers))


def images(side=9, channels=3):
    return torch.randn(2, channels, side, side, dtype=DOUBLE)


class Residual(nn.Module):
    """A stream of 8 channels with two blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down, self.up = (
            nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in "ab") for _ in "xy"
        )
        self.n1, self.n2 = (nn.ModuleList(nn.BatchNorm2d(8) for _ in "ab") for _ in "xy")
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for down, n1, up, n2 in zip(self.down, self.n1, self.up, self.n2, strict=True):
            x = F.relu(x + n2(up(F.relu(n1(down(x))))))
        return self.head(x.mean((2, 3)))


def residual():
    torch.manual_seed(0)
    return randomise(Residual()), images()


def test_a_channel_of_a_stream_leaves_when_all_its_writers_are_dead():
    model, x = residual()
    for layer in (model.stem, *model.up):
        kill(layer, 1, 2)
    with torch.no_grad():
        model.stem.bias[1:3] = 50
    kill(model.stem, 5)
    plan, small = shrunk(model, x)
    assert removed(plan, "stem") == 1, "one of the two stands for the borders"
    assert any(
        note.startswith("stem: 1 constant channel stays: not constant") for note in plan.notes
    )
    assert graphprune.verify(model, small, x).difference < 1e-10


def test_scales_of_zero():
    """Network slimming, and a branch that is switched off as a whole."""
    model, x = residual()
    with torch.no_grad():
        model.n1[0].weight[:3] = 0
        model.n1[0].bias[:3] = -1
        model.n2[1].weight.zero_()
    plan, small = shrunk(model, x)
    assert removed(plan, "down.0") == 3
    assert removed(plan, "down.1") == 7, "nobody reads the branch; one channel stays"
    assert graphprune.verify(model, small, x).difference < 1e-10


def test_readers_of_zero():
    model = built(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        model[4].weight[:, 2:4] = 0  # nobody reads these,
        model[2].weight[[0, 1, 4, 5], :3] = 0  # so nobody reads those
    plan, _ = shrunk(model, images())
    assert (removed(plan, "2"), removed(plan, "0")) == (2, 3)


@pytest.mark.parametrize("act", [nn.GELU(), nn.Sigmoid(), nn.Hardswish(inplace=True), nn.Softplus(),
                                 nn.ELU(inplace=True), nn.LeakyReLU(0.3, True),
                                 nn.PReLU()])  # fmt: skip
def test_constants_through_activations(act):
    model = built(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act, nn.Conv2d(8, 4, 3), nn.Flatten(),
                  nn.Linear(4 * 25, 2))  # fmt: skip
    kill(model[0], 0, 3, 4)
    plan, small = shrunk(model, images())
    assert plan.removed == 3
    assert [change.tensor for change in plan.biases] == ["3.bias"]
    assert graphprune.verify(model, small, images()).difference < 1e-10


def test_depthwise_convolutions():
    model = built(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    with torch.no_grad():
        model[1].bias[:] = torch.tensor([-9.0, 9, -9, 9, 0, 0, 0, 0])
        model[4].weight.fill_(0.1)
        model[4].bias.fill_(3)
    kill(model[0], 0, 1)  # a zero and a constant before the depthwise convolution
    kill(model[3], 2, 4)  # constants behind it
    plan, small = shrunk(model, images())
    assert removed(plan, "3") == 3
    assert small[3].groups == small[3].in_channels == 5
    assert [note for note in plan.notes if "not the same at all places" in note]
    assert {change.tensor for change in plan.biases} == {"7.running_mean"}
    assert graphprune.verify(model, small, images()).difference < 1e-10


def test_groups_of_a_convolution_leave_as_a_whole():
    model = built(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1)
    )
    kill(model[0], 1, 5)  # the same column of both groups
    kill(model[2], 0, 3, 4, 7)
    _, small = shrunk(model, images())
    assert (small[0].out_channels, small[4].in_channels) == (6, 4)
    kill(model[0], 2)
    _, small = shrunk(model, images())
    assert small[0].out_channels == 6, "column 2 of the other group lives"


class Dense(nn.Module):
    """Concatenation, with a norm of its own for every reader."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Conv2d(6 + 4 * n, 4, 3, padding=1, bias=False) for n in range(3)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * n) for n in range(4))
        self.head = nn.Linear(18, 3)

    def forward(self, x):
        parts = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers):
            parts.append(layer(F.relu(norm(torch.cat(parts, 1)))))
        return self.head(F.relu(self.norms[3](torch.cat(parts, 1))).mean((2, 3)))


def test_concatenation():
    torch.manual_seed(0)
    model = randomise(Dense())
    kill(model.stem, 0, 1, 2)
    kill(model.layers[0], 1, 2)
    kill(model.layers[1], 0, 3)
    plan, small = shrunk(model, images())
    assert plan.removed >= 4
    assert small.layers[2].weight.shape[1] == 14 - plan.removed + (4 - small.layers[2].out_channels)
    assert graphprune.verify(model, small, images()).difference < 1e-10


class Encoder(nn.Module):
    """Two layers of torch's transformer on embedded tokens."""

    def __init__(self, first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            16, 4, 32, 0.0, "gelu", batch_first=True, norm_first=first
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 5)

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens)).mean(1))


@pytest.mark.parametrize("first", [True, False])
def test_transformers(first):
    torch.manual_seed(0)
    model, tokens = Encoder(first).double().eval(), torch.randint(0, 11, (2, 6))
    with torch.no_grad():
        for layer in model.layers.layers:
            layer.linear1.weight[:5] = 0  # constants
            layer.linear2.weight[:, 10:14] = 0  # read by nobody
            layer.self_attn.out_proj.weight[:, 4:8] = 0  # head 1 read by nobody
            layer.self_attn.in_proj_weight[40:44] = 0  # head 2 has equal values everywhere
    plan, small = shrunk(model, tokens)
    assert [g.size - len(g.kept) for g in plan.groups if len(g.kept) < g.size] == [2, 9, 2, 9]
    assert small.layers.layers[0].self_attn.num_heads == 2
    assert graphprune.verify(model, small, tokens).difference < 1e-10
    kill(model.embed, *range(11))
    _, small = shrunk(model, tokens)  # how much is constant then depends on rounding
    with torch.no_grad():
        torch.testing.assert_close(small(tokens), model(tokens), rtol=1e-10, atol=1e-10)


class Gated(nn.Module):
    """A block with root mean square norms by hand and a gated MLP, without biases."""

    def __init__(self):
        super().__init__()
        self.embed, self.scale = nn.Embedding(11, 8), nn.Parameter(torch.rand(8) + 0.5)
        self.eps = 1e-4
        self.up, self.gate = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down, self.head = nn.Linear(12, 8, bias=False), nn.Linear(8, 5, bias=False)

    def norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.scale

    def forward(self, tokens):
        x = self.embed(tokens)
        y = self.norm(x)
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))


def test_norms_that_can_be_rescaled_lose_zeroes():
    torch.manual_seed(0)
    model, tokens = Gated().double(), torch.randint(0, 11, (2, 6))
    with torch.no_grad():
        model.embed.weight[:, 2:4] = 0
        model.embed.weight[:, 5] = 1
        model.down.weight[[2, 3, 5]] = 0
        model.up.weight[:3] = 0
    plan, small = shrunk(model, tokens)
    assert small.embed.embedding_dim == 6, "two zeroes; a one counts in the mean square"
    assert small.up.out_features == 9
    assert plan.notes == ("down: 1 constant channel stays: not constant where 'up' reads them",)
    assert graphprune.verify(model, small, tokens).difference < 1e-10
    with torch.no_grad():
        for layer in (model.up, model.gate, model.head):
            layer.weight[:, 5:7] = 0  # nobody reads these but the mean square
    plan, small = shrunk(model, tokens)
    assert small.embed.embedding_dim == 6
    assert any("for statistics" in note for note in plan.notes)


class Twice(nn.Module):
    """One convolution that is called twice, on values of other constants."""

    def __init__(self):
        super().__init__()
        self.first, self.both, self.last = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 2, 1),
        )

    def forward(self, x):
        return self.last(F.relu(self.both(F.relu(self.both(self.first(x))))))


@pytest.mark.parametrize(("bias", "leave"), [(0.25, 1), (0.75, 0)])
def test_a_shared_layer_takes_a_constant_that_all_its_calls_see(bias, leave):
    torch.manual_seed(0)
    model = Twice().double()
    for layer in (model.first, model.both):
        kill(layer, 2)
    with torch.no_grad():
        model.first.bias[2], model.both.bias[2] = 0.25, bias
    plan, _ = shrunk(model, images())
    assert plan.removed == leave
    assert leave or "not the same in every call" in plan.notes[0]


def test_constants_that_depend_on_the_resolution_stay():
    """The mean of a map with borders, and a map of one place that is all border."""
    model = built(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6),
                  nn.AdaptiveAvgPool2d(1),
                  nn.Flatten(), nn.Linear(6, 2))  # fmt: skip
    kill(model[0], 1, 2)
    plan, small = shrunk(model, images(8))
    assert plan.removed == 0
    assert "for every input shape" in plan.notes[0]
    model = built(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1),
                  nn.Flatten(),
                  nn.Linear(4, 2))  # fmt: skip
    kill(model[0], 1, 2)
    plan, small = shrunk(model, images(1))
    for x in map(images, (1, 2, 7)):
        assert_close(call(model, x), call(small, x))
    assert plan.removed == 1


def test_transposed_convolutions_and_padding_by_hand():
    model = built(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 5, 3, 2, 1, bias=False), nn.ReLU(),
                  nn.ZeroPad2d(1),
                  nn.Conv2d(5, 4, 3, bias=False), nn.ReflectionPad2d(1),
                  nn.Conv2d(4, 2, 3))  # fmt: skip
    kill(model[0], 0, 1)
    with torch.no_grad():
        model[1].weight[:, 3:] = 0
    kill(model[4], 2)
    _, small = shrunk(model, images(5))
    assert small[0].out_channels == 5, "one constant for both, on the lattice of the stride"
    assert small[1].out_channels == 3
    assert small[6].in_channels == 3
    assert graphprune.verify(model, small, images(5)).difference < 1e-10


def test_boolean_vectors_by_layer():
    model, x = residual()
    masks = {"down.0": [True] * 5 + [False] * 3, "up.1": torch.arange(8) != 4, "head": [1, 0, 1]}
    plan, small = shrunk(model, x, exact=False, masks=masks)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for layer, mask in ((masked.down[0], [5, 6, 7]), (masked.up[1], [4]), (masked.head, [1])):
            layer.weight[mask] = 0
            layer.bias[mask] = 0
    assert_close(call(masked, x), call(small, x))
    assert removed(plan, "down.0") >= 2
    assert (small.up[1].weight[4] == 0).all(), "a channel of the stream stays, masked"
    assert graphprune.verify(model, small, x).difference < 1e-10
    again = graphprune.rebuild(copy.deepcopy(model), plan, inplace=True)
    assert_close(call(masked, x), call(again, x))


def test_layers_that_eval_mode_does_not_run_stay():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.hidden, self.aux = nn.Linear(4, 2), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            out = self.main(x)
            return (out, self.aux(self.hidden(x))) if self.training else out

    plan, small = shrunk(Auxiliary().double().eval(), torch.randn(3, 4, dtype=DOUBLE))
    assert plan.removed == 0
    assert small.hidden.out_features == 6


def test_values_that_the_code_reads_are_no_constants():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(self.a(x) * float(x.mean() > 0))

    model = Reads().double()
    kill(model.a, 1, 2)
    plan, _ = shrunk(model, torch.randn(3, 4, dtype=DOUBLE))
    assert plan.removed == 0


def test_a_plan_says_what_it_did():
    model, x = residual()
    prune.ln_structured(model.down[0], "weight", 0.5, n=2, dim=0)
    text = str(Plan.from_masks(model, x))
    assert "constants go to up.0.weight" in text
    assert (
        "down.0, n1.0: 1 constant channel stays: it stands for others that no bias can take" in text
    )


@pytest.mark.parametrize(
    ("kind", "gates", "dead"),
    [
        (nn.RNN, [0], [0]),
        (nn.GRU, [0, 1, 2], [0, 1, 2]),
        (nn.GRU, [0, 1, 2], [2]),  # the candidate alone: the state stays zero
        (nn.LSTM, [0, 1, 2, 3], [2]),
    ],
)
def test_units_of_recurrent_layers_whose_candidate_is_zero(kind, gates, dead):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = kind(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(2, 5, 4, dtype=torch.float64)
    for name in [name for name, _ in model.rnn.named_parameters()]:
        mask = torch.ones_like(getattr(model.rnn, name))
        for gate in dead:
            mask[6 * gate : 6 * gate + 2] = 0
        prune.custom_from_mask(model.rnn, name, mask)
    plan = graphprune.Plan.from_masks(model, x)
    small = graphprune.rebuild(model, plan)
    assert plan.removed == 2
    assert small.rnn.hidden_size == 4
    assert torch.allclose(small(x), model(x), atol=1e-12)
    assert len(model.rnn.weight_hh_l0) == 6 * len(gates)
