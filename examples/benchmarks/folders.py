"""Folders of transformers: what is written, read in a class's own way, and by graphprune.

Each model is pruned by a plan that hardly any config says (a global ratio), saved, and loaded with
``graphprune.from_pretrained``; its outputs must be those of the small model in memory. With
``--config`` plans are asked for that the config says, at ratios from 0.1 to 0.8, and loaded by the
class itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from typing import Any

import suites
import torch
import transformers
from torch import nn

import graphprune
from graphprune.errors import InputError

HIDDEN = ("T5", "BART", "Pegasus", "Whisper")  # also return the encoder's states
KINDS = ("transformers", "transformers_text", "transformers_vision")


def outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """All tensors of the output."""
    torch.manual_seed(0)
    with torch.no_grad():
        return suites.tensors(suites.call(model, inputs))


def round_trip(case: suites.Case, ratio: float) -> str:
    """What came of it."""
    torch.manual_seed(0)
    model = case.build()
    suites.unsettle(model, case.draw(2), case.trains)
    model.eval()
    inputs = case.draw(2)
    graph = graphprune.trace(model, inputs)
    small = graphprune.rebuild(model, graph.plan(ratio, scope="global"), inputs)
    writer = "plan" if "save_pretrained" in vars(small) else "config"
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        loaded = graphprune.from_pretrained(folder)
    wanted, found = outputs(small, inputs), outputs(loaded, inputs)
    same = len(wanted) == len(found) and all(map(torch.equal, wanted, found))
    left = sum(p.numel() for p in loaded.parameters()) / sum(p.numel() for p in model.parameters())
    return f"{'same' if same else 'DIFFERS'}, by its {writer}, {left:.0%} of the parameters"


def by_config(case: suites.Case, ratio: float) -> str:
    """What is left of the parameters by a plan that the config says, or why there is none."""
    torch.manual_seed(0)
    model = case.build()
    suites.unsettle(model, case.draw(2), case.trains)
    model.eval()
    inputs = case.draw(2)
    counted = "logits" if case.name in HIDDEN else None
    try:
        graph = graphprune.trace(model, inputs, outputs=counted)
        small = graphprune.rebuild(model, graph.plan(ratio, expressible="config"), inputs)
    except InputError as error:
        return f"refused ({str(error).splitlines()[-1].strip()[:90]})"
    if "save_pretrained" in vars(small):
        return "LATE"
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        kind: Any = type(model)
        loaded = kind.from_pretrained(folder).eval()
    wanted, found = outputs(small, inputs), outputs(loaded, inputs)
    same = len(wanted) == len(found) and all(map(torch.equal, wanted, found))
    left = sum(p.numel() for p in loaded.parameters()) / sum(p.numel() for p in model.parameters())
    return f"{left:.0%}" if same else "DIFFERS"


def main() -> None:
    """One line per model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=["*"])
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--config", action="store_true", help="plans that a config says, by ratio")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    getattr(transformers.logging, "disable_progress_bar", lambda: None)()
    for kind in KINDS:
        for case in suites.cases(kind, chosen.models):
            start = time.perf_counter()
            try:
                if chosen.config:
                    told = " | ".join(by_config(case, n / 10) for n in range(1, 9))
                else:
                    told = round_trip(case, chosen.ratio)
            except Exception as error:
                told = f"FAILED {type(error).__name__}: {str(error)[:300]}"
            print(f"{case.name:24} | {told} ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
