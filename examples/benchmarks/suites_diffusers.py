"""UNets, autoencoders and transformers of diffusers from small configurations, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from suites import Case
from torch import nn

Draw = Callable[[int], dict[str, Any]]
CHANNELS, SIDE, WORDS, CONTEXT = 4, 16, 6, 48
BODY = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2}
UNET = {
    "in_channels": CHANNELS, "out_channels": CHANNELS, "sample_size": SIDE,
    "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
}  # fmt: skip
CROSS = {
    **UNET, "cross_attention_dim": CONTEXT, "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
CODER = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "sample_size": 32, "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def _times(batch: int) -> torch.Tensor:
    return torch.randint(1, 900, (batch,))


def _noisy(batch: int) -> dict[str, Any]:
    return {"sample": torch.randn(batch, CHANNELS, SIDE, SIDE), "timestep": _times(batch)}


def _told(batch: int) -> dict[str, Any]:
    return {**_noisy(batch), "encoder_hidden_states": torch.randn(batch, WORDS, CONTEXT)}


def _pictures(batch: int) -> dict[str, Any]:
    return {"sample": torch.randn(batch, 3, 32, 32)}


def _latents(channels: int = CHANNELS, **more: Callable[[int], Any]) -> Draw:
    def draw(batch: int) -> dict[str, Any]:
        latents = torch.randn(batch, channels, SIDE, SIDE)
        found = {"hidden_states": latents, "timestep": _times(batch)}
        return found | {name: function(batch) for name, function in more.items()}

    return draw


def _context(batch: int) -> torch.Tensor:
    return torch.randn(batch, WORDS, CONTEXT)


def _pooled(batch: int) -> torch.Tensor:
    return torch.randn(batch, 24)


def _video(channels: int = CHANNELS, frames: int = 4, channels_first: bool = True) -> Draw:
    def draw(batch: int) -> dict[str, Any]:
        shape = (channels, frames) if channels_first else (frames, channels)
        return {
            "hidden_states": torch.randn(batch, *shape, 8, 8),
            "timestep": _times(batch),
            "encoder_hidden_states": _context(batch),
        }

    return draw


def _flux(batch: int) -> dict[str, Any]:
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return {
        "hidden_states": torch.randn(batch, 16, 16),
        "encoder_hidden_states": _context(batch),
        "pooled_projections": _pooled(batch),
        "timestep": torch.rand(batch),
        "img_ids": grid,
        "txt_ids": torch.zeros(WORDS, 3),
    }


def _ltx(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 2 * 4 * 4, 8),
        "encoder_hidden_states": _context(batch),
        "timestep": _times(batch),
        "encoder_attention_mask": torch.ones(batch, WORDS),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def _prior(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, CONTEXT),
        "timestep": _times(batch),
        "proj_embedding": torch.randn(batch, CONTEXT),
        "encoder_hidden_states": _context(batch),
    }


def _controlled(batch: int) -> dict[str, Any]:
    return {**_told(batch), "controlnet_cond": torch.randn(batch, 3, 8 * SIDE, 8 * SIDE)}


def _frames(batch: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, CHANNELS, 3, 8, 8),
        "timestep": _times(batch),
        "encoder_hidden_states": _context(batch),
    }


def _lumina(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, CHANNELS, 8, 8),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": _context(batch),
        "encoder_attention_mask": torch.ones(batch, WORDS, dtype=torch.bool),
    }


def _labels(batch: int) -> torch.Tensor:
    return torch.randint(0, 10, (batch,))


ROWS: tuple[tuple[str, dict[str, Any], Draw], ...] = (
    ("UNet2DModel", {
        **UNET, "attention_head_dim": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }, _noisy),
    ("UNet2DModel ResNet", {
        **UNET, "attention_head_dim": 8, "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    }, _noisy),
    ("UNet2DConditionModel", CROSS, _told),
    ("UNet2DConditionModel SDXL", {
        **CROSS, "use_linear_projection": True, "transformer_layers_per_block": 2,
    }, _told),
    ("UNet2DConditionModel simple", {
        **CROSS, "only_cross_attention": True, "resnet_time_scale_shift": "scale_shift",
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    }, _told),
    ("UNet1DModel", {
        "sample_size": 64, "block_out_channels": (32, 64), "extra_in_channels": 64,
        "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"),
        "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"),
    }, lambda batch: {"sample": torch.randn(batch, 2, 64), "timestep": _times(batch)}),
    ("UNet3DConditionModel", {
        **UNET, "cross_attention_dim": CONTEXT, "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    }, _frames),
    ("ControlNetModel", {
        key: value for key, value in CROSS.items()
        if key not in ("out_channels", "up_block_types", "sample_size")
    }, _controlled),
    ("AutoencoderKL", CODER, _pictures),
    ("AutoencoderTiny", {
        "encoder_block_out_channels": (32, 32), "decoder_block_out_channels": (32, 32),
        "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1),
    }, _pictures),
    ("AsymmetricAutoencoderKL", {
        "down_block_types": ("DownEncoderBlock2D",) * 2, "down_block_out_channels": (16, 32),
        "up_block_types": ("UpDecoderBlock2D",) * 2, "up_block_out_channels": (32, 48),
        "norm_num_groups": 8,
    }, _pictures),
    ("VQModel", {**CODER, "num_vq_embeddings": 16}, _pictures),
    ("AutoencoderDC", {
        "latent_channels": 4, "attention_head_dim": 8,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (16, 32), "decoder_block_out_channels": (16, 32),
        "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
    }, _pictures),
    ("AutoencoderOobleck", {
        "encoder_hidden_size": 8, "decoder_channels": 8, "decoder_input_channels": 4,
        "downsampling_ratios": [2, 4], "channel_multiples": [1, 2],
    }, lambda batch: {"sample": torch.randn(batch, 2, 64)}),
    ("AutoencoderKLTemporalDecoder", {
        "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "layers_per_block": 1,
    }, _pictures),
    ("DiTTransformer2DModel", {
        **BODY, "in_channels": CHANNELS, "sample_size": SIDE, "num_embeds_ada_norm": 10,
    }, _latents(class_labels=_labels)),
    ("Transformer2DModel", {
        **BODY, "in_channels": 32, "norm_num_groups": 8, "cross_attention_dim": CONTEXT,
    }, lambda batch: {
        "hidden_states": torch.randn(batch, 32, 8, 8), "encoder_hidden_states": _context(batch),
    }),
    ("PixArtTransformer2DModel", {
        **BODY, "cross_attention_dim": 64, "sample_size": SIDE, "caption_channels": CONTEXT,
        "use_additional_conditions": False,
    }, _latents(encoder_hidden_states=_context)),
    ("SD3Transformer2DModel", {
        **BODY, "sample_size": SIDE, "in_channels": CHANNELS, "out_channels": CHANNELS,
        "joint_attention_dim": CONTEXT, "caption_projection_dim": 64, "pooled_projection_dim": 24,
        "pos_embed_max_size": 16, "qk_norm": "rms_norm", "dual_attention_layers": (0,),
    }, _latents(encoder_hidden_states=_context, pooled_projections=_pooled)),
    ("FluxTransformer2DModel", {
        **BODY, "in_channels": 16, "num_layers": 1, "num_single_layers": 1,
        "joint_attention_dim": CONTEXT, "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6),
    }, _flux),
    ("AuraFlowTransformer2DModel", {
        "sample_size": SIDE, "num_attention_heads": 4, "attention_head_dim": 16,
        "num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": CONTEXT,
        "caption_projection_dim": 64, "pos_embed_max_size": 64,
    }, _latents(encoder_hidden_states=_context)),
    ("SanaTransformer2DModel", {
        **BODY, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 16, "cross_attention_dim": 64, "caption_channels": CONTEXT,
        "sample_size": SIDE,
    }, _latents(encoder_hidden_states=_context)),
    ("LTXVideoTransformer3DModel", {
        **BODY, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 64,
        "caption_channels": CONTEXT,
    }, _ltx),
    ("WanTransformer3DModel", {
        **BODY, "in_channels": CHANNELS, "out_channels": CHANNELS, "text_dim": CONTEXT,
        "freq_dim": 32, "ffn_dim": 128, "rope_max_seq_len": 32,
    }, _video()),
    ("CogVideoXTransformer3DModel", {
        **BODY, "in_channels": CHANNELS, "out_channels": CHANNELS, "time_embed_dim": 32,
        "text_embed_dim": CONTEXT, "sample_width": 8, "sample_height": 8, "sample_frames": 4,
        "temporal_compression_ratio": 1, "max_text_seq_length": WORDS,
    }, _video(channels_first=False)),
    ("LatteTransformer3DModel", {
        **BODY, "in_channels": CHANNELS, "sample_size": 8, "patch_size": 2, "video_length": 4,
        "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "cross_attention_dim": 64,
        "norm_elementwise_affine": False, "caption_channels": CONTEXT, "attention_bias": True,
        "activation_fn": "gelu-approximate",
    }, _video()),
    ("Lumina2Transformer2DModel", {
        "sample_size": 8, "in_channels": CHANNELS, "hidden_size": 48, "num_layers": 1,
        "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16,
        "axes_dim_rope": (4, 4, 4), "axes_lens": (32, 32, 32), "cap_feat_dim": CONTEXT,
    }, _lumina),
    ("PriorTransformer", {
        **BODY, "embedding_dim": CONTEXT, "num_embeddings": WORDS, "additional_embeddings": 4,
    }, _prior),
)  # fmt: skip


def _case(name: str, options: dict[str, Any], draw: Draw) -> Case:
    def build() -> nn.Module:
        model: nn.Module = getattr(diffusers, name.partition(" ")[0])(**options)
        return model

    shapes = (f"{key} {'x'.join(map(str, value.shape[1:]))}"
              for key, value in draw(1).items()
              if isinstance(value, torch.Tensor) and value.dim() > 2)  # fmt: skip
    return Case(name, "diffusion", build, draw, CHANNELS, size=", ".join(shapes), batch=2)


def suite() -> list[Case]:
    """All cases."""
    return [_case(*row) for row in ROWS]
