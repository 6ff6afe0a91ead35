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
