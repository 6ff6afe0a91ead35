"""What is added to two streams at once: attention over images and texts, one MLP for both."""

import pytest
import torch
from support.comparing import untouched
from torch import nn
from torch.nn import functional as F

import graphprune

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Joint(nn.Module):
    """Two streams side by side through attention and an MLP, and apart again."""

    def __init__(self, width=8):
        super().__init__()
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, text, image):
        size = text.shape[1]
        out = self.attention(torch.cat([text, image], 1))
        text, image = text + out[:, :size], image + out[:, size:]
        out = self.mlp(torch.cat([text, image], 1))
        return text + out[:, :size], image + out[:, size:]


class Streams(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Joint() for _ in range(layers))
        self.head = nn.Linear(8, 2)

    def forward(self, text, image):
        for layer in self.layers:
            text, image = layer(text, image)
        return self.head(text), self.head(image)


def made():
    torch.manual_seed(0)
    return Streams().eval(), (torch.randn(2, 3, 8), torch.randn(2, 5, 8))


def test_found():
    graph = graphprune.trace(*made())
    names = [f"layers.{n}.{part}" for n in range(3) for part in ("attention", "mlp")]
    assert [branch.name for branch in graph.branches] == names
    assert all(len(branch.cuts) == 2 for branch in graph.branches)
    assert [block.name for block in graph.blocks] == [f"layers.{n}" for n in range(3)]


@pytest.mark.parametrize("parts", ["branches", "blocks"])
@pytest.mark.parametrize("criterion", ["l2", "taylor", "reconstruction"])
def test_gone(parts, criterion):
    model, inputs = made()
    options = {"criterion": criterion, "data": [dict(zip(("text", "image"), inputs))]}
    if criterion == "taylor":
        options["loss"] = lambda model, batch: model(**batch)[1].square().sum()
    with untouched(model):
        plan = graphprune.trace(model, inputs).plan(0.4, parts=parts, **options)
        small = graphprune.rebuild(model, plan)
        assert graphprune.verify(model, small, inputs).verdict == "equal"
    assert len(plan.parts) == (2 if parts == "branches" else 1)
    assert plan.after.params < plan.before.params
