"""Gradual pruning in the ``Trainer`` of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphprune.api import ChannelGraph
from graphprune.errors import InputError, warn
from graphprune.training.pruner import Pruner
from graphprune.training.regularise import Regulariser
from graphprune.training.schedules import SparsityOf

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    try:
        from transformers import TrainerCallback
    except ImportError:  # an optional extra; the package can be imported without it
        TrainerCallback = object

FILE = "graphprune.pt"


class TrainerPruning(TrainerCallback):
    """A :class:`~graphprune.training.Pruner` that the Trainer of transformers drives.

    Channels are masked while it trains and removed when training ends: ``trainer.model`` is small
    then, its config follows, and ``trainer.save_model`` writes the small model. The state of the
    pruner is written into each checkpoint folder, where ``resume_from_checkpoint`` finds it.

    Args:
        schedule: a sparsity, a schedule, or any function step -> sparsity; a step is one of the
            optimizer.
        example_inputs: as for ``graphprune.trace``; a dict of keyword arguments without labels.
        regulariser: makes a penalty from the graph, such as ``lambda graph: GroupLasso(graph,
            1e-4)``; its gradients are added before each step of the optimizer.
        finish: remove the channels when training ends; otherwise call ``callback.pruner.finish()``.
        options: as for :class:`~graphprune.training.Pruner`.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(
        self,
        schedule: float | SparsityOf,
        example_inputs: Any = None,
        *,
        regulariser: Callable[[ChannelGraph], Regulariser] | None = None,
        finish: bool = True,
        **options: Any,
    ) -> None:
        if TrainerCallback is object:
            raise ImportError("TrainerPruning needs transformers: pip install transformers")
        self.schedule = schedule
        self.example_inputs = example_inputs
        self.make_regulariser = regulariser
        self.regulariser: Regulariser | None = None
        self.finish = finish
        self.options = options
        self.pruner: Pruner | None = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Trace the model, and go on from a checkpoint if there is one."""
        if args.load_best_model_at_end:
            warn(
                "load_best_model_at_end brings back the weights of a checkpoint, which may be from "
                "before the last masks: the channels masked at the end are removed from them"
            )
        self.pruner = Pruner(
            model, self.example_inputs, optimizer, schedule=self.schedule, **self.options
        )
        if state.global_step:
            file = _folder(args, state) / FILE
            if not file.is_file():
                raise InputError(
                    f"training goes on at step {state.global_step}, but there is no {file}: resume "
                    "from a checkpoint that was written with this callback"
                )
            known = torch.load(file, map_location=args.device, weights_only=True)
            self.pruner.load_state_dict(known)
        if self.make_regulariser is not None:
            self.regulariser = self.make_regulariser(self.pruner.graph)
            self.regulariser.steps = self.pruner.steps

    def on_pre_optimizer_step(
        self, args: object, state: object, control: object, **_: object
    ) -> None:
        """Add the gradients of the regulariser."""
        if self.regulariser is not None:
            self.regulariser.add_gradients()

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        """Count a step; the Trainer calls this once for each step of the optimizer."""
        if self.pruner is not None:
            self.pruner.step()
        if self.regulariser is not None:
            self.regulariser.step()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Say how sparse the model is."""
        if self.pruner is not None and logs is not None:
            logs["sparsity"] = self.pruner.sparsity
            if state.log_history:  # which has a copy of them
                state.log_history[-1]["sparsity"] = self.pruner.sparsity

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the state of the pruner beside the checkpoint."""
        if self.pruner is not None and state.is_world_process_zero:
            torch.save(self.pruner.state_dict(), _folder(args, state) / FILE)

    def on_train_end(self, args: object, state: object, control: object, **_: object) -> None:
        """Remove the masked channels for good."""
        if self.finish and self.pruner is not None:
            self.pruner.finish()


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
