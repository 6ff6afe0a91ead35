"""More models of transformers: encoders, decoders and pairs of both that read tokens."""

from __future__ import annotations

from typing import Any

import transformers
from suites import Case, named
from suites_transformers import LOGITS, VOCABULARY, Counts, Draw, case, masked, pair, tokens

SMALL = {
    # one width, two layers, four heads, under the names that configurations give them
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 16),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 128),
    **dict.fromkeys(("n_inner", "d_inner", "dff", "ffn_dim"), 128),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "embedding_size": 32,
    "vocab_size": VOCABULARY,
    "sliding_window": 8,
    "dropout": 0.0,
}


def small(config: str, **options: Any) -> dict[str, Any]:
    """The fields of a configuration that set its size, small; ``options`` replace them."""
    fields = getattr(transformers, config)().to_dict()
    return {name: value for name, value in SMALL.items() if name in fields} | options


def row(stem: str, head: str, kind: str, draw: Draw, counts: Counts = None, **options: Any) -> Case:
    """A model whose class and configuration share the first part of their name."""
    config = f"{stem}Config"
    return case(stem, kind, f"{stem}{head}", config, draw, counts, **small(config, **options))


ENCODERS: dict[str, dict[str, Any]] = {
    "Camembert": {},
    "XLMRoberta": {},
    "XLMRobertaXL": {},
    "RobertaPreLayerNorm": {},
    "MegatronBert": {},
    "Nystromformer": {"num_landmarks": 10, "segment_means_seq_len": 10, "conv_kernel_size": 3},
    "Yoso": {},
    "ConvBert": {"embedding_size": 64},
    "SqueezeBert": {"embedding_size": 64},
    "MobileBert": {"intra_bottleneck_size": 32, "true_hidden_size": 32},
    "FNet": {},
    "Funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1]},
    "RoFormer": {},
    "RemBert": {"input_embedding_size": 24, "output_embedding_size": 48},
    "Esm": {"mask_token_id": 4, "position_embedding_type": "rotary"},
    "ModernBert": {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 4,
                   "cls_token_id": 1, "sep_token_id": 2},
    "NomicBert": {},
    "EuroBert": {},
    "Ernie": {},
    "LayoutLM": {"max_2d_position_embeddings": 16},
    "IBert": {},
    "Deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                "max_relative_positions": 16},
    "Longformer": {"attention_window": 4},
    "BigBird": {"attention_type": "original_full"},
    "Data2VecText": {},
    "Xmod": {"languages": ["en"], "default_language": "en"},
    "JinaEmbeddingsV3": {},
}  # fmt: skip

EXPERTS = {"num_key_value_heads": 4}
LATENT = {
    **EXPERTS, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
HYBRID = {"mamba_d_state": 8, "mamba_d_conv": 3, "mamba_n_heads": 8, "mamba_d_head": 16,
          "mamba_chunk_size": 4}  # fmt: skip

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPTNeo": ("ForCausalLM", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "GPTJ": ("ForCausalLM", {"rotary_dim": 8}),
    "GPTBigCode": ("ForCausalLM", {}),
    "CodeGen": ("ForCausalLM", {"rotary_dim": 8}),
    "BioGpt": ("ForCausalLM", {}),
    "XGLM": ("ForCausalLM", {"attention_heads": 4}),
    "OpenAIGPT": ("LMHeadModel", {}),
    "CTRL": ("LMHeadModel", {}),
    "XLNet": ("LMHeadModel", {"mem_len": None}),
    "Mpt": ("ForCausalLM", {}),
    "Gemma": ("ForCausalLM", {}),
    "Phi": ("ForCausalLM", {}),
    "Persimmon": ("ForCausalLM", {}),
    "StableLm": ("ForCausalLM", {}),
    "Starcoder2": ("ForCausalLM", {}),
    "Cohere": ("ForCausalLM", {}),
    "Cohere2": ("ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}),
    "Olmo": ("ForCausalLM", {}),
    "Olmo2": ("ForCausalLM", {}),
    "Olmo3": ("ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}),
    "Granite": ("ForCausalLM", {}),
    "Nemotron": ("ForCausalLM", {}),
    "Glm": ("ForCausalLM", {}),
    "Glm4": ("ForCausalLM", {}),
    "SmolLM3": ("ForCausalLM", {"layer_types": ["full_attention"] * 2}),
    "Helium": ("ForCausalLM", {}),
    "DiffLlama": ("ForCausalLM", {}),
    "Exaone4": ("ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}),
    "Arcee": ("ForCausalLM", {}),
    "Apertus": ("ForCausalLM", {}),
    "BitNet": ("ForCausalLM", {}),
    "SeedOss": ("ForCausalLM", {}),
    "Olmoe": ("ForCausalLM", EXPERTS),
    "GraniteMoe": ("ForCausalLM", EXPERTS),
    "Qwen2Moe": ("ForCausalLM", EXPERTS),
    "Qwen3Moe": ("ForCausalLM", EXPERTS),
    "Ernie4_5": ("ForCausalLM", {}),
    "GptOss": ("ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}),
    "DeepseekV2": ("ForCausalLM", LATENT),
    "DeepseekV3": ("ForCausalLM", LATENT),
    "Mamba2": ("ForCausalLM", {"num_heads": 8, "n_groups": 2, "state_size": 8, "chunk_size": 4}),
    "FalconMamba": ("ForCausalLM", {"state_size": 8, "time_step_rank": 4}),
    "RecurrentGemma": ("ForCausalLM", {"lru_width": 64, "num_hidden_layers": 3,
                                       "attention_window_size": 8}),
    "Jamba": ("ForCausalLM", {**EXPERTS, "mamba_d_state": 8, "mamba_dt_rank": 4,
                              "attn_layer_period": 2, "attn_layer_offset": 1,
                              "use_mamba_kernels": False}),
    "Bamba": ("ForCausalLM", {**HYBRID, "mamba_n_groups": 1, "attn_layer_indices": [1]}),
    "Rwkv": ("ForCausalLM", {"attention_hidden_size": 64, "context_length": 16}),
    "Lfm2": ("ForCausalLM", {"layer_types": ["conv", "full_attention"],
                             "block_auto_adjust_ff_dim": False}),
    "Qwen3Next": ("ForCausalLM", {
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }),
    "MiniMax": ("ForCausalLM", {"layer_types": ["linear_attention", "full_attention"],
                                "block_size": 4}),
}  # fmt: skip

PAIRS: dict[str, dict[str, Any]] = {
    "MBart": {},
    "M2M100": {},
    "Marian": {"decoder_start_token_id": 0},
    "Blenderbot": {},
    "BlenderbotSmall": {},
    "LED": {"attention_window": 4, "max_encoder_position_embeddings": 32,
            "max_decoder_position_embeddings": 32},
    "PLBart": {},
    "MT5": {},
    "UMT5": {},
    "LongT5": {"local_radius": 4},
    "SwitchTransformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "ProphetNet": {"ngram": 2, "num_buckets": 8, "disable_ngram_loss": True},
    "PegasusX": {"block_size": 4, "num_global_tokens": 4},
}  # fmt: skip

STATES = dict.fromkeys(("XLNet", "Rwkv"), LOGITS)  # others return theirs in an object
START = {"decoder_start_token_id": 2}


def suite() -> list[Case]:
    """All cases."""
    encoders = [
        row(stem, "Model" if stem == "JinaEmbeddingsV3" else "ForMaskedLM", "encoder", masked,
            named("pooler_output") if stem == "JinaEmbeddingsV3" else None, **options)
        for stem, options in ENCODERS.items()
    ]  # fmt: skip
    decoders = [
        row(stem, head, "decoder", tokens, STATES.get(stem), **options)
        for stem, (head, options) in DECODERS.items()
    ]
    pairs = [
        row(stem, "MTModel" if stem == "Marian" else "ForConditionalGeneration",
            "encoder-decoder", pair, LOGITS, **START | options)
        for stem, options in PAIRS.items()
    ]  # fmt: skip
    return [*encoders, *decoders, *pairs]
