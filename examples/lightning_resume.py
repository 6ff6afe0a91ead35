"""A LightningModule that is made from its hyperparameters, and read back small."""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that Lightning imports
    import lightning.pytorch as pl

import graphprune

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Net(pl.LightningModule):
    """The two hooks let checkpoints hold the plan, and follow it before weights are loaded."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        plan = getattr(self.net, "graphprune_plan", None)
        if plan is not None:
            checkpoint["plan"] = plan.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "plan" in checkpoint and not hasattr(self.net, "graphprune_plan"):
            plan = graphprune.Plan.from_json(checkpoint["plan"])
            graphprune.rebuild(self.net, plan, inplace=True)


def trainer(folder: str, epochs: int) -> pl.Trainer:
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder,
        enable_checkpointing=False, **silent,
    )  # fmt: skip


pl.seed_everything(0, verbose=False)
x = torch.randn(64, 8)
loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 16)
model = Net()
model.net = graphprune.rebuild(model.net, 0.5, x[:2])

with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/small.ckpt"
    first = trainer(folder, 2)
    first.fit(model, loader)
    first.save_checkpoint(path)
    loaded = Net.load_from_checkpoint(path)
    resumed = Net()  # of the original's size: the checkpoint makes it small
    trainer(folder, 4).fit(resumed, loader, ckpt_path=path)

print(f"{model.net[0].out_features} of {Net().net[0].out_features} channels")
assert torch.equal(loaded.eval()(x), model.eval()(x))
assert resumed.net[0].out_features == 16
