"""Models that exist only as ONNX: read, made smaller, verified, written back, run in ONNX Runtime.

    python examples/benchmarks/onnx_in.py --write docs/deploy.md

Usual families with random weights, each as a file by both of torch's exporters. Half of the
channels leave; beside it stands what is left when the torch model itself is made smaller.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import machine
import torch
import torchvision
from torch import Tensor, nn

import graphprune
from graphprune.deploy import export, from_onnx
from graphprune.deploy.reading.source import source_of

TITLE = "Measured: models that are ONNX already"
RATIO = 0.5
EXPORTERS = {"traces (`dynamo=False`)": False, "exports (`dynamo=True`)": True}


@dataclass(frozen=True)
class Row:
    """A family from an exporter; differences are the largest relative ones."""

    family: str
    exporter: str
    nodes: int
    read: float
    left: float
    of_torch: float
    masked: float
    written: float
    seconds: float


class Text(nn.Module):
    """An encoder of transformers that takes tensors by place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return out


def bert() -> nn.Module:
    """BERT as wide as MiniLM, with six layers."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536,
    )  # fmt: skip
    return Text(BertModel(config, add_pooling_layer=False))


def distilbert() -> nn.Module:
    """DistilBERT with three layers."""
    from transformers import DistilBertConfig, DistilBertModel

    return Text(DistilBertModel(DistilBertConfig(vocab_size=1000, n_layers=3, dim=384,
                                                 hidden_dim=1536)))  # fmt: skip


def vision(name: str) -> Callable[[], nn.Module]:
    """A classifier of torchvision."""
    none = {"init_weights": False} if name == "googlenet" else {}
    return lambda: torchvision.models.get_model(name, weights=None, **none)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-18": (vision("resnet18"), 64),
    "ResNet-50": (vision("resnet50"), 64),
    "DenseNet-121": (vision("densenet121"), 64),
    "ShuffleNetV2": (vision("shufflenet_v2_x1_0"), 64),
    "MobileNetV2": (vision("mobilenet_v2"), 64),
    "MobileNetV3": (vision("mobilenet_v3_small"), 64),
    "EfficientNet-B0": (vision("efficientnet_b0"), 64),
    "SqueezeNet": (vision("squeezenet1_1"), 64),
    "RegNetY": (vision("regnet_y_400mf"), 64),
    "ConvNeXt-T": (vision("convnext_tiny"), 64),
    "ViT-B/16": (vision("vit_b_16"), 224),
    "Swin-T": (vision("swin_t"), 224),
    "BERT": (bert, 0),
    "DistilBERT": (distilbert, 0),
}


def rows(family: str, folder: Path) -> Iterator[Row]:
    """A family by both exporters."""
    make, size = FAMILIES[family]
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # of heads that start at zero, whose outputs prove nothing
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    inputs = {"x": torch.randn(2, 3, size, size)}
    if not size:
        inputs = {
            "input_ids": torch.randint(0, 1000, (2, 24)),
            "attention_mask": torch.ones(2, 24, dtype=torch.int64),
        }
    x = tuple(inputs.values())
    of_torch = parameters(graphprune.rebuild(model, RATIO, x)) / parameters(model)
    for exporter, dynamo in EXPORTERS.items():
        path = folder / f"{family.replace('/', '')}-{dynamo}.onnx"
        write(model, inputs, path, dynamo)
        start = time.perf_counter()
        read = from_onnx(path)
        source = source_of(read)
        assert source is not None
        assert source.agreement is not None
        small = graphprune.rebuild(read, RATIO, x)
        report = graphprune.verify(read, small, x)
        made = export(small, folder / "small.onnx", x)
        assert (report.verdict, made.verdict) == ("equal", "equal")
        assert made.agreement is not None
        yield Row(
            family, exporter, source.nodes, source.agreement.difference,
            parameters(small) / parameters(read), of_torch, report.difference,
            made.agreement.difference, time.perf_counter() - start,
        )  # fmt: skip


def write(model: nn.Module, inputs: dict[str, Tensor], path: Path, dynamo: bool) -> None:
    """The file, with open sizes of batch and sequence."""
    text = "input_ids" in inputs
    opened = {name: {0: "batch", **({1: "sequence"} if text else {})} for name in inputs}
    options: dict[str, Any] = {"dynamic_axes": opened}
    if dynamo:
        free = torch.export.Dim.DYNAMIC
        shapes = tuple(dict.fromkeys(dims, free) for dims in opened.values())
        options = {"dynamic_shapes": shapes, "external_data": False}
    torch.onnx.export(
        model, tuple(inputs.values()), str(path), dynamo=dynamo, input_names=list(inputs),
        output_names=["y"], verbose=False, **options,
    )  # fmt: skip


def parameters(model: nn.Module) -> int:
    """How many a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def table(found: list[Row]) -> str:
    """The rows as Markdown."""
    head = (
        "| family | exporter that | nodes | read | parameters left | of the torch model | "
        "masked original | small file | seconds |"
    )
    lines = [head, "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {row.family} | {row.exporter} | {row.nodes:,} | {row.read:.0e} | {row.left:.1%} | "
        f"{row.of_torch:.1%} | {row.masked:.0e} | {row.written:.0e} | {row.seconds:.0f} |"
        for row in found
    ]
    return "\n".join(lines).replace("%", " %")


def main() -> int:
    """Run families; those that fail are told, and the exit code says so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    found: list[Row] = []
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for family in options.families:
            try:
                for row in rows(family, Path(folder)):
                    found.append(row)
                    print(table([row]).splitlines()[-1], flush=True)
            except Exception:
                failed += 1
                print(f"{family} fails\n{traceback.format_exc(limit=-3)}", flush=True)
    where = f"{machine.describe()}, onnx {version('onnx')}, onnxruntime {version('onnxruntime')}"
    print(f"{table(found)}\n{where}")
    if options.write:
        text = f"""## {TITLE}

Random weights, half of the channels by `l2`. Columns "read", "masked original" and "small file" are
largest relative differences: of the model read to its file in ONNX Runtime, of the small model to
the masked one (float64), and of the small file in ONNX Runtime to the small model. "Of the torch
model" is what is left of the model that the file was made from, made smaller itself. Seconds are
for all of it, of which torch's exporter takes most ({where}; `examples/benchmarks/onnx_in.py`).

{table(found)}
"""
        machine.replace_section(options.write, TITLE, text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
