"""Models that are built from a config: the config of a small model says its sizes."""

import copy
import json
from pathlib import Path

import pytest
import torch
from support.configured import Block
from torch import nn

import graphprune
from graphprune.errors import ModelError, PruningWarning


class Config:
    """What a library of models calls a config: fields, and ``to_dict``."""

    def __init__(self, width=16, heads=4, hidden=24, layers=2):
        self.width, self.heads, self.hidden, self.layers = width, heads, hidden, layers

    def to_dict(self):
        return dict(vars(self))


class Saved(nn.Module):
    """A model with a method that writes its config, which the case keeps in memory."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def save_pretrained(self, folder):
        torch.save(self.state_dict(), folder / "weights.pt")


def loaded(small, folder):
    """What the config of a small model and the file of its weights give."""
    small.save_pretrained(folder)
    model = type(small)(small.config).eval()
    model.load_state_dict(torch.load(folder / "weights.pt"))
    return model


class Model(Saved):
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(11, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, 3)

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.arange(10).view(2, 5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model(Config()).eval()


def test_a_uniform_plan_is_written_into_the_config(model, tmp_path):
    before = copy.deepcopy(model.config)
    small = graphprune.rebuild(model, 0.5, X)
    assert vars(model.config) == vars(before)
    assert vars(small.config) == {"width": 8, "heads": 2, "hidden": 12, "layers": 2}
    assert torch.equal(loaded(small, tmp_path)(X), small(X))


def test_a_plan_that_no_config_expresses_says_so(model, tmp_path):
    graph = graphprune.trace(model, X)
    hidden = graph.group_of("blocks.0.up")
    with pytest.warns(PruningWarning, match=r"different numbers .*, which hidden sizes together"):
        small = graphprune.rebuild(model, graph.plan_of({hidden.name: range(5)}))
    assert vars(small.config) == vars(model.config)
    with pytest.raises(ModelError, match=r"config of Model cannot express .* graphprune.save"):
        small.save_pretrained(tmp_path)
    graphprune.save(small, tmp_path / "small.safetensors")
    again = graphprune.load(tmp_path / "small.safetensors", model)
    assert torch.equal(again(X), small(X))


def test_in_place_the_model_gets_another_config(model):
    config = model.config
    small = graphprune.rebuild(model, 0.5, X, inplace=True)
    assert small is model
    assert (model.config.hidden, config.hidden) == (12, 24)


def test_heads_that_do_not_divide_the_stream_are_in_no_config(model):
    with pytest.warns(PruningWarning, match="config of Model cannot express"):
        small = graphprune.rebuild(model, 0.4, X)
    assert (small.words.embedding_dim, small.blocks[0].heads) == (10, 3)
    assert vars(small.config) == vars(model.config)


def test_transformers_round_trip(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=64, use_cache=False,  # of old ones, an output
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    small = graphprune.rebuild(model, 0.5, {"input_ids": X})
    assert (small.config.hidden_size, small.config.num_attention_heads) == (16, 2)
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(X).logits, small(X).logits)


class Forgetful(Config):
    """A config with a setting that its own file does not hold, as older libraries have them."""

    def __init__(self, kernel="slow", **fields):
        super().__init__(**fields)
        self._kernel = kernel

    def save_pretrained(self, folder):
        fields = {key: value for key, value in vars(self).items() if key != "_kernel"}
        (Path(folder) / "config.json").write_text(json.dumps(fields))

    @classmethod
    def from_pretrained(cls, folder):
        return cls(**json.loads((Path(folder) / "config.json").read_text()))


class Kernels(Model):
    """Remembers the setting; no size and no value follows from it."""

    def __init__(self, config):
        super().__init__(config)
        self.kernel = config._kernel


def test_what_the_file_of_the_config_forgets_anyway_is_no_obstacle():
    model = Kernels(Forgetful("fast")).eval()
    small = graphprune.rebuild(model, 0.5, X)
    assert (small.config.width, small.config._kernel, small.kernel) == (8, "fast", "fast")


# --- a config changes only when what it builds is the small model --------------------------------


class Stream(Saved):
    """A stream of ``width`` and a hidden layer; the subclasses use the width as a value."""

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(11, config.width)
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)
        self.head = nn.Linear(config.width, 3)

    def factor(self):
        return 1.0

    def forward(self, tokens):
        x = self.words(tokens) * self.factor()
        return self.head(x + self.down(torch.relu(self.up(x))))


class ByConfig(Stream):
    def factor(self):
        return self.config.width**0.5


class ByBuffer(Stream):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.tensor(config.width**0.5), persistent=False)

    def factor(self):
        return self.scale


class ByNumber(Stream):
    def __init__(self, config):
        super().__init__(config)
        self.scale = config.width**0.5

    def factor(self):
        return self.scale


class ByTensor(Stream):
    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.tensor(config.width**0.5)

    def factor(self):
        return self.scale


class Unnoticed(Stream):
    """Remembers a width that no forward reads."""

    def __init__(self, config):
        super().__init__(config)
        self.num_features = config.width


class InTraining(Stream):
    """Reads the width in train mode only."""

    def __init__(self, config):
        super().__init__(config)
        self.width = config.width

    def factor(self):
        return 1.0 / self.width if self.training else 1.0


class Wrapped(nn.Module):
    """A model that knows nothing of the config of its part."""

    def __init__(self, config):
        super().__init__()
        self.body = Stream(config)

    def forward(self, tokens):
        return self.body(tokens).mean(1)


class Loose(Saved):
    """Is saved, and has no config that says sizes."""

    def __init__(self, config):
        super().__init__("no sizes")
        self.net = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 3))

    def forward(self, tokens):
        return self.net(tokens)


def seeded(kind, config=None):
    torch.manual_seed(0)
    return kind(config or Config()).eval()


@pytest.mark.parametrize("kind", [ByConfig, ByBuffer, ByNumber, ByTensor, InTraining])
def test_a_width_that_is_a_value_keeps_the_config(kind, tmp_path):
    model = seeded(kind)
    with pytest.warns(PruningWarning, match=f"config of {kind.__name__} cannot express"):
        small = graphprune.rebuild(model, 0.5, X)
    assert small.config.width == model.config.width == 16
    assert graphprune.verify(model, small, X).difference < 1e-10
    with pytest.raises(ModelError, match=r"scale|width|something else"):
        small.save_pretrained(tmp_path)


class ByWidth(Saved):
    """Attention by the width of a head; the number of heads, which no code reads, is remembered."""

    def __init__(self, config):
        super().__init__(config)
        self.heads, self.size = config.heads, config.width // config.heads
        self.words = nn.Embedding(11, config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, 3)

    def forward(self, tokens):
        b, n = tokens.shape
        q, k, v = (
            each.view(b, n, -1, self.size).transpose(1, 2)
            for each in self.qkv(self.words(tokens)).chunk(3, -1)
        )
        weights = (q @ k.transpose(-1, -2) * self.size**-0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, -1))


def test_of_two_unread_numbers_the_outputs_say_which_is_right(tmp_path):
    """Fewer heads, or narrower ones: both have the shapes of the small model."""
    model = seeded(ByWidth)
    small = graphprune.rebuild(model, 0.5, X)
    assert (small.config.width, small.config.heads, small.size) == (8, 2, 4)
    assert torch.equal(loaded(small, tmp_path)(X), small(X))


def test_without_inputs_code_that_reads_the_config_keeps_it():
    model = seeded(ByConfig)
    plan = graphprune.trace(model, X).plan(0.5)
    with pytest.warns(PruningWarning, match=r"ByConfig.factor reads width of it: pass example_inp"):
        small = graphprune.rebuild(model, plan)
    assert small.config.width == 16
    plain = seeded(Stream)
    assert graphprune.rebuild(plain, graphprune.trace(plain, X).plan(0.5)).config.width == 8


def test_an_attribute_that_no_forward_reads_follows_the_config(tmp_path):
    model = seeded(Unnoticed)
    small = graphprune.rebuild(model, 0.5, X)
    assert (small.num_features, small.config.width, model.num_features) == (8, 8, 16)
    assert torch.equal(loaded(small, tmp_path)(X), small(X))


def test_a_part_with_a_config_follows_too(tmp_path):
    model = seeded(Wrapped)
    small = graphprune.rebuild(model, 0.5, X)
    assert (small.body.config.width, model.body.config.width) == (8, 16)
    assert torch.equal(loaded(small.body, tmp_path)(X), small.body(X))


def test_what_is_saved_without_a_config_says_so(tmp_path):
    model = seeded(Loose)
    with pytest.warns(PruningWarning, match="config of Loose cannot express .* no config"):
        small = graphprune.rebuild(model, 0.5, X)
    with pytest.raises(ModelError, match=r"graphprune\.save"):
        small.save_pretrained(tmp_path)


class Lists(Saved):
    """Widths in a list, and in a config inside the config."""

    def __init__(self, config):
        super().__init__(config)
        widths = [3, *config.widths, config.inner.width]
        self.layers = nn.ModuleList(map(nn.Linear, widths, widths[1:]))
        self.head = nn.Linear(widths[-1], 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


class Nested(Config):
    def __init__(self):
        super().__init__()
        self.widths, self.inner = [8, 12], Config(width=20)


def test_lists_of_widths_and_configs_in_configs_can_say_sizes(tmp_path):
    model, x = seeded(Lists, Nested()), torch.randn(2, 3)
    small = graphprune.rebuild(model, 0.5, x)
    assert (small.config.widths, small.config.inner.width) == ([4, 6], 10)
    assert (model.config.widths, model.config.inner.width) == ([8, 12], 20)
    assert torch.equal(loaded(small, tmp_path)(x), small(x))


class Strict(Config):
    """Refuses what its checks do not allow, when it is read."""

    def save_pretrained(self, folder):
        if self.width % 3:
            raise ValueError("the width must be a multiple of three")

    @classmethod
    def from_pretrained(cls, folder):
        raise AssertionError("never written")


def test_a_config_that_refuses_the_sizes_is_quoted():
    with pytest.warns(PruningWarning, match=r"refuses these sizes .* multiple of three"):
        graphprune.rebuild(seeded(Stream, Strict()), 0.5, X)


def test_random_numbers_of_the_user_are_not_drawn():
    model = seeded(Stream)
    state = torch.get_rng_state()
    graphprune.rebuild(model, 0.5, X)
    assert torch.equal(state, torch.get_rng_state())


def test_a_second_round_may_bring_a_config_back(model):
    graph = graphprune.trace(model, X)
    up = [graph.group_of(f"blocks.{n}.up").name for n in range(2)]
    with pytest.warns(PruningWarning, match="cannot express"):
        first = graphprune.rebuild(model, graph.plan_of({up[0]: range(12)}), X)
    second = graphprune.trace(first, X).plan_of({up[1]: range(12)})
    small = graphprune.rebuild(first, second, X)
    assert small.config.hidden == 12
    assert "save_pretrained" not in vars(small)
