"""Let a quarter of the experts leave every mixture of transformers' types, and compare.

    python examples/benchmarks/experts.py

One line for each type of model with a mixture of experts, in a small configuration with random
weights: how many mixtures were found, how many experts leave, what is left of the parameters, all
that ``verify`` compares in float64, and whether the config follows (``save_pretrained`` works).
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
import warnings
from typing import Any

import torch
import transformers
from isolate import isolated
from suites import unsettle
from suites_transformers_text import SMALL
from torch import nn

import graphprune
from graphprune.errors import PruningWarning

QUARTER = 0.25
TOKENS = 9
FIELDS = {
    **SMALL,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 8),
    **dict.fromkeys(("moe_num_experts", "moe_k", "moe_topk"), 8) | {"moe_k": 2, "moe_topk": 2},
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "mamba_n_heads", "mamba_num_heads", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_layer_start_index", "interleave_moe_layer_step"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "index_topk"), 4),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size"), 32),
    "num_key_value_heads": 4,
    "shared_intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 99,
    "num_global_key_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "n_group": 2,
    "pad_token_id": 0,
}  # fmt: skip
PLAIN = """
    Afmoe AXK2 BailingHybrid Beam Cohere2Moe DeepseekV2 DeepseekV32 DeepseekV4
    Ernie4_5_Moe ExaoneMoe FlexOlmo Glm4Moe Glm4MoeLite GlmMoeDsa GptOss GraniteMoe GraniteMoeSWA
    GraniteMoeHybrid GraniteMoeShared HunYuanMoEV1 HYV3 HYV4 Inkling2 Inkling2Loop JetMoe KimiLinear
    Kolibri1 Laguna LaraMini Llama4 Mellum MiniMax MiniMaxM2 MiniMaxM3VL Mistral4 Mixtral NemotronH
    Olmoe Phimoe Qwen2Moe Qwen3Moe Qwen3Next Qwen3_5Moe SolarOpen
"""
TYPES: dict[str, dict[str, Any]] = {
    **{stem: {} for stem in PLAIN.split()},
    "DeepseekV3": {"head_dim": 8},
    "AriaText": {"moe_num_experts": 4},
    "Dots1": {"n_shared_experts": 1},
    "SwitchTransformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "NllbMoe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
}
ENDINGS = ("ForCausalLM", "ForConditionalGeneration")


def model_of(stem: str) -> nn.Module:
    """A small model of a type, with random weights."""
    names = [stem + ending for ending in ENDINGS if hasattr(transformers, stem + ending)]
    kind = getattr(transformers, names[0])
    base = kind.config_class()
    fields: dict[str, Any] = {name: n for name, n in FIELDS.items() if hasattr(base, name)}
    for name in ("layer_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(getattr(base, name, None) or ()))
        if kinds:
            fields[name] = (2 * kinds)[:2]
    torch.manual_seed(0)
    found: nn.Module = kind(kind.config_class(**fields | TYPES[stem]))
    return found.eval()


def run(stem: str) -> dict[str, Any]:
    """What is found in one type, and what ``verify`` says when a quarter leaves."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PruningWarning)
    model = model_of(stem)
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, 90, (2, TOKENS)), "use_cache": False}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = torch.randint(3, 90, (2, TOKENS - 2))
    unsettle(model, inputs)
    start = time.process_time()
    graph = graphprune.trace(model, inputs)
    traced = time.process_time()
    row: dict[str, Any] = {"mixtures": len(graph.experts)}
    row["seconds"] = round(traced - start, 1), round(time.process_time() - traced, 1)
    plan = graph.plan(QUARTER, parts="experts")
    row["gone"] = sum(len(change.gone) for change in plan.experts)
    row["of"] = sum(change.size for change in plan.experts)
    row["params"] = plan.after.params / plan.before.params
    small = graphprune.rebuild(model, plan, inputs)
    report = graphprune.verify(model, small, inputs)
    row["verdict"], row["difference"] = report.verdict, report.difference
    row["config"] = "save_pretrained" not in vars(small)
    return row


def line(stem: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    if row["status"] != "ok":
        return f"| {stem} | - | - | - | {row['reason'].splitlines()[0][:150]} | - |"
    counts = f"{row['mixtures']} | {row['gone']} of {row['of']} | {100 * row['params']:.1f} %"
    verdict = f"{row['verdict']} ({row['difference']:.0e})"
    return f"| {stem} | {counts} | {verdict} | {'follows' if row['config'] else 'refuses'} |"


def main() -> int:
    """Print the table; 1 where a small model was not equal, or something else than a refusal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--timeout", type=float, default=300, help="seconds per type")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    print(
        "| type | mixtures | experts that leave | parameters kept | small against masked | config |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    equal = wrong = 0
    for stem in options.types:
        row = isolated(run, stem, timeout=options.timeout)
        equal += row.get("verdict") == "equal"
        refused = row["status"] != "ok" and "no experts of this model can leave" in row["reason"]
        wrong += row.get("verdict") != "equal" and not refused
        print(line(stem, row), flush=True)
    print(f"\n{equal} of {len(options.types)} types equal")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
