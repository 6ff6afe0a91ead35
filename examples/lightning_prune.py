"""Gradual pruning in a Lightning Trainer, by a callback."""

from __future__ import annotations

import logging
import warnings

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that Lightning imports
    import lightning.pytorch as pl

import graphprune
from graphprune.training import cubic
from graphprune.training.callbacks import LightningPruning

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]


class Digits(pl.LightningModule):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            *(nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Conv2d(24, 48, 3, padding=1),
            *(nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(48, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


pl.seed_everything(0, verbose=False)
model = Digits()
loader = DataLoader(TensorDataset(images[train], labels[train]), 100, shuffle=True)
callback = LightningPruning(cubic(0.5, begin=28, end=84, frequency=7), images[:2])
silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = pl.Trainer(
    max_epochs=10, accelerator="cpu", callbacks=[callback], enable_checkpointing=False, **silent
)
trainer.fit(model, loader)

with torch.no_grad():
    hits = (model.eval()(images[test]).argmax(1) == labels[test]).float().mean()
print(callback.pruner)
print(f"{graphprune.measure(model, images[:1])}\naccuracy {hits:.1%}")
assert model.net[0].out_channels == 12
for weight, state in trainer.optimizers[0].state.items():
    assert state["exp_avg"].shape == weight.shape, "the optimizer's state left with the channels"
assert hits > 0.5
