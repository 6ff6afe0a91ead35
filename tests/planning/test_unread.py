"""Attributes that no forward reads follow where that is certain; the plan says where it is not."""

import itertools

import pytest
import torch
from torch import nn

import graphprune


class Branches(nn.Module):
    """Sums a convolution and the identity; ``deploy`` makes one convolution of both."""

    def __init__(self, into, out):
        super().__init__()
        self.in_channels, self.kernel = into, 3
        self.dense, self.norm = nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out)
        self.identity = nn.BatchNorm2d(into) if into == out else None

    def forward(self, x):
        x, same = self.norm(self.dense(x)), x
        return (x if self.identity is None else x + self.identity(same)).relu()

    def deploy(self):
        eye = torch.zeros(self.in_channels, self.in_channels, self.kernel, self.kernel)
        eye[range(self.in_channels), range(self.in_channels), 1, 1] = 1.0
        return self.dense.weight + eye


class Backbone(nn.Module):
    """Remembers its width for whoever puts another head on."""

    def __init__(self, widths=(8, 12, 24), classes=3):
        super().__init__()
        self.num_features, self.num_classes = widths[-1], classes
        self.widths, self.depth, self.image = list(widths), len(widths), 16
        sizes = [3, *widths]
        self.layers = nn.Sequential(*(nn.Conv2d(a, b, 3) for a, b in itertools.pairwise(sizes)))
        self.head = nn.Linear(self.num_features, classes)

    def reset(self, classes):
        self.head = nn.Linear(self.num_features, classes)

    def forward(self, x):
        return self.head(self.layers(x).mean((2, 3)))


IMAGE = torch.randn(2, 3, 16, 16)


def test_a_width_that_a_conversion_reads_follows():
    model = nn.Sequential(Branches(3, 16), Branches(16, 16), nn.Conv2d(16, 2, 1)).eval()
    small = graphprune.rebuild(model, 0.5, torch.randn(1, 3, 9, 9))
    assert (small[0].in_channels, small[1].in_channels, small[1].kernel) == (3, 8, 3)
    assert small[1].deploy().shape == (8, 8, 3, 3)
    assert model[1].in_channels == 16


@pytest.mark.parametrize("options", [{}, {"scope": "global"}])
def test_a_new_head_fits_the_small_backbone(options):
    model = Backbone().eval()
    small = graphprune.rebuild(model, 0.4, IMAGE, **options)
    assert small.num_features == small.head.in_features < 24
    assert small.widths == [layer.out_channels for layer in small.layers]
    assert (small.depth, small.num_classes, small.image) == (3, 3, 16)
    small.reset(7)
    assert small(IMAGE).shape == (2, 7)


def test_a_number_that_may_be_another_size_stays():
    model = Backbone((8, 8, 16), classes=8).eval()
    graph = graphprune.trace(model, IMAGE)
    plan = graph.plan(0.5)
    small = graphprune.rebuild(model, plan)
    assert small.num_classes == 8  # as many as the channels of two layers
    assert small.num_features == 16  # as many as the image has pixels
    assert "num_features (16)" in plan.notes[0]


class Counting(nn.Module):
    """Runs a layer as often as it has channels, or scales by that, unseen by shapes."""

    def __init__(self, use):
        super().__init__()
        self.width, self.use = 8, use
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x)
        if self.use == "range":
            for _ in range(self.width):
                x = x.sin()
        elif self.use == "value":
            x = x * self.width
        elif self.use == "list":
            x = x * list(range(100))[self.width]
        return self.last(x)


class Silent(Counting):
    """Remembers its width, and mentions it nowhere in its forward."""

    def forward(self, x):
        return self.last(self.first(x))


@pytest.mark.parametrize("use", ["range", "value", "list", "nothing"])
def test_a_number_that_the_forward_uses_stays(use):
    model, x = (Silent if use == "nothing" else Counting)(use).eval(), torch.randn(3, 4)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.first.out_features == 4
    assert small.width == (4 if use == "nothing" else 8)
    assert graphprune.verify(model, small, x).difference < 1e-9


def test_a_second_round_follows_again_and_plans_compose():
    model = Backbone().eval()
    first = graphprune.rebuild(model, 0.5, IMAGE)
    second = graphprune.rebuild(first, 0.5, IMAGE)
    again = graphprune.rebuild(model, second.graphprune_plan)
    assert again.num_features == second.num_features == second.head.in_features == 6


NORMS = {
    "weight": nn.utils.weight_norm,
    "spectral": nn.utils.spectral_norm,
    "parametrized": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_normed_layers_know_their_sizes(norm, kind):
    wrap = NORMS[norm]
    model = nn.Sequential(
        wrap(kind(3, 32, 3)), nn.ReLU(), wrap(kind(32, 16, 3)), nn.Conv1d(16, 2, 3)
    )
    model, x = model.eval(), torch.randn(1, 3, 12)
    small = graphprune.rebuild(model, 0.5, x)
    assert (small[0].out_channels, small[2].in_channels, small[2].out_channels) == (16, 16, 8)
    assert small[2].weight.shape == ((8, 16, 3) if kind is nn.Conv1d else (16, 8, 3))
    small(x)


class Remembers(nn.Module):
    """Takes an earlier value by its place: a number that happens to equal a width."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.place, self.head = 4, nn.Linear(4, 2)

    def forward(self, x):
        values = [x]
        for layer in self.layers:
            values.append(layer(values[-1]).relu())
        return self.head(values[self.place] * values[-1])


def test_a_place_that_equals_a_width_is_no_width():
    model, x = Remembers().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    small = graphprune.rebuild(model, 0.25, x)
    assert small.place == 4
    assert small.layers[0].out_features == 3
    assert graphprune.verify(model, small, x).difference < 1e-10


class Reader:
    """No module: what it reads of a model is mentioned in no code of the model."""

    def __init__(self, use):
        self.use = use

    def read(self, owner, x):
        name = "".join(["wid", "th"])
        if self.use == "value":
            return x * list(range(100))[getattr(owner, name)]
        if self.use == "default":
            return x * (2.0 if getattr(owner, name, 8) == 8 else 3.0)
        return x if hasattr(owner, name) else x + 1


class Asking(nn.Module):
    """Lets another object look at its width."""

    def __init__(self, use):
        super().__init__()
        self.width, self.reader = 8, Reader(use)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.reader.read(self, self.first(x)))


@pytest.mark.parametrize(("use", "width"), [("value", 8), ("default", 8), ("has", 4)])
def test_a_number_that_is_read_by_way_of_another_object_stays(use, width):
    model, x = Asking(use).double().eval(), torch.randn(3, 4, dtype=torch.float64)
    small = graphprune.rebuild(model, 0.5, x)
    assert (small.first.out_features, small.width) == (4, width)
    assert graphprune.verify(model, small, x).difference < 1e-10


class Halves(nn.Module):
    """Takes halves in its forward, and parts of ``width`` in another one that exporters prefer."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.into, self.out = nn.Conv2d(3, 2 * width, 1), nn.Conv2d(3 * width, 3, 1)
        self.steps = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1)])

    def forward(self, x):
        parts = list(self.into(x).chunk(2, 1))
        parts.extend(parts[-1] + step(parts[-1]) for step in self.steps)
        return self.out(torch.cat(parts, 1))

    def forward_split(self, x):
        parts = list(self.into(x).split((self.width, self.width), 1))
        parts.extend(parts[-1] + step(parts[-1]) for step in self.steps)
        return self.out(torch.cat(parts, 1))


class Reading(Halves):
    """Reads the attribute of that name of its own."""

    def forward(self, x):
        return self.forward_split(x)


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_the_width_of_a_part_in_a_list_follows_for_another_forward(ratio):
    model = nn.Sequential(Halves(8), Reading(16)).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    small = graphprune.rebuild(model, ratio, x)
    assert [part.width for part in small] == [8 * (1 - ratio), 16 * (1 - ratio)]
    assert small[0].steps[0].out_channels == small[0].width
    assert torch.allclose(small[0].forward_split(x), small[0](x))
