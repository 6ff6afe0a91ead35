"""Blocks that leave lists of modules: configs, names, numbers of layers and folders follow."""

import copy
import pickle

import pytest
import torch
from support.comparing import untouched
from torch import nn

import graphprune
from graphprune.errors import ModelError, PruningWarning
from graphprune.execute.numbering import Shortened


class Config:
    """Fields, and ``to_dict``; one list by layer, one that is as long by chance."""

    def __init__(
        self, layers=4, width=12, window=None, kinds=None, places=(1, 3), hidden=8, **more
    ):
        self.layers, self.width, self.window = layers, width, window or [4, 3, 2, 1]
        self.kinds = kinds or ["tanh", "relu", "relu", "tanh"]
        self.places, self.hidden = list(places), hidden
        vars(self).update(more)

    def to_dict(self):
        return dict(vars(self))


class Block(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.number, self.kind = number, config.kinds[number]
        self.norm = nn.LayerNorm(config.width)
        self.up, self.down = (
            nn.Linear(config.width, config.hidden),
            nn.Linear(config.hidden, config.width),
        )

    def inside(self, x):
        return self.up(x)

    def forward(self, x, kept):
        hidden = self.inside(self.norm(x))
        kept[self.number] = hidden.shape
        return x + self.down(getattr(torch, self.kind)(hidden))


class Wide(Block):
    """Another kind of block, at places that the config names."""

    def __init__(self, config, number):
        super().__init__(config, number)
        self.gate = nn.Linear(config.width, config.hidden)

    def inside(self, x):
        return self.up(x) * self.gate(x)


class Saved(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def save_pretrained(self, folder, state_dict=None):
        state = self.state_dict() if state_dict is None else state_dict
        torch.save((self.config, state), folder / "model.pt")

    @classmethod
    def from_pretrained(cls, folder):
        config, state = torch.load(folder / "model.pt", weights_only=False)
        model = cls(config)
        model.load_state_dict(state)
        return model.eval()


class Model(Saved):
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(11, config.width)
        self.blocks = nn.ModuleList(
            (Wide if place in config.places else Block)(config, place)
            for place in range(config.layers)
        )
        self.window = list(config.window)
        self.head = nn.Linear(config.width, 3)

    def forward(self, tokens):
        x, kept = self.words(tokens), {}
        for place in range(self.config.layers):
            x = self.blocks[place](x, kept)
        return self.head(x) * self.window[1]


X = torch.arange(10).view(2, 5)


def made(kind=Model):
    torch.manual_seed(0)
    return kind(Config()).eval()


def shorter(model, **more):
    """One of the two in the middle leaves."""
    keep = ["*blocks.0", "*blocks.3"]
    return graphprune.rebuild(model, 0.5, X, parts="blocks", keep=keep, **more)


def left(small):
    """The place of the one block that left."""
    (part,) = small.graphprune_plan.parts
    assert part.name.rpartition(".")[2] in "12"
    return int(part.name.rpartition(".")[2])


def again(small, folder):
    """What the folder of a model gives: it must compute the same."""
    small.save_pretrained(folder)
    loaded = type(small).from_pretrained(folder)
    assert torch.equal(loaded(X), small(X))
    assert type(loaded.blocks) is nn.ModuleList
    return loaded


def test_the_config_says_how_many_blocks_there_are(tmp_path):
    model = made()
    with untouched(model):
        small = shorter(model)
    stay = [place for place in range(4) if place != left(small)]
    assert vars(small.config) == {
        "layers": 3,
        "width": 12,
        "hidden": 8,
        "window": [4, 3, 2, 1],
        "kinds": [model.config.kinds[place] for place in stay],
        "places": [place for place, old in enumerate(stay) if old in model.config.places],
    }
    assert vars(model.config) == vars(Config())
    assert [block.number for block in small.blocks] == [0, 1, 2]
    assert small.blocks[-1] is small.blocks[2] is small.get_submodule("blocks.3")
    state = model.state_dict()
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, state[name])
    loaded = again(small, tmp_path)
    assert [*loaded.blocks._modules] == ["0", "1", "2"]
    assert graphprune.verify(model, small, X).verdict == "equal"


class Named(Config):
    """Computes names of its layers, and says which of them is returned."""

    def __init__(self, layers=4, last=None):
        super().__init__()
        self.layers = layers
        self.names = ["stem", *(f"layer{place}" for place in range(layers))]
        self.last = last or self.names[-1:]


def test_what_a_config_computes_from_the_depth_is_computed_anew(tmp_path):
    torch.manual_seed(0)
    small = shorter(Model(Named()).eval())
    assert small.config.names == ["stem", "layer0", "layer1", "layer2"]
    assert small.config.last == ["layer2"]
    again(small, tmp_path)
    torch.manual_seed(0)
    small = shorter(Model(Named(last=["layer0"])).eval())  # said, not computed
    assert (small.config.layers, small.config.last) == (3, ["layer0"])


def test_rounds_and_copies(tmp_path):
    model = made()
    small = shorter(model)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert twin.save_pretrained.module is twin
        assert torch.equal(again(twin, tmp_path)(X), small(X))
    narrow = graphprune.rebuild(small, 0.5, X)
    assert (narrow.config.width, narrow.config.layers) == (6, 3)
    fewer = graphprune.rebuild(narrow, 0.5, X, parts="blocks")
    assert fewer.config.layers == len(fewer.blocks) == 2
    for each in (narrow, fewer):
        assert graphprune.verify(model, each, X).verdict == "equal"
        again(each, tmp_path)
    path = graphprune.save(fewer, tmp_path / "fewer.safetensors")
    loaded = graphprune.load(path, model)
    assert torch.equal(loaded(X), fewer(X))
    with pytest.raises(ModelError, match=r"blocks\.1.*example_inputs\) lets it follow"):
        loaded.save_pretrained(tmp_path)
    same = graphprune.rebuild(model, fewer.graphprune_plan, X)
    assert torch.equal(again(same, tmp_path)(X), fewer(X))


def test_in_place():
    model = made()
    config, blocks, stays = model.config, model.blocks, model.blocks[3]
    wanted = shorter(copy.deepcopy(model))(X)
    small = shorter(model, inplace=True)
    assert small is model
    assert small.blocks is blocks
    assert small.blocks[-1] is stays
    assert torch.equal(small(X), wanted)
    assert (small.config.layers, config.layers) == (3, 4)


def test_a_state_that_was_gathered_elsewhere_gets_the_names_as_well(tmp_path):
    small = shorter(made())
    state = {name: tensor + 1 for name, tensor in small.state_dict().items()}
    small.save_pretrained(tmp_path, state_dict=state)
    loaded = Model.from_pretrained(tmp_path)
    assert torch.equal(loaded.blocks[2].up.bias, small.blocks[2].up.bias + 1)


class Nested(Saved):
    """Its body is saved alone, too."""

    def __init__(self, config):
        super().__init__(config)
        self.body = Model(config)

    def forward(self, tokens):
        return self.body(tokens).relu()


def test_a_part_that_is_saved_alone(tmp_path):
    small = shorter(made(Nested))
    assert small.body.config.layers == 3
    assert torch.equal(again(small.body, tmp_path)(X), small.body(X))
    small.save_pretrained(tmp_path)
    assert torch.equal(Nested.from_pretrained(tmp_path)(X), small(X))


def test_a_part_that_is_saved_alone_is_refused_with_the_whole(tmp_path):
    model = made(Nested)
    graph = graphprune.trace(model, X)
    hidden = graph.group_of("body.blocks.2.up")
    for plan in (graph.plan_of({hidden.name: range(5)}), graph.plan(0.5, parts="blocks")):
        with pytest.warns(PruningWarning, match="cannot express this model"):
            small = graphprune.rebuild(model, plan)
        for each in (small, small.body):
            with pytest.raises(ModelError, match="cannot express this model"):
                each.save_pretrained(tmp_path)


# --- what a config cannot say ---------------------------------------------------------------------


class Scaled(Model):
    """A number that was computed from the depth."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = config.layers**-0.5

    def forward(self, tokens):
        return super().forward(tokens) * self.scale


class Buffered(Model):
    """The same in a tensor that no file holds."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.tensor(config.layers**-0.5), persistent=False)

    def forward(self, tokens):
        return super().forward(tokens) * self.scale


class Pair(Model):
    """Two lists of the same length, by one field."""

    def __init__(self, config):
        super().__init__(config)
        self.others = nn.ModuleList(Block(config, place) for place in range(config.layers))

    def forward(self, tokens):
        x = super().forward(tokens)
        for block in self.others:
            x = x + block.down(block.up(self.words(tokens)).relu()).sum(-1, keepdim=True)
        return x


class Fixed(Model):
    """As many blocks as its code says."""

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(Config(), place) for place in range(4))

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x, {})
        return self.head(x)


class Last(Model):
    """Its code names one of the blocks."""

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x, {})
        return self.head(x) * self.blocks[3].norm.weight.sum()


class ByName(Model):
    """Its code reads numbers from the names of entries."""

    def forward(self, tokens):
        x = self.words(tokens)
        for name, block in self.blocks.named_children():
            x = block(x, {}) * bool(self.config.window[: self.config.layers][int(name)])
        return self.head(x)


CANNOT = {
    Scaled: r"it makes scale 0\.57735, which is 0\.5 in this model",
    Buffered: "computes other values for scale, which no file holds",
    Pair: r"layers of it says how many entries blocks has together with others",
    Fixed: r"no field of it says that blocks has 3 of 4 entries",
    ByName: "counts on entries of lists that have left",
    Last: "does not run on the example inputs",
}


@pytest.mark.parametrize("kind", CANNOT)
def test_what_a_config_cannot_say_is_refused_with_the_reason(kind, tmp_path):
    model = made(kind)
    with untouched(model), pytest.warns(PruningWarning, match=CANNOT[kind]):
        small = shorter(model)
    assert vars(small.config) == vars(model.config)
    assert len(small.blocks) == 4
    gone = f"blocks.{left(small)}."
    assert [*small.state_dict()] == [n for n in model.state_dict() if not n.startswith(gone)]
    assert graphprune.verify(model, small, X).verdict == "equal"
    with pytest.raises(ModelError, match="cannot express this model"):
        small.save_pretrained(tmp_path)


class Halves(nn.Module):
    """Two branches, one after the other."""

    def __init__(self, config, number):
        super().__init__()
        self.first, self.second = Block(config, number), Block(config, number)

    def forward(self, x, kept):
        return self.second(self.first(x, kept), kept)


class Halved(Model):
    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(Halves(config, place) for place in range(config.layers))


def test_half_a_block_stays_in_the_list(tmp_path):
    model = made(Halved)
    for block in (model.blocks[1].first, model.blocks[1].second):
        block.down.weight.data *= 1e-3  # these leave first
        block.down.bias.data.zero_()
    graph = graphprune.trace(model, X)
    with pytest.warns(PruningWarning, match=r"a model built from it has blocks\.1\.(first|second)"):
        half = graphprune.rebuild(model, graph.plan(1 / 8, parts="branches"), X)
    whole = graphprune.rebuild(half, 1 / 7, X, parts="branches")
    assert whole.config.layers == len(whole.blocks) == 3
    assert graphprune.verify(model, whole, X).verdict == "equal"
    again(whole, tmp_path)


def test_a_shortened_list():
    layers = Shortened([nn.Linear(1, 1), nn.Identity(), nn.ReLU(), nn.Tanh()])
    del layers._modules["1"]
    assert [type(layers[place]) for place in (0, 1, -1)] == [nn.Linear, nn.ReLU, nn.Tanh]
    assert [type(each) for each in layers[1:]] == [nn.ReLU, nn.Tanh]
    with pytest.raises(IndexError):
        layers[3]
    layers.append(nn.GELU())
    layers.extend([nn.SiLU()])
    assert [*layers._modules] == ["0", "2", "3", "4", "5"]
    layers[1] = nn.ELU()
    assert type(layers._modules["2"]) is nn.ELU
    layers.insert(1, nn.Mish())
    assert [type(each).__name__ for each in layers][:3] == ["Linear", "Mish", "ELU"]
    del layers[0]
    assert len(layers) == 5
