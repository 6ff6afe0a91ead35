"""CPU seconds and peak memory of large models, the slowest models, and growth with depth.

    python examples/benchmarks/scale.py models slowest depth --write docs/benchmarks.md

One thread; every model in a process of its own; time of the processor, not of the clock, so that
a busy machine counts less. Peak memory is sampled as in memory.py.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cifar_resnet
import machine
import torch
import torchvision
from isolate import isolated
from memory import MIB, Peak, resident, size
from suites import cases
from torch import nn

import graphprune

Row = dict[str, Any]
STAGES = ("trace", "plan", "rebuild")
RUNS = 3
LIMIT = 10.0  # seconds that no model of a suite may take
MODELS = {  # the target in seconds
    "vit_b_16": 1.0,
    "swin_t": 0.6,
    "Llama, 1.2 billion parameters, bfloat16": 20.0,
    "Llama, 1.2 billion parameters, float32": 20.0,
}
TRANSFORMERS, RESNETS = (3, 6, 12, 24, 48, 96), (20, 38, 74, 146, 290)


def shrink(model: nn.Module, x: Any, ratio: float = 0.5) -> tuple[nn.Module, dict[str, float]]:
    """The small model, and the CPU seconds of each stage."""
    marks = [time.process_time()]
    graph = graphprune.trace(model, x)
    marks.append(time.process_time())
    plan = graph.plan(ratio)
    marks.append(time.process_time())
    small = graphprune.rebuild(model, plan)
    marks.append(time.process_time())
    return small, {name: b - a for name, a, b in zip(STAGES, marks, marks[1:])}


def quiet() -> None:
    """One thread, no warnings."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def median(model: nn.Module, x: Any) -> dict[str, float]:
    """The median of each stage, after one run that fills caches."""
    shrink(model, x)
    taken = [shrink(model, x)[1] for _ in range(RUNS)]
    return {name: statistics.median(t[name] for t in taken) for name in STAGES}


def of_torchvision(name: str) -> Row:
    """A model of torchvision on one image."""
    quiet()
    model = torchvision.models.get_model(name, weights=None).eval()
    return median(model, torch.randn(1, 3, 224, 224))


def llama(layers: int, width: int, dtype: torch.dtype, vocabulary: int = 32000) -> nn.Module:
    """A Llama whose parameters are written once: initialising them takes minutes."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 512,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    return model.eval()


def of_llama(dtype: str) -> Row:
    """A 24-layer Llama: seconds of one run, and its peak memory above an empty process."""
    quiet()
    ctypes.CDLL(None).mallopt(-3, 64 * 1024)  # M_MMAP_THRESHOLD: give freed blocks back
    kind, words = getattr(torch, dtype), {"input_ids": torch.randint(0, 50, (1, 32))}
    shrink(llama(2, 512, kind, 50), words)  # imports and caches
    gc.collect()
    empty = resident()
    model = llama(24, 2048, kind)
    with Peak() as peak:
        small, seconds = shrink(model, words)
    counts = {"original": size(model), "small": size(small), "peak": peak.highest - empty}
    return {**seconds, **counts, "parameters": sum(p.numel() for p in model.parameters())}


def total(row: Row) -> float:
    """Seconds of all stages."""
    return sum(row[name] for name in STAGES)


def timed(row: Row) -> str:
    """The cells of the stages and their sum."""
    if row["status"] != "ok":
        return f"- | - | - | {row['status']}: {row['reason'][:60]}"
    return " | ".join(f"{seconds:.2f}" for seconds in (*(row[n] for n in STAGES), total(row)))


def models() -> str:
    """The section on models with a target of their own."""
    lines = [
        "| model | trace | plan | rebuild | all | target | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    memory = ["| model | original | small | peak | bound | |", "|---|---:|---:|---:|---:|---|"]
    for name, target in MODELS.items():
        if name.startswith("Llama"):
            row = isolated(of_llama, name.rpartition(" ")[2], timeout=600)
        else:
            row = isolated(of_torchvision, name, timeout=300)
        good = row["status"] == "ok" and total(row) < target
        state = "holds" if good else "missed"
        lines.append(f"| {name} | {timed(row)} | {target:g} | {state} |")
        print(lines[-1], flush=True)
        if "peak" in row:
            limit = 1.1 * (row["original"] + row["small"])
            cells = [f"{b / MIB:.0f}" for b in (row["original"], row["small"], row["peak"], limit)]
            state = "holds" if row["peak"] <= limit else "exceeded"
            memory.append(f"| {name} | {' | '.join(cells)} | {state} |")
            print(memory[-1], flush=True)
    return "\n".join(
        [
            "## Attention and large models\n",
            f"CPU seconds on {machine.describe()}, one",
            f"thread, ratio 0.5; medians of {RUNS} runs after one that warms up, one run for the",
            "Llama (24 layers, hidden size 2048, 32 heads of queries and 4 of keys and values).",
            "`examples/benchmarks/scale.py models` prints this.\n",
            *lines,
            "\nPeak resident memory of trace + plan + rebuild above that of a process without the",
            "model, in MiB; the bound is original + small + 10 %.\n",
            *memory,
        ]
    )


def of_case(suite: str, name: str) -> Row:
    """The first run in a new process, on inputs of the usual size."""
    quiet()
    (case,) = cases(suite, [name])
    return shrink(case.model(), case.full())[1]


def slowest(suites: Sequence[str], shown: int) -> str:
    """The section on the slowest models of the suites."""
    found, failed = [], []
    for suite in suites:
        for case in cases(suite):
            row = isolated(of_case, suite, case.name, timeout=120)
            print(f"{suite:<12} {case.name:<40} {timed(row)}", flush=True)
            (found if row["status"] == "ok" else failed).append((suite, case.name, row))
    found.sort(key=lambda item: -total(item[2]))
    over = sum(total(row) > LIMIT for *_, row in found)
    without = f"; {len(failed)} fail: {', '.join(name for _, name, _ in failed)}" if failed else ""
    middle = statistics.median(total(row) for *_, row in found)
    lines = [
        "## The slowest models\n",
        f"CPU seconds on {machine.describe()}, one",
        "thread, ratio 0.5, the first run in a new process, inputs of the usual size.",
        f"{len(found)} models of {' and '.join(suites)}: median {middle:.2f} s, {over} over",
        f"{LIMIT:g} s{without}. `examples/benchmarks/scale.py slowest` prints this.\n",
        "| suite | model | trace | plan | rebuild | all |",
        "|---|---|---:|---:|---:|---:|",
        *(f"| {suite} | {name} | {timed(row)} |" for suite, name, row in found[:shown]),
    ]
    return "\n".join(lines)


def transformer(depth: int) -> nn.Module:
    """A vision transformer of ``depth`` layers."""
    return torchvision.models.VisionTransformer(32, 8, depth, 4, 64, 256, num_classes=10)


def growth(build: Callable[[int], nn.Module], depths: Sequence[int]) -> Row:
    """Median CPU seconds of all stages by depth."""
    quiet()
    x = torch.randn(1, 3, 32, 32)
    shrink(build(depths[0]).eval(), x)
    taken = {}
    for depth in depths:
        model = build(depth).eval()
        runs = [sum(shrink(model, x)[1].values()) for _ in range(RUNS)]
        taken[depth] = statistics.median(runs)
    return {"seconds": taken}


def plot(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Seconds by depth, with the line through the largest."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "growth", "svg.fonttype": "none"}
    figure, axis = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    for name, seconds in curves.items():
        (line,) = axis.plot([*seconds], [*seconds.values()], "o-", label=name)
        deepest = max(seconds)
        ends = [0, seconds[deepest]]
        axis.plot([0, deepest], ends, ":", color=line.get_color(), linewidth=1)
    axis.set(xlabel="layers", ylabel="CPU seconds, trace + plan + rebuild", xlim=0, ylim=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def depth(folder: Path | None) -> str:
    """The section on growth with depth; its picture goes to a folder."""
    kinds = {
        "vision transformer": (transformer, TRANSFORMERS),
        "ResNet for CIFAR": (lambda n: cifar_resnet.resnet(n)(), RESNETS),
    }
    curves, lines = {}, ["| model | layers | seconds | ms per layer |", "|---|---:|---:|---:|"]
    for name, (build, depths) in kinds.items():
        row = isolated(growth, build, depths, timeout=600)
        curves[name] = row["seconds"]
        for layers, seconds in curves[name].items():
            lines.append(f"| {name} | {layers} | {seconds:.2f} | {1000 * seconds / layers:.1f} |")
            print(lines[-1], flush=True)
    if folder:
        plot(curves, folder / "growth.svg")
    return "\n".join(
        [
            "## Growth with depth\n",
            f"CPU seconds on {machine.describe()}, one",
            f"thread, all stages, medians of {RUNS} runs. Dotted: proportional to the number of",
            "layers. `examples/benchmarks/scale.py depth` prints this.\n",
            "![Analysis time by depth](growth.svg)\n",
            *lines,
        ]
    )


def main() -> None:
    """Measure the chosen parts, print them, write their sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=["models", "slowest", "depth"])
    parser.add_argument("--suites", nargs="+", default=["torchvision", "timm"])
    parser.add_argument("--shown", type=int, default=12, help="rows of the slowest models")
    parser.add_argument("--write", type=Path, help="the Markdown file whose sections to replace")
    options = parser.parse_args()
    folder = options.write.parent if options.write else None
    sections: dict[str, Callable[[], str]] = {
        "models": models,
        "slowest": lambda: slowest(options.suites, options.shown),
        "depth": lambda: depth(folder),
    }
    print(machine.describe())
    for part in options.parts:
        text = sections[part]()
        print(text)
        if options.write:
            title = text.partition("\n")[0].removeprefix("## ")
            machine.replace_section(options.write, title, text)


if __name__ == "__main__":
    main()
