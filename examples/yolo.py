"""Ultralytics YOLO: shrink to a latency, fine-tune in its own trainer, resume, val and export.

Ultralytics is under AGPL-3.0; install it apart. Your own model: yolo.py best.pt data.yaml
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
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
    """Images of one orange or blue square on noise, with its box, as Ultralytics reads them."""
    random = np.random.default_rng(0)
    for number in range(144):
        kind, side = number % 2, random.integers(24, 56)
        x, y = random.integers(0, SIDE - side, 2)
        pixels = random.integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8)
        pixels[y : y + side, x : x + side] = ((255, 150, 0), (0, 150, 255))[kind]
        folder = place / ("train", "train", "val")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        box = " ".join(str(v / SIDE) for v in (x + side / 2, y + side / 2, side, side))
        (folder / f"{number}.txt").write_text(f"{kind} {box}")
    (place / "data.yaml").write_text(f"path: {place}\ntrain: train\nval: val\nnames: [a, b]\n")
    return str(place / "data.yaml")


TRAIN["data"] = data = DATA or drawn(HOME / "data")
original = YOLO(WEIGHTS)
if WEIGHTS.endswith(".yaml"):  # trained from nothing
    original.train(name="original", epochs=EPOCHS, **SETTINGS, **TRAIN)
model, image = original.model.float(), torch.rand(1, 3, 320, 320)
graph = graphprune.trace(model, image, outputs=predictions)
small = graphprune.rebuild(model, graph.plan(target={"latency": 0.7}, round_to=8))
print(*small.graphprune_plan.notes, graphprune.verify(model, small, image), sep="\n")
for part in (part for part in small.modules() if hasattr(part, "forward_split")):
    part.c = part.cv1.conv.out_channels // 2  # read by that forward, which the exporter runs
(HOME / "plan.json").write_text(small.graphprune_plan.to_json())
del small.graphprune_plan  # then files load where graphprune is not installed
torch.save({"model": small, "train_args": {"task": "detect"}}, HOME / "small.pt")
tuned = YOLO(HOME / "small.pt")
tuned.add_callback("on_fit_epoch_end", lambda run: run.epoch == EPOCHS // 2 and sys.exit())
try:
    tuned.train(trainer=SameModel, name="small", epochs=EPOCHS, **SETTINGS, **TRAIN)
except SystemExit:  # as if the power had failed
    tuned = YOLO(HOME / "small" / "weights" / "last.pt")
    tuned.train(trainer=SameModel, resume=True)
best = YOLO(tuned.trainer.best)  # a checkpoint holds the model itself, not its yaml
served = YOLO(best.export(format="onnx", imgsz=SIDE))
nets = {"original": original, "shrunk": YOLO(HOME / "small.pt"), "tuned": best, "onnx": served}
scores = {name: net.val(data=data, **SETTINGS).box.map50 for name, net in nets.items()}
print("mAP50", {name: round(float(score), 3) for name, score in scores.items()})
assert scores["shrunk"] < min(scores["tuned"], scores["onnx"])
