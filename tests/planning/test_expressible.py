"""Plans that a config can say, asked for up front: widths that the class accepts, or a reason."""

import re
import warnings

import pytest
import torch
from support.configured import Block
from torch import nn

import graphprune
from graphprune.errors import InputError, PruningWarning

X = torch.arange(10).view(2, 5)


class Config:
    """What a library of models calls a config: fields, and ``to_dict``."""

    def __init__(self, width=16, heads=4, hidden=24, layers=2, **more):
        self.width, self.heads, self.hidden, self.layers = width, heads, hidden, layers
        vars(self).update(more)

    def to_dict(self):
        return dict(vars(self))


class Whole(Block):
    """It refuses heads that do not fill the width."""

    def __init__(self, config):
        if config.width % config.heads:
            raise ValueError("the width must be a multiple of the number of heads")
        super().__init__(config)


class Model(nn.Module):
    """Heads share the width; hidden layers of all blocks are of one field."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(11, config.width)
        self.blocks = nn.ModuleList(Whole(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, 3)

    def scaled(self, x):
        return x

    def forward(self, tokens):
        x = self.scaled(self.words(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scaled(Model):
    """Multiplies by a number that is computed from the width, which stays the original's."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = config.width**0.5

    def scaled(self, x):
        return x * self.scale


class Reading(Model):
    """Reads the width from its config whenever it runs."""

    def scaled(self, x):
        return x * self.config.width**0.5


class Strict(nn.Module):
    """Widths of a list, each a multiple of four, and one that is a share of another."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        a, b = config.widths
        inner = int(b * config.share)
        if a % 4:
            raise ValueError("the first width must be a multiple of four")
        self.first = nn.Linear(5, a)
        self.second, self.inner, self.last = (
            nn.Linear(a, b),
            nn.Linear(b, inner),
            nn.Linear(inner, 2),
        )

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        return self.last(self.inner(x).relu())


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.first(x).relu())


def seeded(kind, config=None):
    torch.manual_seed(0)
    return kind(config or Config()).eval()


def built(small):
    """What the config of a small model builds, with its weights."""
    model = type(small)(small.config).eval()
    model.load_state_dict(small.state_dict())
    return model


@pytest.fixture(autouse=True)
def _quiet():
    """Where the class accepts few widths, less leaves than was asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)
        yield


@pytest.mark.parametrize(
    "ratio",
    [pytest.param(n / 10, marks=[pytest.mark.slow] * (n not in (1, 4, 5, 8))) for n in range(1, 9)],
)
def test_every_ratio_is_said(ratio):
    model = seeded(Model)
    plan = graphprune.trace(model, X).plan(ratio, expressible="config", scope="global")
    small = graphprune.rebuild(model, plan, X)
    assert "save_pretrained" not in vars(small)
    assert torch.equal(built(small)(X), small(X))
    assert small.config.width == 4 * small.config.heads
    assert graphprune.verify(model, small, X).difference < 1e-10
    assert plan.request["expressible"] == "config"


def test_the_nearest_widths_are_taken():
    small = graphprune.rebuild(seeded(Model), 0.4, X, expressible="config")
    assert vars(small.config) == {"width": 8, "heads": 2, "hidden": 15, "layers": 2}
    small = graphprune.rebuild(seeded(Model), 0.2, X, expressible="config", round_to=4)
    assert (small.config.width, small.config.hidden) == (12, 20)


def test_budgets_are_met():
    model = seeded(Model)
    for quantity in ("params", "macs"):
        small = graphprune.rebuild(model, None, X, target={quantity: 0.6}, expressible="config")
        plan = small.graphprune_plan
        share = getattr(plan.after, quantity) / getattr(plan.before, quantity)
        assert 0.5 < share <= 0.6
        assert torch.equal(built(small)(X), small(X))


def test_widths_go_down_by_a_head():
    """By the width alone the class accepts half of it; with the number of heads, every head."""
    model = seeded(Model, Config(width=48, heads=12))
    small = graphprune.rebuild(model, 0.4, X, expressible="config")
    assert (small.config.width, small.config.heads) == (28, 7)
    assert torch.equal(built(small)(X), small(X))
    small = graphprune.rebuild(model, 0.25, X)  # by luck
    assert (small.config.width, small.config.heads, small.config.hidden) == (36, 9, 18)


class Joined(Model):
    """A layer stands between two widths, unless they are equal."""

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(11, config.first)
        if config.first != config.width:
            self.join = nn.Linear(config.first, config.width)

    def scaled(self, x):
        return self.join(x) if hasattr(self, "join") else x


def test_widths_that_do_not_go_together():
    """The same ratio would make both widths eight."""
    model = seeded(Joined, Config(first=15))
    plan = graphprune.trace(model, X).plan(0.49, expressible="config")
    small = graphprune.rebuild(model, plan, X)
    assert small.config.first != small.config.width == 8
    assert torch.equal(built(small)(X), small(X))


def test_options_hold_together_with_it():
    model = seeded(Model)
    graph = graphprune.trace(model, X)
    plan = graph.plan(0.5, expressible="config", keep=["blocks.0.up"])
    small = graphprune.rebuild(model, plan, X)
    assert (small.config.width, small.config.hidden) == (8, 24), "the other one stays as well"
    plan = graph.plan(0.5, expressible="config", min_kept={"blocks.*.up": 0.75})
    assert graphprune.rebuild(model, plan, X).config.hidden == 18
    plan = graph.plan(0.5, expressible="config", ratios={"blocks.1.up": 0.25, "words": 0.0})
    small = graphprune.rebuild(model, plan, X)
    assert small.config.hidden == 18
    with pytest.raises(InputError, match="let parts leave first"):
        graph.plan(0.5, expressible="config", parts="blocks")
    with pytest.raises(InputError, match="expressible must be 'config'"):
        graph.plan(0.5, expressible="file")


@pytest.mark.parametrize(
    ("kind", "said"), [(Scaled, r"scale .* which is 4"), (Reading, "computes something else")]
)
def test_what_no_config_says_stays_with_the_reason(kind, said):
    model = seeded(kind)
    plan = graphprune.trace(model, X).plan(0.75, expressible="config")
    small = graphprune.rebuild(model, plan, X)
    assert (small.config.width, small.config.hidden) == (16, 6)
    told = " ".join(plan.notes)
    assert re.search(f"stay whole, as no config says otherwise: .*{said}", told)
    assert torch.equal(built(small)(X), small(X))


def test_lists_multiples_and_shares():
    model, x = seeded(Strict, Config(widths=[16, 32], share=0.5)), torch.randn(2, 5)
    graph = graphprune.trace(model, x)
    for ratio in (0.2, 0.4, 0.7):
        small = graphprune.rebuild(model, graph.plan(ratio, expressible="config"), x)
        assert small.config.widths[0] == {0.2: 12, 0.4: 8, 0.7: 4}[ratio]
        assert small.config.widths[1] % 2 == 0, "half of it is another width"
        assert abs(small.config.widths[1] - 32 * (1 - ratio)) < 2
        assert torch.equal(built(small)(x), small(x))


def test_models_without_a_config_are_refused_at_once():
    with pytest.raises(InputError, match="Plain has no config that it is built from"):
        graphprune.rebuild(Plain(), 0.5, torch.randn(2, 5), expressible="config")
    model = seeded(Model)
    model.head = nn.Linear(16, 7)
    with pytest.raises(InputError, match=r"builds another model, head\.bias, head\.weight differ"):
        graphprune.rebuild(model, 0.5, X, expressible="config")


class Fixed(nn.Module):
    """Nothing of its config is a size."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.first(x).relu())


def test_where_no_field_is_a_size_nothing_is_planned():
    with pytest.raises(InputError, match=r"says no other width:\n  .*no field of it sizes them"):
        graphprune.rebuild(seeded(Fixed), 0.5, torch.randn(2, 5), expressible="config")


def test_models_on_meta_are_planned_by_shapes_and_code():
    with torch.device("meta"):
        bare, reading = Model(Config()).eval(), Reading(Config()).eval()
    options = {"expressible": "config", "criterion": "random"}
    plan = graphprune.trace(bare, X).plan(0.4, **options)
    small = graphprune.rebuild(seeded(Model), plan, X)
    assert (small.config.width, small.config.hidden) == (8, 15)
    plan = graphprune.trace(reading, X).plan(0.4, **options)
    assert graphprune.rebuild(seeded(Reading), plan, X).config.width == 16


def test_the_model_is_not_touched():
    model = seeded(Model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    graphprune.trace(model, X).plan(0.4, expressible="config")
    assert vars(model.config) == vars(Config())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
