"""Prune a vision transformer on 8 x 8 digits: heads, or inside heads; the stream stays."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune


class Transformer(nn.Module):
    """Sixteen patches of 2 x 2 pixels, two layers of torch's own, the mean of all tokens."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 64, 0.0, batch_first=True)
        self.embed = nn.Linear(4, width)
        self.places = nn.Parameter(torch.randn(16, width) * 0.1)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        patches = F.unfold(image.unsqueeze(1), 2, stride=2).transpose(1, 2)
        return self.head(self.layers(self.embed(patches) + self.places).mean(1))


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        batch = slice(step * 100 % 1400, step * 100 % 1400 + 100)
        loss = F.cross_entropy(model.train()(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def accuracy(model: nn.Module) -> float:
    return float((model(images[1400:]).argmax(1) == labels[1400:]).double().mean())


torch.manual_seed(0)
images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
images = images.float().view(-1, 8, 8) / 16
model = Transformer()
train(model, 150)

for attention in ("heads", "head_dim"):
    small = graphprune.rebuild(model, 0.5, images[:2], attention=attention, keep="embed")
    difference = graphprune.verify(model, small, images[:2]).difference
    layer = small.layers.layers[0].self_attn
    print(f"{attention}: {layer.num_heads} heads of {layer.head_dim}, equal to {difference:.0e}")
    before = accuracy(small)
    train(small, 50)
    print(f"  accuracy {accuracy(model):.3f} -> {before:.3f} -> {accuracy(small):.3f} fine-tuned")
    assert difference < 1e-10
    assert accuracy(small) > 0.5
