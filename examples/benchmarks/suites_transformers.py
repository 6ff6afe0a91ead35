"""Models of transformers from small configurations, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from suites import Case, named
from torch import nn

VOCABULARY = 101  # a number that no other layer has, so that heads are found by it
LABELS = 7
ROWS = 10  # tokens
WIDE, DEEP, HEADS, INNER = 64, 2, 4, 128
SIDE, PATCH = 32, 8

Draw = Callable[[int], dict[str, Any]]
Counts = Callable[[Any], Any] | None
SCORES = named("logits_per_image", "logits_per_text")
LOGITS, BOXES = named("logits"), named("logits", "pred_boxes")
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDE,
    "num_hidden_layers": DEEP,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": 32,
}
TEXT = {**ENCODER, "bos_token_id": 1, "eos_token_id": VOCABULARY - 1}
GROUPED = {**ENCODER, "num_key_value_heads": 2}
VISION = {
    "hidden_size": WIDE,
    "num_hidden_layers": DEEP,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": WIDE,
    "encoder_layers": DEEP,
    "decoder_layers": DEEP,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 32,
}
SPEECH = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDE,
    "num_hidden_layers": DEEP,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 32, 48, 64]}
RESNET = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 48, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}


def tokens(batch: int) -> dict[str, Any]:
    """Token ids."""
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, ROWS))}


def masked(batch: int) -> dict[str, Any]:
    """Token ids, of which the last row has three that are padding."""
    mask = torch.ones(batch, ROWS, dtype=torch.long)
    mask[-1, -3:] = 0
    return {**tokens(batch), "attention_mask": mask}


def pair(batch: int) -> dict[str, Any]:
    """Token ids for an encoder and for a decoder."""
    return {**tokens(batch), "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, 6))}


def pixels(side: int) -> Draw:
    """Images of one size."""
    return lambda batch: {"pixel_values": torch.randn(batch, 3, side, side)}


def _both(batch: int) -> dict[str, Any]:
    ids = tokens(batch)["input_ids"]
    ids[:, -1] = VOCABULARY - 1  # CLIP pools where the end of the text is
    return {"input_ids": ids, **pixels(SIDE)(batch)}


def waves(batch: int) -> dict[str, Any]:
    """Sound."""
    return {"input_values": torch.randn(batch, 800)}


def _spectrum(batch: int) -> dict[str, Any]:
    return {
        "input_features": torch.randn(batch, 16, 40),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, 6)),
    }


def configure(name: str, options: dict[str, Any]) -> Any:
    """A configuration; a pair of a class name and options stands for one inside another."""
    nested = {
        key: configure(*value) if isinstance(value, tuple) and isinstance(value[0], str) else value
        for key, value in options.items()
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common = {"initializer_range": 0.1, "num_labels": LABELS}
    return getattr(transformers, name)(**{**special, **common, **nested})


def case(
    name: str, kind: str, model: str, config: str, draw: Draw, counts: Counts = None, **options: Any
) -> Case:
    """A model of transformers, by the names of its class and of its configuration's."""

    def build() -> nn.Module:
        return getattr(transformers, model)(configure(config, options))

    shapes = (
        f"{key} {'x'.join(map(str, value.shape[1:]))}"
        for key, value in draw(1).items()
        if key != "attention_mask"
    )
    classes = LABELS if kind in ("vision", "detection", "classification") else VOCABULARY
    return Case(
        name,
        kind,
        build,
        draw,
        classes,
        size=", ".join(shapes),
        batch=2,
        head_names=("*.class_labels_classifier", "*.bbox_predictor.layers.2", "*_projection"),
        counts=counts,
    )


def _encoders() -> list[Case]:
    kind = "encoder"
    small = {"embedding_size": 32}
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("BERT", "Bert", ENCODER),
        ("RoBERTa", "Roberta", ENCODER),
        ("DistilBERT", "DistilBert", {
            "vocab_size": VOCABULARY, "dim": WIDE, "n_layers": DEEP, "n_heads": HEADS,
            "hidden_dim": INNER, "max_position_embeddings": 32,
        }),
        ("ALBERT", "Albert", ENCODER | small),
        ("ELECTRA", "Electra", ENCODER | small),
        ("DeBERTa-v2", "DebertaV2", ENCODER | {
            "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
            "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
        }),
        ("MPNet", "MPNet", ENCODER),
    ]  # fmt: skip
    return [
        case(name, kind, f"{stem}ForMaskedLM", f"{stem}Config", masked, **options)
        for name, stem, options in rows
    ]


def _decoders() -> list[Case]:
    rows: list[tuple[str, str, str, dict[str, Any]]] = [
        ("GPT-2", "GPT2LMHeadModel", "GPT2Config", {
            "vocab_size": VOCABULARY, "n_embd": WIDE, "n_layer": DEEP, "n_head": HEADS,
            "n_positions": 32,
        }),
        ("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", ENCODER),
        ("OPT", "OPTForCausalLM", "OPTConfig", {
            "vocab_size": VOCABULARY, "hidden_size": WIDE, "num_hidden_layers": DEEP,
            "num_attention_heads": HEADS, "ffn_dim": INNER, "max_position_embeddings": 32,
            "word_embed_proj_dim": WIDE,
        }),
        ("BLOOM", "BloomForCausalLM", "BloomConfig", {
            "vocab_size": VOCABULARY, "hidden_size": WIDE, "n_layer": DEEP, "n_head": HEADS,
        }),
        ("Llama", "LlamaForCausalLM", "LlamaConfig", GROUPED),
        ("Mistral", "MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 8}),
        ("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", GROUPED),
        ("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 16}),
        ("Gemma2", "Gemma2ForCausalLM", "Gemma2Config", GROUPED | {"head_dim": 16}),
        ("Gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED | {"head_dim": 16}),
        ("Phi-3", "Phi3ForCausalLM", "Phi3Config", GROUPED),
        ("Falcon", "FalconForCausalLM", "FalconConfig", {
            "vocab_size": VOCABULARY, "hidden_size": WIDE, "num_hidden_layers": DEEP,
            "num_attention_heads": HEADS,
        }),
        ("Mixtral", "MixtralForCausalLM", "MixtralConfig", GROUPED | {
            "num_local_experts": 4, "num_experts_per_tok": 2,
        }),
        ("Mamba", "MambaForCausalLM", "MambaConfig", {
            "vocab_size": VOCABULARY, "hidden_size": WIDE, "num_hidden_layers": DEEP,
            "state_size": 8,
        }),
    ]  # fmt: skip
    return [
        case(name, "decoder", model, config, tokens, **options)
        for name, model, config, options in rows
    ]


def _sequences() -> list[Case]:
    kind = "encoder-decoder"
    t5 = {
        "vocab_size": VOCABULARY, "d_model": WIDE, "d_kv": 16, "d_ff": INNER, "num_layers": DEEP,
        "num_heads": HEADS, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0,
    }  # fmt: skip
    start = {"decoder_start_token_id": 2}
    bart, pegasus = "BartForConditionalGeneration", "PegasusForConditionalGeneration"
    whisper = {**SEQ2SEQ, **start, "num_mel_bins": 16, "max_source_positions": 20,
               "max_target_positions": 16}  # fmt: skip
    return [
        case("T5", kind, "T5ForConditionalGeneration", "T5Config", pair, LOGITS, **t5),
        case("BART", kind, bart, "BartConfig", pair, LOGITS, **SEQ2SEQ, **start),
        case("Pegasus", kind, pegasus, "PegasusConfig", pair, LOGITS, **SEQ2SEQ, **start),
        case(
            "Whisper", "speech", "WhisperForConditionalGeneration", "WhisperConfig", _spectrum,
            LOGITS, **whisper,
        ),
        case("Wav2Vec2", "speech", "Wav2Vec2ForCTC", "Wav2Vec2Config", waves, **SPEECH),
        case("HuBERT", "speech", "HubertForCTC", "HubertConfig", waves, **SPEECH),
    ]  # fmt: skip


def _vision() -> list[Case]:
    swin = {
        "image_size": SIDE, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
        "num_heads": [2, 4], "window_size": 4,
    }  # fmt: skip
    segformer = {
        **STAGES, "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 32,
        "sr_ratios": [4, 2, 2, 1], "mlp_ratios": [2, 2, 2, 2],
    }  # fmt: skip
    rows = [
        ("ViT", "ViTForImageClassification", "ViTConfig", VISION),
        ("DeiT", "DeiTForImageClassification", "DeiTConfig", VISION),
        ("Swin", "SwinForImageClassification", "SwinConfig", swin),
        ("BEiT", "BeitForImageClassification", "BeitConfig", VISION),
        ("ConvNeXt", "ConvNextForImageClassification", "ConvNextConfig", STAGES),
        ("SegFormer", "SegformerForSemanticSegmentation", "SegformerConfig", segformer),
    ]
    return [
        case(name, "vision", model, config, pixels(64 if "depths" in options else SIDE),
              **(options if name != "Swin" else options | {"image_size": 64}))
        for name, model, config, options in rows
    ] + [_detr(), *_contrastive()]  # fmt: skip


def _detr() -> Case:
    options = {key: value for key, value in SEQ2SEQ.items() if key != "vocab_size"}
    return case(
        "DETR", "detection", "DetrForObjectDetection", "DetrConfig", pixels(64), BOXES,
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False,
        backbone_config=("ResNetConfig", RESNET), num_queries=5, **options,
    )  # fmt: skip


def _contrastive() -> list[Case]:
    kind = "contrastive"
    return [
        case("CLIP", kind, "CLIPModel", "CLIPConfig", _both, SCORES, projection_dim=48,
              text_config=TEXT, vision_config=VISION),
        case("SigLIP", kind, "SiglipModel", "SiglipConfig", _both, SCORES,
              text_config=TEXT, vision_config=VISION),
    ]  # fmt: skip


def suite() -> list[Case]:
    """All cases."""
    return [*_encoders(), *_decoders(), *_sequences(), *_vision()]
