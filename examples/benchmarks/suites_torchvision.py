"""Every model of torchvision that is not quantized, and the ResNets for CIFAR."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import cifar_resnet
import torch
import torchvision
from suites import Case, tensor
from torch import Tensor, nn

SIDES = {  # where 64 pixels are too few
    "alexnet": 96,
    "squeezenet*": 96,
    "inception_v3": 299,
    "vit_h_14": 56,
    "maxvit_t": 224,
}
FEW = {  # of detection: few and certain boxes, so that the second stages see some
    "rcnn": {
        "rpn_pre_nms_top_n_test": 60,
        "rpn_post_nms_top_n_test": 12,
        "box_score_thresh": 0.0,
        "box_detections_per_img": 8,
    },
    "retinanet": {"score_thresh": 0.0, "topk_candidates": 40, "detections_per_img": 8},
    "fcos": {"score_thresh": 0.0, "topk_candidates": 40, "detections_per_img": 8},
    "ssd": {"score_thresh": 0.0, "topk_candidates": 40, "detections_per_img": 8},
}
VIDEO = {  # frames and side: small, usual
    "s3d": ((14, 224), (16, 224)),
    "mvit*": ((16, 64), (16, 64)),
    "swin3d*": ((8, 64), (16, 224)),
    "*": ((8, 64), (16, 112)),
}


def _matching(table: dict[str, Any], name: str, default: Any = None) -> Any:
    return next((v for key, v in table.items() if fnmatch.fnmatchcase(name, key)), default)


def _build(name: str, **options: Any) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, **options)


def _image(name: str) -> Case:
    full = 299 if name == "inception_v3" else 224
    side = _matching(SIDES, name, 64)
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False}
    if name.startswith("vit_"):
        options = {"image_size": side}
    return Case(
        name,
        "classification",
        lambda: _build(name, **options),
        tensor(3, side, side),
        1000,
        None if name.startswith("vit_") else tensor(3, full, full),
        size=f"{side}x{side}",
    )


def _segmentation(name: str) -> Case:
    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    return Case(
        name,
        "segmentation",
        lambda: _build(name, weights_backbone=None, **options),
        tensor(3, 64, 64),
        21,
        tensor(3, 224, 224),
        size="64x64",
    )


def _detection(name: str) -> Case:
    side = 300 if name.startswith("ssd300") else 320 if name.startswith("ssdlite") else 64
    options = next(dict(few) for key, few in FEW.items() if key in name)
    if side == 64:
        options |= {"min_size": 64, "max_size": 64}

    def build() -> nn.Module:
        return _build(name, weights_backbone=None, num_classes=7, **options)

    def draw(batch: int) -> tuple[list[Tensor]]:
        return ([torch.rand(3, side, side) for _ in range(batch)],)

    heads = ("*.cls_logits", "*.bbox_pred", "*.kps_score_lowres")
    return Case(
        name,
        "detection",
        build,
        draw,
        7,
        trains=False,
        size=f"{side}x{side}",
        head_names=heads,
    )


def _flow(name: str) -> Case:
    def draw(batch: int) -> dict[str, Any]:
        first, second = 2 * torch.rand(2, batch, 3, 128, 128) - 1  # as its transforms return
        return {"image1": first, "image2": second, "num_flow_updates": 2}

    return Case(name, "optical flow", lambda: _build(name), draw, 2, size="2 of 128x128")


def _video(name: str) -> Case:
    (frames, side), (full_frames, full_side) = _matching(VIDEO, name)

    def build() -> nn.Module:
        if not name.startswith("mvit"):
            return _build(name)
        # Attention over 25,000 tokens is too slow to verify: the same model for smaller images.
        module = torchvision.models.video.mvit
        make = partial(_sized, module._mvit, (side, side))
        with mock.patch.object(module, "_mvit", make):
            return _build(name)

    return Case(
        name,
        "video",
        build,
        tensor(3, frames, side, side),
        400,
        tensor(3, full_frames, full_side, full_side),
        size=f"{frames}x{side}x{side}",
    )


def _sized(make: Callable[..., nn.Module], size: tuple[int, int], **options: Any) -> nn.Module:
    return make(**{**options, "spatial_size": size})


def _cifar(depth: int) -> Case:
    build = cifar_resnet.resnet(depth)
    return Case(f"cifar_resnet{depth}", "CIFAR", build, tensor(3, 32, 32), 10, size="32x32")


def suite() -> list[Case]:
    """All cases: classification, segmentation, detection, optical flow, video, CIFAR."""
    models = torchvision.models
    return [
        *map(_image, models.list_models(module=models)),
        *map(_segmentation, models.list_models(module=models.segmentation)),
        *map(_detection, models.list_models(module=models.detection)),
        *map(_flow, models.list_models(module=models.optical_flow)),
        *map(_video, models.list_models(module=models.video)),
        *map(_cifar, (20, 32, 44, 56, 110)),
    ]
