"""A small transformer that no config says: the Trainer resumes from a checkpoint."""

from __future__ import annotations

import tempfile
import warnings

import torch
import transformers
from torch import Tensor

import graphprune

transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore")  # that the config does not say the sizes
transformers.set_seed(0)
config = transformers.BertConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    num_labels=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
model = transformers.BertForSequenceClassification(config)
rows = torch.randint(5, 40, (64, 8))
data = [{"input_ids": row, "labels": row[0] % 2} for row in rows]
small = graphprune.rebuild(model, 0.4, {"input_ids": rows[:2]}, scope="global")


def trainer(net: torch.nn.Module, folder: str, steps: int) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_steps=10,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return transformers.Trainer(net, arguments, train_dataset=data)


def logits(net: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(rows).logits


with tempfile.TemporaryDirectory() as folder:
    trainer(small, folder, 20).train()  # checkpoints after 10 and 20 steps
    checkpoint = f"{folder}/checkpoint-10"
    again = graphprune.from_pretrained(checkpoint)  # the small model, as it was then
    trainer(again, folder, 20).train(resume_from_checkpoint=checkpoint)
    auto = transformers.AutoModelForSequenceClassification.from_pretrained(
        f"{folder}/checkpoint-20", trust_remote_code=True
    )

print(f"{model.num_parameters():,} -> {again.num_parameters():,} parameters")
assert torch.allclose(logits(again), logits(small), atol=1e-4)
assert torch.allclose(logits(auto), logits(again), atol=1e-4)
