"""Fashion-MNIST from the Debian package, and a small ResNet for it."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import cifar_resnet
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FOLDER = Path("/usr/share/datasets/fashion-mnist")
INSTALL = "no Fashion-MNIST in {}: apt-get install dataset-fashion-mnist"


def available(folder: Path = FOLDER) -> bool:
    """Whether the images are there."""
    return (folder / "train-images-idx3-ubyte.gz").is_file()


def require(folder: Path = FOLDER) -> None:
    """Say how to install the images, and stop."""
    if not available(folder):
        sys.exit(INSTALL.format(folder))


def images(part: str, count: int | None = None, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Images of ``"train"`` (60,000) or ``"test"`` (10,000), the first ``count`` of them.

    Returns:
        Normalised images [count, 1, 28, 28] and labels [count].
    """
    name = "train" if part == "train" else "t10k"
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    x = torch.from_numpy(pixels[:count].astype(np.float32)) / 255
    return (x - 0.286) / 0.353, torch.from_numpy(labels[:count].astype(np.int64))


class Block(cifar_resnet.Block):
    """The block of the CIFAR ResNets, with a convolution where the width changes."""

    def __init__(self, width: int, planes: int, stride: int) -> None:
        super().__init__(width, planes, stride)
        if width != planes:
            convolution = nn.Conv2d(width, planes, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(planes))


class SmallResNet(nn.Module):
    """Three stages of one block each, 16, 32 and 64 channels: 78 k parameters, 2.55 M MACs."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = Block(16, 16, 1)
        self.layer2 = Block(16, 32, 2)
        self.layer3 = Block(32, 64, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))
