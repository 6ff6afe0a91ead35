"""Gradual pruning in a Lightning ``Trainer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from graphprune.api import ChannelGraph
from graphprune.errors import InputError
from graphprune.training.pruner import Pruner
from graphprune.training.regularise import Regulariser
from graphprune.training.schedules import SparsityOf

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:  # an optional extra; the package can be imported without it
        Callback = object


class LightningPruning(Callback):
    """A :class:`~graphprune.training.Pruner` that Lightning drives.

    Channels are masked while the trainer fits and removed when training ends. Its state is in the
    checkpoints, so that a resumed fit goes on with the same masks. ``sparsity`` is logged.

    Args:
        schedule: a sparsity, a schedule, or any function step -> sparsity; a step is one of the
            optimizer.
        example_inputs: as for ``graphprune.trace``.
        module: the qualified name of the submodule to prune; by default the whole
            ``LightningModule``, which must then have a ``forward``.
        regulariser: makes a penalty from the graph, as ``lambda graph: Slimming(graph, 1e-4)``
            does; its gradients are added before each step of the optimizer.
        finish: remove the channels when training ends; otherwise call ``callback.pruner.finish()``.
        options: as for :class:`~graphprune.training.Pruner`.

    Raises:
        ImportError: Lightning is not installed.
    """

    def __init__(
        self,
        schedule: float | SparsityOf,
        example_inputs: Any = None,
        *,
        module: str = "",
        regulariser: Callable[[ChannelGraph], Regulariser] | None = None,
        finish: bool = True,
        **options: Any,
    ) -> None:
        if Callback is object:
            raise ImportError("LightningPruning needs Lightning: pip install lightning")
        self.schedule = schedule
        self.example_inputs = example_inputs
        self.module = module
        self.make_regulariser = regulariser
        self.regulariser: Regulariser | None = None
        self.finish = finish
        self.options = options
        self.pruner: Pruner | None = None
        self._pending: dict[str, Any] | None = None
        self._seen = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Trace the model, and go on from a checkpoint if there is one."""
        try:
            model = pl_module.get_submodule(self.module)
        except AttributeError as error:
            raise InputError(f"module={self.module!r} is no submodule: {error}") from None
        self.pruner = Pruner(
            model,
            self.example_inputs,
            trainer.optimizers,
            schedule=self.schedule,
            **self.options,
        )
        if self._pending is not None:
            self.pruner.load_state_dict(self._pending)
        if self.make_regulariser is not None:
            self.regulariser = self.make_regulariser(self.pruner.graph)
            self.regulariser.steps = self.pruner.steps
        self._seen = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: object, pl_module: object, optimizer: object
    ) -> None:
        """Add the gradients of the regulariser."""
        if self.regulariser is not None:
            self.regulariser.add_gradients()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step, if the optimizer made one."""
        if trainer.global_step == self._seen or self.pruner is None:
            return
        self._seen = trainer.global_step
        self.pruner.step()
        if self.regulariser is not None:
            self.regulariser.step()
        pl_module.log("sparsity", self.pruner.sparsity)

    def on_train_end(self, trainer: object, pl_module: object) -> None:
        """Remove the masked channels for good."""
        if self.finish and self.pruner is not None:
            self.pruner.finish()

    def state_dict(self) -> dict[str, object]:
        """For the checkpoint."""
        return {} if self.pruner is None else {"pruner": self.pruner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self._pending = state_dict.get("pruner")
