"""Decoders of segmentation-models-pytorch on small encoders, with random weights."""

from __future__ import annotations

from typing import Any

import segmentation_models_pytorch as smp
from suites import Case, tensor

CLASSES = 5
SIDE, LARGE = 64, 128  # the pyramid of PAN pools four times more
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Unet", "resnet18", {}),
    ("Unet", "mobilenet_v2", {"decoder_attention_type": "scse"}),
    ("Unet", "efficientnet-b0", {}),
    ("Unet", "timm-skresnet18", {}),
    ("Unet", "mit_b0", {}),
    ("Unet", "tu-resnet10t", {"aux_params": {"classes": 3, "dropout": None}}),
    ("UnetPlusPlus", "resnet18", {}),
    ("MAnet", "resnet18", {}),
    ("Linknet", "resnet18", {}),
    ("FPN", "resnet18", {}),
    ("FPN", "densenet121", {}),
    ("PSPNet", "resnet18", {}),
    ("PAN", "resnet18", {}),
    ("DeepLabV3", "resnet18", {}),
    ("DeepLabV3Plus", "mobilenet_v2", {}),
    ("UPerNet", "resnet18", {}),
    ("Segformer", "mit_b0", {}),
    ("DPT", "tu-vit_tiny_patch16_224", {"dynamic_img_size": True}),
)


def _case(architecture: str, encoder: str, options: dict[str, Any]) -> Case:
    side = LARGE if architecture == "PAN" else SIDE
    return Case(
        f"{architecture} {encoder}",
        "segmentation",
        lambda: getattr(smp, architecture)(
            encoder, encoder_weights=None, in_channels=3, classes=CLASSES, **options
        ),
        tensor(3, side, side),
        CLASSES,
        size=f"{side}x{side}",
        batch=2,  # the pooled branch of several heads normalises one place per image
    )


def suite() -> list[Case]:
    """All cases."""
    return [_case(*row) for row in ROWS]
