"""Penalties that drive channels to zero before they are removed.

Each can be used in two ways: add :meth:`Regulariser.loss` to the loss of the task, or call
:meth:`Regulariser.add_gradients` between ``backward`` and ``optimizer.step()``. Both give the same
gradients; the second leaves the loss, and what is reported of it, alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.api import ChannelGraph
from graphprune.arguments import is_number
from graphprune.channels.analysis import Group, Member
from graphprune.criteria.slots import by_channel, members
from graphprune.errors import InputError
from graphprune.plan.plan import Plan
from graphprune.record.checks import check_model
from graphprune.record.tensors import named_tensors

Strength = float | Callable[[int], float]


class Regulariser(ABC):
    """A penalty on the weights of a model; ``strength`` is a number or a function of the step.

    Attributes:
        steps: how often :meth:`step` was called.
    """

    def __init__(self, model: nn.Module, strength: Strength) -> None:
        check_model(model)
        self.model = model
        self.strength = strength
        self.steps = 0
        self._shapes = {name: tensor.shape for name, tensor in named_tensors(model)}
        self.present_strength()

    @abstractmethod
    def penalty(self, tensors: dict[str, Tensor]) -> Tensor:
        """The penalty at strength 1: a scalar; differentiable in the parameters by name."""

    def loss(self) -> Tensor:
        """The term to add to the loss of the task: a scalar.

        Raises:
            InputError: channels were removed from the model since.
        """
        return self.present_strength() * self.penalty(self._tensors())

    def add_gradients(self, scale: float = 1.0) -> None:
        """Add the gradients of :meth:`loss` to ``.grad``; call it between backward and step.

        Args:
            scale: of the gradients that are there, where a gradient scaler has not unscaled them.
        """
        with torch.enable_grad():
            tensors = self._tensors()
            wanted = [t for t in tensors.values() if t.requires_grad]
            loss = self.present_strength() * self.penalty(tensors)
            if not loss.requires_grad:
                return
            gradients = torch.autograd.grad(loss * scale, wanted, allow_unused=True)
        for parameter, gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                found = parameter.grad
                parameter.grad = gradient if found is None else found.add_(gradient)

    def step(self) -> None:
        """Count a step, for a strength that depends on it."""
        self.steps += 1

    def present_strength(self) -> float:
        """The strength at this step.

        Raises:
            InputError: it is negative or not finite.
        """
        value: Any = self.strength(self.steps) if callable(self.strength) else self.strength
        if not is_number(value, 0) or value == math.inf:
            raise InputError(
                f"strength must be a number of at least 0, or a function step -> such a number; "
                f"got {value!r} at step {self.steps}"
            )
        return float(value)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = dict(named_tensors(self.model))
        for name, shape in self._shapes.items():
            if name not in tensors or tensors[name].shape != shape:
                raise InputError(
                    f"{name!r} has changed its shape: after channels were removed, trace the model "
                    "again and make a new regulariser"
                )
        return tensors


def _model_of(graph: object) -> nn.Module:
    if not isinstance(graph, ChannelGraph):
        raise InputError(
            "graph must be what graphprune.trace(model, example_inputs) returns; got "
            f"{type(graph).__name__}"
        )
    return graph.model


class Slimming(Regulariser):
    """L1 on the scales of batch norms whose channels can leave.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017;
    prune with ``criterion="bn_scale"`` afterwards.

    Args:
        graph: from ``graphprune.trace``.
        strength: of the penalty, 1e-5 to 1e-3 in the paper.

    Raises:
        InputError: no batch norm scales a removable channel, or the strength is out of range.

    Example:
        >>> import torch, graphprune
        >>> from graphprune.training import Slimming
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        >>> slimming = Slimming(graphprune.trace(net, torch.ones(2, 4)), strength=0.1)
        >>> net(torch.ones(2, 4)).sum().backward()
        >>> slimming.add_gradients()
        >>> float(slimming.loss().detach())
        0.8...
    """

    def __init__(self, graph: ChannelGraph, strength: Strength) -> None:
        super().__init__(_model_of(graph), strength)
        self.names = tuple(dict.fromkeys(m.slot.tensor for g in graph.groups for m in _scales(g)))
        if not self.names:
            raise InputError(
                "no batch norm scales a channel that can be removed: use GroupLasso instead"
            )

    def penalty(self, tensors: dict[str, Tensor]) -> Tensor:
        """The sum of the absolute scales."""
        return torch.stack([tensors[name].abs().sum() for name in self.names]).sum()


class GroupLasso(Regulariser):
    """The sum of the norms of all channels, each with every weight that leaves with it.

    Coupled channels are one vector: the filters that write them, the weights that read them, and
    the scales of norms between (Yuan and Lin, "Model selection and estimation in regression with
    grouped variables", 2006; Wen et al., "Learning Structured Sparsity", NeurIPS 2016). Prune with
    ``criterion="group_norm"`` afterwards, which scores by the same norm.

    Args:
        graph: from ``graphprune.trace``.
        strength: of the penalty.

    Raises:
        InputError: no channel can be removed, or the strength is out of range.

    Example:
        >>> import torch, graphprune
        >>> from graphprune.training import GroupLasso
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> lasso = GroupLasso(graphprune.trace(net), strength=1e-3)
        >>> loss = net(torch.ones(1, 4)).sum() + lasso.loss()
    """

    def __init__(self, graph: ChannelGraph, strength: Strength) -> None:
        super().__init__(_model_of(graph), strength)
        self.groups = graph.groups
        if not self.groups:
            raise InputError("no channel of this model can be removed: print(graph) says why")

    def penalty(self, tensors: dict[str, Tensor]) -> Tensor:
        """The sum of the norms."""
        return torch.stack([_root(square).sum() for square in self._squares(tensors)]).sum()

    def _squares(self, tensors: dict[str, Tensor]) -> Iterator[Tensor]:
        """For each group the squared norms of its channels, [channels]."""
        for group in self.groups:
            rows = [_square(member, tensors) for member in members(group, "both")]
            yield torch.stack([row.to(rows[0].device) for row in rows]).sum(0)


class SparseLearning(GroupLasso):
    """Squared norms of coupled channels, weak channels up to ``2 ** alpha`` times as much.

    Within each group, a channel of squared norm I is weighted by
    ``2 ** (alpha * (max I - I) / (max I - min I))``, so that weak channels shrink and strong ones
    stay: the sparse learning of Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.

    Args:
        graph: from ``graphprune.trace``.
        strength: of the penalty.
        alpha: how much harder the weakest channel is pressed; 4 in the paper.

    Raises:
        InputError: no channel can be removed, or the strength is out of range.

    Example:
        >>> import torch, graphprune
        >>> from graphprune.training import SparseLearning
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> sparse = SparseLearning(graphprune.trace(net), strength=1e-3)
        >>> net(torch.ones(1, 4)).sum().backward()
        >>> sparse.add_gradients()
    """

    def __init__(self, graph: ChannelGraph, strength: Strength, alpha: float = 4.0) -> None:
        super().__init__(graph, strength)
        if not is_number(alpha, 0) or alpha == math.inf:
            raise InputError(f"alpha must be a number of at least 0, such as 4; got {alpha!r}")
        self.alpha = alpha

    def penalty(self, tensors: dict[str, Tensor]) -> Tensor:
        """Half the weighted sum of the squared norms."""
        return torch.stack(
            [(self._weights(square) * square).sum() / 2 for square in self._squares(tensors)]
        ).sum()

    def _weights(self, square: Tensor) -> Tensor:
        fixed = square.detach()
        spread = fixed.max() - fixed.min()
        return torch.exp2(self.alpha * (fixed.max() - fixed) / torch.where(spread > 0, spread, 1))


@dataclass(frozen=True)
class Growth:
    """A strength that grows by ``delta`` every ``every`` steps, up to ``ceiling``."""

    delta: float = 1e-4
    every: int = 10
    ceiling: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.delta <= self.ceiling < math.inf or self.every < 1:
            raise InputError(
                "a strength grows by delta > 0 every >= 1 steps up to a ceiling >= delta; got "
                f"delta {self.delta}, every {self.every}, ceiling {self.ceiling}"
            )

    def __call__(self, step: int) -> float:
        """The strength at a step."""
        return min(self.ceiling, self.delta * (1 + step // self.every))


class Growing(Regulariser):
    """L2 on the channels that a plan removes, growing until nothing of them is left.

    Wang et al., "Neural Pruning via Growing Regularization", ICLR 2021 (GReg-1). Call :meth:`step`
    after each step of the optimizer; then remove them with ``rebuild(model, plan)``.

    Args:
        model: the model that the plan is for.
        plan: which channels are to leave.
        strength: by default ``Growth()``.

    Raises:
        PlanError: the plan does not fit the model.
        InputError: the plan removes nothing, or the strength is out of range.

    Example:
        >>> import torch, graphprune
        >>> from graphprune.training import Growing, Growth
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> plan = graphprune.trace(net).plan(0.5, criterion="l1")
        >>> growing = Growing(net, plan, Growth(delta=1e-3, every=5))
        >>> net(torch.ones(1, 4)).sum().backward()
        >>> growing.add_gradients()
        >>> growing.step()
    """

    def __init__(self, model: nn.Module, plan: Plan, strength: Strength | None = None) -> None:
        super().__init__(model, Growth() if strength is None else strength)
        plan.check(model)
        if not plan.removed:
            raise InputError("the plan removes no channel: nothing can be driven to zero")
        tensors = dict(named_tensors(model))
        self.leaving: dict[str, Tensor] = {}
        for slot in plan.slots:
            tensor = tensors[slot.tensor]
            if isinstance(tensor, nn.Parameter):
                found = self.leaving.setdefault(
                    slot.tensor, torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
                )
                found |= ~slot.stays(tensor.shape).to(tensor.device)

    def penalty(self, tensors: dict[str, Tensor]) -> Tensor:
        """Half the sum of the squares."""
        parts = [
            tensors[name].abs().square().masked_fill(~leaving, 0).sum()
            for name, leaving in self.leaving.items()
        ]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum() / 2


def _scales(group: Group) -> list[Member]:
    """The scales of batch norms, which are known by their running variance."""
    normed = {m.slot.module for m in group.members if m.slot.tensor.endswith("running_var")}
    return [
        m
        for m in group.members
        if m.slot.module in normed and m.slot.parameter and m.slot.tensor.endswith("weight")
    ]


def _square(member: Member, tensors: dict[str, Tensor]) -> Tensor:
    """The squared norm of the weights of every channel along one slot, [channels]."""
    tensor = tensors[member.slot.tensor]
    rest = [dim for dim in range(tensor.dim()) if dim != member.slot.dim]
    squares = tensor.abs().square()
    return by_channel(member, squares.sum(rest) if rest else squares).sum(1)


def _root(square: Tensor) -> Tensor:
    """The square root, with gradient zero at zero."""
    return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)
