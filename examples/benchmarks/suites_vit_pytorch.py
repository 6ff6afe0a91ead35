"""Vision transformers of vit-pytorch, small and with random weights."""

from __future__ import annotations

import importlib
from typing import Any

from suites import Case, tensor

CLASSES = 7
FRAME = {"image_size": 32, "patch_size": 8, "num_classes": CLASSES}
BODY = {"dim": 64, "depth": 2, "heads": 4, "mlp_dim": 128}
PLAIN = {**FRAME, **BODY, "dim_head": 16}
IMAGE = (3, 32, 32)
WINDOWS = {
    "num_classes": CLASSES, "dim": 16, "depth": (1, 1, 2, 1), "heads": (1, 2, 4, 8),
}  # fmt: skip
CLIP = {
    "image_size": 32, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2,
    "num_classes": CLASSES, "dim": 64, "heads": 4, "mlp_dim": 128, "dim_head": 16,
}  # fmt: skip

SAME = {  # module: class, where all take the options of a plain vision transformer
    "vit": "ViT",
    "simple_vit": "SimpleViT",
    "deepvit": "DeepViT",
    "normalized_vit": "nViT",
    "parallel_vit": "ViT",
    "simple_flash_attn_vit": "SimpleViT",
    "simple_vit_attn_residual": "SimpleViTAttnResidual",
    "simple_vit_orthog_residual_update": "SimpleViT",
    "simple_vit_with_patch_dropout": "SimpleViT",
    "simple_vit_with_qk_norm": "SimpleViT",
    "simple_vit_with_register_tokens": "SimpleViT",
    "simple_vit_with_relative_proj_pos_bias": "SimpleViT",
    "simple_vit_with_value_residual": "SimpleViT",
    "vit_5": "ViT",
    "vit_for_small_dataset": "ViT",
    "vit_with_keel_post_ln": "ViT",
    "vit_with_patch_dropout": "ViT",
}

Options = dict[str, Any]
OTHER: dict[str, tuple[str, Options, tuple[int, ...]]] = {
    "simple_uvit": ("SimpleUViT", {**PLAIN, "depth": 4}, IMAGE),
    "cait": ("CaiT", {**PLAIN, "cls_depth": 1}, IMAGE),
    "xcit": ("XCiT", {**PLAIN, "cls_depth": 1}, IMAGE),
    "rvt": ("RvT", {**PLAIN, "dim_head": 8}, IMAGE),  # queries of the width of the tokens tie both
    "cct": ("CCT", {
        "img_size": 32, "embedding_dim": 64, "num_layers": 2, "num_heads": 4, "mlp_ratio": 2.0,
        "num_classes": CLASSES,
    }, IMAGE),
    "cross_vit": ("CrossViT", {
        "image_size": 48, "num_classes": CLASSES, "sm_dim": 32, "lg_dim": 48, "depth": 1,
        "sm_enc_heads": 2, "sm_enc_mlp_dim": 64, "sm_enc_dim_head": 16, "lg_enc_depth": 1,
        "lg_enc_heads": 4, "lg_enc_mlp_dim": 96, "lg_enc_dim_head": 16, "cross_attn_heads": 4,
        "cross_attn_dim_head": 16,
    }, (3, 48, 48)),
    "crossformer": ("CrossFormer", {
        "dim": (32, 64, 64, 64), "depth": (1, 1, 1, 1), "global_window_size": (4, 2, 2, 1),
        "local_window_size": 2, "num_classes": CLASSES,
    }, (3, 64, 64)),
    "cvt": ("CvT", {
        "num_classes": CLASSES, "s1_emb_dim": 16, "s2_emb_dim": 32, "s2_heads": 2, "s2_depth": 1,
        "s3_emb_dim": 48, "s3_heads": 3, "s3_depth": 1,
    }, (3, 64, 64)),
    "levit": ("LeViT", {
        "image_size": 64, "num_classes": CLASSES, "dim": (32, 48, 64), "depth": 1,
        "heads": (2, 3, 4), "mlp_mult": 2, "dim_key": 16, "dim_value": 16,
    }, (3, 64, 64)),
    "look_vit": ("LookViT", {
        "image_size": 48, "num_classes": CLASSES, "dim": 64, "depth": 2, "heads": 4,
        "dim_head": 16, "cross_attn_heads": 4, "cross_attn_dim_head": 16,
    }, (3, 48, 48)),
    "max_vit": ("MaxViT", {
        "num_classes": CLASSES, "dim": 32, "depth": (1, 1), "dim_head": 16, "window_size": 4,
    }, (3, 64, 64)),
    "mobile_vit": ("MobileViT", {
        "image_size": (64, 64), "dims": [32, 48, 64], "num_classes": CLASSES,
        "channels": [16, 16, 24, 24, 32, 32, 48, 48, 64, 64, 96], "depths": (1, 1, 1),
    }, (3, 64, 64)),
    "nest": ("NesT", {
        **FRAME, "patch_size": 4, "dim": 32, "heads": 2, "dim_head": 16, "num_hierarchies": 2,
        "block_repeats": (1, 1), "mlp_mult": 2,
    }, IMAGE),
    "pit": ("PiT", {**PLAIN, "depth": (1, 1)}, IMAGE),
    "regionvit": ("RegionViT", {
        "dim": (16, 32, 64, 64), "depth": (1, 1, 1, 1), "window_size": 2,
        "num_classes": CLASSES, "local_patch_size": 4,
    }, (3, 64, 64)),
    "scalable_vit": ("ScalableViT", {
        **WINDOWS, "reduction_factor": (8, 4, 2, 1), "window_size": (8, 4, None, None),
    }, (3, 64, 64)),
    "simple_vit_1d": ("SimpleViT", {
        "seq_len": 64, "patch_size": 8, "num_classes": CLASSES, **BODY, "dim_head": 16,
    }, (3, 64)),
    "simple_vit_3d": ("SimpleViT", {**CLIP, "depth": 2}, (3, 4, 32, 32)),
    "simple_vit_with_fft": ("SimpleViT", {**PLAIN, "freq_patch_size": 8}, IMAGE),
    "simple_vit_with_hyper_connections": ("SimpleViT", {
        **PLAIN, "num_residual_streams": 2,
    }, IMAGE),
    "t2t": ("T2TViT", {
        "image_size": 32, "num_classes": CLASSES, **BODY, "dim_head": 16,
        "t2t_layers": ((7, 4), (3, 2)),
    }, IMAGE),
    "twins_svt": ("TwinsSVT", {
        "num_classes": CLASSES, "s1_emb_dim": 16, "s1_local_patch_size": 4, "s1_global_k": 4,
        "s2_emb_dim": 32, "s2_local_patch_size": 4, "s2_global_k": 4,
        "s3_emb_dim": 48, "s3_local_patch_size": 2, "s3_global_k": 2, "s3_depth": 1,
        "s4_emb_dim": 64, "s4_local_patch_size": 2, "s4_global_k": 2, "s4_depth": 1,
    }, (3, 64, 64)),
    "vit_1d": ("ViT", {
        "seq_len": 64, "patch_size": 8, "num_classes": CLASSES, **BODY, "dim_head": 16,
    }, (3, 64)),
    "vit_3d": ("ViT", {**CLIP, "depth": 2}, (3, 4, 32, 32)),
    "vit_with_patch_merger": ("ViT", {**PLAIN, "patch_merge_num_tokens": 4}, IMAGE),
    "vivit": ("ViViT", {**CLIP, "spatial_depth": 1, "temporal_depth": 1}, (3, 4, 32, 32)),
}  # fmt: skip


def _case(module: str, name: str, options: Options, shape: tuple[int, ...]) -> Case:
    found = importlib.import_module(f"vit_pytorch.{module}")
    build = getattr(found, name)
    return Case(
        module,
        "vision",
        lambda: build(**options),
        tensor(*shape),
        CLASSES,
        size="x".join(map(str, shape[1:])),
        batch=2,
    )


def suite() -> list[Case]:
    """All cases."""
    same = [_case(module, name, PLAIN, IMAGE) for module, name in SAME.items()]
    return same + [_case(module, *row) for module, row in OTHER.items()]
