"""Lightning and the Trainer of transformers drive the same Pruner as a plain loop."""

import contextlib
import importlib
import logging
import warnings

import pytest
import torch
from support.loops import X, Y, build
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from graphprune.errors import InputError, PruningWarning
from graphprune.training import GroupLasso, Pruner, callbacks, cubic

SCHEDULE = cubic(0.5, end=6, frequency=2)


def plain(steps, accumulate=1, penalty=False, batch=4):
    """What the callbacks must do, as a loop."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    pruner = Pruner(model, X[:2], optimizer, schedule=SCHEDULE)
    lasso = GroupLasso(pruner.graph, 0.01)
    parts = list(zip(X.split(batch), Y.split(batch)))
    for step in range(steps):
        optimizer.zero_grad()
        for number in range(accumulate):
            x, y = parts[(step * accumulate + number) % len(parts)]
            (F.cross_entropy(model(x), y) / accumulate).backward()
        if penalty:
            lasso.add_gradients()
        optimizer.step()
        pruner.step()
    return model, pruner


def assert_same(model, wanted):
    for (name, ours), theirs in zip(model.named_parameters(), wanted.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=name)


# --- Lightning -------------------------------------------------------------------------------


@contextlib.contextmanager
def ours_alone():
    """What trainers warn of depends on their versions and on the machine."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, PruningWarning):
            warnings.warn(warning.message, stacklevel=2)


@pytest.fixture(scope="module")
def lightning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that Lightning imports
        package = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return package


@pytest.fixture
def fit(lightning, tmp_path):
    """Fit a Lightning module with a callback."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = build()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    def run(callback, epochs, ckpt=None, save=False, **options):
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=[callback], precision="64-true",
            default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, **options,
        )  # fmt: skip
        with ours_alone():
            trainer.fit(module, DataLoader(TensorDataset(X, Y), 4), ckpt_path=ckpt)
        if save:
            trainer.save_checkpoint(tmp_path / "run.ckpt")
        return module, trainer

    return run


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_prunes_as_a_plain_loop(fit, accumulate):
    callback = callbacks.LightningPruning(SCHEDULE, X[:2])
    module, trainer = fit(callback, 2 * accumulate, accumulate_grad_batches=accumulate)
    _, pruner = plain(8, accumulate)
    assert callback.pruner.history[:-1] == pruner.history
    assert callback.pruner.finished
    assert_same(module.net, pruner.finish())
    assert module.net.stem.out_channels == 4
    assert float(trainer.callback_metrics["sparsity"]) == 0.5


def test_lightning_prunes_a_submodule_under_a_penalty(fit):
    callback = callbacks.LightningPruning(
        SCHEDULE, X[:2], module="net", regulariser=lambda graph: GroupLasso(graph, 0.01),
        finish=False,
    )  # fmt: skip
    module, _ = fit(callback, 2)
    assert not callback.pruner.finished
    assert callback.regulariser.steps == 8
    assert_same(module.net, plain(8, penalty=True)[0])
    assert callback.pruner.finish() is module.net


def test_a_fit_of_lightning_is_resumed(fit, tmp_path):
    fit(callbacks.LightningPruning(SCHEDULE, X[:2], finish=False), 1, save=True)
    again = callbacks.LightningPruning(SCHEDULE, X[:2])
    module, _ = fit(again, 2, ckpt=tmp_path / "run.ckpt")
    _, pruner = plain(8)
    assert again.pruner.history[:-1] == pruner.history
    assert_same(module.net, pruner.finish())


def test_lightning_names_a_submodule_that_is_not_there(fit):
    with pytest.raises(InputError, match="module='body' is no submodule"):
        fit(callbacks.LightningPruning(0.5, X[:2], module="body"), 1)


# --- transformers ----------------------------------------------------------------------------


class Labelled(nn.Module):
    """A model as the Trainer wants it."""

    def __init__(self):
        super().__init__()
        self.net = build()

    def forward(self, x, labels=None):
        logits = self.net(x)
        return logits if labels is None else (F.cross_entropy(logits, labels), logits)


class Rows(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"x": X[index], "labels": Y[index]}


@pytest.fixture
def run(tmp_path):
    """Train with a callback; batches in order."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def train(callback, steps, resume=None, **options):
        model = Labelled()
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
            lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=0.0, use_cpu=True,
            report_to=[], disable_tqdm=True, seed=0, save_steps=4, logging_steps=4,
            optim="adamw_torch", **options,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        trainer = Trainer(
            model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[callback],
            optimizers=(optimizer, None),
        )  # fmt: skip
        with ours_alone():
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


EXAMPLE = {"x": X[:2]}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_prunes_as_a_plain_loop(run, accumulate):
    callback = callbacks.TrainerPruning(SCHEDULE, EXAMPLE)
    trainer = run(callback, 8, gradient_accumulation_steps=accumulate, save_strategy="no")
    _, pruner = plain(8, accumulate)
    assert callback.pruner.history[:-1] == pruner.history
    assert_same(trainer.model.net, pruner.finish())
    assert trainer.model.net.stem.out_channels == 4
    assert [log["sparsity"] for log in trainer.state.log_history if "loss" in log] == [
        SCHEDULE(4),
        0.5,
    ]


def test_the_trainer_prunes_under_a_penalty(run):
    callback = callbacks.TrainerPruning(
        SCHEDULE, EXAMPLE, regulariser=lambda graph: GroupLasso(graph, 0.01), finish=False
    )
    trainer = run(callback, 8, save_strategy="no")
    assert_same(trainer.model.net, plain(8, penalty=True)[0])


@pytest.mark.slow
def test_the_trainer_is_resumed(run, tmp_path):
    run(callbacks.TrainerPruning(SCHEDULE, EXAMPLE, finish=False), 4)
    assert (tmp_path / "checkpoint-4" / "graphprune.pt").is_file()
    again = callbacks.TrainerPruning(SCHEDULE, EXAMPLE)
    trainer = run(again, 8, resume=str(tmp_path / "checkpoint-4"))
    _, pruner = plain(8)
    assert again.pruner.history[:-1] == pruner.history
    assert_same(trainer.model.net, pruner.finish())

    (tmp_path / "checkpoint-4" / "graphprune.pt").unlink()
    with pytest.raises(InputError, match=r"goes on at step 4, but there is no .*graphprune\.pt"):
        run(callbacks.TrainerPruning(SCHEDULE, EXAMPLE), 8, resume=str(tmp_path / "checkpoint-4"))


def test_the_best_model_at_the_end_may_be_another(run):
    callback = callbacks.TrainerPruning(0.5, EXAMPLE)
    with pytest.warns(PruningWarning, match="may be from before the last masks"):
        run(callback, 4, load_best_model_at_end=True, eval_strategy="steps", eval_steps=4)
    assert callback.pruner.finished


# --- neither ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("home", "base", "name", "package"),
    [
        ("lightning", "Callback", "LightningPruning", "lightning"),
        ("huggingface", "TrainerCallback", "TrainerPruning", "transformers"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, home, base, name, package):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"graphprune.training.callbacks.{home}")
    monkeypatch.setattr(module, base, object)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        getattr(callbacks, name)(0.5)


def test_other_callbacks_are_not_there():
    assert sorted(callbacks.__all__) == ["LightningPruning", "TrainerPruning"]
    with pytest.raises(AttributeError, match="has no attribute 'KerasPruning'"):
        _ = callbacks.KerasPruning
