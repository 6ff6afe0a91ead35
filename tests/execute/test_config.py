"""Models that are built from a config: the config of a small model says its sizes."""

import copy

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import ModelError


class Config:
    """What a library of models calls a config: fields, and ``to_dict``."""

    def __init__(self, width=16, heads=4, hidden=24, layers=2):
        self.width, self.heads, self.hidden, self.layers = width, heads, hidden, layers

    def to_dict(self):
        return dict(vars(self))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.size = config.heads, config.width // config.heads
        self.norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.up, self.down = (
            nn.Linear(config.width, config.hidden),
            nn.Linear(config.hidden, config.width),
        )

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * self.size**-0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, n, -1))
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(11, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, 3)

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def save_pretrained(self, folder):
        torch.save(self.state_dict(), folder / "weights.pt")


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
    small.save_pretrained(tmp_path)
    loaded = Model(small.config).eval()
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(loaded(X), small(X))


def test_a_plan_that_no_config_expresses_says_so(model, tmp_path):
    graph = graphprune.trace(model, X)
    hidden = graph.group_of("blocks.0.up")
    small = graphprune.rebuild(model, graph.plan_of({hidden.name: range(5)}))
    assert vars(small.config) == vars(model.config)
    with pytest.raises(ModelError, match=r"config of Model cannot express .* graphprune.save"):
        small.save_pretrained(tmp_path)
    graphprune.save(small, tmp_path / "small.safetensors")
    loaded = graphprune.load(tmp_path / "small.safetensors", model)
    assert torch.equal(loaded(X), small(X))


def test_in_place(model):
    small = graphprune.rebuild(model, 0.5, X, inplace=True)
    assert small is model
    assert model.config.hidden == 12


def test_heads_that_do_not_divide_the_stream_are_in_no_config(model):
    small = graphprune.rebuild(model, 0.4, X)
    assert (small.words.embedding_dim, small.blocks[0].heads) == (10, 3)
    assert vars(small.config) == vars(model.config)


def test_transformers_round_trip(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    small = graphprune.rebuild(model, 0.5, {"input_ids": X})
    assert (small.config.hidden_size, small.config.num_attention_heads) == (16, 2)
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(X).logits, small(X).logits)
