"""Ultralytics YOLO: shrink to a latency, fine-tune in its own trainer, resume, val and export.

Ultralytics is under AGPL-3.0; install it apart. Your own model: yolo.py best.pt data.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

import graphprune

WEIGHTS, DATA = sys.argv[1:] if len(sys.argv) == 3 else ("yolo11n.yaml", None)
HOME, SIDE, EPOCHS = Path("yolo").resolve(), 96, 20
SETTINGS = {"imgsz": SIDE, "batch": 16, "workers": 0, "device": "cpu", "verbose": False}
TRAIN = {"project": str(HOME), "exist_ok": True, "optimizer": "AdamW", "lr0": 2e-3, "mosaic": 0.0}


class SameModel(DetectionTrainer):
    """Goes on with the model of its checkpoint: the usual trainer builds that of the yaml anew."""

    def get_model(self, cfg=None, weights=None, verbose=True):
        return super().get_model(cfg, None, verbose) if weights is None else weights.float()


def predictions(out):
    """What the loss reads; the features beside them are for teachers, and would freeze the neck."""
    if isinstance(out, dict):
        return {name: predictions(value) for name, value in out.items() if name != "feats"}
    return out[0] if isinstance(out, tuple | list) else out


def drawn(place: Path) -> str:
    """Images of one square or disc on noise, with their boxes, as Ultralytics reads them."""
    random = np.random.default_rng(0)
    for number in range(144):
        split, kind = ("train", "train", "val")[number % 3], number % 2
        side = random.integers(24, 56)
        x, y = random.integers(0, SIDE - side, 2)
        image = Image.fromarray(random.integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8))
        pen = ImageDraw.Draw(image)
        (pen.rectangle, pen.ellipse)[kind]((x, y, x + side, y + side), ("orange", "cyan")[kind])
        for folder in ("images", "labels"):
            (place / split / folder).mkdir(parents=True, exist_ok=True)
        image.save(place / split / "images" / f"{number}.png")
        box = " ".join(str(v / SIDE) for v in (x + side / 2, y + side / 2, side, side))
        (place / split / "labels" / f"{number}.txt").write_text(f"{kind} {box}")
    head = f"path: {place}\ntrain: train/images\nval: val/images\n"
    (place / "data.yaml").write_text(f"{head}names: [square, disc]\n")
    return str(place / "data.yaml")


def interrupt(trainer):
    if trainer.epoch == EPOCHS // 2:
        raise KeyboardInterrupt


TRAIN["data"] = data = DATA or drawn(HOME / "data")
original = YOLO(WEIGHTS)
if WEIGHTS.endswith(".yaml"):  # trained from nothing
    original.train(name="original", epochs=EPOCHS, **SETTINGS, **TRAIN)
model, image = original.model.float(), torch.rand(1, 3, 320, 320)
graph = graphprune.trace(model, image, outputs=predictions)
small = graphprune.rebuild(model, graph.plan(target={"latency": 0.7}, round_to=8))
print(*small.graphprune_plan.notes, graphprune.verify(model, small, image), sep="\n")
for part in small.modules():  # the exporter runs another forward, which reads one more width
    if hasattr(part, "forward_split"):
        part.c = part.cv1.conv.out_channels // 2
(HOME / "plan.json").write_text(small.graphprune_plan.to_json())
del small.graphprune_plan  # then files load where graphprune is not installed
torch.save({"model": small, "train_args": {"task": "detect"}}, HOME / "small.pt")
tuned = YOLO(HOME / "small.pt")
tuned.add_callback("on_fit_epoch_end", interrupt)
try:
    tuned.train(trainer=SameModel, name="small", epochs=EPOCHS, **SETTINGS, **TRAIN)
except KeyboardInterrupt:
    tuned = YOLO(HOME / "small" / "weights" / "last.pt")
    tuned.train(trainer=SameModel, resume=True)
best = YOLO(tuned.trainer.best)  # a checkpoint holds the model itself, not its yaml
served = YOLO(best.export(format="onnx", imgsz=SIDE))
nets = {"original": original, "shrunk": YOLO(HOME / "small.pt"), "tuned": best, "onnx": served}
scores = {name: net.val(data=data, **SETTINGS).box.map50 for name, net in nets.items()}
print("mAP50", {name: round(float(score), 3) for name, score in scores.items()})
assert scores["shrunk"] < min(scores["tuned"], scores["onnx"])
