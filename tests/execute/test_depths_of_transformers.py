"""Folders of models of a library that lost layers: ``from_pretrained`` gives the small model."""

import subprocess
import sys

import pytest
import torch
from support.comparing import untouched

import graphprune
from graphprune.errors import PruningWarning

transformers = pytest.importorskip(
    "transformers", minversion="5.0", reason="earlier ones return caches as tensors, by layer"
)
SIZE = 60
PLAIN = {
    "vocab_size": SIZE, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32,
}  # fmt: skip
DECODER = {**PLAIN, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = {**DECODER, "head_dim": 8, "sliding_window": 4}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GPT = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32}
OLD = {"vocab_size": SIZE, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
PAIR = {
    "d_model": 16, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
CLIP = {
    "text_config": {**PLAIN, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1},
    "vision_config": IMAGES, "projection_dim": 8,
}  # fmt: skip
WHISPER = {
    **PAIR, **OLD, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 30,
    "pad_token_id": 1, "decoder_start_token_id": 2, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "moe_intermediate_size": 8, "num_key_value_heads": 2,
}  # fmt: skip
KINDS = {
    "LlamaForCausalLM": ("LlamaConfig", DECODER),
    "ViTForImageClassification": ("ViTConfig", IMAGES),
}
MORE = {
    "Qwen2ForCausalLM": (
        "Qwen2Config",
        {**DECODER, "use_sliding_window": True, "max_window_layers": 2},
    ),
    "GPT2LMHeadModel": ("GPT2Config", {**OLD, **GPT}),
    "Qwen3ForCausalLM": ("Qwen3Config", {**DECODER, "head_dim": 8}),
    "MistralForCausalLM": ("MistralConfig", {**DECODER, "sliding_window": 4}),
    "MixtralForCausalLM": ("MixtralConfig", {**DECODER, "num_local_experts": 4}),
    "Gemma2ForCausalLM": ("Gemma2Config", WINDOW),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**WINDOW, "layer_types": MIXED}),
    "GptOssForCausalLM": (
        "GptOssConfig",
        {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "PhiForCausalLM": ("PhiConfig", PLAIN),
    "Phi3ForCausalLM": ("Phi3Config", {**DECODER, "pad_token_id": 0}),
    "OPTForCausalLM": ("OPTConfig", {**PLAIN, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", PLAIN),
    "GPTJForCausalLM": ("GPTJConfig", {**OLD, **GPT, "rotary_dim": 4}),
    "FalconForCausalLM": ("FalconConfig", PLAIN),
    "Olmo2ForCausalLM": ("Olmo2Config", DECODER),
    "SmolLM3ForCausalLM": ("SmolLM3Config", {**DECODER, "pad_token_id": 0}),
    "Cohere2ForCausalLM": ("Cohere2Config", {**DECODER, "pad_token_id": 0}),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", {**PLAIN, **LATENT}),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {
            **DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
            "mlp_only_layers": [1, 3],
        },
    ),
    "ModernBertModel": (
        "ModernBertConfig",
        {
            **PLAIN, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
            "sep_token_id": 2, "local_attention": 4,
        },
    ),
    "DeiTForImageClassification": ("DeiTConfig", IMAGES),
    "BeitForImageClassification": ("BeitConfig", {**IMAGES, "drop_path_rate": 0.0}),
    "Dinov2ForImageClassification": ("Dinov2Config", IMAGES),
    "CLIPModel": ("CLIPConfig", CLIP),
    "CLIPVisionModel": ("CLIPVisionConfig", IMAGES),
    "WhisperForConditionalGeneration": ("WhisperConfig", WHISPER),
    "MBartForConditionalGeneration": (
        "MBartConfig",
        {**PAIR, **OLD, "max_position_embeddings": 32, "pad_token_id": 0},
    ),
}  # fmt: skip


def inputs_of(name):
    ids = torch.randint(3, SIZE, (2, 7), generator=torch.Generator().manual_seed(1))
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name.startswith("Whisper"):
        return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids[:, :4]}
    if name.startswith("MBart"):
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    if name == "CLIPModel":
        return {"input_ids": ids, **pixels}
    return pixels if "Image" in name or "Vision" in name else {"input_ids": ids}


def model_of(name):
    config, fields = {**KINDS, **MORE}[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**fields)).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model, inputs_of(name)


def tensors(model, inputs):
    with torch.no_grad():
        return [t for t in model(**inputs).values() if isinstance(t, torch.Tensor)]


def depths(config):
    found = config.to_dict()
    fields = ("num_hidden_layers", "n_layer", "encoder_layers", "vision_config", "text_config")
    return [
        depths(getattr(config, f)) if isinstance(found[f], dict) else found[f]
        for f in fields
        if f in found
    ]


@pytest.mark.parametrize(
    "name", [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_folders(name, tmp_path):
    """The last layers stay: those that stay have other numbers in the folder."""
    model, inputs = model_of(name)
    with untouched(model):
        graph = graphprune.trace(model, inputs)
        blocks = [block.name for block in graph.blocks]
        keep = [name for name in blocks if name.endswith(".3") and len(blocks) > 2]
        small = graphprune.rebuild(model, graph.plan(0.5, parts="blocks", keep=keep), inputs)
        assert graphprune.verify(model, small, inputs).verdict == "equal"
    assert depths(small.config) != depths(model.config)
    state = model.state_dict()
    assert all(torch.equal(state[name], t) for name, t in small.state_dict().items())
    small.save_pretrained(tmp_path)
    again, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted = tensors(small, inputs)
    assert all(map(torch.equal, wanted, tensors(again.eval(), inputs)))
    if "input_ids" in inputs and hasattr(model, "lm_head"):
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        ids = inputs["input_ids"]
        found = [
            each.generate(ids, use_cache=cached, **options)
            for each, cached in ((small, True), (small, False), (again, True))
        ]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


FRESH = """
import sys, torch, transformers
model = transformers.AutoModel.from_pretrained(sys.argv[1]).eval()
given = torch.load(sys.argv[1] + "/given.pt")
assert len(model.layers) == 2, model
assert torch.equal(model(given["ids"]).last_hidden_state, given["wanted"])
"""


@pytest.mark.slow
def test_a_fresh_process(tmp_path):
    """Channels and blocks, read where this library is not imported."""
    torch.manual_seed(0)
    model = transformers.LlamaModel(transformers.LlamaConfig(**DECODER)).eval()
    ids = inputs_of("LlamaModel")
    small = graphprune.rebuild(graphprune.rebuild(model, 0.5, ids), 0.5, ids, parts="blocks")
    small = graphprune.rebuild(small, 0.4, ids, parts="blocks") if len(small.layers) > 2 else small
    small.save_pretrained(tmp_path)
    wanted = small(**ids).last_hidden_state
    torch.save({"ids": ids["input_ids"], "wanted": wanted}, tmp_path / "given.pt")
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], check=True)


@pytest.mark.slow
def test_half_a_layer_is_refused():
    model, inputs = model_of("LlamaForCausalLM")
    graph = graphprune.trace(model, inputs)
    with pytest.warns(PruningWarning, match=r"a model built from it has model\.layers\.\d\."):
        small = graphprune.rebuild(model, graph.plan(0.1, parts="branches"), inputs)
    assert small.config.num_hidden_layers == 4
