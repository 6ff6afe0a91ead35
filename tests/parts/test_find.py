"""What is found: branches that are added to a stream, and blocks made of them."""

import pytest
import torch
from support.streams import Basic, images, texts
from torch import nn
from torch.nn import functional as F

import graphprune


def found(model, inputs):
    graph = graphprune.trace(model, inputs)
    return [part.name for part in graph.branches], [part.name for part in graph.blocks]


@pytest.mark.parametrize("kind", ["basic", "inverted", "scaled"])
@pytest.mark.parametrize("loop", [False, True])
def test_residual_blocks(kind, loop):
    branches, blocks = found(*images(kind, kind, loop=loop))
    assert branches == ["blocks.0", "blocks.1"]
    assert blocks == [*([] if loop else ["blocks"]), "blocks.0", "blocks.1"]


def test_of_a_projected_stream_the_long_way_can_leave():
    assert found(*images("projected", "projected")) == (["blocks.0.long", "blocks.1.long"], [])


def test_norms_before_and_behind_the_sums():
    model, ids = texts("before", "behind")
    branches, blocks = found(model, ids)
    assert branches == [f"layers.{n}.{name}" for n in (0, 1) for name in ("attention", "mlp")]
    assert blocks == ["layers.0"]  # the norm behind a sum stays


def test_branches_side_by_side_leave_alone_and_together():
    branches, blocks = found(*texts("parallel"))
    assert branches == ["layers.0.attention", "layers.0.mlp", "layers.0"]
    assert blocks == ["layers.0"]


def test_blocks_of_all_levels():
    model, x = images("nested")
    graph = graphprune.trace(model, x)
    assert {"blocks.0", "blocks.0.inner.0"} <= {block.name for block in graph.blocks}
    whole, inner = (
        next(block for block in graph.blocks if block.name == name)
        for name in ("blocks.0", "blocks.0.inner.0")
    )
    assert whole.params == sum(p.numel() for p in model.blocks.parameters())
    assert inner.params < whole.params
    assert inner.macs < whole.macs


def test_a_part_says_what_leaves_with_it():
    model, ids = texts("before")
    part = graphprune.trace(model, ids).branches[1]
    assert part.modules == ("layers.0.mlp", "layers.0.norm2")
    layer = model.layers[0]
    gone = [*layer.mlp.parameters(), *layer.norm2.parameters()]
    assert part.params == sum(p.numel() for p in gone)
    assert part.macs == 2 * 6 * 2 * 8 * 16  # batch, places, two layers, narrow, wide


class Between(nn.Module):
    """Something between two sums that decides whether the whole is a block."""

    def __init__(self, change):
        super().__init__()
        self.first, self.second, self.change = nn.Linear(6, 6), nn.Linear(6, 6), change

    def forward(self, x):
        x = x + self.first(x)
        return self.change(x + self.second(x))


class Around(nn.Module):
    def __init__(self, before, change):
        super().__init__()
        self.before, self.block, self.last = before, Between(change), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.block(self.before(x)))


@pytest.mark.parametrize(
    ("before", "change", "whole"),
    [
        (nn.ReLU(), nn.ReLU(), True),
        (nn.Sigmoid(), nn.ReLU(), True),
        (nn.ReLU6(), nn.ReLU6(), True),
        (nn.Identity(), nn.Identity(), True),
        (nn.Identity(), lambda x: x.reshape(-1).view(x.shape), True),
        (nn.Identity(), nn.ReLU(), False),  # the stream may be negative
        (nn.ReLU(), nn.ReLU6(), False),  # and larger than six
        (nn.ReLU(), nn.GELU(), False),
        (nn.ReLU(), lambda x: x.clone().mul_(2), False),
        (nn.ReLU(), lambda x: x.flip(1), False),
        (nn.ReLU(), lambda x: x.transpose(0, 1).reshape(x.shape), False),
    ],
)
def test_what_stands_behind_the_sum_must_change_nothing(before, change, whole):
    torch.manual_seed(0)
    model, x = Around(before, change).eval(), torch.randn(3, 6)
    branches, blocks = found(model, x)
    assert branches == ["block.first", "block.second"]
    assert blocks == (["block"] if whole else [])


class Reading(nn.Module):
    """What is added is read once more, elsewhere."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        y = self.first(x)
        return self.last(x + y), y, self.second(x) + x


def test_what_is_read_elsewhere_stays():
    assert found(Reading(), torch.randn(2, 6))[0] == ["second"]


class Plain(nn.Module):
    """Sums that are no residual ones: of two inputs, with a bias, of another size."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = self.one(x + self.bias)
        return self.two(x) + x.sum(1, keepdim=True)


def test_a_stream_of_another_shape_is_none():
    assert found(Plain(), torch.randn(2, 6)) == ([], [])


class State(nn.Module):
    """A block that counts its calls, and writes a part of a tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        y = torch.zeros_like(x)
        y[:, :3] = self.layer(x)[:, :3]
        return x + y


def test_what_is_written_into_a_part_leaves_with_it():
    model = nn.Sequential(nn.Linear(6, 6), State(), State(), nn.Linear(6, 2))
    assert found(model, torch.randn(2, 6)) == (["1", "2"], ["1", "2"])


def test_a_value_written_into_the_stream_stays():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            y = self.layer(x)
            x[:, 0] = y[:, 0]
            return x + y

    model = nn.Sequential(nn.Linear(6, 6), Writing(), nn.Linear(6, 2))
    assert found(model, torch.randn(2, 6))[1] == []


class Hidden(nn.Module):
    """The sum is in a function of torch's own: nothing is seen of it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return F.relu(self.layer(x))


def test_layers_of_torch():
    branches, blocks = found(Hidden().eval(), torch.randn(2, 5, 8))
    assert branches == ["layer.self_attn", "layer.linear1"]
    assert blocks == []


def test_the_model_is_not_touched():
    model, x = images("basic", "inverted")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    graph = graphprune.trace(model, x)
    assert graph.blocks
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert hooks == after
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_block_alone_is_none_for_the_whole_model():
    class Whole(Basic):
        pass

    graph = graphprune.trace(Whole(4).eval(), torch.randn(1, 4, 8, 8))
    assert [block.name for block in graph.blocks] == []
    assert [branch.name for branch in graph.branches] == ["conv1"]


class Numbered(nn.Module):
    """A layer that keeps what it saw in a cache, by its number."""

    def __init__(self, number):
        super().__init__()
        self.number, self.layer = number, nn.Linear(6, 6)

    def forward(self, x, cache):
        cache.entries[self.number] = x
        return x + self.layer(x)


class Cache:
    def __init__(self):
        self.entries = {}


class Remembering(nn.Module):
    def __init__(self, numbers):
        super().__init__()
        self.layers = nn.ModuleList(map(Numbered, numbers))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        cache = Cache()
        for layer in self.layers:
            x = layer(x, cache)
        return self.head(x), cache


def test_the_first_of_numbered_layers_stays():
    assert found(Remembering([0, 1, 2]), torch.randn(2, 6))[1] == ["layers.1", "layers.2"]
    assert len(found(Remembering([4, 4, 4]), torch.randn(2, 6))[1]) == 3


def test_a_cache_works_after_layers_have_left():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=30,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval()
    ids, more = torch.randint(30, (2, 5)), torch.randint(30, (2, 1))
    graph = graphprune.trace(model, {"input_ids": ids})
    for parts in ("blocks", "branches"):
        reason = "a model built from it has|reads num_hidden_layers of it: pass example_inputs"
        with pytest.warns(graphprune.errors.PruningWarning, match=reason):
            small = graphprune.rebuild(model, graph.plan(0.7, parts=parts))
        with torch.no_grad():
            cache = small(ids, use_cache=True).past_key_values
            steps = small(more, past_key_values=cache).logits[:, -1]
            once = small(torch.cat([ids, more], 1)).logits[:, -1]
        torch.testing.assert_close(steps, once)


class Keys:
    def __init__(self):
        self.keys = []


class Keeps(nn.Module):
    """Adds what it finds among keys; of these it leaves all, or the last two, to its cache."""

    def __init__(self, window):
        super().__init__()
        self.window, self.key, self.out = window, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, cache):
        keys = torch.cat([x[:, :0], self.key(x)], 1)
        cache.keys.append(keys[:, -2:] if self.window else keys)
        return x + self.out((x @ keys.transpose(1, 2)).softmax(-1) @ keys)


class Windows(nn.Module):
    def __init__(self, windows):
        super().__init__()
        self.layers = nn.ModuleList(map(Keeps, windows))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        cache = Keys()
        for layer in self.layers:
            x = layer(x, cache)
        return self.head(x), cache


@pytest.mark.parametrize(
    ("windows", "blocks"),
    [
        ((False, False, False), "12"),
        ((True, True, True), "12"),
        ((True, False, True, False), "23"),
        ((False, False, True, True), "13"),
    ],
)
def test_the_first_layer_of_each_kind_of_cache_stays(windows, blocks):
    graph = graphprune.trace(Windows(windows).eval(), torch.randn(2, 5, 8))
    assert [block.name for block in graph.blocks] == [f"layers.{place}" for place in blocks]
