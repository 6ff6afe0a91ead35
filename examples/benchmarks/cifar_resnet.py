"""The CIFAR ResNets of He et al. (2015), their trained weights, and real CIFAR-10 images.

The shortcut that changes the width has no parameters ("option A"): every second pixel, and zeros
for the new channels. Weights and images are looked for in ``shared/data`` beside the repository, or
in it.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
PLACES = [folder / "shared" / "data" for folder in (ROOT.parent, ROOT)]
DATA = next((place for place in PLACES if place.is_dir()), PLACES[0])
JPEG = "cifar10_jpeg.npz"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def padded_shortcut(planes: int) -> Apply:
    """Every second pixel, with zero channels on both sides."""
    amount = planes // 4
    return Apply(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, amount, amount)))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, width: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        same = width == planes
        self.shortcut: nn.Module = nn.Identity() if same else padded_shortcut(planes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of ``blocks`` blocks with 16, 32 and 64 channels; depth ``6 * blocks + 2``."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, 1)
        self.layer2 = self._stage(blocks, 16, 32, 2)
        self.layer3 = self._stage(blocks, 32, 64, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(blocks: int, width: int, planes: int, stride: int) -> nn.Sequential:
        rest = (Block(planes, planes, 1) for _ in range(blocks - 1))
        return nn.Sequential(Block(width, planes, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


def resnet(depth: int) -> Callable[[], CifarResNet]:
    """A builder of the untrained network of 20, 32, 44, 56 or 110 layers."""
    return lambda: CifarResNet((depth - 2) // 6)


def available() -> bool:
    """Whether the trained weights and the images are there."""
    names = ("cifar_resnet20.safetensors", "cifar_resnet56.safetensors", "cifar10_subset.npz")
    return all((DATA / name).is_file() for name in names)


def trained(depth: int) -> CifarResNet:
    """The trained network of 20 or 56 layers, in eval mode."""
    model = resnet(depth)()
    model.load_state_dict(load_file(DATA / f"cifar_resnet{depth}.safetensors"))
    return model.eval()


def images(part: str) -> tuple[Tensor, Tensor]:
    """Lossless images of ``"train"`` or ``"test"``.

    Returns:
        Normalised images of shape [count, 3, 32, 32] and labels of shape [count].
    """
    with np.load(DATA / "cifar10_subset.npz") as file:
        raw, labels = file[f"x_{part}"], file[f"y_{part}"]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    pixels = torch.from_numpy(raw).float() / 255
    return (pixels - mean) / std, torch.from_numpy(labels.astype(np.int64))


def jpeg_available() -> bool:
    """Whether the trained weights and all images, as JPEG, are there."""
    return all((DATA / name).is_file() for name in ("cifar_resnet56.safetensors", JPEG))


def jpeg_images(part: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """All 50,000 images of ``"train"`` or 5,000 of ``"test"``, from JPEG; the first ``count``.

    Returns:
        As :func:`images`.
    """
    with np.load(DATA / JPEG) as file:
        data, offsets = file[f"{part}_bytes"], file[f"{part}_offsets"]
        labels = file[f"{part}_labels"][:count]
    pictures = [
        np.asarray(Image.open(io.BytesIO(data[begin:end].tobytes())).convert("RGB"))
        for begin, end in itertools.pairwise(offsets[: len(labels) + 1])
    ]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (pixels - mean) / std, torch.from_numpy(labels.astype(np.int64))


def batches(x: Tensor, size: int = 256) -> Iterator[Tensor]:
    """The images in batches."""
    yield from x.split(size)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Top-1 accuracy in percent, in eval mode."""
    model.eval()
    found = torch.cat([model(batch).argmax(1) for batch in batches(x)])
    return 100 * float((found == y).float().mean())


@torch.no_grad()
def reestimate(model: nn.Module, x: Tensor) -> None:
    """Replace every running statistic of BatchNorm by the average over these images."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    model.train()
    for batch in batches(x):
        model(batch)
    model.eval()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
