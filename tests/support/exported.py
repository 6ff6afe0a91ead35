"""Small networks of usual kinds as files of ONNX, by both of torch's exporters."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

EXPORTERS = ("script", "dynamo")


def write(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    exporter: str,
    names: Sequence[str] = ("x",),
    outputs: Sequence[str] = ("y",),
    opened: dict[str, dict[int, str]] | None = None,
    **options: Any,
) -> Path:
    """A model as a file, its first dimensions open unless ``opened`` says otherwise."""
    opened = {name: {0: "batch"} for name in names} if opened is None else opened
    common: dict[str, Any] = {"input_names": [*names], "output_names": [*outputs], **options}
    if exporter == "dynamo":
        common["dynamic_shapes"] = tuple(
            {dim: torch.export.Dim.DYNAMIC for dim in opened.get(name, {})} for name in names
        )
        common["external_data"] = False
    else:
        common["dynamic_axes"] = opened
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model.eval(), inputs, str(path), dynamo=exporter == "dynamo", verbose=False,
                **common,
            )  # fmt: skip
    finally:
        logging.disable(level)
    return path


class Residual(nn.Module):
    """Convolutions with a shortcut, and a linear head, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.first = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.second, self.norm = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem(x).relu(), 2)
        x = (x + self.norm(self.second(self.first(x)))).relu()
        return self.fc(self.pool(x).flatten(1))


class Attention(nn.Module):
    """Words, positions and a masked attention written out, whose sizes come from shapes."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.words, self.places = nn.Embedding(20, 16), nn.Parameter(torch.randn(1, 12, 16))
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.wide, self.narrow = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        x = self.words(words) + self.places[:, : words.shape[1]]
        batch, length, width = x.shape
        parts = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        scores = scores.masked_fill(mask[:, None, None] == 0, -1e9)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = self.norm(x + self.out(mixed))
        x = x + self.narrow(nn.functional.gelu(self.wide(x)))
        return self.head(x.mean(1))


class Shuffled(nn.Module):
    """Channels shuffled between groups, split, gated and joined, with an image made larger."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.deep, self.gate = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(16, 16, 1)
        self.up, self.end = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.stem(x))
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        first, second = x.chunk(2, 1)
        x = torch.cat([self.left(first).relu(), self.deep(second)], 1)
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        x = nn.functional.interpolate(self.up(x), scale_factor=2.0, mode="nearest")
        return self.end(x)
