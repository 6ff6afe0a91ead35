"""Small models with LayerNorm and GroupNorm over channels, in the ways that networks have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Images(nn.Module):
    """Two convolutions around a norm of 12 channels at 5 x 6 places."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.make, self.norm, self.read = nn.Conv2d(3, 12, 3, padding=1), norm, nn.Conv2d(12, 4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.read(F.silu(self.norm(self.make(x))))


class Stream(nn.Module):
    """A residual stream of 12 channels under two norms of two groups."""

    def __init__(self, groups: int = 2, **options: Any) -> None:
        super().__init__()
        self.make = nn.Conv2d(3, 12, 3, padding=1)
        self.first, self.conv = nn.GroupNorm(groups, 12, **options), nn.Conv2d(12, 12, 1)
        self.last, self.read = nn.GroupNorm(groups, 12, **options), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.make(x)
        x = x + self.conv(F.silu(self.first(x)))
        return self.read(self.last(x).mean((2, 3)))


class Permuted(nn.Module):
    """LayerNorm over the channels of images, by permuting them, as ConvNeXt does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Called(nn.LayerNorm):
    """The same with a call of the function in its own code, as torchvision and timm have it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Inherited(nn.LayerNorm):
    """The same with the forward of the class above, as transformers has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def in_groups(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A GroupNorm of one group by a function."""
    return torch.nn.functional.group_norm(x, 1, weight=weight, bias=bias)


class Helped(nn.Module):
    """A norm that a helper computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return in_groups(x, self.weight, self.bias)


class Block(nn.Module):
    """A transformer block, with its norms before or behind."""

    def __init__(self, width: int = 12, before: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.before = before

    def attend(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Any:
        if self.before:
            x = x + self.attend(self.norm1(x))
            return x + self.down(F.gelu(self.up(self.norm2(x))))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class ViT(nn.Module):
    """Two blocks with their norms before, on patches of images."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 12))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class BERT(nn.Module):
    """Two blocks with their norms behind, on embedded words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(20, 12), nn.LayerNorm(12)
        self.layers = nn.Sequential(Block(before=False), Block(before=False))
        self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.layers(self.norm(self.words(ids)))[:, 0])


def rows(norm: nn.Module) -> nn.Sequential:
    """Two linear layers around a norm of 12 channels."""
    return nn.Sequential(nn.Linear(4, 12), norm, nn.GELU(), nn.Linear(12, 3))
