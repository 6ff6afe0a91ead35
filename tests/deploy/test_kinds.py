"""Small models of many kinds in ONNX Runtime, at other sizes than they were recorded at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import graphprune
from graphprune.deploy import export

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inside torch's exporters
    pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning"),  # of configs
]
SEQUENCE = {"batch": 0, "sequence": 1}


def vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=10)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # zeroes would be the same for all inputs
    return model


def language(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        kind, _, task = name.partition("For")
        config = getattr(transformers, f"{kind}Config")(vocab_size=50, **options)
        return getattr(transformers, f"{kind}For{task}")(config)

    return build


def words(*names: str) -> dict[str, Tensor]:
    return {name: torch.randint(1, 30, (2, 5 + n)) for n, name in enumerate(names)}


def text() -> dict[str, Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    return {"input_ids": torch.randint(1, 30, (2, 9)), "attention_mask": mask}


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BERT = language(
    "BertForSequenceClassification", **SIZES, num_attention_heads=4, max_position_embeddings=32
)
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any], Any]] = {
    "mobilenet": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
        lambda: torch.randn(1, 3, 64, 64),
        {},
        {},
    ),
    "segmentation": (
        lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights_backbone=None, num_classes=4
        ),
        lambda: torch.randn(1, 3, 64, 64),
        {},
        {},
    ),
    "vit": (vit, lambda: torch.randn(1, 3, 32, 32), {}, {}),
    "vit, exact": (vit, lambda: torch.randn(1, 3, 32, 32), {"exact_only": True}, {}),
    "bert": (BERT, text, {}, {"dynamic": SEQUENCE}),
    "bert, exact": (BERT, text, {"exact_only": True}, {"dynamic": SEQUENCE}),
    "queries": (
        language("LlamaForCausalLM", **SIZES, **HEADS),
        text,
        {"attention": "queries"},
        {"dynamic": SEQUENCE, "outputs": "logits"},
    ),
    "encoder and decoder": (
        language("T5ForConditionalGeneration", **T5, use_cache=False, decoder_start_token_id=0),
        lambda: words("input_ids", "decoder_input_ids"),
        {},
        {
            "outputs": "logits",
            "dynamic": {
                "batch": 0,
                "source": {"input_ids": 1},
                "target": {"decoder_input_ids": 1},
            },
        },
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_small_models_of_all_kinds(name: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the onnx extra is not installed")
    build, draw, options, sizes = KINDS[name]
    model, x = build(), draw()
    small = graphprune.rebuild(model, 0.5, x, **options)
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert counts[1] < 0.7 * counts[0]
    made = export(small, tmp_path / "small.onnx", x, **sizes)
    assert made.verdict == "equal"
    assert made.agreement is not None
    wanted = 2 + len(sizes.get("dynamic", {"batch": 0}))
    assert sum(check.decided for check in made.agreement.checks) == wanted
