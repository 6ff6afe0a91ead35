"""Back to a point early in training: weights, learning rate, or both."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.api import rebuild
from graphprune.arguments import as_path
from graphprune.errors import CheckpointError, InputError, PlanError
from graphprune.plan.plan import plan_of
from graphprune.record.checks import check_model
from graphprune.record.copying import copy_module
from graphprune.record.masked_names import mask_hooks
from graphprune.record.tensors import fingerprint, named_tensors
from graphprune.training.optimizers import check_optimizer
from graphprune.training.ranks import unwrapped_model

FORMAT = "graphprune-rewind-point"


class RewindPoint:
    """The weights of a model at a step early in training, and the learning rate there.

    Weight rewinding sets what is left of a pruned model back to these weights, and trains again
    from there (Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML
    2020). Learning-rate rewinding keeps the trained weights, and trains again with the learning
    rates from there on (Renda et al., "Comparing Rewinding and Fine-tuning in Neural Network
    Pruning", ICLR 2020).

    Args:
        model: as it is at the point; it is copied.
        optimizer: whose learning rates (and momenta, betas, weight decays) are kept.
        scheduler: whose state is kept.
        step: where the point is; for the user.

    Raises:
        InputError: the optimizer has none of the model's parameters.
        ModelError: as for ``graphprune.trace``.

    Example:
        >>> import torch, graphprune
        >>> from graphprune.training import RewindPoint
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> point = RewindPoint(net, step=0)
        >>> first = net[0].weight.detach().clone()
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> net(torch.ones(1, 4)).sum().backward()
        >>> sgd.step()
        >>> small = graphprune.rebuild(net, 0.5)
        >>> kept = [slot.kept for slot in small.graphprune_plan.slots if slot.tensor == "0.weight"]
        >>> torch.equal(point.rewind_weights(small)[0].weight, first[list(kept[0])])
        True
    """

    def __init__(
        self, model: nn.Module, optimizer: Any = None, scheduler: Any = None, *, step: int = 0
    ) -> None:
        inner = unwrapped_model(model)
        check_model(inner)
        self.model = copy_module(inner, {})
        self.step = step
        self.groups: list[dict[str, Any]] = []
        if optimizer is not None:
            optimizer = check_optimizer(optimizer, inner)
            self.groups = [_options(group) for group in optimizer.param_groups]
        self.scheduler = None if scheduler is None else copy.deepcopy(scheduler.state_dict())

    def rewind_weights(self, small: nn.Module) -> nn.Module:
        """Set the weights and buffers of a pruned model back to the point, in place.

        Args:
            small: the model of the point, or a smaller one made from it by ``rebuild``, or either
                of them with masks of ``torch.nn.utils.prune``, which stay.

        Returns:
            The same model. Optimizers hold the same parameters as before; their momentum is that of
            the weights that are gone, so make a new one.

        Raises:
            PlanError: the model was made from another architecture.
        """
        inner = unwrapped_model(small)
        plan = plan_of(inner)
        source = self.model
        if plan is not None and plan != plan_of(self.model):
            source = rebuild(self.model, plan)
        tensors = {_plain(name): tensor for name, tensor in named_tensors(source)}
        pairs = []
        for name, tensor in named_tensors(inner):
            if name.endswith("_mask") and _plain(f"{name[:-5]}_orig") in tensors:
                continue
            old = tensors.get(_plain(name))
            if old is None or old.shape != tensor.shape:
                raise PlanError(
                    f"{name!r} is {list(tensor.shape)} in the model and "
                    f"{'nothing' if old is None else list(old.shape)} at the rewind point: the "
                    "model was not made from the one at the point by rebuild and masks"
                )
            pairs.append((tensor, old))
        with torch.no_grad():
            for tensor, old in pairs:
                tensor.copy_(old)
                tensor.grad = None
        for module in inner.modules():
            _recompute(module)
        return small

    def rewind_rate(self, optimizer: Any, scheduler: Any = None) -> None:
        """Set learning rates (and other options of the groups) and a scheduler back to the point.

        Args:
            optimizer: of the pruned model, old or new, with as many parameter groups as at the
                point. Its parameters and state stay.
            scheduler: of the same kind as at the point.

        Raises:
            InputError: the point holds no optimizer or scheduler, or the groups are others.
        """
        if not self.groups:
            raise InputError("the point has no learning rate: RewindPoint(model, optimizer)")
        if len(optimizer.param_groups) != len(self.groups):
            raise InputError(
                f"the optimizer has {len(optimizer.param_groups)} parameter groups, at the point "
                f"there were {len(self.groups)}: make the groups as they were then"
            )
        if scheduler is not None and self.scheduler is None:
            raise InputError("the point has no scheduler: RewindPoint(model, optimizer, scheduler)")
        if scheduler is not None:
            scheduler.load_state_dict(copy.deepcopy(self.scheduler))
        for group, known in zip(optimizer.param_groups, self.groups):
            group.update(copy.deepcopy(known))

    def save(self, path: str | Path) -> Path:
        """Write the point to a file (with ``torch.save``), whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        path = as_path(path)
        content = {
            "format": FORMAT,
            "step": self.step,
            "architecture": fingerprint(self.model),
            "tensors": {name: tensor.detach() for name, tensor in named_tensors(self.model)},
            "groups": self.groups,
            "scheduler": self.scheduler,
        }
        part = path.with_name(f".{path.name}.part")
        try:
            torch.save(content, part)
            os.replace(part, path)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot write {str(path)!r}: {error}") from error
        return path

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> RewindPoint:
        """Read a point back.

        Args:
            path: what :meth:`save` wrote; nothing in it is executed.
            model: of the architecture at the point; it is not touched.

        Raises:
            CheckpointError: the file is damaged or no rewind point.
            PlanError: the model has another architecture.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"cannot read {str(path)!r}: {error}") from None
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise CheckpointError(f"{str(path)!r} is no rewind point: pass what save wrote")
        if content["architecture"] != fingerprint(unwrapped_model(model)):
            raise PlanError("the rewind point belongs to another architecture")
        point = cls(model, step=content["step"])
        with torch.no_grad():
            for name, tensor in named_tensors(point.model):
                tensor.copy_(content["tensors"][name])
        point.groups, point.scheduler = content["groups"], content["scheduler"]
        return point


def _options(group: Mapping[str, object]) -> dict[str, object]:
    """The options of a parameter group, without its parameters."""
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


def _plain(name: str) -> str:
    """The name of a parameter, whether it is masked or not."""
    return name.removesuffix("_orig")


def _recompute(module: nn.Module) -> None:
    """Masked weights are computed before each call; between calls they are what was left there."""
    for hook in mask_hooks(module):
        value: Tensor = hook.apply_mask(module)
        setattr(module, hook._tensor_name, value.detach())
