"""Criteria of weights and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from graphprune.channels.analysis import Group
from graphprune.criteria.evidence import Collector, Evidence, Key, Slots, joined, register_statistic
from graphprune.criteria.registry import Unseen, register_criterion
from graphprune.criteria.slots import by_channel, check_side, members, real
from graphprune.errors import InputError
from graphprune.ranks import Ranks

BLOCK = 1 << 18  # weights that are reduced at a time


@dataclass
class GradientSums:
    """Means over the batches, for one dimension of a tensor, of shape [size of the dimension].

    With w a weight, g the gradient of the loss of a batch with respect to it, and sums over the
    weights of a slice:

    Attributes:
        signed: of sum(w g): how the loss changes, to first order, when the slice is scaled.
        squared: of sum(w g)^2, over all slices of a channel together, shared out among them.
        absolute: of sum(abs(w g)).
        elementwise: of sum((w g)^2).
    """

    signed: Tensor
    squared: Tensor
    absolute: Tensor
    elementwise: Tensor

    def add(self, other: GradientSums) -> None:
        """Add those of another batch."""
        for field in fields(self):
            getattr(self, field.name).add_(getattr(other, field.name))


@register_statistic("gradients")
class Gradients(Collector):
    """Sums of weight times gradient by slice: ``{(tensor, dim): GradientSums}``."""

    backward = True

    def __init__(self, model: nn.Module, slots: Slots) -> None:
        super().__init__(model, slots)
        self.dims: dict[str, list[int]] = {}
        for tensor, dim in sorted(slots):
            self.dims.setdefault(tensor, []).append(dim)
        self.sums: dict[Key, GradientSums] = {}

    def gradient(self, name: str, parameter: Tensor) -> None:
        """Reduce a gradient to sums by slice."""
        gradient = parameter.grad
        if gradient is None or name not in self.dims:
            return
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        for dim, (signed, absolute, elementwise) in self._reduced(name, parameter, gradient):
            squared = joined(signed, self.slots[name, dim], torch.square)
            found = GradientSums(signed, squared, absolute, elementwise)
            if (name, dim) in self.sums:
                self.sums[name, dim].add(found)
            else:
                self.sums[name, dim] = found

    def _reduced(
        self, name: str, parameter: Tensor, gradient: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Sums of the products, their absolute values and squares: dimensions and [3, size].

        Rows are taken in blocks: temporary tensors stay small beside the gradient.
        """
        shape = parameter.shape
        sums = {d: torch.zeros(3, shape[d], dtype=torch.float64) for d in self.dims[name]}
        step = max(1, BLOCK * shape[0] // parameter.numel())
        for start in range(0, shape[0], step):
            rows = slice(start, start + step)
            product = real(parameter[rows]) * real(gradient[rows])
            for dim, known in sums.items():
                others = [other for other in range(product.dim()) if other != dim]
                parts = [
                    part.sum(others) if others else part
                    for part in (product, product.abs(), product.square())
                ]
                found = torch.stack(parts).to("cpu", torch.float64)
                known[:, rows if dim == 0 else slice(None)] += found
        yield from sums.items()

    def reduce(self, ranks: Ranks) -> bool:
        """Sums over the ranks."""
        names = [field.name for field in fields(GradientSums)]
        found = ranks.sums({(k, n): getattr(s, n) for k, s in self.sums.items() for n in names})
        self.sums = {k: GradientSums(*(found[k, n] for n in names)) for k, _ in found}
        return True

    def finish(self, batches: int) -> dict[Key, GradientSums]:
        """Means over the batches."""
        for sums in self.sums.values():
            for field in fields(sums):
                getattr(sums, field.name).div_(batches)
        return self.sums


def _rows(group: Group, tensors: Mapping[str, Tensor], side: str, name: str) -> Tensor:
    """A statistic of the slots of a side that the loss depends on, [slots, channels]."""
    assert isinstance(tensors, Evidence)
    known: Mapping[Key, GradientSums] = tensors.statistics["gradients"]
    rows = [
        by_channel(m, getattr(known[m.slot.tensor, m.slot.dim], name)).sum(1)
        for m in members(group, side)
        if (m.slot.tensor, m.slot.dim) in known
    ]
    if not rows:
        raise Unseen("no gradient of the loss reaches its weights")
    return torch.stack(rows)


@dataclass(frozen=True)
class Taylor:
    """How the loss changes, to first order, without the weights of a channel: ``taylor``.

    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019: weight times
    gradient, summed over the weights of a channel, squared, and averaged over the batches. The
    gradients are those of the loss of a batch: many small batches tell more than one large one.

    Attributes:
        form: ``"squared"`` as above; ``"signed"``: the absolute value of the average; at a minimum
            of the loss it is close to 0 for all channels; ``"absolute"``: absolute values of single
            weights, summed.
        side: ``"writes"``, ``"reads"`` or ``"both"`` sides of the channels.
    """

    form: str = "squared"
    side: str = "both"
    needs: ClassVar[frozenset[str]] = frozenset({"weights", "gradients"})
    comparable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_side(self.side)
        if self.form not in ("squared", "signed", "absolute"):
            raise InputError(f"form must be squared, signed or absolute, not {self.form!r}")

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [slots, channels]."""
        return _rows(group, tensors, self.side, self.form).abs()


taylor = register_criterion("taylor")(Taylor())


@dataclass(frozen=True)
class Fisher:
    """How the loss changes, to second order, without the weights of a channel: ``fisher``.

    LeCun et al., "Optimal Brain Damage", NIPS 1989: half the diagonal of the Hessian times the
    squared weights, with the empirical Fisher information (Theis et al., "Faster gaze prediction
    with dense networks and Fisher pruning", 2018) for the diagonal: the mean of the squared
    gradients of batches. Batches of one sample give the diagonal of the samples.

    Attributes:
        side: ``"writes"``, ``"reads"`` or ``"both"`` sides of the channels.
    """

    side: str = "both"
    needs: ClassVar[frozenset[str]] = frozenset({"weights", "gradients"})
    comparable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_side(self.side)

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [slots, channels]."""
        return _rows(group, tensors, self.side, "elementwise") / 2


fisher = register_criterion("fisher")(Fisher())
