"""More models of transformers: images, video, sound, pairs of image and text, time series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from suites import Case, named
from suites_transformers import (
    BOXES,
    LABELS,
    LOGITS,
    SCORES,
    SIDE,
    SPEECH,
    VOCABULARY,
    Draw,
    case,
    pixels,
    tokens,
    waves,
)
from suites_transformers_text import SMALL, row, small

LARGE = 64
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]}
PYRAMID = {**STAGES, "num_attention_heads": [1, 2, 4, 4], "mlp_ratios": [2, 2, 2, 2]}
WINDOWS = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "image_size": LARGE}
PATCHES = {"image_size": SIDE, "patch_size": 8}
FRAMES = {**PATCHES, "num_frames": 4}
BACKBONE = ("ResNetConfig", {
    "embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
})  # fmt: skip
LAST = ("ResNetConfig", {**BACKBONE[1], "out_features": ["stage4"]})
QUERIES = {"num_queries": 5, "num_labels": LABELS, "backbone_config": LAST}

IMAGES: dict[str, tuple[int, dict[str, Any]]] = {
    "Dinov2": (SIDE, PATCHES),
    "Dinov2WithRegisters": (SIDE, PATCHES),
    "IJepa": (SIDE, PATCHES),
    "ViTMSN": (SIDE, PATCHES),
    "Data2VecVision": (SIDE, PATCHES),
    "PoolFormer": (LARGE, STAGES),
    "Pvt": (LARGE, {**PYRAMID, "image_size": LARGE}),
    "PvtV2": (LARGE, PYRAMID),
    "ConvNextV2": (LARGE, STAGES),
    "ResNet": (LARGE, {**STAGES, "embedding_size": 16}),
    "RegNet": (LARGE, {**STAGES, "embedding_size": 16, "groups_width": 16}),
    "Bit": (LARGE, {**STAGES, "embedding_size": 16, "num_groups": 8}),
    "MobileNetV1": (LARGE, {"depth_multiplier": 0.25}),
    "MobileNetV2": (LARGE, {"depth_multiplier": 0.35}),
    "MobileViT": (LARGE, {
        "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96],
    }),
    "MobileViTV2": (LARGE, {"width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]}),
    "EfficientNet": (LARGE, {
        "width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 640,
    }),
    "Levit": (LARGE, {
        "image_size": LARGE, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1], "key_dim": [16] * 3,
    }),
    "FocalNet": (LARGE, {**STAGES, "embed_dim": 16, "image_size": LARGE}),
    "Swinv2": (LARGE, {**WINDOWS, "window_size": 4}),
    "SwiftFormer": (LARGE, {"depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 48]}),
    "TextNet": (LARGE, {"stem_out_channels": 16, "hidden_sizes": [16, 16, 24, 32, 48]}),
}  # fmt: skip


def _video(batch: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 4, 3, SIDE, SIDE)}


Row = tuple[str, str, str, Draw, dict[str, Any]]
MORE: tuple[Row, ...] = (
    ("GLPN", "ForDepthEstimation", "vision", pixels(LARGE), {**PYRAMID, "decoder_hidden_size": 16}),
    ("DPT", "ForSemanticSegmentation", "vision", pixels(SIDE), {
        **PATCHES, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 32,
    }),
    ("DepthAnything", "ForDepthEstimation", "vision", pixels(56), {
        "backbone_config": ("Dinov2Config", {
            **small("Dinov2Config"), "image_size": 56, "patch_size": 14,
            "out_features": ["stage1", "stage2"], "reshape_hidden_states": False,
        }),
        "reassemble_hidden_size": 64, "neck_hidden_sizes": [16, 32], "fusion_hidden_size": 16,
        "reassemble_factors": [2, 1], "patch_size": 14, "head_hidden_size": 8,
    }),
    ("UperNet", "ForSemanticSegmentation", "vision", pixels(LARGE), {
        "backbone_config": ("ResNetConfig", {
            **BACKBONE[1], "out_features": ["stage1", "stage2", "stage3", "stage4"],
        }),
        "hidden_size": 32, "auxiliary_channels": 16, "auxiliary_in_channels": 48,
    }),
    ("Yolos", "ForObjectDetection", "detection", pixels(SIDE), {
        "image_size": [SIDE, SIDE], "patch_size": 8, "num_detection_tokens": 5,
    }),
    ("ConditionalDetr", "ForObjectDetection", "detection", pixels(LARGE), QUERIES),
    ("DeformableDetr", "ForObjectDetection", "detection", pixels(LARGE), {
        **QUERIES, "backbone_config": BACKBONE, "num_feature_levels": 3,
    }),
    ("DabDetr", "ForObjectDetection", "detection", pixels(LARGE), {**QUERIES, "hidden_size": 64}),
    ("RTDetr", "ForObjectDetection", "detection", pixels(LARGE), {
        **QUERIES, "backbone_config": ("RTDetrResNetConfig", BACKBONE[1]),
        "encoder_hidden_dim": 32, "encoder_in_channels": [32, 48, 64],
        "decoder_in_channels": [32, 32, 32], "d_model": 32, "num_denoising": 0,
    }),
    ("Mask2Former", "ForUniversalSegmentation", "detection", pixels(LARGE), {
        "backbone_config": ("SwinConfig", {
            "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 2,
            "image_size": LARGE, "out_features": ["stage1", "stage2", "stage3", "stage4"],
        }),
        "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_queries": 5,
        "encoder_feedforward_dim": 64, "dim_feedforward": 64, "encoder_layers": 1,
        "decoder_layers": 2,
    }),
    ("Timesformer", "ForVideoClassification", "vision", _video, FRAMES),
    ("Vivit", "ForVideoClassification", "vision", _video, {
        **FRAMES, "tubelet_size": [2, 8, 8],
    }),
    ("VideoMAE", "ForVideoClassification", "vision", _video, FRAMES),
    ("WavLM", "ForCTC", "speech", waves, SPEECH),
    ("UniSpeech", "ForCTC", "speech", waves, SPEECH),
    ("UniSpeechSat", "ForCTC", "speech", waves, SPEECH),
    ("Data2VecAudio", "ForCTC", "speech", waves, {
        **SPEECH, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5,
    }),
    ("SEW", "ForCTC", "speech", waves, {**SPEECH, "squeeze_factor": 2}),
    ("Wav2Vec2Conformer", "ForCTC", "speech", waves, {**SPEECH, "conv_depthwise_kernel_size": 5}),
)  # fmt: skip


USED = {"Mask2Former": named("class_queries_logits", "masks_queries_logits")}


def _draw(**fields: Callable[[int], torch.Tensor]) -> Draw:
    return lambda batch: {name: function(batch) for name, function in fields.items()}


def _normal(*shape: int) -> Callable[[int], torch.Tensor]:
    return lambda batch: torch.randn(batch, *shape)


def _ids(batch: int) -> torch.Tensor:
    found: torch.Tensor = tokens(batch)["input_ids"]
    return found


def _ended(batch: int) -> torch.Tensor:
    ids = _ids(batch)
    ids[:, -1] = VOCABULARY - 1  # where CLIP's texts end
    return ids


def _captions(batch: int) -> dict[str, Any]:
    ids = _ids(batch).clamp(max=VOCABULARY - 2)
    ids[:, 1:5] = VOCABULARY - 1  # four places for the four parts of an image
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 16, 16)}


def _llava() -> Case:
    vision = small("CLIPVisionConfig", image_size=16, patch_size=8)
    options = {
        "vision_config": ("CLIPVisionConfig", vision),
        "text_config": ("LlamaConfig", small("LlamaConfig")),
        "image_token_id": VOCABULARY - 1, "image_seq_length": 4,
    }  # fmt: skip
    return case("Llava", "vision-text", "LlavaForConditionalGeneration", "LlavaConfig",
                _captions, LOGITS, **options)  # fmt: skip


def _spectra() -> list[Case]:
    tree = small("ASTConfig", max_length=32, num_mel_bins=16, patch_size=8, frequency_stride=4,
                 time_stride=4)  # fmt: skip
    speech = small("Speech2TextConfig", num_conv_layers=2, conv_kernel_sizes=[3, 3],
                   conv_channels=32, input_feat_per_channel=16, max_source_positions=64,
                   max_target_positions=32, decoder_start_token_id=2)  # fmt: skip
    words = _draw(input_features=_normal(40, 16), decoder_input_ids=_ids)
    return [
        case("AST", "speech", "ASTForAudioClassification", "ASTConfig",
             _draw(input_values=_normal(32, 16)), **tree),
        case("Speech2Text", "speech", "Speech2TextForConditionalGeneration", "Speech2TextConfig",
             words, LOGITS, **speech),
    ]  # fmt: skip


def _pairs() -> list[Case]:
    text, vision = small("CLIPTextConfig"), small("CLIPVisionConfig", **PATCHES)
    ended = _draw(input_ids=_ended, pixel_values=_normal(3, SIDE, SIDE))
    both = _draw(input_ids=_ids, pixel_values=_normal(3, SIDE, SIDE))
    marks = {"bos_token_id": 1, "eos_token_id": VOCABULARY - 1}
    vilt = small("ViltConfig", **PATCHES, type_vocab_size=2, modality_type_vocab_size=2,
                 num_labels=LABELS)  # fmt: skip
    return [
        case("ChineseCLIP", "contrastive", "ChineseCLIPModel", "ChineseCLIPConfig", both, SCORES,
             text_config=small("ChineseCLIPTextConfig"), vision_config=vision, projection_dim=48),
        case("CLIPSeg", "vision-text", "CLIPSegForImageSegmentation", "CLIPSegConfig",
             ended, LOGITS,
             text_config=text | marks, vision_config=vision, projection_dim=48, reduce_dim=16,
             extract_layers=[0, 1], decoder_num_attention_heads=2, decoder_intermediate_size=32),
        case("Vilt", "vision-text", "ViltForQuestionAnswering", "ViltConfig", both, **vilt),
        case("Blip", "vision-text", "BlipForConditionalGeneration", "BlipConfig", both, LOGITS,
             text_config=small("BlipTextConfig", encoder_hidden_size=64),
             vision_config=small("BlipVisionConfig", **PATCHES), projection_dim=48),
        case("Git", "vision-text", "GitForCausalLM", "GitConfig", both,
             **small("GitConfig", vision_config=vision)),
        _llava(),
    ]  # fmt: skip


def _series() -> list[Case]:
    patches = {"num_input_channels": 3, "context_length": 32, "patch_length": 8,
               "patch_stride": 8, "prediction_length": 8}  # fmt: skip
    past = _draw(past_values=_normal(32, 3))
    return [
        case("PatchTST", "series", "PatchTSTForPrediction", "PatchTSTConfig", past,
             **small("PatchTSTConfig", **patches)),
        case("PatchTSMixer", "series", "PatchTSMixerForPrediction", "PatchTSMixerConfig", past,
             named("prediction_outputs"),
             **small("PatchTSMixerConfig", **patches)),
        case("DecisionTransformer", "series", "DecisionTransformerModel",
             "DecisionTransformerConfig", _episode, named("action_preds"),
             **small("DecisionTransformerConfig", state_dim=5, act_dim=3, max_ep_len=20)
             | {"hidden_size": SMALL["hidden_size"]}),
    ]  # fmt: skip


def _episode(batch: int) -> dict[str, Any]:
    return {
        "states": torch.randn(batch, 6, 5),
        "actions": torch.randn(batch, 6, 3),
        "rewards": torch.randn(batch, 6, 1),
        "returns_to_go": torch.randn(batch, 6, 1),
        "timesteps": torch.arange(6).expand(batch, 6),
        "attention_mask": torch.ones(batch, 6),
    }


def suite() -> list[Case]:
    """All cases."""
    images = [
        row(stem, "ForImageClassification", "vision", pixels(side), **options)
        for stem, (side, options) in IMAGES.items()
    ]
    more = [
        row(
            stem,
            head,
            kind,
            draw,
            USED.get(stem, BOXES if kind == "detection" else None),
            **options,
        )
        for stem, head, kind, draw, options in MORE
    ]
    return [*images, *more, *_spectra(), *_pairs(), *_series()]
