"""Gradual pruning of single weights in the user's own training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune

from graphprune.errors import InputError
from graphprune.ranks import Ranks
from graphprune.record.checks import check_model
from graphprune.record.tensors import mark, named_modules
from graphprune.training.ranks import unwrapped_model
from graphprune.training.schedules import Schedule, SparsityOf, as_schedule, sparsity_at
from graphprune.training.sparse import (
    SCOPES,
    layers_to_mask,
    make_permanent,
    prune_hook,
    sparsify,
    sparsity_of,
)


class SparsePruner:
    """Masks more and more single weights while a model trains, as a schedule says.

    Call :meth:`step` after each ``optimizer.step()`` and :meth:`finish` in the end. What
    :class:`Pruner` is for channels: Zhu and Gupta, "To prune, or not to prune", 2017. Masked
    weights do not come back, so that a schedule may not fall.

    Args:
        model: is trained by the user's loop; one inside ``DistributedDataParallel`` is found.
        schedule: a sparsity, a schedule, or any function step -> sparsity. The n-th call of
            :meth:`step` asks it for step n.
        scope: as for :func:`sparsify`.
        keep: as for :func:`sparsify`.
        process_group: of ``torch.distributed``; all ranks must mask the same weights.

    Raises:
        InputError: an argument is wrong, or no layer can be masked.

    Example:
        >>> import torch
        >>> from graphprune.training import SparsePruner, cubic
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = SparsePruner(net, schedule=cubic(0.75, end=4))
        >>> for _ in range(4):
        ...     sgd.zero_grad()
        ...     net(torch.randn(16, 4)).square().mean().backward()
        ...     sgd.step()
        ...     pruner.step()
        >>> int(pruner.finish()[0].weight.count_nonzero() + net[2].weight.count_nonzero())
        12
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: float | SparsityOf,
        scope: str = "global",
        keep: str | Iterable[str] = (),
        process_group: object = None,
    ) -> None:
        self.schedule = as_schedule(schedule)
        self.model = unwrapped_model(model)
        self.scope = scope
        self.keep = (keep,) if isinstance(keep, str) else tuple(keep)
        self.steps = 0
        self.sparsity = 0.0
        self.finished = False
        if scope not in SCOPES:
            raise InputError(f"scope must be one of {', '.join(SCOPES)}, not {scope!r}")
        self.ranks = Ranks(process_group)
        with self.ranks.together():
            known = repr(self.schedule) if isinstance(self.schedule, Schedule) else ""
            self.ranks.check("options and schedule", (known, scope, self.keep))
            check_model(self.model)
            layers_to_mask(self.model, self.keep)

    def step(self) -> None:
        """Call it after each ``optimizer.step()``: masks more weights when it is time.

        Raises:
            InputError: the schedule says no sparsity in [0, 1), or a smaller one than before.
            RankError: the ranks do not mask the same weights.
        """
        self.steps += 1
        if self.finished:
            return
        sparsity = sparsity_at(self.schedule, self.steps)
        if not isinstance(self.schedule, Schedule):
            self.ranks.check("step and sparsity", (self.steps, sparsity))
        if sparsity < self.sparsity:
            raise InputError(
                f"the schedule falls from {self.sparsity:.3g} to {sparsity:.3g} at step "
                f"{self.steps}, but masked weights do not come back"
            )
        if sparsity > self.sparsity:
            with self.ranks.together():
                sparsify(self.model, sparsity, scope=self.scope, keep=self.keep)
                self.sparsity = sparsity
                masks = {name: mask.double() for name, mask in self.masks.items()}
                self.ranks.check("the weights to mask", (self.steps, sparsity, mark(masks)))

    def finish(self) -> nn.Module:
        """Write the zeros into the weights; a second call does nothing."""
        self.finished = True
        return make_permanent(self.model)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks by the name of the weight, true where it stays."""
        return {
            f"{name}.weight": module.get_buffer("weight_mask").bool()
            for name, module in named_modules(self.model)
            if prune_hook(module) is not None
        }

    def state_dict(self) -> dict[str, object]:
        """What a resumed run needs besides the model and the optimizer."""
        found = {"steps": self.steps, "sparsity": self.sparsity, "finished": self.finished}
        return {**found, "masks": {name: mask.clone() for name, mask in self.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: load the pruner's first, then the model's and the optimizer's.

        Raises:
            InputError: not a state of a sparse pruner, or its masks do not fit the model.
        """
        missing = set(self.state_dict()) - set(state)
        if missing:
            names = ", ".join(sorted(missing))
            raise InputError(f"this is no state of a SparsePruner: {names} missing")
        modules = dict(named_modules(self.model))
        for name, mask in state["masks"].items():
            weight = getattr(modules.get(name.removesuffix(".weight")), "weight", None)
            if weight is None or weight.shape != mask.shape:
                raise InputError(f"the state has a mask of {name!r} that fits no layer")
        make_permanent(self.model)
        for name, mask in state["masks"].items():
            module = modules[name.removesuffix(".weight")]
            prune.custom_from_mask(module, "weight", mask.to(module.weight.device))
        self.steps, self.sparsity = state["steps"], state["sparsity"]
        self.finished = state["finished"]

    def __str__(self) -> str:
        """The schedule and where it stands."""
        name = type(self.model).__name__
        state = f"{sparsity_of(self.model).fraction:.1%} of the weights are zero"
        return f"SparsePruner of {name}, step {self.steps}\n{self.schedule}\n{state}"
