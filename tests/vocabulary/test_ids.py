"""Ids in unusual places: nested inputs, bags, configs and attributes of one's own, codebooks."""

from dataclasses import dataclass

import pytest
import torch
from support.comparing import untouched
from torch import nn

import graphprune
from graphprune.errors import InputError, PlanError

SIZE = 40


def tokens(*shape):
    return torch.randint(SIZE, shape, generator=torch.Generator().manual_seed(3))


def equal(model, ids, inputs, **more):
    with untouched(model):
        small = graphprune.trim_vocabulary(model, ids, inputs, **more)
        assert graphprune.verify(model, small, inputs).verdict == "equal"
    return small


class Nested(nn.Module):
    """Ids inside of a dictionary inside of a list."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(SIZE, 8), nn.Linear(8, SIZE)

    def forward(self, x, batch):
        return [{"logits": self.out(self.embed(batch[0]["ids"]) + x)}]


def test_nested_inputs_and_outputs():
    batch = [{"ids": tokens(2, 5), "other": tokens(2, 5)}]
    for inputs in ((torch.randn(2, 5, 8), batch), {"batch": batch, "x": torch.randn(2, 5, 8)}):
        model = Nested()
        small = equal(model, [3, 30], inputs)
        (vocabulary,) = small.graphprune_plan.vocabularies
        assert vocabulary.inputs == ("batch[0]['ids']",)
        assert vocabulary.outputs == (("[0]['logits']", 2),)
        other = {"batch": batch, "x": torch.randn(2, 5, 8)}  # called in another way
        assert graphprune.verify(model, small, other).verdict == "equal"


class Bags(nn.Module):
    """Means of rows, of texts that lie one after the other."""

    def __init__(self):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(SIZE, 8), nn.Linear(8, 3)

    def forward(self, tokens, starts):
        return self.out(self.bag(tokens, starts))


def test_bags():
    small = equal(Bags(), [3, 30, 31], (tokens(9), torch.tensor([0, 4, 6])))
    assert small.bag.num_embeddings == 3
    assert "no output has a logit" in str(small.graphprune_plan)


def test_in_place():
    model = Nested()
    inputs = torch.randn(2, 5, 8), [{"ids": tokens(2, 5)}]
    plan = graphprune.trim_vocabulary(model, [3, 30], inputs).graphprune_plan
    embed, weight = model.embed, model.embed.weight
    small = graphprune.rebuild(model, plan, inplace=True)
    assert small is model
    assert model.embed is embed
    assert model.embed.weight is weight
    assert weight.shape == (2, 8)


@dataclass
class Config:
    vocab_size: int = SIZE
    pad_token_id: int = 9
    width: int = 8


class Configured(nn.Module):
    """A config that is a dataclass, and attributes that no forward reads."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.eos_token_id, self.pad_idx, self.unk_id = 12, 9, 39
        self.offset = 12
        self.embed = nn.Embedding(config.vocab_size, config.width)

    def forward(self, tokens):
        mask = (tokens != self.config.pad_token_id)[..., None]
        return (self.embed(tokens) * mask) @ self.embed.weight.T


def test_configs_and_attributes_of_ones_own():
    config = Config()
    model = Configured(config)
    small = equal(model, [3, 30], tokens(2, 5))
    assert small.graphprune_plan.vocabularies[0].kept == (3, 9, 12, 30, 39)
    assert (small.config.vocab_size, small.config.pad_token_id) == (5, 1)
    assert (small.eos_token_id, small.pad_idx, small.unk_id, small.offset) == (2, 1, 4, 12)
    assert (config.vocab_size, config.pad_token_id, model.eos_token_id) == (SIZE, 9, 12)
    assert model.config is config


class Reads(nn.Module):
    def __init__(self, how, size=SIZE):
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(size, 8)
        self.head = nn.Linear(8, size)
        self.register_buffer("stops", torch.tensor([4, 11]))
        self.register_buffer("weights", torch.rand(size))

    def forward(self, tokens):
        return self.how(self, self.head(self.embed(tokens)), tokens)


def again(m, t):
    return m.head(m.embed(t))


def tied(m, t):
    return m.embed(t) @ m.embed.weight.T


RIGHT = {
    "within": lambda m, x, t: again(m, t.clamp(min=0)),
    "below": lambda m, x, t: again(m, t.clamp(6, SIZE - 1)),
    "one stop": lambda m, x, t: x * torch.isin(t, 4)[..., None],
    "weights": lambda m, x, t: x * m.weights[t][..., None],
    "chosen first": lambda m, x, t: again(m, torch.where(t > 30, 6, t)),
    "int32": lambda m, x, t: again(m, t.to(torch.int32)),
    "sorted": lambda m, x, t: again(m, t.sort(-1).values),
    "best two": lambda m, x, t: again(m, t.topk(2).values),
    "cut by values": lambda m, x, t: x[:, : int((t != 6).sum(1).max())],
    "put and read": lambda m, x, t: (
        again(m, torch.cat([t.new_full((2, 1), 35), t], 1)) * float((t != 34).any().item())
    ),
    "beyond": lambda m, x, t: x * (t < SIZE)[..., None] + (t >= 100)[..., None],
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_with_other_ids(name):
    torch.manual_seed(0)
    inputs = {"tokens": tokens(2, 5)}
    model = Reads(RIGHT[name])
    equal(model.double(), [2, 7, 20, 21, 33, 38], inputs)


WRONG = {
    "stops": (
        lambda m, x, t: x * torch.isin(t, torch.tensor([4, 11]))[..., None],
        "says 4, which must become 1 .* keep all ids below it",
    ),
    "written": (
        lambda m, x, t: again(m, t.index_put((torch.tensor([0]),), torch.tensor(8))),
        "says 8, which must become 2",
    ),
    "buffer": (lambda m, x, t: again(m, torch.cat([t, m.stops.expand(2, 2)], 1)), "stays"),
    "sum": (lambda m, x, t: x * t.sum(), "sum.default reads ids"),
    "added up": (
        lambda m, x, t: again(m, t.scatter(1, t % 2, 1, reduce="add")),
        "reads ids|makes ids",
    ),
    "accumulated": (
        lambda m, x, t: again(m, t.index_put((torch.tensor([0]),), torch.tensor(1), True)),
        "index_put.default makes ids",
    ),
    "small ints": (lambda m, x, t: x * (t.to(torch.int16) == 3)[..., None], "reads ids"),
    "some logits": (lambda m, x, t: tied(m, t)[..., :7], "some ids, or in another order"),
    "turned": (lambda m, x, t: tied(m, t).flip(-1), "some ids, or in another order"),
    "one hot": (
        lambda m, x, t: nn.functional.one_hot(t, SIZE).float() @ m.embed.weight,
        "makes ids",
    ),
    "values": (lambda m, x, t: x * float(t[0, 0].item() > 3), "reads ids"),
    "largest": (lambda m, x, t: (x, x.argmax(-1)), "argmax"),
    "normed": (lambda m, x, t: x / x.norm(dim=-1, keepdim=True), "norm"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_would_be_wrong_is_refused(name):
    how, told = WRONG[name]
    model = Reads(how)
    with untouched(model), pytest.raises(InputError, match=told):
        graphprune.trim_vocabulary(model, [2, 7, 33], tokens(2, 5))


class Masked(Reads):
    def forward(self, tokens):
        return again(self, tokens.masked_fill(tokens == -100, 0))


def test_numbers_that_are_no_ids_stay():
    inputs = tokens(2, 5)
    inputs[0, 2] = -100
    equal(Masked(None), [20, 21, 38], inputs)


class Pooled(nn.Module):
    """As many channels as ids: its last layer makes no logits."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.pool = nn.Linear(SIZE, SIZE)

    def forward(self, tokens):
        states = self.embed(tokens)
        states = states + self.mix(states)
        return {"states": states, "pooled": self.pool(states[:, 0])}


def test_as_many_channels_as_ids():
    with pytest.raises(InputError, match=r"pool.weight.*40 channels as well.*output=False"):
        graphprune.trim_vocabulary(Pooled(), [3, 4], tokens(2, 5))
    small = equal(Pooled(), [3, 4], tokens(2, 5), output=False)
    assert small.pool.out_features == SIZE


class Trained(nn.Module):
    """One more output in train mode, before the logits."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(SIZE, 8), nn.Linear(8, SIZE)
        self.extra = nn.Linear(8, SIZE)

    def forward(self, tokens):
        x = self.embed(tokens)
        return (x, self.head(x)) if self.training else self.head(x)


def test_outputs_of_train_mode():
    small = equal(Trained(), [3, 4], tokens(2, 5))
    assert {*small.graphprune_plan.vocabularies[0].outputs} == {("", 2), ("[1]", 2)}


class Ended(nn.Module):
    """A text ends once, and is read there: other inputs are refused, by values."""

    def __init__(self):
        super().__init__()
        self.eos_token_id = 30
        self.embed, self.out = nn.Embedding(SIZE, 8), nn.Linear(8, 4)

    def forward(self, tokens):
        ends = tokens.eq(self.eos_token_id)
        if len(ends.sum(1).unique()) > 1 or not bool(ends.any()):
            raise ValueError("all texts must end as often")
        states = self.embed(tokens).cumsum(1)
        return self.out(states[ends].view(len(tokens), -1, 8)[:, -1])


def test_special_ids_stand_for_nothing_else():
    inputs = tokens(3, 6) % 30
    inputs[:, -1] = 30
    small = equal(Ended().double(), [4, 9], inputs)
    assert small.graphprune_plan.vocabularies[0].special == (30,)
    assert small.eos_token_id == 2


class Features(nn.Module):
    """What it is given is returned as well."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(SIZE, 8), nn.Linear(8, 4)

    def forward(self, features):
        features["pooled"] = self.out(self.embed(features["ids"]).mean(1))
        return features


def test_ids_that_are_returned_need_not_count():
    inputs = ({"ids": tokens(2, 5)},)
    with pytest.raises(InputError, match=r"returned \(outputs= names"):
        graphprune.trim_vocabulary(Features(), [3, 4], inputs)
    small = equal(Features(), [3, 4], inputs, outputs="pooled")
    assert small.embed.num_embeddings == 2


class Codes(nn.Module):
    """A codebook: which row is the nearest, not which one an input names."""

    def __init__(self):
        super().__init__()
        self.book = nn.Embedding(SIZE, 8)

    def forward(self, x):
        return self.book(torch.cdist(x, self.book.weight).argmin(-1))


def test_codebooks_hold_no_ids_of_inputs():
    with pytest.raises(InputError, match="no embedding table of this model is read by ids"):
        graphprune.trim_vocabulary(Codes(), [1, 2], torch.randn(2, 5, 8))


def test_plans_for_other_models_are_refused():
    plan = graphprune.trim_vocabulary(Configured(Config()), [3, 30]).graphprune_plan
    other = Configured(Config())
    other.pad_idx = 20
    with pytest.raises(PlanError, match=r"removes id 20, which pad_idx names"):
        graphprune.rebuild(other, plan)
    with pytest.raises(PlanError, match="another architecture"):
        graphprune.rebuild(Configured(Config(vocab_size=50)), plan)
