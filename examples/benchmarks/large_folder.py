"""A folder larger than the memory shrinks: seconds beside a plain copy, and the most memory used.

``python examples/benchmarks/large_folder.py [--billions 3] [--folder NAME]`` writes a random
Llama-shaped checkpoint in bfloat16, copies it, shrinks it to 70 % of its parameters in a process of
its own, and removes everything again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD = 2 << 30


def config(billions: float) -> dict[str, int]:
    """Sizes of a Llama of about so many parameters: twelve squares of the width in every layer."""
    width = max(256, round((billions * 1e9 / 480) ** (1 / 2) / 256) * 256)
    layers = max(2, round(billions * 1e9 / (12 * width**2)))
    heads = width // 128
    return {
        "hidden_size": width,
        "intermediate_size": round(8 * width / 3 / 256) * 256,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32_000,
    }


def make(folder: Path, billions: float) -> int:
    """Write the checkpoint shard by shard; its bytes."""
    import transformers

    settings = transformers.LlamaConfig(**config(billions), dtype="bfloat16")
    settings.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings)
    settings.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    parts: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if parts[-1] and filled + size > SHARD:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    where = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {n: torch.randn(shapes[n], dtype=torch.bfloat16) * 0.02 for n in names}
        save_file(tensors, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def most_memory() -> int:
    """The most memory that this process has had, in KiB; pages of files that it reads are in it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def shrink(source: str, out: str, criterion: str) -> None:
    """What the process of its own does: it prints seconds and memory."""
    import graphprune

    importlib.import_module("transformers")  # before: what it holds is not counted

    warnings.simplefilter("ignore")
    before = most_memory()
    start = time.perf_counter()
    plan = graphprune.shrink_folder(source, out, target={"params": 0.7}, criterion=criterion)
    seconds = time.perf_counter() - start
    after = most_memory()
    kept = plan.after.params / plan.before.params
    print(json.dumps({"seconds": seconds, "loaded": before, "most": after, "kept": kept}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--billions", type=float, default=0.5)
    parser.add_argument("--folder", type=Path, default=Path("large_folder"))
    parser.add_argument("--criterion", default="l2")
    parser.add_argument("--shrink", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shrink:
        shrink(*options.shrink, options.criterion)
        return
    home = options.folder
    home.mkdir(parents=True)
    try:
        size = make_whole(home, options.billions)
        start = time.perf_counter()
        subprocess.run(["cp", "-r", str(home / "whole"), str(home / "copy")], check=True)
        os.sync()
        copied = time.perf_counter() - start
        shutil.rmtree(home / "copy")
        command = [sys.executable, __file__, "--criterion", options.criterion, "--shrink"]
        done = subprocess.run(
            [*command, str(home / "whole"), str(home / "small")],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        grown = (found["most"] - found["loaded"]) / 2**20
        print(
            f"{options.billions:g} billion parameters, {size / 1e9:.1f} GB in bfloat16, kept "
            f"{found['kept']:.1%}, criterion {options.criterion}\n"
            f"copied by cp: {copied:.0f} s; shrunk: {found['seconds']:.0f} s "
            f"({found['seconds'] / copied:.1f} times)\n"
            f"memory: {grown:.2f} GiB above the {found['loaded'] / 2**20:.2f} GiB of the libraries"
        )
    finally:
        shutil.rmtree(home)


def make_whole(home: Path, billions: float) -> int:
    (home / "whole").mkdir()
    return make(home / "whole", billions)


if __name__ == "__main__":
    main()
