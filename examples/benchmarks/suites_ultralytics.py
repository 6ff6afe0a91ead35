"""Detectors, segmenters and classifiers of ultralytics from their yaml files, random weights.

Ultralytics is under AGPL-3.0: it is installed apart, and nothing of it is in this package.
"""

from __future__ import annotations

import importlib
from typing import Any

from suites import Case, tensor
from torch import nn

CLASSES = 7
ROWS = (  # yaml, class of ultralytics.nn.tasks, side
    ("yolov3-tiny.yaml", "DetectionModel", 64),
    ("yolov5n.yaml", "DetectionModel", 64),
    ("yolov6n.yaml", "DetectionModel", 64),
    ("yolov8n.yaml", "DetectionModel", 64),
    ("yolov8n-ghost.yaml", "DetectionModel", 64),
    ("yolov8n-p2.yaml", "DetectionModel", 64),
    ("yolov9t.yaml", "DetectionModel", 64),
    ("yolov10n.yaml", "DetectionModel", 64),
    ("yolo11n.yaml", "DetectionModel", 64),
    ("yolo12n.yaml", "DetectionModel", 64),
    ("yolo26n.yaml", "DetectionModel", 64),
    ("yolov8n-seg.yaml", "SegmentationModel", 64),
    ("yolo11n-seg.yaml", "SegmentationModel", 64),
    ("yolo26n-seg.yaml", "SegmentationModel", 64),
    ("yolov8n-pose.yaml", "PoseModel", 64),
    ("yolo11n-pose.yaml", "PoseModel", 64),
    ("yolov8n-obb.yaml", "OBBModel", 64),
    ("yolo11n-obb.yaml", "OBBModel", 64),
    ("yolov8n-cls.yaml", "ClassificationModel", 64),
    ("yolo11n-cls.yaml", "ClassificationModel", 64),
    ("yolo12n-cls.yaml", "ClassificationModel", 64),
    ("yolov8n-rtdetr.yaml", "RTDETRDetectionModel", 64),
)


def _heads(out: Any) -> Any:
    """The predictions: in train mode those that the loss reads, without the features."""
    if isinstance(out, dict):
        return {name: _heads(value) for name, value in out.items() if name != "feats"}
    return out[0] if isinstance(out, tuple | list) else out


def _case(file: str, name: str, side: int) -> Case:
    def build() -> nn.Module:
        tasks: Any = importlib.import_module("ultralytics.nn.tasks")
        model: nn.Module = getattr(tasks, name)(file, ch=3, nc=CLASSES, verbose=False)
        return model

    return Case(
        file.removesuffix(".yaml"),
        "detection",
        build,
        tensor(3, side, side),
        CLASSES,
        size=f"{side}x{side}",
        batch=2,
        counts=_heads,
    )


def suite() -> list[Case]:
    """All cases."""
    return [_case(*row) for row in ROWS]
