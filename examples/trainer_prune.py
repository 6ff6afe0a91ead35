"""Gradual pruning of a tiny vision transformer in the Trainer of transformers, by a callback."""

from __future__ import annotations

import tempfile

import torch
import transformers
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

from graphprune.training import cubic
from graphprune.training.callbacks import TrainerPruning

transformers.logging.set_verbosity_error()
transformers.set_seed(0)


class Rows(Dataset):
    """Images of 8 x 8 pixels and their labels, by name."""

    def __init__(self, rows: slice) -> None:
        digits = load_digits()
        self.pixels = torch.tensor(digits.images[rows] / 16).float()[:, None]
        self.labels = torch.tensor(digits.target[rows])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


config = transformers.ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    num_labels=10,
)
model = transformers.ViTForImageClassification(config)
train, test = Rows(slice(0, 1400)), Rows(slice(1400, None))
before = sum(p.numel() for p in model.parameters())


def accuracy(net: nn.Module) -> float:
    with torch.no_grad():
        return float((net.eval()(test.pixels).logits.argmax(1) == test.labels).float().mean())


with tempfile.TemporaryDirectory() as folder:
    callback = TrainerPruning(
        cubic(0.5, begin=80, end=200, frequency=10),
        {"pixel_values": train.pixels[:2]},
        keep=["*embeddings*", "*attention*"],  # only sizes that a ViTConfig can say
    )
    arguments = transformers.TrainingArguments(
        folder,
        num_train_epochs=10,
        per_device_train_batch_size=50,
        learning_rate=3e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=train, callbacks=[callback])
    trainer.train()
    trainer.save_model(folder)  # the config says the new sizes
    again = transformers.ViTForImageClassification.from_pretrained(folder)

after = sum(p.numel() for p in model.parameters())
print(f"{before:,} -> {after:,} parameters, accuracy {accuracy(model):.1%}")
assert again.config.intermediate_size == 48
assert accuracy(again) == accuracy(model) > 0.5
